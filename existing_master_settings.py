"""The settings of a Prometheus that someone else runs and that federates this environment."""

from __future__ import annotations

import re
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, SecretStr, model_validator

from job_settings import SSH_PORT, certificates
from setting_types import (
    Cidr,
    DomainName,
    Duration,
    HostKey,
    HostName,
    Model,
    PrivateKey,
    UserName,
    matching,
    split_url,
)

_LOOPBACK = ("127.0.0.1", "localhost")


def _url(value: str) -> str:
    parts = split_url(value, "http", "https")
    if not parts or parts.query or parts.username:
        raise ValueError(
            "is not the address of a Prometheus; write it like http://127.0.0.1:9090 or, with the "
            "path of its --web.external-url, http://127.0.0.1:9090/prometheus"
        )
    return value.rstrip("/")


def _file(value: str) -> str:
    if not re.fullmatch(r"(/[A-Za-z0-9._+@-]+){2,}", value) or ".." in value.split("/"):
        raise ValueError("is not the path of a file; write it like /etc/prometheus/prometheus.yml")
    return value


class ExistingMasterAccess(Model):
    """How an existing master is reached over SSH, to put the federate jobs there.

    `host` is where its sshd answers, if not at the name that scrapes. The user must be root or
    have sudo without a password.
    """

    host: HostName | None = None
    user: UserName
    private_key: PrivateKey
    host_key: HostKey
    port: Annotated[int, Field(ge=1, le=65535)] = SSH_PORT
    timeout: Duration = "5m"


class ApiAuthSettings(Model):
    """The user and password that its web page and API ask for."""

    username: Annotated[
        str, matching(r"[^:\s]+", "holds a blank or a colon, or nothing; write it like admin")
    ]
    password: SecretStr


class ExistingMasterSettings(Model):
    """A Prometheus that someone else runs and that will federate the slaves of this environment.

    Without `access` it gets a client certificate and nothing else; the keys after `access` say
    where things are on its host. `url` is how it is asked there whether its targets came up.
    """

    host: DomainName
    cidrs: Annotated[tuple[Cidr, ...], Field(min_length=1)]
    access: ExistingMasterAccess | None = None
    config_file: Annotated[str, AfterValidator(_file)] = "/etc/prometheus/prometheus.yml"
    # Its user, by name or number: this one's group may read our keys.
    run_as: Annotated[
        str, matching(r"[a-z_][a-z0-9_-]*|\d+", "is no user; write it like prometheus or 65534")
    ] = "prometheus"
    promtool: Annotated[
        str,
        matching(r"[A-Za-z0-9._/+-]+", "is no program; write it like /opt/prometheus/promtool"),
    ] = "promtool"
    url: Annotated[str, AfterValidator(_url)] = "http://127.0.0.1:9090"
    ca: Annotated[str, AfterValidator(certificates)] | None = None
    basic_auth: ApiAuthSettings | None = None
    # `signal`: SIGHUP to the main process of `unit`. `http`: POST to /-/reload of `url`.
    reload: Literal["signal", "http"] = "signal"
    unit: Annotated[
        str, matching(r"[A-Za-z0-9@._:-]+", "is no systemd unit; write it like prometheus.service")
    ] = "prometheus.service"

    @model_validator(mode="after")
    def _password_is_not_readable(self) -> ExistingMasterSettings:
        parts = urlsplit(self.url)
        if self.basic_auth and parts.scheme == "http" and parts.hostname not in _LOOPBACK:
            raise ValueError(
                "would send basicAuth over plain http, readable by anyone on the way; use an "
                "https url, or one of 127.0.0.1"
            )
        return self
