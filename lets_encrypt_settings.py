"""The settings of certificates that a public authority signs, over ACME (RFC 8555)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, model_validator

from hostfiles.model import Acme, Challenge
from job_settings import certificates
from setting_types import Duration, Model, matching, split_url

# https://letsencrypt.org/docs/acme-protocol-updates/
LETS_ENCRYPT = "https://acme-v02.api.letsencrypt.org/directory"
TERMS = "https://letsencrypt.org/repository/"
ROOTS = Path(__file__).with_name("lets_encrypt_roots.pem")


def _directory(value: str) -> str:
    shape = r"https://[a-z0-9.-]+(:[0-9]+)?(/[A-Za-z0-9._~-]+)*/?"
    if not re.fullmatch(shape, value) or not split_url(value, "https"):
        raise ValueError(f"is not the directory of an ACME server; write it like {LETS_ENCRYPT}")
    return value


def _agreed(value: object) -> object:
    if value is not True:
        raise ValueError(
            f"does not agree to the authority's terms of service; read them ({TERMS} for Let's "
            "Encrypt) and set it to true, or use certificates: ownCa"
        )
    return value


def _roots(value: str) -> str:
    if value == "system":
        raise ValueError("is no certificate; give the root certificates of the server as PEM")
    return certificates(value)


class LetsEncryptSettings(Model):
    """An account with an ACME server, Let's Encrypt's unless `server` says otherwise.

    `challenge` is how hosts that say nothing else prove their names. `ca_root` is what the
    server's certificates, and its own at `server`, chain to. `timeout` is how long `up` waits for
    a host's certificate.
    """

    email: Annotated[
        str,
        matching(
            r"[A-Za-z0-9._+-]+@[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)+",
            "is no mail address; write it like operator@example.com",
        ),
    ]
    agree_to_terms: Annotated[Literal[True], BeforeValidator(_agreed)]
    server: Annotated[str, AfterValidator(_directory)] = LETS_ENCRYPT
    ca_root: Annotated[str, AfterValidator(_roots)] | None = None
    challenge: Challenge = "http-01"
    timeout: Duration = "10m"

    @model_validator(mode="after")
    def _roots_are_known(self) -> LetsEncryptSettings:
        if self.server != LETS_ENCRYPT and self.ca_root is None:
            raise ValueError(
                f"names the server {self.server}, and not what its certificates chain to; add "
                "caRoot with its root certificates as PEM"
            )
        return self

    @property
    def roots(self) -> str:
        """The PEM of the roots that its certificates chain to."""
        return self.ca_root or ROOTS.read_text()

    def acme(self, challenge: Challenge | None) -> Acme:
        """What a host needs to know, with the challenge of its own if it has one."""
        return Acme(
            email=self.email,
            server=self.server,
            port=urlsplit(self.server).port or 443,
            challenge=challenge or self.challenge,
            roots=self.roots,
            private=self.ca_root is not None,
        )
