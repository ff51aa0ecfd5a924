"""A site's slave Prometheus: what is special to it, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pulumi
from pulumi import Input, Output, ResourceOptions

from components.credentials import RotatingCredential, Rotation
from components.environment import Environment
from components.firewall import Table, TableOf
from components.host import Host, HostAddress
from components.lookups import Network
from components.node_exporter import monitor
from hostfiles import firewall, slave
from hostfiles.model import FederatedSite, ServerSecrets, SlaveServer

if TYPE_CHECKING:
    from components.master import Master
from settings import FEDERATION_PORT, Settings, SlaveSettings

FEDERATION_USER = "prometheus-admin"


@dataclass(frozen=True, kw_only=True)
class FederatingMaster:
    """Who may federate a slave: the names in client certificates, and where they come from.

    `cidrs` are known from settings; `public_ip` is the address of a master of this
    environment. There may be both: on the way from an existing master to one of our own.
    """

    names: tuple[str, ...]
    cidrs: tuple[str, ...] = ()
    public_ip: Input[str] | None = None

    @classmethod
    def of(cls, settings: Settings, master_address: HostAddress | None) -> FederatingMaster:
        """The masters that an environment's settings speak of: its own, an existing one."""
        existing = settings.existing_master
        names = [master_address.fqdn] if master_address else []
        return cls(
            names=(*names, existing.host) if existing else tuple(names),
            cidrs=existing.cidrs if existing else (),
            public_ip=master_address.public_ip if master_address else None,
        )


class Slave(pulumi.ComponentResource):
    """A slave: scrapes its site, and answers `GET /federate` to its master alone."""

    site: FederatedSite
    host: Host
    federation: RotatingCredential

    def __init__(
        self,
        settings: SlaveSettings,
        master: FederatingMaster,
        environment: Environment,
        opts: ResourceOptions | None = None,
    ) -> None:
        name = f"slave-{settings.site}"
        super().__init__("prometheus-federation:index:Slave", name, None, opts)
        child_opts = ResourceOptions(parent=self)
        address = HostAddress(name, settings, environment, opts=child_opts)
        self.host = Host(
            name,
            settings,
            _table(settings, master, environment),
            {} if master.public_ip is None else {"master": master.public_ip},
            address,
            environment,
            opts=child_opts,
        )
        self.federation = RotatingCredential(
            f"{name}-federation",
            FEDERATION_USER,
            Rotation(**settings.own_password),
            opts=child_opts,
        )
        self.site = FederatedSite(
            site=settings.site,
            host=address.fqdn,
            port=FEDERATION_PORT,
            user=self.federation.user,
            match=settings.match,
            scrape_interval=environment.settings.scrape_interval,
            sample_limit=settings.sample_limit,
            public_roots=environment.settings.public_roots,
        )
        self._settings = settings
        self._environment = environment
        self._server = self.host.server(
            SlaveServer,
            external_labels={"site": settings.site},
            site=settings.site,
            master_names=master.names,
            federation_port=FEDERATION_PORT,
        )

    def boot(self, master: Master | None) -> None:
        """Boots it. A renewed password, and a public authority, the master learns first."""
        server = self._server
        secrets = self.host.secrets(ServerSecrets, self.federation.accepted)
        public = self._environment.settings.acme_of(self._settings) is not None
        master_first = public or self._settings.rotation.password > 1
        self.host.boot(
            server.apply(slave.host_files),
            Output.all(server, secrets).apply(lambda pair: slave.secret_files(*pair)),
            after=[master.host.delivered] if master and master_first else [],
        )
        monitor(
            self._settings,
            self.host,
            f"slave-{self._settings.site}",
            self._environment,
            opts=ResourceOptions(parent=self),
        )
        self.register_outputs(self.outputs)

    @property
    def outputs(self) -> dict[str, Input[str]]:
        """What a person or a master elsewhere needs to know of this slave."""
        return {
            "federationUrl": f"https://{self.site.host}:{self.site.port}/federate",
            "federationUser": self.federation.user,
            **self.host.outputs,
        }


def _table(settings: SlaveSettings, master: FederatingMaster, environment: Environment) -> TableOf:
    def with_network(network: Network) -> Table:
        return lambda addresses: firewall.slave_rules(
            operator_cidrs=environment.settings.operator_cidrs,
            package_cidrs=environment.settings.package_cidrs,
            master_cidrs=master.cidrs,
            masters={name: f"{ip}/32" for name, ip in addresses.items()},
            federation_port=FEDERATION_PORT,
            vpc_cidr=network.vpc_cidr,
            target_cidrs=settings.target_cidrs,
            jobs=[job.job() for job in settings.jobs],
            jump_ports=settings.jump_ports,
            acme=environment.settings.acme_of(settings),
            notifications=environment.settings.notifications(),
        )

    return with_network
