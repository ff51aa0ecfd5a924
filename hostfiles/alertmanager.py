"""Alertmanager, on a server for its own Prometheus alone; on the master nginx serves its pages.

https://prometheus.io/docs/alerting/latest/alertmanager/
"""

from __future__ import annotations

from collections.abc import Iterator

import yaml

from hostfiles.curl import curl_config
from hostfiles.files import Check, File, Unit, secret_file
from hostfiles.model import (
    Alerting,
    Credential,
    MasterSecrets,
    MasterServer,
    Server,
    ServerSecrets,
)
from hostfiles.releases import directory
from hostfiles.templates import render
from hostfiles.web_config import web_config

FOLDER = "/etc/alertmanager"
SECRETS_FOLDER = f"{FOLDER}/secrets"
CONFIG = f"{FOLDER}/alertmanager.yml"
CERTIFICATE = f"{FOLDER}/tls/alertmanager.crt"
GROUP = "alertmanager"
PORT = 9093
# Of its pages, as nginx on the master serves them.
PATH = "/alertmanager"
SERVICE = "/etc/systemd/system/alertmanager.service"
# Of no use before the first bundle.
PATHS = (SERVICE, f"{FOLDER}/")
# It holds what fires and what is silenced. The share of memory is Go's, as for Prometheus.
MEMORY_MIB = 96
GO_MEMORY_SHARE = 0.8


def files(server: Server) -> tuple[File, ...]:
    """What is not secret: its configuration, the CA and the unit."""
    alerting = server.alerting
    if alerting is None:
        return ()
    # Only the master's can be looked at; a slave's notifications say where they come from.
    port = "" if isinstance(server, MasterServer) else f":{PORT}"
    return (
        File(path=CONFIG, content=_configuration(alerting)),
        File(path=f"{FOLDER}/tls/ca.pem", content=server.ca_bundle),
        File(
            path=SERVICE,
            content=render(
                "systemd/alertmanager.service.j2",
                release_dir=directory(alerting.release),
                listen=f"127.0.0.1:{PORT}",
                external_url=f"https://{server.fqdn}{port}{PATH}/",
                memory_max_mib=MEMORY_MIB,
                go_memory_limit_mib=int(MEMORY_MIB * GO_MEMORY_SHARE),
            ),
        ),
    )


def secret_files(server: Server, secrets: ServerSecrets) -> tuple[File, ...]:
    """Its key and certificate, who may come in, and what it needs to send notifications."""
    if server.alerting is None:
        return ()
    if secrets.alertmanager_leaf is None:
        raise ValueError(f"{server.fqdn} has an Alertmanager and no certificate for it")
    leaf = secrets.alertmanager_leaf
    # Whoever federates a slave has nothing to do with its Alertmanager.
    nginx = (secrets.nginx,) if isinstance(secrets, MasterSecrets) else ()
    return (
        File(path=CERTIFICATE, content=leaf.certificate),
        secret_file(f"{FOLDER}/tls/alertmanager.key", leaf.key, GROUP),
        secret_file(
            f"{FOLDER}/web.yml",
            web_config(
                certificate="tls/alertmanager.crt",
                key="tls/alertmanager.key",
                ca="tls/ca.pem",
                users=[*nginx, secrets.local],
            ),
            GROUP,
        ),
        *_curl(server, secrets.local),
        *(secret_file(path, content, GROUP) for path, content in sorted(secrets.alerting.items())),
    )


def certificate_ends(secrets: ServerSecrets) -> dict[str, int]:
    """When its certificate ends, in Unix seconds, by path."""
    leaf = secrets.alertmanager_leaf
    return {CERTIFICATE: leaf.not_after} if leaf else {}


def checks(server: Server) -> tuple[Check, ...]:
    """amtool reads the configuration, promtool the web config: its format is Prometheus's own."""
    if server.alerting is None:
        return ()
    release = directory(server.alerting.release)
    promtool = f"{directory(server.prometheus)}/promtool"
    return (
        Check(name="Alertmanager", argv=(f"{release}/alertmanager", "--version")),
        Check(
            name="alertmanager.yml",
            argv=(f"{release}/amtool", "check-config", f"{{tree}}{CONFIG}"),
        ),
        Check(
            name="Alertmanager's web.yml",
            argv=(promtool, "check", "web-config", f"{{tree}}{FOLDER}/web.yml"),
        ),
    )


UNIT = Unit(
    name="alertmanager.service",
    restart_on=(SERVICE,),
    reload_on=(f"{FOLDER}/",),
    ready=("/usr/bin/curl", "--config", f"{SECRETS_FOLDER}/ready.curl"),
)


def _configuration(alerting: Alerting) -> str:
    return yaml.safe_dump(dict(alerting.config), sort_keys=False, width=1000, allow_unicode=True)


def _curl(server: Server, local: Credential) -> Iterator[File]:
    for name, method, path in (("ready", "GET", "/-/ready"), ("reload", "POST", "/-/reload")):
        content = curl_config(
            fqdn=server.fqdn,
            port=PORT,
            path=f"{PATH}{path}",
            user=local,
            ca=f"{FOLDER}/tls/ca.pem",
            method=method,
        )
        yield secret_file(f"{SECRETS_FOLDER}/{name}.curl", content, GROUP)
