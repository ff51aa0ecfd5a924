"""The files of a master: a Prometheus that federates its sites, and people's door to it."""

from __future__ import annotations

from hostfiles import server as common
from hostfiles.files import File, HostFiles
from hostfiles.model import MasterSecrets, MasterServer


def host_files(server: MasterServer) -> HostFiles:
    """All that is not secret."""
    return common.host_files(server)


def secret_files(server: MasterServer, secrets: MasterSecrets) -> tuple[File, ...]:
    """All that is, with the certificates."""
    return common.secret_files(server, secrets)
