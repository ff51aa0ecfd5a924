"""The files of a master: a Prometheus that federates its sites, and its door."""

from __future__ import annotations

from dataclasses import replace

from hostfiles import grafana, oauth2_proxy
from hostfiles import server as common
from hostfiles.files import File, HostFiles
from hostfiles.model import MasterSecrets, MasterServer


def host_files(server: MasterServer) -> HostFiles:
    """All that is not secret."""
    host = common.host_files(server)
    return replace(
        host,
        files=(*host.files, *oauth2_proxy.files(server), *grafana.files(server)),
        checks=(*host.checks, *oauth2_proxy.checks(server), *grafana.checks(server)),
        units=(*host.units, *oauth2_proxy.units(server), *grafana.units(server)),
        releases=(*host.releases, *oauth2_proxy.releases(server), *grafana.releases(server)),
    )


def secret_files(server: MasterServer, secrets: MasterSecrets) -> tuple[File, ...]:
    """All that is, with the certificates."""
    return (
        *common.secret_files(server, secrets),
        *oauth2_proxy.secret_files(server, secrets),
        *grafana.secret_files(server, secrets),
    )
