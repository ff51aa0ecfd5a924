"""Secure federated Prometheus: settings, components, outputs."""

from __future__ import annotations

import pulumi
from pulumi import Output

import settings
from components import federation
from components.backup import Backups
from components.credentials import password
from components.environment import make_environment
from components.existing_master import ExistingMaster
from components.host import HostAddress
from components.master import Master
from components.slave import FederatingMaster, Slave

chosen = settings.load()
environment = make_environment(chosen)
backups = Backups(environment)
pulumi.export("caCertificate", Output.secret(environment.trusted))
pulumi.export("sshPrivateKey", Output.secret(environment.ssh_key.private_key_openssh))

master_address = HostAddress("master", chosen.master, environment) if chosen.master else None
federating = FederatingMaster.of(chosen, master_address)

slaves = [Slave(site, federating, environment) for site in chosen.slaves]
master = None
if chosen.master and master_address:
    master = Master(chosen.master, master_address, slaves, environment)
    pulumi.export("master", master.outputs)
    pulumi.export("masterTokens", master.tokens)
    pulumi.export("grafanaDataSource", master.grafana_data_source)
    if master.ui:
        pulumi.export("masterPassword", password(master.ui.current))
        pulumi.export("masterNextPassword", password(master.ui.next))

for slave in slaves:
    slave.boot(master)
pulumi.export("slaves", {slave.site.site: slave.outputs for slave in slaves})
pulumi.export(
    "federationPasswords",
    {slave.site.site: password(slave.federation.current) for slave in slaves},
)

if chosen.existing_master:
    existing = ExistingMaster(chosen.existing_master, slaves, environment)
    pulumi.export("existingMasterCertificate", existing.leaf.apply(lambda leaf: leaf.certificate))
    pulumi.export("existingMasterKey", existing.leaf.apply(lambda leaf: leaf.key))
    federation.export(slaves, existing.leaf, environment)
