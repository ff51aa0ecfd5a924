"""Grafana: how one of the user's asks the master, and one on the master itself.

https://grafana.com/docs/grafana/latest/administration/provisioning/#data-sources
"""

from __future__ import annotations

from pathlib import Path

import yaml

from hostfiles.duration import milliseconds
from hostfiles.files import Check, File, Unit, secret_file, unit_check
from hostfiles.model import MasterSecrets, MasterServer, Release
from hostfiles.releases import directory
from hostfiles.templates import render

FOLDER = "/etc/grafana/federation"
CA = f"{FOLDER}/ca.pem"
# The whole value of the header: `Bearer …` with a token, or `Basic …` with a password.
AUTHORIZATION = f"{FOLDER}/authorization"


def data_source(*, url: str, server_name: str, scrape_interval: str) -> str:
    """A provisioning file. Grafana reads the CA and the credential from files beside it.

    https://grafana.com/docs/grafana/latest/setup-grafana/configure-grafana/#file-provider
    """
    source = {
        "name": "Federation",
        "uid": "federation",
        "type": "prometheus",
        # Grafana's server asks, not the browser.
        "access": "proxy",
        "url": url,
        "isDefault": True,
        "editable": False,
        "jsonData": {
            "httpMethod": "POST",
            "prometheusType": "Prometheus",
            # Rules are made in files; Grafana need not try to write any.
            "manageAlerts": False,
            "timeInterval": f"{milliseconds(scrape_interval) // 1000}s",
            "tlsAuthWithCACert": True,
            "serverName": server_name,
            "httpHeaderName1": "Authorization",
        },
        "secureJsonData": {
            "tlsCACert": f"$__file{{{CA}}}",
            "httpHeaderValue1": f"$__file{{{AUTHORIZATION}}}",
        },
    }
    return yaml.safe_dump({"apiVersion": 1, "datasources": [source]}, sort_keys=False)


# ---- on the master, where the settings ask for one ---------------------------------------------

# The token by which it asks nginx.
TOKEN = "grafana"  # noqa: S105 - its name
GROUP = "grafana"
PORT = 3000
CONFIG = "/etc/grafana/grafana.ini"
SECRET_KEY = f"{FOLDER}/secret_key"
SERVICE = "/etc/systemd/system/grafana.service"
# All that belongs to it.
PATHS = (
    *("/etc/grafana/", SERVICE, "/etc/sysusers.d/grafana.conf"),
    "/etc/systemd/system/multi-user.target.d/grafana.conf",
)
DASHBOARDS = Path(__file__).parent.parent / "dashboards"


def files(server: MasterServer) -> tuple[File, ...]:
    """What is not secret; nothing where there is no Grafana."""
    if server.grafana is None:
        return ()
    # By loopback through nginx, like every other program: it may read and nothing else.
    source = data_source(
        url=f"https://127.0.0.1:{server.ui_port}",
        server_name=server.fqdn,
        scrape_interval=server.scrape_interval,
    )
    provisioning = "/etc/grafana/provisioning"
    return (
        File(path="/etc/sysusers.d/grafana.conf", content=f'u {GROUP} - "Grafana"\n'),
        File(
            path=CONFIG,
            content=render(
                "grafana/grafana.ini.j2", fqdn=server.fqdn, port=PORT, secret_key=SECRET_KEY
            ),
        ),
        File(path=CA, content=server.ca_bundle),
        File(path=f"{provisioning}/datasources/federation.yml", content=source),
        File(
            path=f"{provisioning}/dashboards/federation.yml",
            content=(DASHBOARDS / "provider.yml").read_text(),
        ),
        *(
            File(path=f"{FOLDER}/dashboards/{path.name}", content=path.read_text())
            for path in sorted(DASHBOARDS.glob("*.json"))
        ),
        File(
            path=SERVICE,
            content=render(
                "systemd/grafana.service.j2",
                release_dir=directory(server.grafana),
                config=CONFIG,
            ),
        ),
        File(
            path="/etc/systemd/system/multi-user.target.d/grafana.conf",
            content=render("systemd/multi-user.target.conf.j2", units=("grafana.service",)),
        ),
    )


def secret_files(server: MasterServer, secrets: MasterSecrets) -> tuple[File, ...]:
    """What it shows nginx, and the key of its own database."""
    if server.grafana is None:
        return ()
    return (
        secret_file(AUTHORIZATION, f"Bearer {secrets.tokens[TOKEN]}", GROUP),
        secret_file(SECRET_KEY, secrets.grafana_key, GROUP),
    )


def checks(server: MasterServer) -> tuple[Check, ...]:
    """That it starts at all; it has no check of its configuration."""
    if server.grafana is None:
        return ()
    return (
        Check(name="Grafana", argv=(f"{directory(server.grafana)}/bin/grafana", "--version")),
        unit_check("grafana.service", SERVICE),
    )


def units(server: MasterServer) -> tuple[Unit, ...]:
    """It reads what is provisioned when it starts."""
    if server.grafana is None:
        return ()
    return (
        Unit(
            name="grafana.service",
            restart_on=(SERVICE, "/etc/grafana/"),
            ready=(
                *("/usr/bin/curl", "--silent", "--show-error", "--fail", "--max-time", "5"),
                *("--output", "/dev/null", f"http://127.0.0.1:{PORT}/grafana/api/health"),
            ),
            # A first start makes its database.
            ready_seconds=180,
        ),
    )


def releases(server: MasterServer) -> tuple[Release, ...]:
    """The tarball that the settings name."""
    return (server.grafana,) if server.grafana else ()
