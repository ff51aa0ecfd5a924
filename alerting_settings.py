"""The settings of notifications: Alertmanager's own configuration, and the networks it may reach.

It is written in Alertmanager's own language, secrets in their places (encrypted by Pulumi). On a
host each secret becomes a file of its own, named by Alertmanager's `…_file` key.
https://prometheus.io/docs/alerting/latest/configuration/
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import ConfigDict, Field, SecretStr, model_validator

from hostfiles.alertmanager import SECRETS_FOLDER
from hostfiles.model import Alerting, Release
from setting_types import Cidr, HostName, Model, split_url

HTTPS_PORT = 443

# By section, the secrets that Alertmanager also takes from a file: each has a key `<key>_file`.
_SECRETS = {
    "global": "smtp_auth_password smtp_auth_secret slack_api_url slack_app_token opsgenie_api_key "
    "wechat_api_secret victorops_api_key telegram_bot_token rocketchat_token rocketchat_token_id "
    "mattermost_webhook_url",
    "discord_configs": "webhook_url",
    "email_configs": "auth_password auth_secret",
    "incidentio_configs": "url alert_source_token",
    "mattermost_configs": "webhook_url",
    "msteams_configs": "webhook_url",
    "msteamsv2_configs": "webhook_url",
    "opsgenie_configs": "api_key",
    "pagerduty_configs": "routing_key service_key",
    "pushover_configs": "token user_key",
    "rocketchat_configs": "token token_id",
    "slack_configs": "api_url app_token",
    "telegram_configs": "bot_token",
    "victorops_configs": "api_key",
    "webhook_configs": "url",
    "wechat_configs": "api_secret",
    # Parts of every http_config, and tls_config of e-mail.
    "authorization": "credentials",
    "basic_auth": "password",
    "oauth2": "client_secret",
    "tls_config": "key",
}
# What looks like a secret and is none of those would stand readable in alertmanager.yml.
_LOOKS_SECRET = re.compile(
    r"(.*_)?(password|passphrase|secret|secrets|token|credentials|bearer_token)|.*(api|user|"
    r"routing|service|secret|private)_key"
)
# Keys whose value is where a notification goes.
_PLACE = re.compile(r"(.*_)?(api_url|webhook_url|proxy_url|token_url)|pagerduty_url")
_PLACES_NAMED_URL = ("incidentio_configs", "pagerduty_configs", "webhook_configs")

Path = tuple[str | int, ...]


class AlertingSettings(Model):
    """Alertmanager's configuration. `cidrs` is ours: the networks of receivers, by host name.

    A receiver that is named by address needs none; one on port 443 is reached through packageCidrs
    if it has none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=None)

    global_: Mapping[str, Any] = Field(default_factory=dict, alias="global")
    route: Mapping[str, Any]
    receivers: Annotated[tuple[Mapping[str, Any], ...], Field(min_length=1)]
    inhibit_rules: tuple[Mapping[str, Any], ...] = ()
    time_intervals: tuple[Mapping[str, Any], ...] = ()
    cidrs: Mapping[HostName, Annotated[tuple[Cidr, ...], Field(min_length=1)]] = Field(
        default_factory=dict
    )

    @model_validator(mode="before")
    @classmethod
    def _hidden(cls, given: Any) -> Any:
        """Secrets are hidden before anything else looks at them."""
        return _hide(given, ()) if isinstance(given, Mapping) else given

    @model_validator(mode="after")
    def _reachable(self) -> AlertingSettings:
        known = {host for host, _ in self._places()}
        for host in self.cidrs:
            if host not in known:
                raise ValueError(
                    f"names networks of {host}, where no notification goes; take it out of cidrs"
                )
        for host, port in self._places():
            if not _address(host) and host not in self.cidrs and port != HTTPS_PORT:
                raise ValueError(
                    f"sends notifications to {host} on port {port}, and says nothing of its "
                    f"networks; add cidrs: {{{host}: [<network>]}}"
                )
        return self

    def alerting(self, release: Release) -> Alerting:
        """The configuration as the renderers take it: without its secrets."""
        config = self._config
        return Alerting(config=_without_secrets(config, ()), release=release)

    def secrets(self) -> dict[str, str]:
        """The secrets, by the paths of their files."""
        return dict(_secrets(self._config, ()))

    def destinations(self) -> tuple[tuple[int, str], ...]:
        """Ports and networks (CIDR) that notifications go to, beside 443 of packageCidrs."""
        found = set[tuple[int, str]]()
        for host, port in self._places():
            cidrs = (f"{host}/32",) if _address(host) else self.cidrs.get(host, ())
            found.update((port, cidr) for cidr in cidrs)
        return tuple(sorted(found))

    @property
    def _config(self) -> dict[str, Any]:
        return self.model_dump(by_alias=True, exclude_defaults=True, exclude={"cidrs"})

    def _places(self) -> list[tuple[str, int]]:
        return sorted(set(_places(self._config, ())))


def _section(path: Path) -> str:
    """The part of the configuration that a key is in: its table of secrets goes by it."""
    return next((str(part) for part in reversed(path[:-1]) if part in _SECRETS), "")


def _is_secret(path: Path) -> bool:
    parent = path[-2] if len(path) > 1 else ""
    # What is nested (an action's url, say) is not the section's own.
    own = parent in _SECRETS or (isinstance(parent, int) and path[-3] in _SECRETS)
    return own and path[-1] in _SECRETS[_section(path)].split()


def _named(path: Path) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)[1:]


def _hide(value: Any, path: Path) -> Any:
    """The same with its secrets hidden; ValueError for what would be unsafe or not be there."""
    if isinstance(value, list | tuple):
        return [_hide(item, (*path, number)) for number, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {key: _hide(item, (*path, str(key))) for key, item in value.items()}
    key = str(path[-1])
    if path[0] == "cidrs" or value is None:
        return value
    if _is_secret(path):
        return value if isinstance(value, SecretStr) else SecretStr(str(value))
    if key.endswith("_file") or "templates" in path or "files" in path:
        raise ValueError(
            f"names a file in {_named(path)}, which the hosts do not have; give the value itself, "
            "under the key without _file, and it becomes a file there"
        )
    if key == "insecure_skip_verify" and value:
        raise ValueError(
            f"would trust anyone, by {_named(path)}; give the receiver's authority as "
            "tls_config: {ca: <certificate>}"
        )
    if key in ("require_tls", "smtp_require_tls") and value is False:
        raise ValueError(
            f"would send mail in clear, by {_named(path)}; leave it out (STARTTLS), or use the "
            "server's port 465, whose TLS begins at once"
        )
    if _LOOKS_SECRET.fullmatch(key) or "secrets" in path:
        raise ValueError(
            f"holds a secret in {_named(path)}, which Alertmanager reads from no file; leave that "
            "key out, or use a receiver of another kind"
        )
    return value


def _secrets(value: Any, path: Path) -> Iterator[tuple[str, str]]:
    if isinstance(value, SecretStr):
        yield _file(path), value.get_secret_value()
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _secrets(item, (*path, str(key)))
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _secrets(item, (*path, number))


def _without_secrets(value: Any, path: Path) -> Any:
    if isinstance(value, Mapping):
        found: dict[str, Any] = {}
        for key, item in value.items():
            inner = (*path, str(key))
            if isinstance(item, SecretStr):
                found[f"{key}_file"] = _file(inner)
            else:
                found[key] = _without_secrets(item, inner)
        return found
    if isinstance(value, list | tuple):
        return [_without_secrets(item, (*path, number)) for number, item in enumerate(value)]
    return value


def _file(path: Path) -> str:
    return f"{SECRETS_FOLDER}/{'-'.join(map(str, path))}"


def _places(value: Any, path: Path) -> Iterator[tuple[str, int]]:
    """Host and port of every notification; ValueError for one that would be readable."""
    if isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _places(item, (*path, number))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _places(item, (*path, str(key)))
    elif path and str(path[-1]) in ("smarthost", "smtp_smarthost"):
        host, _, port = str(value).rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"has no port in {_named(path)}; write it like mail.example.com:587")
        yield host, int(port)
    elif path and _is_place(path):
        text = value.get_secret_value() if isinstance(value, SecretStr) else str(value)
        parts = split_url(text.strip(), "https")
        if not parts or "{" in parts.netloc:
            raise ValueError(
                f"has no https address with a plain host in {_named(path)} (not shown); anyone on "
                "the way could read what is sent over http"
            )
        yield str(parts.hostname), parts.port or HTTPS_PORT


def _is_place(path: Path) -> bool:
    key = str(path[-1])
    section = path[-3] if len(path) > 2 else ""
    return bool(_PLACE.fullmatch(key)) or (key == "url" and section in _PLACES_NAMED_URL)


def _address(host: str) -> bool:
    try:
        ipaddress.IPv4Address(host)
    except ValueError:
        return False
    return True
