"""What a monitored host gets: node_exporter, its certificate and who may scrape it.

The host is not ours. cloud-init/monitored-host puts this in place, and takes it away again.
"""

from __future__ import annotations

import json

from hostfiles import bundle, certificates, node_exporter
from hostfiles.files import Check, File, HostFiles
from hostfiles.model import MonitoredHost, MonitoredHostSecrets
from hostfiles.releases import directory
from hostfiles.remote_program import install_command, remove_command
from hostfiles.templates import FOLDER, render

# monitored-host refuses another number.
FORMAT = 1
PROGRAM = "/opt/federation/bin/monitored-host"
# What is left of it by a removal that was killed at its end.
ASIDE = "/opt/.federation"
_PROGRAMS = ("monitored-host", "apply-bundle", "install-release")

INSTALL = install_command("monitored-host", '["programs"]["monitored-host"]')


def remove(owner: str) -> str:
    """The command that leaves the host as it was."""
    return remove_command(f"{PROGRAM} remove {owner}", PROGRAM, ASIDE)


def delivery(host: MonitoredHost, secrets: MonitoredHostSecrets) -> str:
    """All that monitored-host needs, as the JSON that it reads on stdin."""
    return json.dumps(
        {
            "format": FORMAT,
            "owner": host.owner,
            "programs": {name: (FOLDER / name).read_text() for name in _PROGRAMS},
            "user": node_exporter.GROUP,
            "unit": "node_exporter.service",
            "state_directory": node_exporter.STATE_DIRECTORY,
            "listen": {"address": host.address or "", "port": node_exporter.PORT},
            "allow_from": sorted(host.sources),
            "bundle": bundle.as_data(host_files(host), secret_files(host, secrets)),
        },
        sort_keys=True,
        indent=1,
    )


def host_files(host: MonitoredHost) -> HostFiles:
    """What is not secret."""
    binary = f"{directory(host.node_exporter)}/node_exporter"
    return HostFiles(
        files=(
            # https://www.freedesktop.org/software/systemd/man/latest/sysusers.d.html
            File(
                path="/etc/sysusers.d/federation.conf",
                content='# No home and no shell.\nu node_exporter - "Prometheus node_exporter"\n',
            ),
            File(
                path="/etc/systemd/system/multi-user.target.d/federation.conf",
                content=render(
                    "systemd/multi-user.target.conf.j2", units=["node_exporter.service"]
                ),
            ),
            *node_exporter.service(host.node_exporter, host.address or "", host.ca_bundle),
        ),
        checks=(
            # There is no promtool here, so node_exporter itself says whether it would serve.
            Check(
                name="node_exporter's config.yml",
                argv=(PROGRAM, "check-config", binary, f"{{tree}}{node_exporter.CONFIG}"),
            ),
        ),
        units=(
            node_exporter.unit(
                (
                    *(PROGRAM, "ready", host.address or "127.0.0.1", str(node_exporter.PORT)),
                    *(host.host, node_exporter.CA),
                )
            ),
        ),
        releases=(host.node_exporter,),
        packages=(),
    )


def secret_files(host: MonitoredHost, secrets: MonitoredHostSecrets) -> tuple[File, ...]:
    """Its key, its certificate and the hashes of the passwords that come in."""
    return (
        *node_exporter.access(secrets.leaf, secrets.users, host.scraper),
        certificates.metrics(
            {
                node_exporter.CA: host.ca_not_after,
                node_exporter.CERTIFICATE: secrets.leaf.not_after,
            }
        ),
    )
