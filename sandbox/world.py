"""The given world: networks, a DNS zone and hosts that exist before the program runs.

It is described in world.yaml, apart from the program's settings, and brought about here. The
program's own machines live in these networks but are none of this module's business. `destroy`
is the end of both: it removes everything that a sandbox has, and needs no state for it.
"""

import hashlib
import os
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from ipaddress import AddressValueError, IPv4Address, IPv4Network, NetmaskValueError
from pathlib import Path
from typing import Any

import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lets_encrypt_settings import ROOTS
from sandbox import acme, machine, network
from sandbox.host import Progress, SandboxError, cgroups, is_alive, run, wait_until
from sandbox.image import (
    EXPORTER_PACKAGES,
    PRIMED_PACKAGES,
    UFW_PACKAGES,
    Image,
    ensure_image,
)
from sandbox.network import Attachment, Fabric, Network, NetworkModel
from sandbox.plan import CACHE_DIR, MARKER, NETNS_DIR, Plan, checked_name, not_ours

WORLD_FILE = Path(__file__).with_name("world.yaml")
USER = "admin"


@dataclass(frozen=True, kw_only=True)
class Zone:
    """The Route53 zone that the user owns."""

    name: str
    id: str


@dataclass(frozen=True, kw_only=True)
class Host:
    """A host that the user has already. `name` is its full name in its network's private DNS.

    exporter: it has the distribution's node_exporter. ufw: it has a firewall that lets SSH in
    and nothing else. public: it has a public address, and no firewall but its own.
    """

    name: str
    subnet: str
    address: str
    memory_mib: int = 128
    exporter: bool = False
    ufw: bool = False
    public: bool = False

    @property
    def machine(self) -> str:
        """The machine's name: the host's without its domain."""
        return self.name.partition(".")[0]

    @property
    def packages(self) -> tuple[str, ...]:
        """What is installed on it beyond the base image."""
        exporter = EXPORTER_PACKAGES if self.exporter else ()
        return exporter + (UFW_PACKAGES if self.ufw else ())


@dataclass(frozen=True, kw_only=True)
class World:
    """All that is given. acme: a public certificate authority is among it, and what hosts ask of
    AWS to prove their names to it."""

    zone: Zone
    ami: str
    networks: tuple[Network, ...]
    hosts: tuple[Host, ...] = field(default=())
    acme: bool = False

    def network_of(self, subnet: str) -> Network:
        """Return the network of a subnet; raise SandboxError where there is none."""
        return NetworkModel(networks={n.id: n for n in self.networks}).network_of(subnet)


# Reading: every value is checked, and an error names file, key and value.


class _Reader:
    """Takes keys out of one mapping of the file, and refuses those that nobody took."""

    def __init__(self, file: Path, path: str, value: object) -> None:
        self.file, self.path = file, path
        if not isinstance(value, dict):
            raise self.error("", value, "a mapping")
        self.left: dict[str, Any] = {str(key): item for key, item in value.items()}

    def error(self, key: str, value: object, wanted: str) -> SandboxError:
        where = f"{self.path}.{key}".strip(".") or "the file"
        return SandboxError(f"{self.file}: {where} is {value!r}.", f"It must be {wanted}.")

    def text(self, key: str) -> str:
        value = self.left.pop(key, None)
        if not isinstance(value, str) or not value:
            raise self.error(key, value, "a text")
        return value

    def whole(self, key: str, default: int, minimum: int) -> int:
        value = self.left.pop(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise self.error(key, value, f"a whole number of at least {minimum}")
        return value

    def flag(self, key: str) -> bool:
        value = self.left.pop(key, False)
        if not isinstance(value, bool):
            raise self.error(key, value, "true or false")
        return value

    def cidr(self, key: str) -> str:
        return self.checked_cidr(key, self.text(key))

    def checked_cidr(self, key: str, value: object) -> str:
        try:
            return str(IPv4Network(str(value)))
        except (AddressValueError, NetmaskValueError, ValueError):
            raise self.error(key, value, "an IPv4 range such as 10.20.1.0/24") from None

    def address(self, key: str) -> str:
        value = self.text(key)
        try:
            return str(IPv4Address(value))
        except AddressValueError:
            raise self.error(key, value, "an IPv4 address") from None

    def sub(self, key: str) -> "_Reader":
        return _Reader(self.file, f"{self.path}.{key}".strip("."), self.left.pop(key, None))

    def rows(self, key: str) -> list["_Reader"]:
        value = self.left.pop(key, [])
        if not isinstance(value, list):
            raise self.error(key, value, "a list")
        return [
            _Reader(self.file, f"{self.path}.{key}[{number}]".strip("."), row)
            for number, row in enumerate(value)
        ]

    def done(self) -> None:
        if self.left:
            key = sorted(self.left)[0]
            raise SandboxError(
                f"{self.file}: {f'{self.path}.{key}'.strip('.')} is not known here.",
                "Remove it, or correct its spelling.",
            )


def load_world(file: Path = WORLD_FILE) -> World:
    """Read a world file. Raises SandboxError that names the file, the key and the value."""
    try:
        content = yaml.safe_load(file.read_text())
    except FileNotFoundError:
        raise SandboxError(f"There is no file {file}.", "Name a world file that exists.") from None
    except yaml.YAMLError as error:
        raise SandboxError(f"{file} is not YAML: {error}", "Correct the file.") from error
    top = _Reader(file, "", content)
    zone = top.sub("zone")
    world = World(
        zone=Zone(name=zone.text("name"), id=zone.text("id")),
        ami=top.text("ami"),
        networks=tuple(_read_network(row) for row in top.rows("networks")),
        hosts=tuple(_read_host(row) for row in top.rows("hosts")),
        acme=top.flag("acme"),
    )
    zone.done()
    top.done()
    _check(file, world)
    names: dict[str, dict[str, str]] = {item.id: {} for item in world.networks}
    for host in world.hosts:
        names[world.network_of(host.subnet).id][host.name] = host.address
    networks = tuple(replace(item, private_names=names[item.id]) for item in world.networks)
    return replace(world, networks=networks)


def _read_network(row: _Reader) -> Network:
    identity, cidr, subnets = row.text("id"), row.cidr("cidr"), row.sub("subnets")
    nat_gateway = row.flag("natGateway")
    row.done()
    return Network(
        id=identity,
        cidr=cidr,
        subnets={name: subnets.checked_cidr(name, value) for name, value in subnets.left.items()},
        nat_gateway=nat_gateway,
    )


def _read_host(row: _Reader) -> Host:
    host = Host(
        name=row.text("name"),
        subnet=row.text("subnet"),
        address=row.address("address"),
        memory_mib=row.whole("memoryMib", 128, 64),
        exporter=row.flag("exporter"),
        ufw=row.flag("ufw"),
        public=row.flag("public"),
    )
    row.done()
    return host


def _check(file: Path, world: World) -> None:
    """Refuse what contradicts itself: a name twice, a subnet or address outside its range."""

    def unique(what: str, names: Sequence[str]) -> None:
        for name in names:
            if names.count(name) > 1:
                raise SandboxError(f"{file}: the {what} '{name}' is there twice.", "Rename one.")

    unique("network", [item.id for item in world.networks])
    unique("subnet", [subnet for item in world.networks for subnet in item.subnets])
    unique("host", [host.machine for host in world.hosts])
    for item in world.networks:
        checked_name(item.id)
        for subnet, cidr in item.subnets.items():
            if not IPv4Network(cidr).subnet_of(IPv4Network(item.cidr)):
                raise SandboxError(
                    f"{file}: {subnet}'s range {cidr} is not in {item.id}'s, {item.cidr}.",
                    "Give it a range within the network's.",
                )
    NetworkModel(
        networks={item.id: item for item in world.networks},
        attachments={host.machine: _attachment(host) for host in world.hosts},
    ).check()


def _attachment(host: Host) -> Attachment:
    checked_name(host.machine)
    return Attachment(machine=host.machine, subnet=host.subnet, private_ip=host.address)


# Bringing it about


def world_key(plan: Plan) -> Path:
    """Return the private SSH key of the given hosts, making it where there is none.

    The public half is beside it, with the ending .pub.
    """
    return _key_pair(plan.state_dir / "world" / "id_ed25519", "given-hosts")


def host_key(plan: Plan, host: Host) -> Path:
    """Return the private SSH host key of a given host, making it where there is none.

    A host has it from its first boot on, so who it is can be told before it boots. The public
    half is beside it, with the ending .pub.
    """
    return _key_pair(plan.state_dir / "world" / f"ssh_host_{host.machine}", host.machine)


def _key_pair(path: Path, comment: str) -> Path:
    public = path.with_suffix(".pub")
    if path.exists() and public.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    key = Ed25519PrivateKey.generate()
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )
    )
    # Last and at once: a pair is complete when both files are there.
    fresh = public.with_suffix(".new")
    fresh.write_text(f"{_public_line(key)} {comment}\n")
    fresh.replace(public)
    return path


def _public_line(key: Ed25519PrivateKey) -> str:
    return (
        key.public_key()
        .public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        .decode()
    )


def _seed(plan: Plan, world: World, host: Host) -> dict[str, str]:
    own_key = host_key(plan, host)
    user_data: dict[str, Any] = {
        "hostname": host.machine,
        "fqdn": host.name,
        "ssh_authorized_keys": [world_key(plan).with_suffix(".pub").read_text().strip()],
        "ssh_keys": {
            "ed25519_private": own_key.read_text(),
            "ed25519_public": own_key.with_suffix(".pub").read_text().strip(),
        },
    }
    if host.ufw:
        network_range = world.network_of(host.subnet).cidr
        source = "any" if host.public else network_range
        user_data["runcmd"] = [
            ["ufw", "allow", "proto", "tcp", "from", source, "to", "any", "port", "22"],
            ["ufw", "--force", "enable"],
        ]
    return {
        "user-data": "#cloud-config\n" + yaml.safe_dump(user_data, sort_keys=False),
        "meta-data": yaml.safe_dump({"instance-id": f"given-{host.machine}"}),
    }


def public_addresses(plan: Plan, world: World) -> dict[str, str]:
    """Return the public address of each given host that has one, by the host's full name.

    From the range's end, in the order of the file, as the program's own come from its beginning.
    """
    public = [host.name for host in world.hosts if host.public]
    return dict(zip(public, reversed(plan.eips), strict=False))


def _gateways(plan: Plan, world: World) -> dict[str, str]:
    wanted = [item.id for item in world.networks if item.nat_gateway]
    if len(wanted) > len(plan.nat_ips):
        raise SandboxError(
            f"{len(wanted)} networks of the world have a NAT gateway.",
            f"The sandbox has addresses for {len(plan.nat_ips)}.",
        )
    return dict(zip(wanted, plan.nat_ips, strict=False))


def with_world(
    model: NetworkModel, world: World, plan: Plan, *, before: Sequence[str] = ()
) -> NetworkModel:
    """Return the model with the world's networks and hosts, and without hosts that are gone."""
    hosts = {host.machine: _attachment(host) for host in world.hosts}
    machines = {host.name: host.machine for host in world.hosts}
    given = {ip: machines[name] for name, ip in public_addresses(plan, world).items()}
    others = {ip: who for ip, who in model.eips.items() if who not in {*before, *hosts}}
    return replace(
        model,
        networks={item.id: item for item in world.networks},
        attachments={**network.without(model.attachments, *before), **hosts},
        eips={**others, **given},
        gateways=_gateways(plan, world),
        zones=tuple(dict.fromkeys((*model.zones, world.zone.name))),
    )


# What settings may say of the world


def resolve_given(
    config: Mapping[str, Any], plan: Plan, world: World, *, stand_ins: bool = False
) -> dict[str, Any]:
    """Return the settings with what only the sandbox knows in the place of `{given: …}`.

    `{given: sshKey}` is the private key of the given hosts, `{given: <host>}` that host's public
    host key, `{given: <host>/publicAddress}` its address, `{given: acmeRoots}` what the public
    certificate authority's certificates chain to. Raises SandboxError for another name.
    stand_ins: values that look the same, for a check that may not write any file yet.
    """
    known: dict[str, Callable[[], str]] = {
        "sshKey": lambda: _stand_in("")[0] if stand_ins else world_key(plan).read_text()
    }
    for host in world.hosts:
        known[host.name] = lambda host=host: (
            _stand_in(host.name)[1]
            if stand_ins
            else host_key(plan, host).with_suffix(".pub").read_text().rpartition(" ")[0]
        )
    if world.acme:
        known["acmeRoots"] = lambda: ROOTS.read_text() if stand_ins else acme.roots(plan)
    for name, address in public_addresses(plan, world).items():
        known[f"{name}/publicAddress"] = lambda address=address: address

    def resolved(value: Any, path: str) -> Any:
        if isinstance(value, Mapping):
            if set(value) != {"given"}:
                return {key: resolved(item, f"{path}.{key}") for key, item in value.items()}
            if str(value["given"]) not in known:
                raise SandboxError(
                    f"{path}: the sandbox's world gives no {value['given']!r}.",
                    f"Name one of: {', '.join(known)}.",
                )
            return known[value["given"]]()
        if isinstance(value, list):
            return [resolved(item, f"{path}[{number}]") for number, item in enumerate(value)]
        return value

    return {key: resolved(value, key) for key, value in config.items()}


def _stand_in(name: str) -> tuple[str, str]:
    """A key that nobody has: private and public half, the same for a name on every machine."""
    key = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest())
    private = key.private_bytes(
        serialization.Encoding.PEM,
        # OpenSSH's own format holds random bytes.
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return private.decode(), _public_line(key)


# The machines


def given_hosts(plan: Plan) -> list[str]:
    """Return the machines that this world was brought about with, from its own record."""
    record = plan.state_dir / "world" / "hosts"
    return record.read_text().split() if record.exists() else []


def ensure_networks(plan: Plan, world: World, fabric: Fabric) -> bool:
    """Bring the networks and names to the world's; return whether anything changed."""
    before = given_hosts(plan)
    now = {host.machine for host in world.hosts}
    for gone in sorted(set(before) - now):
        machine.remove(plan, gone)
    changed = fabric.update(lambda model: with_world(model, world, plan, before=before))
    record = plan.state_dir / "world" / "hosts"
    record.parent.mkdir(parents=True, exist_ok=True)
    # Those to come are noted before they exist, so that none is forgotten by a kill.
    record.write_text("\n".join(sorted(now)) + "\n")
    return changed


def ensure_hosts(
    plan: Plan,
    world: World,
    progress: Progress,
    *,
    primed_packages: Sequence[str] = PRIMED_PACKAGES,
    wait: bool = True,
) -> list[str]:
    """Boot the hosts that do not run, all at once; return which were booted.

    The networks must exist (ensure_networks). wait: return only when the booted ones are up.
    """
    asleep = [host for host in world.hosts if not machine.is_running(plan, host.machine)]
    if not asleep:
        return []
    images: dict[tuple[str, ...], Image] = {}
    for packages in {host.packages for host in asleep}:
        images[packages] = ensure_image(
            progress, primed_packages=primed_packages, installed_packages=packages
        )
    world_key(plan)

    def start(host: Host) -> None:
        machine.boot(
            plan,
            host.machine,
            image=images[host.packages],
            nameserver=world.network_of(host.subnet).resolver,
            seed=_seed(plan, world, host),
            memory_mib=host.memory_mib,
            cpus=1,
        )
        if wait:
            machine.wait_for_boot(plan, host.machine)

    names = [host.machine for host in asleep]
    with (
        progress(f"Booting the given hosts {', '.join(names)}"),
        ThreadPoolExecutor(max_workers=16) as pool,
    ):
        list(pool.map(start, asleep))
    return names


# The end of it


def destroy(plan: Plan) -> list[str]:
    """Remove every trace of a sandbox and return what was removed, in words.

    Works with no state, whatever was killed at whatever moment: it finds things by the plan's
    names and folders alone. The caller holds the plan's lock (plan.hold). What is shared by all
    sandboxes, the cached image and releases, stays: see purge.
    """
    removed: list[str] = []
    where = cgroups()
    groups = [tree / plan.prefix for tree in where.trees]
    names = {p.parent.name for group in groups for p in group.glob("*/launcher")}
    existed = any(group.is_dir() for group in groups)
    machine.kill_groups(groups)
    removed += [f"machine {name}" for name in sorted(names)]
    if existed:
        removed.append(f"control groups {plan.prefix}")
    removed += [f"process {pid} ({comm})" for pid, comm in _kill_in_namespaces(plan)]
    removed += network.destroy_all(plan)
    removed += _unmount_below(plan.state_dir)
    removed += [f"loop device {name}" for name in machine.release_loops_below(plan.state_dir)]
    for folder in (plan.state_dir, plan.runtime_dir):
        if _remove_folder(plan, folder):
            removed.append(f"folder {folder}")
    parent = plan.runtime_dir.parent
    if parent.is_dir() and not any(parent.iterdir()):
        parent.rmdir()
    return removed


def _kill_in_namespaces(plan: Plan) -> list[tuple[int, str]]:
    """Kill what runs in the sandbox's network namespaces: whatever is there, is of the sandbox."""
    namespaces = {_identity(NETNS_DIR / name) for name in network.netns_names(plan)}
    killed: dict[int, str] = {}

    def gone() -> bool:
        left = False
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if _identity(folder / "ns/net") not in namespaces:
                    continue
                comm = (folder / "comm").read_text().strip()
                os.kill(int(folder.name), signal.SIGKILL)
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            killed[int(folder.name)] = comm
            left = True
        return not left

    wait_until(gone, seconds=10, step=0.02)
    wait_until(lambda: not any(is_alive(pid) for pid in killed), seconds=3)
    return sorted(killed.items())


def _identity(namespace: Path) -> tuple[int, int]:
    found = namespace.stat()
    return found.st_dev, found.st_ino


def _unmount_below(folder: Path) -> list[str]:
    points = [
        line.split(" ")[4].replace("\\040", " ")
        for line in Path("/proc/self/mountinfo").read_text().splitlines()
    ]
    ours = [point for point in points if Path(point).is_relative_to(folder)]
    for point in sorted(ours, reverse=True):
        run(["umount", "--lazy", point], check=False)
    return [f"mount {point}" for point in ours]


def _remove_folder(plan: Plan, folder: Path) -> bool:
    if not folder.is_dir():
        return False
    # Never a folder that is not plainly ours, whatever a plan was given.
    if folder == plan.state_dir and any(folder.iterdir()) and not (folder / MARKER).exists():
        raise not_ours(folder)
    # The marker goes last, so that a removal that was killed can be gone on with.
    for item in folder.iterdir():
        if item.name not in (MARKER, "lock"):
            if item.is_dir() and not item.is_symlink():
                shutil.rmtree(item)
            else:
                item.unlink()
    shutil.rmtree(folder)
    return True


def purge(slots: Mapping[int, Plan]) -> list[str]:
    """Remove what sandboxes share: the cached image and releases. No sandbox may exist."""
    for plan in slots.values():
        if plan.owner is not None:
            raise SandboxError(
                f"The sandbox in slot {plan.slot} ({plan.owner}) still uses the cached image.",
                "Run `make down` there first.",
            )
    if not CACHE_DIR.is_dir():
        return []
    shutil.rmtree(CACHE_DIR)
    return [f"folder {CACHE_DIR}"]
