"""The files of a master: a Prometheus that federates its sites, and people's door to it."""

from __future__ import annotations

from dataclasses import replace

from hostfiles import grafana
from hostfiles import server as common
from hostfiles.files import File, HostFiles
from hostfiles.model import MasterSecrets, MasterServer


def host_files(server: MasterServer) -> HostFiles:
    """All that is not secret."""
    host = common.host_files(server)
    return replace(
        host,
        files=(*host.files, *grafana.files(server)),
        checks=(*host.checks, *grafana.checks(server)),
        units=(*host.units, *grafana.units(server)),
        releases=(*host.releases, *grafana.releases(server)),
    )


def secret_files(server: MasterServer, secrets: MasterSecrets) -> tuple[File, ...]:
    """All that is, with the certificates."""
    return (*common.secret_files(server, secrets), *grafana.secret_files(secrets))
