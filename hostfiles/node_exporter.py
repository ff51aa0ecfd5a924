"""The node_exporter of a server's own host: on loopback, for this host's Prometheus alone.

https://github.com/prometheus/node_exporter
"""

from __future__ import annotations

from hostfiles import prometheus
from hostfiles.files import Check, File, Unit
from hostfiles.model import Server, ServerSecrets
from hostfiles.releases import directory
from hostfiles.templates import render
from hostfiles.web_config import web_config

FOLDER = "/etc/node_exporter"
GROUP = "node_exporter"
SERVICE = "/etc/systemd/system/node_exporter.service"


def files(server: Server) -> tuple[File, ...]:
    """What is not secret."""
    return (
        File(path=f"{FOLDER}/tls/ca.pem", content=server.ca_bundle),
        File(
            path=SERVICE,
            content=render(
                "systemd/node_exporter.service.j2", release_dir=directory(server.node_exporter)
            ),
        ),
    )


def secret_files(server: Server, secrets: ServerSecrets) -> tuple[File, ...]:
    """Its key and certificate, and the hash of the local user's password."""
    leaf = secrets.node_exporter_leaf
    config = web_config(
        certificate="tls/node_exporter.crt",
        key="tls/node_exporter.key",
        ca="tls/ca.pem",
        users=[secrets.local],
        allowed_client_sans=[server.fqdn],
    )
    return (
        File(path=f"{FOLDER}/tls/node_exporter.crt", content=leaf.certificate),
        File(
            path=f"{FOLDER}/tls/node_exporter.key",
            content=leaf.key,
            group=GROUP,
            mode=0o640,
            secret=True,
        ),
        File(path=f"{FOLDER}/config.yml", content=config, group=GROUP, mode=0o640, secret=True),
    )


def checks(server: Server) -> tuple[Check, ...]:
    """promtool knows the format: it is Prometheus's own."""
    return (
        Check(
            name="node_exporter's config.yml",
            argv=(
                f"{directory(server.prometheus)}/promtool",
                "check",
                "web-config",
                f"{{tree}}{FOLDER}/config.yml",
            ),
        ),
    )


UNIT = Unit(
    name="node_exporter.service",
    restart_on=(SERVICE,),
    reload_on=(f"{FOLDER}/",),
    ready=("/usr/bin/curl", "--config", f"{prometheus.FOLDER}/secrets/node_exporter.curl"),
)
