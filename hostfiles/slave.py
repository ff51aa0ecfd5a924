"""The files of a slave: a Prometheus that one master may federate, and nobody else."""

from __future__ import annotations

from hostfiles import server as common
from hostfiles.files import File, HostFiles
from hostfiles.model import ServerSecrets, SlaveServer


def host_files(server: SlaveServer) -> HostFiles:
    """All that is not secret."""
    return common.host_files(server)


def secret_files(server: SlaveServer, secrets: ServerSecrets) -> tuple[File, ...]:
    """All that is, with the certificates."""
    return common.secret_files(server, secrets)
