"""Settings of the master's door: who comes in there, and by what."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, SecretStr, field_validator, model_validator

from hostfiles.model import OAuth2
from job_settings import certificates
from setting_types import Cidr, DomainName, Model, matching, split_url

HTTPS_PORT = 443


def _issuer(value: str) -> str:
    parts = split_url(value, "https")
    if not parts or parts.query or parts.fragment:
        raise ValueError("is not an https address; write it like https://accounts.example.com")
    return value


# It stands before the `_` of the token itself.
TokenName = Annotated[
    str,
    matching(
        r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?",
        "is no name of a token; use up to 63 lower-case letters, digits and hyphens",
    ),
]


class OAuth2Settings(Model):
    """How people log in: at a provider of OpenID Connect, by OAuth2 Proxy.

    Of all who have an account there, only those of a group or of an e-mail domain come in; where
    both are given, both are asked for. `ca` (PEM) verifies a provider without a public
    certificate, `cidrs` say where it is when that is not among `packageCidrs`.
    https://oauth2-proxy.github.io/oauth2-proxy/configuration/providers/openid_connect
    """

    issuer: Annotated[str, AfterValidator(_issuer)]
    client_id: Annotated[str, Field(min_length=1)]
    client_secret: SecretStr
    allowed_groups: tuple[str, ...] = ()
    email_domains: tuple[DomainName, ...] = ()
    # Some providers know no scope `groups`.
    scope: str | None = None
    ca: Annotated[str, AfterValidator(certificates)] = "system"
    cidrs: tuple[Cidr, ...] = ()

    @field_validator("client_secret")
    @classmethod
    def _a_secret(cls, value: SecretStr) -> SecretStr:
        if not value.get_secret_value().strip():
            raise ValueError("is empty; take it from your provider's page of this client")
        return SecretStr(value.get_secret_value().strip())

    @model_validator(mode="after")
    def _not_everybody(self) -> OAuth2Settings:
        if not self.allowed_groups and not self.email_domains:
            raise ValueError(
                "would let in everybody who has an account at the provider; name allowedGroups, "
                "emailDomains or both"
            )
        if self.port != HTTPS_PORT and not self.cidrs:
            raise ValueError(
                f"has an issuer on port {self.port}, which no firewall rule lets out; name the "
                "networks that it is in as cidrs"
            )
        return self

    @property
    def port(self) -> int:
        """Where the provider listens."""
        return urlsplit(self.issuer).port or HTTPS_PORT

    def public(self) -> OAuth2:
        """All of it that is not secret."""
        return OAuth2(
            issuer=self.issuer,
            client_id=self.client_id,
            allowed_groups=self.allowed_groups,
            email_domains=self.email_domains,
            scope=self.scope or "",
            ca=self.ca,
        )
