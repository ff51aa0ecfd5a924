"""The aws provider: EC2, EBS and Route 53, as far as the program uses them.

What exists here is remembered in a file of its own, apart from the engine's state, as AWS knows
its resources whether or not Pulumi does. Every change of it that the network can see is brought to
the kernel by network.Fabric. It invents nothing that AWS lacks; what it leaves out stands in
docs/architecture.md.
"""

from __future__ import annotations

import base64
import contextlib
import ipaddress
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from sandbox import aws_api, iam, machine, providers, snapshots
from sandbox.host import Progress, SandboxError
from sandbox.image import Image
from sandbox.network import (
    Attachment,
    Fabric,
    NetworkModel,
    Rule,
    SecurityGroup,
    with_attachment,
    without_machine,
)
from sandbox.plan import Plan
from sandbox.program import Resource
from sandbox.providers import Inputs, Outputs, Provider
from sandbox.world import World

# vCPUs and memory of the types that make sense on one machine.
# https://docs.aws.amazon.com/ec2/latest/instancetypes/gp.html
INSTANCE_TYPES = {
    "t3.nano": (2, 512),
    "t3.micro": (2, 1024),
    "t3.small": (2, 2048),
    "t3.medium": (2, 4096),
}


@dataclass(kw_only=True)
class Instance:
    """An EC2 instance; `machine` is the name under which it runs here."""

    machine: str
    image_id: str
    instance_type: str
    subnet_id: str
    groups: list[str]
    private_ip: str
    temporary_ip: str
    name: str
    profile: str = ""


@dataclass(kw_only=True)
class Cloud:
    """All that exists, by id.

    `volumes`: size in GiB; `volume_tags`: their tags. `policies`: details of lifecycle policies.
    `attachments`: volume and instance. `associations`: allocation and instance. `records`: address.
    `role_policies`: role and policy document. `profiles`: the role of an instance profile.
    """

    instances: dict[str, Instance] = field(default_factory=dict)
    volumes: dict[str, int] = field(default_factory=dict)
    volume_tags: dict[str, dict[str, str]] = field(default_factory=dict)
    policies: dict[str, dict[str, Any]] = field(default_factory=dict)
    attachments: dict[str, tuple[str, str]] = field(default_factory=dict)
    addresses: dict[str, str] = field(default_factory=dict)
    associations: dict[str, tuple[str, str]] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)
    rules: dict[str, dict[str, Any]] = field(default_factory=dict)
    records: dict[str, str] = field(default_factory=dict)
    role_policies: dict[str, tuple[str, str]] = field(default_factory=dict)
    profiles: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Cloud:
        """What a file remembers; nothing where there is none."""
        if not path.exists():
            return cls()
        known = json.loads(path.read_text())
        known["instances"] = {id_: Instance(**row) for id_, row in known["instances"].items()}
        for kind in ("attachments", "associations", "role_policies"):
            known[kind] = {id_: tuple(row) for id_, row in known.get(kind, {}).items()}
        return cls(**known)

    def save(self, path: Path) -> None:
        """Writes the file whole, or leaves the old one."""
        fresh = path.with_suffix(".new")
        fresh.touch(mode=0o600)
        fresh.write_text(json.dumps(asdict(self), indent=1, sort_keys=True))
        fresh.replace(path)


class AwsProvider(Provider):
    """https://www.pulumi.com/registry/packages/aws/."""

    def __init__(
        self, plan: Plan, world: World, fabric: Fabric, image: Image, progress: Progress
    ) -> None:
        self._plan = plan
        self._world = world
        self._fabric = fabric
        self._image = image
        self._progress = progress
        self._path = plan.state_dir / "cloud.json"
        self._cloud = Cloud.load(self._path)
        self._lock = threading.RLock()
        self._makers: dict[str, Callable[[Resource, Inputs], tuple[str, Outputs]]] = {
            providers.EIP: self._allocate,
            providers.EIP_ASSOCIATION: self._associate,
            providers.RECORD: self._register,
            providers.SECURITY_GROUP: self._create_group,
            providers.INGRESS_RULE: self._authorize,
            providers.EGRESS_RULE: self._authorize,
            providers.VOLUME: self._create_volume,
            providers.VOLUME_ATTACHMENT: self._attach_volume,
            providers.INSTANCE: self._run_instance,
            providers.ROLE: self._note_identity,
            providers.ROLE_POLICY: self._note_identity,
            providers.ROLE_POLICY_ATTACHMENT: self._note_identity,
            providers.INSTANCE_PROFILE: self._note_identity,
            providers.LIFECYCLE_POLICY: self._note_policy,
        }

    def create(self, resource: Resource, inputs: Inputs) -> tuple[str, Outputs]:
        """Makes the resource."""
        if resource.type not in self._makers:
            return super().create(resource, inputs)
        id_, outputs = self._makers[resource.type](resource, inputs)
        return id_, {**inputs, **outputs}

    def update(
        self, resource: Resource, id_: str, inputs: Inputs, old: Inputs, outputs: Outputs
    ) -> Outputs:
        """Changes in place what AWS changes in place. Tags and descriptions do nothing here."""
        fresh = {**outputs, **inputs}
        if resource.type in (providers.INGRESS_RULE, providers.EGRESS_RULE):
            with self._changing():
                self._set_rule(id_, resource, inputs)
        elif resource.type == providers.RECORD:
            with self._changing():
                self._cloud.records[id_] = inputs["records"][0]
        elif resource.type == providers.INSTANCE:
            self._change_instance(id_, inputs)
        elif resource.type == providers.VOLUME:
            if inputs["size"] != old["size"]:
                raise SandboxError(
                    f"{resource.name}: the sandbox cannot grow a data volume while it is in use.",
                    "Put dataVolumeGib back, or `make down` and `make up`.",
                )
            with self._changing(seen=False):
                self._cloud.volume_tags[id_] = dict(inputs.get("tags", {}))
        elif resource.type == providers.LIFECYCLE_POLICY:
            with self._changing(seen=False):
                self._cloud.policies[id_] = dict(inputs["policyDetails"])
        elif resource.type in (providers.ROLE_POLICY, providers.INSTANCE_PROFILE):
            self._remember_identity(resource.type, id_, inputs)
        return fresh

    def delete(self, type_: str, id_: str, inputs: Inputs, timeout: str) -> None:
        """Removes the resource."""
        if type_ == providers.INSTANCE:
            self._terminate(id_)
        elif type_ == providers.VOLUME_ATTACHMENT:
            self._detach_volume(id_)
        elif type_ == providers.VOLUME:
            if self._holder_of(id_):
                raise SandboxError(f"{id_} is attached and cannot be deleted.", "Detach it first.")
            self._volume_file(id_).unlink(missing_ok=True)
        with self._changing():
            for kind in vars(self._cloud).values():
                kind.pop(id_, None)

    def invoke(self, token: str, args: Mapping[str, Any]) -> dict[str, Any]:
        """Answers the program's look-ups from the given world."""
        return {**args, **_look_up(self._world, token, args)}

    def resume(self) -> list[str]:
        """Brings back what this machine lost since the last run, such as by a reboot.

        Returns the names of the instances that had to be started.
        """
        self._apply()
        started = []
        for id_, instance in self._cloud.instances.items():
            if not machine.is_running(self._plan, instance.machine):
                with self._progress(f"start {instance.name} again"):
                    self._start(id_)
                started.append(instance.name)
        return started

    def forget_all_but(self, ids: set[str]) -> None:
        """Removes what nobody remembers: leftovers of a run that was killed while making them."""
        for id_ in self._cloud.instances.keys() - ids:
            self._terminate(id_)
        with self._changing():
            for id_ in self._cloud.volumes.keys() - ids:
                self._volume_file(id_).unlink(missing_ok=True)
            for kind in vars(self._cloud).values():
                for id_ in kind.keys() - ids:
                    kind.pop(id_)

    def instances(self) -> list[tuple[Instance, str]]:
        """Every instance with its public address."""
        return [(row, self._public_ip(id_)) for id_, row in sorted(self._cloud.instances.items())]

    # Addresses and names

    def _allocate(self, resource: Resource, inputs: Inputs) -> tuple[str, Outputs]:
        with self._changing():
            # Those of the given world's hosts are in the network's model alone.
            taken = {*self._cloud.addresses.values(), *self._fabric.model.eips}
            free = [ip for ip in self._plan.eips if ip not in taken]
            if not free:
                raise SandboxError(
                    f"All {len(taken)} addresses of {self._plan.eip_range} are allocated.",
                    "Use fewer slaves in the sandbox.",
                )
            id_ = _new_id("eipalloc")
            self._cloud.addresses[id_] = free[0]
        return id_, {"publicIp": free[0], "allocationId": id_}

    def _associate(self, resource: Resource, inputs: Inputs) -> tuple[str, Outputs]:
        id_ = _new_id("eipassoc")
        with self._changing():
            # An address moves when it is associated anew.
            self._cloud.associations = {
                other: pair
                for other, pair in self._cloud.associations.items()
                if pair[0] != inputs["allocationId"]
            }
            self._cloud.associations[id_] = (inputs["allocationId"], inputs["instanceId"])
        return id_, {}

    def _register(self, resource: Resource, inputs: Inputs) -> tuple[str, Outputs]:
        if inputs["type"] != "A":
            raise NotImplementedError(f"{resource.name}: records of type {inputs['type']}")
        id_ = f"{inputs['zoneId']}_{inputs['name']}_A"
        # One with the same address is what a killed run made.
        if self._cloud.records.get(id_, inputs["records"][0]) != inputs["records"][0]:
            raise SandboxError(
                f"{resource.name}: the zone has a record {inputs['name']} already.",
                "Route 53 would refuse it, too: a site that gets another name needs another host.",
            )
        with self._changing():
            self._cloud.records[id_] = inputs["records"][0]
        return id_, {"fqdn": inputs["name"]}

    # IAM: roles and their own policies are noted for whom a host asks (aws_api).

    def _note_identity(self, resource: Resource, inputs: Inputs) -> tuple[str, Outputs]:
        name = inputs.get("name") or (
            f"{inputs.get('namePrefix', f'{resource.name}-')}{secrets.token_hex(4)}"
        )
        if resource.type == providers.ROLE_POLICY:
            self._remember_identity(resource.type, f"{inputs['role']}:{name}", inputs)
            return f"{inputs['role']}:{name}", {"name": name}
        if resource.type == providers.ROLE_POLICY_ATTACHMENT:
            return f"{inputs['role']}/{inputs['policyArn']}", {}
        kind = "role"
        if resource.type == providers.INSTANCE_PROFILE:
            self._remember_identity(resource.type, name, inputs)
            kind = "instance-profile"
        return name, {"name": name, "arn": f"arn:aws:iam::000000000000:{kind}/{name}"}

    def _remember_identity(self, type_: str, id_: str, inputs: Inputs) -> None:
        with self._changing(seen=False):
            if type_ == providers.ROLE_POLICY:
                self._cloud.role_policies[id_] = (inputs["role"], inputs["policy"])
            else:
                self._cloud.profiles[id_] = inputs["role"]

    def _tell_identities(self) -> None:
        roles: dict[str, list[iam.Statement]] = {}
        for role, policy in self._cloud.role_policies.values():
            roles.setdefault(role, []).extend(json.loads(policy)["Statement"])
        held = {
            self._public_ip(id_): self._cloud.profiles[instance.profile]
            for id_, instance in self._cloud.instances.items()
            if instance.profile in self._cloud.profiles
        }
        aws_api.tell(self._plan, roles, held)

    # Security groups

    def _create_group(self, resource: Resource, inputs: Inputs) -> tuple[str, Outputs]:
        id_ = _new_id("sg")
        with self._changing(seen=False):
            self._cloud.groups[id_] = inputs["vpcId"]
        return id_, {"name": f"{inputs.get('namePrefix', '')}{id_[-6:]}"}

    def _authorize(self, resource: Resource, inputs: Inputs) -> tuple[str, Outputs]:
        # The same each time, so that what a killed run made is found again.
        made_of = f"{resource.urn} {inputs['securityGroupId']}"
        id_ = f"sgr-{sha256(made_of.encode()).hexdigest()[:16]}"
        used = {group for row in self._cloud.instances.values() for group in row.groups}
        with self._changing(seen=inputs["securityGroupId"] in used):
            self._set_rule(id_, resource, inputs)
        return id_, {"securityGroupRuleId": id_}

    def _set_rule(self, id_: str, resource: Resource, inputs: Inputs) -> None:
        """Refuses a second one of the same content, as AWS does (InvalidPermission.Duplicate).

        https://docs.aws.amazon.com/AWSEC2/latest/APIReference/errors-overview.html
        """
        rule = _rule(resource.type, inputs)
        if any(other == rule for known, other in self._cloud.rules.items() if known != id_):
            raise SandboxError(
                f"{resource.name}: its security group has this very rule already.",
                "On AWS this is InvalidPermission.Duplicate: name rules by what they say.",
            )
        self._cloud.rules[id_] = rule

    # Volumes

    def _create_volume(self, resource: Resource, inputs: Inputs) -> tuple[str, Outputs]:
        id_ = _new_id("vol")
        snapshot = inputs.get("snapshotId")
        if snapshot:
            snapshots.check(self._plan, snapshot, inputs["size"])
        with self._changing(seen=False):
            self._cloud.volumes[id_] = inputs["size"]
            self._cloud.volume_tags[id_] = dict(inputs.get("tags", {}))
        if snapshot:
            snapshots.restore(self._plan, snapshot, self._volume_file(id_))
        machine.create_volume(self._volume_file(id_), size_gib=inputs["size"])
        return id_, {}

    def _attach_volume(self, resource: Resource, inputs: Inputs) -> tuple[str, Outputs]:
        volume, instance = inputs["volumeId"], inputs["instanceId"]
        id_ = _new_id("vai")
        with self._changing(seen=False):
            holder = self._holder_of(volume)
            if holder not in ("", instance):
                raise SandboxError(
                    f"{volume} is attached to {holder}.", "A volume is on one instance at a time."
                )
            self._cloud.attachments[id_] = (volume, instance)
        machine.attach_device(
            self._plan, self._cloud.instances[instance].machine, self._device(volume)
        )
        return id_, {}

    def _detach_volume(self, id_: str) -> None:
        volume, holder = self._cloud.attachments.get(id_, ("", ""))
        if holder in self._cloud.instances:
            # stop_instance_before_detaching: nothing may be writing to it.
            machine.stop(self._plan, self._cloud.instances[holder].machine)
            machine.detach_device(
                self._plan, self._cloud.instances[holder].machine, self._device(volume)
            )

    def _holder_of(self, volume: str) -> str:
        return next((i for v, i in self._cloud.attachments.values() if v == volume), "")

    def _device(self, volume: str) -> machine.Device:
        # The name that udev gives an EBS volume on a Nitro instance.
        name = f"nvme-Amazon_Elastic_Block_Store_{volume.replace('-', '')}"
        return machine.Device(image=self._volume_file(volume), by_id=name)

    def _volume_file(self, id_: str) -> Path:
        return self._plan.state_dir / "volumes" / f"{id_}.img"

    # Snapshots: nothing here makes them by itself, as nobody is up at 01:00.

    def _note_policy(self, resource: Resource, inputs: Inputs) -> tuple[str, Outputs]:
        id_ = _new_id("policy")
        with self._changing(seen=False):
            self._cloud.policies[id_] = dict(inputs["policyDetails"])
        return id_, {"arn": f"arn:aws:dlm:::policy/{id_}"}

    def run_policies(self, address: str | None = None) -> list[snapshots.Snapshot]:
        """Does now what the lifecycle policies would do at their time.

        `address`: only of the volume of the instance with this public address.
        """
        taken = []
        for policy in self._cloud.policies.values():
            keep = policy["schedules"][0]["retainRule"]["count"]
            for volume, tags in self._cloud.volume_tags.items():
                holder = self._cloud.instances.get(self._holder_of(volume))
                if not policy["targetTags"].items() & tags.items():
                    continue
                if address and (not holder or address != self._public_ip(self._holder_of(volume))):
                    continue
                with self._progress(f"snapshot of {volume} ({tags.get('Name', '')})"):
                    taken.append(
                        snapshots.take(
                            self._plan,
                            self._volume_file(volume),
                            snapshots.Snapshot(
                                id=_new_id("snap"),
                                volume=volume,
                                name=tags.get("Name", ""),
                                size_gib=self._cloud.volumes[volume],
                                time=time.time(),
                            ),
                            holder.machine if holder else None,
                        )
                    )
                    snapshots.prune(self._plan, volume, keep)
        return taken

    # Instances

    def _run_instance(self, resource: Resource, inputs: Inputs) -> tuple[str, Outputs]:
        _size_of(inputs["instanceType"])
        id_ = _new_id("i")
        with self._changing():
            model = self._fabric.model
            taken = set(model.temporary.values())
            instance = Instance(
                machine=f"{resource.name}-{id_[2:8]}",
                name=inputs.get("tags", {}).get("Name", resource.name),
                image_id=inputs["ami"],
                instance_type=inputs["instanceType"],
                subnet_id=inputs["subnetId"],
                groups=list(inputs["vpcSecurityGroupIds"]),
                private_ip=model.free_private_ip(inputs["subnetId"]),
                temporary_ip=next(ip for ip in self._plan.temporary_ips if ip not in taken),
                profile=inputs.get("iamInstanceProfile", ""),
            )
            self._cloud.instances[id_] = instance
        folder = self._plan.machine_dir(instance.machine) / "instance"
        folder.mkdir(parents=True, exist_ok=True)
        # User-data with its first-contact key is the instance's own: its folder goes with it.
        (folder / "user-data").touch(mode=0o600)
        (folder / "user-data").write_bytes(base64.b64decode(inputs["userDataBase64"]))
        (folder / "meta-data").write_text(
            json.dumps(
                {
                    "instance-id": id_,
                    "local-hostname": f"ip-{instance.private_ip.replace('.', '-')}",
                }
            )
        )
        self._start(id_)
        return id_, {
            "arn": f"arn:aws:ec2:::instance/{id_}",
            "privateIp": instance.private_ip,
            "publicIp": instance.temporary_ip,
            "instanceState": "running",
        }

    def _start(self, id_: str) -> None:
        instance = self._cloud.instances[id_]
        cpus, memory_mib = _size_of(instance.instance_type)
        folder = self._plan.machine_dir(instance.machine) / "instance"
        machine.boot(
            self._plan,
            instance.machine,
            image=self._image,
            nameserver=self._world.network_of(instance.subnet_id).resolver,
            seed={file.name: file.read_bytes() for file in folder.iterdir()},
            memory_mib=memory_mib,
            cpus=cpus,
            devices=[
                self._device(volume)
                for volume, holder in self._cloud.attachments.values()
                if holder == id_
            ],
        )

    def _change_instance(self, id_: str, inputs: Inputs) -> None:
        instance = self._cloud.instances[id_]
        _size_of(inputs["instanceType"])
        with self._changing():
            instance.groups = list(inputs["vpcSecurityGroupIds"])
            instance.profile = inputs.get("iamInstanceProfile", "")
        if instance.instance_type != inputs["instanceType"]:
            # As EC2 does: the type of a stopped instance is changed, then it is started again.
            machine.stop(self._plan, instance.machine)
            with self._changing():
                instance.instance_type = inputs["instanceType"]
            self._start(id_)

    def _terminate(self, id_: str) -> None:
        instance = self._cloud.instances.get(id_)
        if instance is None:
            return
        machine.remove(self._plan, instance.machine)
        with self._changing():
            # A terminated instance lets go of its volumes.
            for attachment, (_, holder) in list(self._cloud.attachments.items()):
                if holder == id_:
                    del self._cloud.attachments[attachment]
            del self._cloud.instances[id_]

    def _public_ip(self, id_: str) -> str:
        for allocation, holder in self._cloud.associations.values():
            if holder == id_ and allocation in self._cloud.addresses:
                return self._cloud.addresses[allocation]
        return self._cloud.instances[id_].temporary_ip

    # The kernel

    @contextlib.contextmanager
    def _changing(self, *, seen: bool = True) -> Iterator[None]:
        """A change of what exists: saved at its end, and where the network sees it, applied."""
        with self._lock:
            yield
            self._cloud.save(self._path)
            self._tell_identities()
            if seen:
                self._apply()

    def _apply(self) -> None:
        self._fabric.update(self._model)

    def _model(self, model: NetworkModel) -> NetworkModel:
        """The network with everything that exists here, beside the given world's hosts."""
        cloud = self._cloud
        for name in [n for n, a in model.attachments.items() if a.groups is not None]:
            model = without_machine(model, name)
        eips: dict[str, str | None] = {
            # What is left in the model are the given world's hosts, with their addresses.
            ip: name
            for ip, name in model.eips.items()
            if name in model.attachments
        }
        for instance in cloud.instances.values():
            model = with_attachment(
                model,
                Attachment(
                    machine=instance.machine,
                    subnet=instance.subnet_id,
                    private_ip=instance.private_ip,
                    groups=tuple(instance.groups),
                ),
            )
        holders = dict(cloud.associations.values())
        for allocation, address in cloud.addresses.items():
            holder = cloud.instances.get(holders.get(allocation, ""))
            eips[address] = holder.machine if holder else None
        return replace(
            model,
            groups={id_: self._group(id_) for id_ in cloud.groups},
            eips=eips,
            temporary={row.machine: row.temporary_ip for row in cloud.instances.values()},
            public_names={id_.split("_")[1]: ip for id_, ip in cloud.records.items()},
        )

    def _group(self, id_: str) -> SecurityGroup:
        mine = [rule for rule in self._cloud.rules.values() if rule["group"] == id_]

        def rules(direction: str) -> tuple[Rule, ...]:
            return tuple(Rule(**rule["rule"]) for rule in mine if rule["direction"] == direction)

        return SecurityGroup(ingress=rules("ingress"), egress=rules("egress"))


def _new_id(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(8)}"


def _size_of(instance_type: str) -> tuple[int, int]:
    if instance_type not in INSTANCE_TYPES:
        raise SandboxError(
            f"The sandbox has no instance type {instance_type}.",
            f"Use one of {', '.join(INSTANCE_TYPES)} in the sandbox's settings.",
        )
    return INSTANCE_TYPES[instance_type]


def _look_up(world: World, function: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """What AWS would answer of the given world, which has no default VPC."""
    if function == "aws:ec2/getSubnet:getSubnet":
        network = world.network_of(args["id"])
        return {"vpcId": network.id, "availabilityZone": f"{network.id}-a"}
    if function == "aws:ec2/getVpc:getVpc":
        by_id = {network.id: network for network in world.networks}
        if args.get("id") not in by_id:
            raise SandboxError(
                "The sandbox's world has no default VPC.",
                "Give each host a subnetId of sandbox/world.yaml in the settings.",
            )
        return {"cidrBlock": by_id[args["id"]].cidr}
    if function == "aws:ec2/getAmi:getAmi":
        return {"id": world.ami}
    if function == "aws:route53/getZone:getZone":
        if args["name"] != world.zone.name:
            raise SandboxError(
                f"The sandbox's world has no zone {args['name']!r}.",
                f"Set prometheus-federation:zone to {world.zone.name}.",
            )
        return {"zoneId": world.zone.id}
    raise NotImplementedError(f"{function}: the sandbox does not answer this")


def _rule(type_: str, inputs: Inputs) -> dict[str, Any]:
    ipaddress.IPv4Network(inputs["cidrIpv4"])
    return {
        "group": inputs["securityGroupId"],
        "direction": "ingress" if type_ == providers.INGRESS_RULE else "egress",
        "rule": {
            "protocol": inputs["ipProtocol"],
            "peer": inputs["cidrIpv4"],
            "from_port": inputs["fromPort"],
            "to_port": inputs["toPort"],
        },
    }
