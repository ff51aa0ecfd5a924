"""A Prometheus that someone else runs and that federates the slaves of this environment.

It gets a client certificate of this stack's CA and, where settings say how it is reached over SSH,
a federate job for each site. Nothing else of it is touched, and on destroy it is left as it was.
"""

from __future__ import annotations

from collections.abc import Sequence

import pulumi
from pulumi import Output, ResourceOptions

from components.credentials import password
from components.delivery import connection, deliver
from components.environment import Environment
from components.pki import LeafArgs, LeafCertificate
from components.slave import Slave
from existing_master_settings import ExistingMasterAccess, ExistingMasterSettings
from hostfiles import existing_master
from hostfiles.model import ExistingMaster as Master
from hostfiles.model import ExistingMasterSecrets, Leaf
from settings import NAMESPACE


class ExistingMaster(pulumi.ComponentResource):
    """The federate jobs of an existing master, and the certificate that it comes in with."""

    leaf: Output[Leaf]

    def __init__(
        self,
        settings: ExistingMasterSettings,
        slaves: Sequence[Slave],
        environment: Environment,
        opts: ResourceOptions | None = None,
    ) -> None:
        self._name = "existing-master"
        super().__init__("prometheus-federation:index:ExistingMaster", self._name, None, opts)
        self.leaf = LeafCertificate(
            self._name,
            LeafArgs(common_name=settings.host, generation=1, server=False, client=True),
            environment.authority,
            opts=ResourceOptions(parent=self),
        ).leaf
        if settings.access is not None:
            self._create_jobs(settings, settings.access, slaves, environment)
        self.register_outputs({})

    def _create_jobs(
        self,
        settings: ExistingMasterSettings,
        access: ExistingMasterAccess,
        slaves: Sequence[Slave],
        environment: Environment,
    ) -> None:
        owner = f"{NAMESPACE}/{environment.stack}"
        public = environment.authority.bundle.apply(
            lambda ca_bundle: Master(
                owner=owner,
                config_file=settings.config_file,
                run_as=settings.run_as,
                promtool=settings.promtool,
                url=settings.url,
                # None and `system`: the public authorities.
                api_ca="" if settings.ca in (None, "system") else str(settings.ca),
                reload=settings.reload,
                unit=settings.unit,
                ca_bundle=ca_bundle,
                sites=tuple(slave.site for slave in slaves),
            )
        )
        api = settings.basic_auth
        secrets = Output.secret(
            Output.all(
                leaf=self.leaf,
                site_passwords={
                    slave.site.site: password(slave.federation.current) for slave in slaves
                },
            ).apply(
                lambda known: ExistingMasterSecrets(
                    **known,
                    api_user=api.username if api else "",
                    api_password=api.password.get_secret_value() if api else "",
                )
            )
        )
        deliver(
            self._name,
            self,
            to=connection(
                host=access.host or settings.host,
                port=access.port,
                user=access.user,
                private_key=access.private_key.get_secret_value(),
                host_key=access.host_key,
            ),
            run=existing_master.INSTALL,
            remove=existing_master.remove(owner),
            stdin=Output.all(public, secrets).apply(lambda pair: existing_master.delivery(*pair)),
            timeout=access.timeout,
            # It waits until each site's target is up.
            depends_on=[slave.host.delivered for slave in slaves],
        )
