"""node_exporter on hosts that exist already and belong to the user: reached over SSH.

Nothing else of such a host is touched, and on destroy it is left as it was.
"""

from __future__ import annotations

from collections.abc import Sequence

import pulumi
from pulumi import Output, ResourceOptions

from components.credentials import RotatingCredential
from components.delivery import connection, deliver
from components.environment import Environment
from components.host import Host
from components.pki import LeafArgs, LeafCertificate
from hostfiles import monitored_host
from hostfiles.model import MonitoredHost, MonitoredHostSecrets
from job_settings import HostAccess
from job_settings import MonitoredHost as HostSettings
from settings import NAMESPACE
from settings import HostSettings as ServerSettings


class NodeExporter(pulumi.ComponentResource):
    """The node_exporter of one monitored host, which `server` scrapes."""

    def __init__(
        self,
        name: str,
        host: HostSettings,
        access: HostAccess,
        server: Host,
        server_name: str,
        generation: int,
        environment: Environment,
        opts: ResourceOptions | None = None,
    ) -> None:
        super().__init__("prometheus-federation:index:NodeExporter", name, None, opts)
        child_opts = ResourceOptions(parent=self)
        owner = f"{NAMESPACE}/{environment.stack}/{server_name}"
        leaf = LeafCertificate(
            name,
            LeafArgs(
                common_name=host.host,
                generation=generation,
                ip_addresses=[host.address] if host.address else [],
            ),
            environment.authority,
            opts=child_opts,
        ).leaf
        # Through the server means within its network, where it has its private address.
        source = server.private_ip if access.jump else server.address.public_ip
        public = Output.all(
            ca_bundle=environment.authority.bundle,
            ca_not_after=environment.authority.not_after,
            source=source,
        ).apply(
            lambda known: MonitoredHost(
                host=host.host,
                address=host.address,
                owner=owner,
                scraper=server.address.fqdn,
                sources=(f"{known['source']}/32",),
                ca_bundle=known["ca_bundle"],
                ca_not_after=known["ca_not_after"],
                node_exporter=environment.settings.release("nodeExporter"),
            )
        )
        secrets = Output.all(leaf, *_users(server.exporters)).apply(
            lambda known: MonitoredHostSecrets(leaf=known[0], users=tuple(known[1:]))
        )
        deliver(
            name,
            self,
            to=connection(
                host=host.address or host.host,
                port=access.port,
                user=access.user,
                private_key=access.private_key.get_secret_value(),
                host_key=host.host_key,
                proxy=server.jump if access.jump else None,
            ),
            run=monitored_host.INSTALL,
            remove=monitored_host.remove(owner),
            stdin=Output.all(public, secrets).apply(lambda pair: monitored_host.delivery(*pair)),
            timeout=access.timeout,
            # The way there first. And when passwords change: who sends before who asks.
            depends_on=[server.delivered],
        )
        self.register_outputs({})


def monitor(
    settings: ServerSettings,
    server: Host,
    server_name: str,
    environment: Environment,
    opts: ResourceOptions | None = None,
) -> Sequence[NodeExporter]:
    """A node_exporter on every host that a server's jobs list."""
    if settings.host_access is None:
        return []
    return [
        NodeExporter(
            f"{server_name}-{host.host}",
            host,
            settings.host_access.of(host),
            server,
            server_name,
            settings.rotation.leaf_certificates,
            environment,
            opts=opts,
        )
        for job in settings.jobs
        for host in job.hosts
    ]


def _users(exporters: RotatingCredential | None) -> list[Output]:
    if exporters is None:
        raise ValueError("a server without jobs of its own access has no hosts")
    return list(exporters.accepted)
