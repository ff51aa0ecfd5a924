"""The master Prometheus: what is special to it, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pulumi
import pulumi_random as random
from pulumi import Input, Output, ResourceOptions

from components.credentials import (
    PASSWORD_LENGTH,
    RandomCredential,
    RotatingCredential,
    Rotation,
    password,
)
from components.environment import Environment
from components.federation import remote_sites
from components.firewall import Table, TableOf
from components.generations import numbered
from components.host import Host, HostAddress
from components.lookups import Network
from components.node_exporter import monitor
from components.slave import Slave
from door_settings import HTTPS_PORT
from hostfiles import firewall, grafana, master
from hostfiles.model import MasterSecrets, MasterServer
from settings import FEDERATION_PORT, UI_PORT, MasterSettings

UI_USER = "prometheus-admin"
# As whom nginx comes to what is behind it.
NGINX_USER = "nginx"
# oauth2-proxy takes an AES key of this length.
COOKIE_SECRET_LENGTH = 32


class Master(pulumi.ComponentResource):
    """A master: federates slaves, and serves people and programs on its web page.

    `address` is made by the caller, as the slaves' firewalls need it first.
    """

    host: Host
    # None where people log in elsewhere.
    ui: RotatingCredential | None
    tokens: Mapping[str, Output[str]]
    # For a Grafana anywhere else: how it asks this master.
    grafana_data_source: str

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
        self._name, self._settings = name, settings
        self.ui = None
        if settings.oauth2 is None:
            self.ui = RotatingCredential(
                f"{name}-ui", UI_USER, Rotation(**settings.own_password), opts=child_opts
            )
        names = {*settings.tokens, *([grafana.TOKEN] if settings.grafana else [])}
        self.tokens = {token: self._create_token(token) for token in sorted(names)}
        self.grafana_data_source = grafana.data_source(
            url=f"https://{address.fqdn}",
            server_name=address.fqdn,
            scrape_interval=environment.settings.scrape_interval,
        )
        server = self.host.server(
            MasterServer,
            external_labels={},
            sites=(*(slave.site for slave in slaves), *(site.site for site in remote)),
            ui_port=UI_PORT,
            oauth2=settings.oauth2.public() if settings.oauth2 else None,
            oauth2_proxy=environment.settings.release("oauth2Proxy"),
            grafana=settings.grafana.release() if settings.grafana else None,
        )
        secrets = self.host.secrets(
            MasterSecrets,
            self.ui.accepted if self.ui else [],
            site_passwords={
                **{slave.site.site: password(slave.federation.current) for slave in slaves},
                **{site.name: site.password for site in remote},
            },
            site_trusts={site.name: site.trust for site in remote},
            nginx=RandomCredential(f"{name}-nginx", NGINX_USER, opts=child_opts).credential,
            tokens=self.tokens,
            **self._create_oauth2_secrets(),
            **self._create_grafana_secrets(),
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
            **({"user": self.ui.user} if self.ui else {}),
            **self.host.outputs,
        }

    def _create_token(self, token: str) -> Output[str]:
        """A program's token. Its name is in it: who finds one somewhere knows which to revoke."""
        made = self._create_random(f"token-{token}", PASSWORD_LENGTH)
        return Output.secret(Output.concat(token, "_", made))

    def _create_oauth2_secrets(self) -> dict[str, Output[str]]:
        oauth2 = self._settings.oauth2
        if oauth2 is None:
            return {}
        # Another one ends every session.
        cookie = numbered("cookie", self._settings.rotation.password)
        return {
            "client_secret": Output.secret(oauth2.client_secret.get_secret_value()),
            "cookie_secret": self._create_random(cookie, COOKIE_SECRET_LENGTH),
        }

    def _create_grafana_secrets(self) -> dict[str, Output[str]]:
        if self._settings.grafana is None:
            return {}
        return {"grafana_key": self._create_random("grafana-key", PASSWORD_LENGTH)}

    def _create_random(self, purpose: str, length: int) -> Output[str]:
        made = random.RandomPassword(
            f"{self._name}-{purpose}-password",
            length=length,
            special=False,
            opts=ResourceOptions(parent=self),
        )
        return Output.secret(made.result)


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
            notifications=environment.settings.notifications(),
            provider_cidrs=settings.oauth2.cidrs if settings.oauth2 else (),
            provider_port=settings.oauth2.port if settings.oauth2 else HTTPS_PORT,
        )

    return with_network
