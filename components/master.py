"""The master Prometheus: what is special to it, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import pulumi
from pulumi import Input, Output, ResourceOptions

from components.credentials import RotatingCredential, Rotation, password
from components.environment import Environment
from components.federation import remote_sites
from components.firewall import Table, TableOf
from components.host import Host, HostAddress
from components.lookups import Network
from components.node_exporter import monitor
from components.slave import Slave
from hostfiles import firewall, master
from hostfiles.model import MasterSecrets, MasterServer
from settings import FEDERATION_PORT, UI_PORT, MasterSettings

UI_USER = "prometheus-admin"


class Master(pulumi.ComponentResource):
    """A master: federates slaves, and serves people and programs on its web page.

    `address` is made by the caller, as the slaves' firewalls need it first.
    """

    host: Host
    ui: RotatingCredential

    def __init__(
        self,
        settings: MasterSettings,
        address: HostAddress,
        slaves: Sequence[Slave],
        environment: Environment,
        opts: ResourceOptions | None = None,
    ) -> None:
        name = "master"
        super().__init__("prometheus-federation:index:Master", name, None, opts)
        child_opts = ResourceOptions(parent=self)
        remote = remote_sites(settings.other_stacks)
        self.host = Host(
            name,
            settings,
            _table(settings, environment),
            {
                **{slave.site.site: slave.host.address.public_ip for slave in slaves},
                **{site.name: site.public_ip for site in remote},
            },
            address,
            environment,
            opts=child_opts,
        )
        self.ui = RotatingCredential(
            f"{name}-ui", UI_USER, Rotation(**settings.own_password), opts=child_opts
        )
        server = self.host.server(
            MasterServer,
            external_labels={},
            sites=(*(slave.site for slave in slaves), *(site.site for site in remote)),
            ui_port=UI_PORT,
        )
        secrets = self.host.secrets(
            MasterSecrets,
            self.ui,
            site_passwords={
                **{slave.site.site: password(slave.federation.current) for slave in slaves},
                **{site.name: site.password for site in remote},
            },
            site_trusts={site.name: site.trust for site in remote},
        )
        self.host.boot(
            server.apply(master.host_files),
            Output.all(server, secrets).apply(lambda pair: master.secret_files(*pair)),
        )
        monitor(settings, self.host, name, environment, opts=child_opts)
        self.register_outputs(self.outputs)

    @property
    def outputs(self) -> dict[str, Input[str]]:
        """What a person needs to know of the master."""
        return {
            "url": f"https://{self.host.address.fqdn}",
            "user": self.ui.user,
            **self.host.outputs,
        }


def _table(settings: MasterSettings, environment: Environment) -> TableOf:
    def with_network(network: Network) -> Table:
        return lambda addresses: firewall.master_rules(
            operator_cidrs=environment.settings.operator_cidrs,
            package_cidrs=environment.settings.package_cidrs,
            slaves={site: (f"{ip}/32", FEDERATION_PORT) for site, ip in addresses.items()},
            ui_port=UI_PORT,
            vpc_cidr=network.vpc_cidr,
            target_cidrs=settings.target_cidrs,
            jobs=[job.job() for job in settings.jobs],
            jump_ports=settings.jump_ports,
            acme=environment.settings.acme_of(settings),
        )

    return with_network
