"""A machine of ours: address, DNS name, data volume, instance, first boot, delivery.

What slave and master share. It does not know what runs on the machine: that is in the HostFiles
and the secret files it is given.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pulumi
import pulumi_aws as aws
import pulumi_command as command
import pulumi_tls as tls
from pulumi import Input, Output, ResourceOptions

from components import rights
from components.backup import backup_tag
from components.credentials import RandomCredential, RotatingCredential, Rotation
from components.delivery import connection, deliver, jump_host
from components.environment import Environment
from components.firewall import Firewall, TableOf
from components.lookups import IMAGES
from components.pki import LeafArgs, LeafCertificate
from hostfiles import bundle, cloud_init, public_certificate
from hostfiles.duration import milliseconds
from hostfiles.files import File, HostFiles
from hostfiles.model import Credential, Server, ServerSecrets
from hostfiles.prometheus import LOCAL_USER
from settings import HostSettings

# Short, as a replaced address should be known soon; Route 53 bills no extra for it.
RECORD_TTL_SECONDS = 60
ROOT_VOLUME_GIB = 8
# From the call to a host with all packages and releases installed; a t3.micro needs 2 to 3 minutes.
FIRST_BOOT_TIMEOUT = "15m"
# Validators, restarts and Prometheus's replay of its log.
DELIVERY_TIMEOUT = "15m"
# To connect, and for the host to say what is missing.
CERTIFICATE_GRACE_SECONDS = 60
# Of what is done once to an instance: its passing address and its first key are gone, so another
# connection would dial in vain. A new instance replaces the command, and then nothing is ignored.
IGNORED_ONCE_BOOTED = ["connection"]

S = TypeVar("S", bound=Server)
T = TypeVar("T", bound=ServerSecrets)


class HostAddress(pulumi.ComponentResource):
    """A public address and the DNS name that points to it.

    Made before anything else, so that certificates and firewall tables, of this host and of
    others, wait for no instance.
    """

    fqdn: str
    public_ip: Output[str]
    allocation_id: Output[str]

    def __init__(
        self,
        name: str,
        host: HostSettings,
        environment: Environment,
        opts: ResourceOptions | None = None,
    ) -> None:
        super().__init__("prometheus-federation:index:HostAddress", name, None, opts)
        child_opts = ResourceOptions(parent=self)
        self.fqdn = environment.settings.fqdn(host)
        eip = aws.ec2.Eip(
            name, domain="vpc", region=host.region, tags=environment.tags(name), opts=child_opts
        )
        self.public_ip = eip.public_ip
        self.allocation_id = eip.allocation_id
        aws.route53.Record(
            name,
            zone_id=environment.lookups.zone_id,
            name=self.fqdn,
            type="A",
            ttl=RECORD_TTL_SECONDS,
            records=[eip.public_ip],
            opts=child_opts,
        )
        self.register_outputs({"fqdn": self.fqdn, "publicIp": self.public_ip})


@dataclass(frozen=True, kw_only=True)
class Leaves:
    """The leaf certificates of a server: one key for each program that reads one."""

    prometheus: LeafCertificate
    nginx: LeafCertificate
    node_exporter: LeafCertificate
    alertmanager: LeafCertificate | None


class Host(pulumi.ComponentResource):
    """The machine behind an address.

    Made in two steps, because what is on a machine names its data volume, address and firewall:
    the constructor makes these, `boot` the rest.
    """

    address: HostAddress
    firewall: Firewall
    host_key: Output[str]
    # What monitored hosts ask for; None if no job sends it.
    exporters: RotatingCredential | None
    # Once `boot` has run: the instance's address in its VPC, and its last delivery.
    private_ip: Output[str]
    delivered: command.remote.Command

    def __init__(
        self,
        name: str,
        host: HostSettings,
        table: TableOf,
        peer_addresses: Mapping[str, Input[str]],
        address: HostAddress,
        environment: Environment,
        opts: ResourceOptions | None = None,
    ) -> None:
        super().__init__("prometheus-federation:index:Host", name, None, opts)
        self._name = name
        self._host = host
        self._environment = environment
        self._child_opts = ResourceOptions(parent=self)
        self.address = address
        self._network = environment.lookups.network(host)
        self.firewall = Firewall(
            name,
            table(self._network),
            peer_addresses,
            environment,
            self._network.vpc_id,
            host.region,
            opts=self._child_opts,
        )
        self._volume = self._create_volumes()[-1]
        self._leaves = self._create_leaves()
        self.exporters = self._create_exporters()
        self._local = RandomCredential(f"{name}-local", LOCAL_USER, opts=self._child_opts)

    def boot(
        self,
        files: Output[HostFiles],
        secret_files: Output[tuple[File, ...]],
        after: Sequence[pulumi.Resource] = (),
    ) -> None:
        """Boots the machine from the files that are not secret, then delivers all of them.

        Address and data volume join it when its first boot went well and `after` is there: until
        then the instance that it replaces serves on.
        """
        # The key of first contact stands in user-data, which anyone may read who may describe
        # instances; nothing but the permanent key is ever sent by it.
        first_contact = self._create_host_key("first-contact")
        permanent = self._create_host_key("host-key")
        self.host_key = permanent.public_key_openssh
        user_data = Output.all(
            files, first_contact.private_key_openssh, first_contact.public_key_openssh
        ).apply(
            lambda args: base64.b64encode(
                cloud_init.user_data(
                    args[0], first_contact_key=args[1], first_contact_public=args[2]
                )
            ).decode()
        )
        instance = self._create_instance(user_data)
        self.private_ip = instance.private_ip
        contacted = deliver(
            f"{self._name}-first-contact",
            self,
            to=self._way(instance.public_ip, first_contact.public_key_openssh),
            triggers=[instance.id],
            run="sudo /usr/local/sbin/replace-host-key",
            stdin=permanent.private_key_openssh,
            timeout=FIRST_BOOT_TIMEOUT,
            depends_on=[self.firewall],
            ignore_changes=IGNORED_ONCE_BOOTED,
        )
        booted = deliver(
            f"{self._name}-first-boot",
            self,
            to=self._way(instance.public_ip, permanent.public_key_openssh),
            triggers=[instance.id],
            run="sudo /usr/local/sbin/first-boot",
            timeout=FIRST_BOOT_TIMEOUT,
            depends_on=[contacted],
            ignore_changes=IGNORED_ONCE_BOOTED,
        )
        self.delivered = deliver(
            f"{self._name}-bundle",
            self,
            to=self._way(self.address.public_ip, permanent.public_key_openssh),
            triggers=[instance.id],
            run="sudo /usr/local/sbin/apply-bundle",
            stdin=Output.all(files, secret_files).apply(lambda args: bundle.render(*args)),
            timeout=DELIVERY_TIMEOUT,
            depends_on=self._attach(instance, [booted, *after]),
        )
        self._await_certificate(instance)
        self.register_outputs({"fqdn": self.address.fqdn, "publicIp": self.address.public_ip})

    def server(self, kind: type[S], **special: Input[Any]) -> Output[S]:
        """What the renderers need to know of this machine, with what is special to its kind."""
        settings = self._environment.settings
        alerting = settings.alerting
        return Output.all(
            volume_id=self._volume.id,
            ca_bundle=self._environment.authority.bundle,
            ca_not_after=self._environment.authority.not_after,
            operator_keys=self._environment.operator_keys,
            rules=self.firewall.rules,
            **special,
        ).apply(
            lambda known: kind(
                fqdn=self.address.fqdn,
                memory_mib=settings.memory_mib_of(self._host),
                volume_gib=settings.volume_gib_of(self._host),
                prometheus=settings.release("prometheus"),
                node_exporter=settings.release("nodeExporter"),
                nginx_version=settings.nginx_version,
                jobs=tuple(job.job() for job in self._host.jobs),
                scrape_interval=settings.scrape_interval,
                evaluation_interval=settings.evaluation_interval,
                retention_time=settings.retention_time,
                rule_files=settings.rule_file_contents(),
                backup=settings.backup.on_host(),
                security_updates=settings.security_updates.on_host(),
                jump_ports=self._host.jump_ports,
                alerting=alerting.alerting(settings.release("alertmanager")) if alerting else None,
                acme=settings.acme_of(self._host),
                **known,
            )
        )

    def secrets(
        self, kind: type[T], remote: Sequence[Output[Credential]], **special: Input[Any]
    ) -> Output[T]:
        """The secrets of this machine, with what is special to its kind.

        `remote` are the users that come in from elsewhere.
        """
        alerting, leaf = self._environment.settings.alerting, self._leaves.alertmanager
        return Output.secret(
            Output.all(
                prometheus_leaf=self._leaves.prometheus.leaf,
                nginx_leaf=self._leaves.nginx.leaf,
                node_exporter_leaf=self._leaves.node_exporter.leaf,
                local=self._local.credential,
                exporter=self.exporters.current if self.exporters else None,
                jobs={job.name: job.secrets() for job in self._host.jobs},
                alertmanager_leaf=leaf.leaf if leaf else None,
                alerting=alerting.secrets() if alerting else {},
                remote=remote,
                **special,
            ).apply(lambda known: kind(**known))
        )

    @property
    def outputs(self) -> dict[str, Input[str]]:
        """How to find the machine, and how to prove that it is the one."""
        return {
            "host": self.address.fqdn,
            "publicIp": self.address.public_ip,
            "sshCommand": f"ssh -i operator.key {self._user}@{self.address.fqdn}",
            "sshHostKey": self.host_key,
            "securityGroupId": self.firewall.security_group_id,
        }

    @property
    def jump(self) -> command.remote.ProxyConnectionArgs:
        """This machine as a jump host."""
        return jump_host(
            host=self.address.public_ip,
            user=self._user,
            private_key=self._environment.ssh_key.private_key_openssh,
            host_key=self.host_key,
        )

    @property
    def _user(self) -> str:
        return IMAGES[self._environment.settings.os].user

    def _create_volumes(self) -> list[aws.ebs.Volume]:
        """The data volume, and before it those that a restore took out of use.

        One that is restored is a resource of its own: what it takes the place of is neither
        replaced nor deleted, and may stay protected.
        """
        return [self._create_volume(snapshot) for snapshot in self._host.volumes]

    def _create_volume(self, snapshot: str | None) -> aws.ebs.Volume:
        name = f"{self._name}-data"
        return aws.ebs.Volume(
            name if snapshot is None else f"{name}-{snapshot}",
            availability_zone=self._network.availability_zone,
            size=self._environment.settings.volume_gib_of(self._host),
            snapshot_id=snapshot,
            type="gp3",
            encrypted=True,
            region=self._host.region,
            tags={**self._environment.tags(name), **backup_tag(self._environment)},
            opts=ResourceOptions(parent=self, protect=self._environment.settings.protect_data),
        )

    def _create_leaves(self) -> Leaves:
        authority = self._environment.authority
        fqdn, generation = self.address.fqdn, self._host.rotation.leaf_certificates
        return Leaves(
            # Server on loopback, and client towards exporters and slaves.
            prometheus=LeafCertificate(
                f"{self._name}-prometheus",
                LeafArgs(
                    common_name=fqdn,
                    generation=generation,
                    more_names=["localhost"],
                    ip_addresses=["127.0.0.1"],
                    client=True,
                ),
                authority,
                opts=self._child_opts,
            ),
            nginx=LeafCertificate(
                f"{self._name}-nginx",
                LeafArgs(
                    common_name=fqdn,
                    generation=generation,
                    ip_addresses=[self.address.public_ip],
                ),
                authority,
                opts=self._child_opts,
            ),
            node_exporter=self._create_local_leaf("node-exporter"),
            alertmanager=self._create_local_leaf("alertmanager")
            if self._environment.settings.alerting
            else None,
        )

    def _create_local_leaf(self, program: str) -> LeafCertificate:
        """Of a program that answers on loopback alone."""
        return LeafCertificate(
            f"{self._name}-{program}",
            LeafArgs(
                common_name=self.address.fqdn,
                generation=self._host.rotation.leaf_certificates,
                more_names=["localhost"],
                ip_addresses=["127.0.0.1"],
            ),
            self._environment.authority,
            opts=self._child_opts,
        )

    def _create_exporters(self) -> RotatingCredential | None:
        if not any(job.access.credential == "own" for job in self._host.jobs):
            return None
        return RotatingCredential(
            f"{self._name}-exporters",
            "prometheus",
            Rotation(generation=self._host.rotation.exporter_password),
            opts=self._child_opts,
        )

    def _create_host_key(self, purpose: str) -> tls.PrivateKey:
        # One for each generation: a new instance starts with a first contact of its own.
        return tls.PrivateKey(
            f"{self._name}-{purpose}-{self._host.instance_generation}",
            algorithm="ED25519",
            opts=self._child_opts,
        )

    def _create_instance(self, user_data: Output[str]) -> aws.ec2.Instance:
        settings = self._environment.settings
        instance_type = settings.instance_type_of(self._host)
        profile = self._create_profile()
        return aws.ec2.Instance(
            f"{self._name}-{self._host.instance_generation}",
            ami=self._environment.lookups.image(self._host),
            instance_type=instance_type,
            subnet_id=self._network.subnet_id,
            vpc_security_group_ids=[self.firewall.security_group_id],
            iam_instance_profile=profile.name if profile else None,
            # Until the Elastic IP is there, packages and the first contact come over a passing
            # public address.
            associate_public_ip_address=True,
            user_data_base64=user_data,
            # IMDSv2 only, and no forwarding of its answers off the host.
            metadata_options=aws.ec2.InstanceMetadataOptionsArgs(
                http_endpoint="enabled", http_tokens="required", http_put_response_hop_limit=1
            ),
            root_block_device=aws.ec2.InstanceRootBlockDeviceArgs(
                encrypted=True,
                volume_type="gp3",
                volume_size=ROOT_VOLUME_GIB,
                tags=self._environment.tags(f"{self._name}-root"),
            ),
            # `unlimited`, the default, bills what is used above the baseline.
            credit_specification=aws.ec2.InstanceCreditSpecificationArgs(cpu_credits="standard")
            if instance_type.startswith("t")
            else None,
            region=self._host.region,
            tags=self._environment.tags(self._name),
            opts=ResourceOptions(
                parent=self,
                # Both would stop or replace a running server; the bundle is the way of change,
                # and `generation` the way to a new instance.
                ignore_changes=["userDataBase64", "ami"],
            ),
        )

    def _create_profile(self) -> aws.iam.InstanceProfile | None:
        acme = self._environment.settings.acme_of(self._host)
        regions = sorted({entry.region for job in self._host.jobs for entry in job.ec2_sd_configs})
        statements: list[rights.Statement] = []
        if regions:
            statements.append(rights.discovery(regions))
        if acme and acme.challenge == "dns-01":
            zone = self._environment.lookups.zone_id
            statements += rights.challenge_record(zone, self.address.fqdn)
        return rights.instance_profile(self._name, statements, self._environment, self._child_opts)

    def _attach(
        self, instance: aws.ec2.Instance, after: Sequence[pulumi.Resource]
    ) -> list[pulumi.Resource]:
        association = aws.ec2.EipAssociation(
            self._name,
            allocation_id=self.address.allocation_id,
            instance_id=instance.id,
            region=self._host.region,
            opts=ResourceOptions(parent=self, depends_on=after),
        )
        attachment = aws.ec2.VolumeAttachment(
            self._name,
            device_name="/dev/sdf",
            volume_id=self._volume.id,
            instance_id=instance.id,
            # A file system must not be torn off a running Prometheus.
            stop_instance_before_detaching=True,
            region=self._host.region,
            # A volume is on one instance at a time: it must leave the old one first.
            opts=ResourceOptions(parent=self, depends_on=after, delete_before_replace=True),
        )
        return [association, attachment]

    def _await_certificate(self, instance: aws.ec2.Instance) -> None:
        """Where a public authority signs: waits for it, tells of failed attempts, and gives up.

        Nothing depends on it: until then the host works with a certificate of our CA.
        """
        settings = self._environment.settings
        acme = settings.acme_of(self._host)
        if acme is None or settings.lets_encrypt is None:
            return
        seconds = milliseconds(settings.lets_encrypt.timeout) // 1000
        deliver(
            f"{self._name}-public-certificate",
            self,
            to=self._way(self.address.public_ip, self.host_key),
            triggers=[instance.id],
            run=public_certificate.wait_command(acme, self.address.fqdn, seconds),
            timeout=f"{seconds + CERTIFICATE_GRACE_SECONDS}s",
            depends_on=[self.delivered],
            # It says what is missing, and nothing that is secret.
            logging=command.remote.Logging.STDOUT_AND_STDERR,
        )

    def _way(self, address: Output[str], host_key: Output[str]) -> command.remote.ConnectionArgs:
        return connection(
            host=address,
            user=self._user,
            private_key=self._environment.ssh_key.private_key_openssh,
            host_key=host_key,
        )
