"""node_exporter: on a server for this host's Prometheus alone, on a monitored host for its scraper.

https://github.com/prometheus/node_exporter
"""

from __future__ import annotations

from collections.abc import Iterable

from hostfiles import backup, certificates, prometheus, watch
from hostfiles.files import Check, File, Unit, secret_file
from hostfiles.model import Credential, Leaf, Release, Server, ServerSecrets
from hostfiles.releases import directory
from hostfiles.templates import render
from hostfiles.web_config import web_config

FOLDER = "/etc/node_exporter"
GROUP = "node_exporter"
PORT = 9100
SERVICE = "/etc/systemd/system/node_exporter.service"
CONFIG = f"{FOLDER}/config.yml"
CA = f"{FOLDER}/tls/ca.pem"
CERTIFICATE = f"{FOLDER}/tls/node_exporter.crt"
# systemd makes it, and the user may put .prom files of their own into its folder `textfile`.
STATE_DIRECTORY = "/var/lib/node_exporter"
# Of a server, those whose failing somebody needs to know of.
_UNITS = (
    "(alertmanager|data-volume|federation-watch|grafana|nginx|node_exporter|oauth2-proxy|"
    "prometheus|prometheus-backup|public-certificate|ssh|ufw)[.]service|"
    "(apt-daily|apt-daily-upgrade|certbot|federation-watch|prometheus-backup)[.]timer"
)


def service(
    release: Release,
    address: str,
    ca_bundle: str,
    more_textfiles: Iterable[str] = (),
    units: str = "",
) -> tuple[File, ...]:
    """What is not secret: the unit, which listens on that address (empty: on all), and the CA.

    `units` is a pattern of the systemd units whose state it tells (empty: of none).
    """
    return (
        File(path=CA, content=ca_bundle),
        File(
            path=SERVICE,
            content=render(
                "systemd/node_exporter.service.j2",
                release_dir=directory(release),
                listen=f"{address}:{PORT}",
                textfiles=[
                    certificates.FOLDER,
                    f"{STATE_DIRECTORY}/textfile",
                    *more_textfiles,
                ],
                units=units,
            ),
        ),
    )


def access(leaf: Leaf, users: Iterable[Credential], scraper: str) -> tuple[File, ...]:
    """Its key and certificate, and who may come in: a user, with the scraper's certificate."""
    config = web_config(
        certificate="tls/node_exporter.crt",
        key="tls/node_exporter.key",
        ca="tls/ca.pem",
        users=users,
        allowed_client_sans=[scraper],
    )
    key = f"{FOLDER}/tls/node_exporter.key"
    return (
        File(path=CERTIFICATE, content=leaf.certificate),
        secret_file(key, leaf.key, GROUP),
        secret_file(CONFIG, config, GROUP),
    )


def files(server: Server) -> tuple[File, ...]:
    """Of a server, what is not secret."""
    return service(
        server.node_exporter,
        "127.0.0.1",
        server.ca_bundle,
        [backup.METRICS, watch.METRICS],
        units=_UNITS,
    )


def secret_files(server: Server, secrets: ServerSecrets) -> tuple[File, ...]:
    """Of a server, the rest."""
    return access(secrets.node_exporter_leaf, [secrets.local], server.fqdn)


def checks(server: Server) -> tuple[Check, ...]:
    """promtool knows the format: it is Prometheus's own."""
    return (
        Check(
            name="node_exporter",
            argv=(f"{directory(server.node_exporter)}/node_exporter", "--version"),
        ),
        Check(
            name="node_exporter's config.yml",
            argv=(
                f"{directory(server.prometheus)}/promtool",
                "check",
                "web-config",
                f"{{tree}}{CONFIG}",
            ),
        ),
    )


def unit(ready: tuple[str, ...]) -> Unit:
    """It reads its certificate, CA and users anew at each connection: a reload does nothing."""
    return Unit(
        name="node_exporter.service",
        restart_on=(SERVICE,),
        reload_on=(f"{FOLDER}/",),
        ready=ready,
    )


UNIT = unit(("/usr/bin/curl", "--config", f"{prometheus.FOLDER}/secrets/node_exporter.curl"))
