"""Every name and address of one sandbox, and the lock that keeps two of them apart.

Several may run side by side on a machine: slot 0 is `make up`'s, 1 and 2 are `make test`'s.
Everything that a sandbox makes outside its own folders begins with its prefix, so that it can be
found and removed with no state at all.
"""

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from sandbox.host import SandboxError, cgroups, run

CACHE_DIR = Path("/var/cache/prometheus-federation-sandbox")
RUNTIME_ROOT = Path("/run/prometheus-federation")
NETNS_DIR = Path("/run/netns")

# TEST-NET-2 and TEST-NET-3 (RFC 5737). TEST-NET-1 is taken on our build machines.
_EIP_RANGE = IPv4Network("198.51.100.0/24")
_SERVICE_RANGE = IPv4Network("203.0.113.0/24")
# The last octet at which each slot's /27 begins. Not in order, since our build machines reach
# their package mirror at an address in 203.0.113.64/27.
_BLOCKS = (0, 192, 128, 32, 224, 160, 96, 64)
_PREFIX_LENGTH = 27
# A shorter route is of no network that this machine is in.
_MIN_PREFIX_LENGTH = 8
SLOTS = len(_BLOCKS)

MARKER = ".prometheus-federation-sandbox"

_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,48}[a-z0-9])?")


@dataclass(frozen=True)
class Plan:
    """The names and addresses of the sandbox in `slot`, whose disks and state are in `state_dir`.

    Raises SandboxError for a slot that does not exist.
    """

    slot: int
    state_dir: Path

    def __post_init__(self) -> None:
        if not 0 <= self.slot < SLOTS:
            raise SandboxError(
                f"There is no sandbox slot {self.slot}.", f"Use one of 0 to {SLOTS - 1}."
            )
        # As the kernel names mounts and the files of loop devices: with no link in it.
        object.__setattr__(self, "state_dir", self.state_dir.resolve())

    # Names

    @property
    def prefix(self) -> str:
        """What every namespace, group, link, table and machine name begins with."""
        return f"pf{self.slot}"

    @property
    def inet_netns(self) -> str:
        """The network namespace that stands for the internet."""
        return f"{self.prefix}-inet"

    def router_netns(self, network: str) -> str:
        """The namespace of a network's router: its gateway, address translation and groups."""
        return f"{self.prefix}-r-{checked_name(network)}"

    def machine_netns(self, machine: str) -> str:
        """The namespace in which a machine's only interface is."""
        return f"{self.prefix}-m-{checked_name(machine)}"

    def stranger_netns(self, name: str) -> str:
        """The namespace of somebody on the internet who has nothing to do with us."""
        return f"{self.prefix}-s-{checked_name(name)}"

    def machine_name(self, machine: str) -> str:
        """The name under which systemd-nspawn runs a machine."""
        return f"{self.prefix}-{checked_name(machine)}"

    @property
    def host_link(self) -> str:
        """This machine's end of its one link into the sandbox."""
        return f"{self.prefix}-host"

    @property
    def host_table(self) -> str:
        """The one nftables table (family ip) on this machine."""
        return self.prefix

    def link(self, kind: str, key: str) -> str:
        """A name of at most 15 characters for one end of a link, always the same for a key."""
        return f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:10]}"

    # Addresses

    @property
    def eip_range(self) -> IPv4Network:
        """Where Elastic IPs come from."""
        return IPv4Network((int(_EIP_RANGE.network_address) + _BLOCKS[self.slot], _PREFIX_LENGTH))

    @property
    def service_range(self) -> IPv4Network:
        """Where every other public address comes from."""
        return IPv4Network(
            (int(_SERVICE_RANGE.network_address) + _BLOCKS[self.slot], _PREFIX_LENGTH)
        )

    @property
    def public_ranges(self) -> tuple[IPv4Network, IPv4Network]:
        """Both ranges: all that this machine routes into the sandbox."""
        return self.eip_range, self.service_range

    @property
    def eips(self) -> tuple[str, ...]:
        """Every address that may be allocated as an Elastic IP, in order."""
        return tuple(str(address) for address in self.eip_range.hosts())

    @property
    def operator_ip(self) -> str:
        """The source address of whoever connects from this machine."""
        return str(self.service_range[1])

    @property
    def inet_ip(self) -> str:
        """The internet's own router, and the public DNS server."""
        return str(self.service_range[2])

    @property
    def releases_ip(self) -> str:
        """The server that program releases are downloaded from."""
        return str(self.service_range[3])

    @property
    def nat_ips(self) -> tuple[str, ...]:
        """What the hosts of a network with a NAT gateway appear under, one for each network."""
        return tuple(str(self.service_range[n]) for n in range(4, 8))

    @property
    def temporary_ips(self) -> tuple[str, ...]:
        """Public addresses for instances that have no Elastic IP."""
        return tuple(str(self.service_range[n]) for n in range(8, 20))

    @property
    def stranger_ips(self) -> tuple[str, ...]:
        """Public addresses for strangers."""
        return tuple(str(self.service_range[n]) for n in range(20, 29))

    @property
    def aws_ip(self) -> str:
        """Route 53's API, and the name server of what hosts write by it."""
        return str(self.service_range[29])

    @property
    def acme_ip(self) -> str:
        """The public certificate authority."""
        return str(self.service_range[30])

    # Folders

    @property
    def runtime_dir(self) -> Path:
        """What is true until the next reboot: the lock, DNS records, process ids."""
        return RUNTIME_ROOT / self.prefix

    def machine_dir(self, machine: str) -> Path:
        """A machine's disk, seed and console log."""
        return self.state_dir / "machines" / checked_name(machine)

    @property
    def owner(self) -> Path | None:
        """The state directory that this slot belongs to now, or None."""
        try:
            return Path((self.runtime_dir / "owner").read_text().strip()).resolve()
        except FileNotFoundError:
            return None


def checked_name(name: str) -> str:
    """Return the name, or raise SandboxError where it could not be part of a file name."""
    if not _NAME.fullmatch(name):
        raise SandboxError(
            f"'{name}' cannot be the name of a machine, network or stack.",
            "Use up to 50 lower-case letters, digits, '-' and '.'.",
        )
    return name


def check_ranges(plan: Plan, *, in_use: Iterable[str] = ()) -> None:
    """Refuse when this machine already routes one of our ranges, or needs an address in one.

    in_use: addresses that this machine must go on reaching (its name servers, its mirror).
    """
    routes = json.loads(run(["ip", "-json", "-4", "route", "show", "table", "all"]).stdout)
    own = plan.host_link
    for route in routes:
        if route.get("dst", "default") == "default" or route.get("dev") == own:
            continue
        network = IPv4Network(route["dst"], strict=False)
        # A default route by halves, as OpenVPN's: ours, which are longer, go first.
        if network.prefixlen < _MIN_PREFIX_LENGTH:
            continue
        for taken in plan.public_ranges:
            if network.overlaps(taken):
                where = " ".join(f"{k} {route[k]}" for k in ("gateway", "dev") if k in route)
                raise SandboxError(
                    f"The sandbox would take {taken} (documentation addresses) for its public "
                    f"addresses, but this machine already routes {route['dst']} ({where}).",
                    f"Remove that route (`ip route del {route['dst']}`), or use another slot.",
                )
    for address in in_use:
        for taken in plan.public_ranges:
            if IPv4Address(address) in taken:
                raise SandboxError(
                    f"The sandbox would take {taken} for its public addresses, but this machine "
                    f"uses {address} as name server or package mirror.",
                    "Use another slot.",
                )


@contextmanager
def hold(plan: Plan, *, take_over: bool = False, removing: bool = False) -> Iterator[None]:
    """Own the slot while the block runs; the slot stays this directory's afterwards.

    Raises SandboxError when another process holds it (naming its pid and directory), when it
    belongs to another directory, when this directory holds what no sandbox made, or when it is new
    and machines of the slot run. take_over: accept the slot of a directory that is gone.
    removing: accept its machines, too, to remove them.
    """
    runtime = plan.runtime_dir
    runtime.mkdir(parents=True, exist_ok=True)
    lock = runtime / "lock"
    while True:
        file = lock.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            pid, _, directory = file.read().strip().partition(" ")
            file.close()
            raise SandboxError(
                f"Another run of the sandbox in slot {plan.slot} is under way: process {pid}, "
                f"directory {directory}.",
                "Wait until it has ended, or end it with Ctrl-C where it runs.",
            ) from None
        # `down` removes the file while it holds it: what was opened may be gone by now.
        if lock.exists() and lock.stat().st_ino == os.fstat(file.fileno()).st_ino:
            break
        file.close()
        runtime.mkdir(parents=True, exist_ok=True)
    with file:
        _take(plan, take_over, removing)
        file.truncate(0)
        file.write(f"{os.getpid()} {plan.state_dir}\n")
        file.flush()
        yield


def _take(plan: Plan, take_over: bool, removing: bool) -> None:
    owner = plan.owner
    if owner is not None and owner != plan.state_dir and not (take_over and not owner.exists()):
        raise SandboxError(
            f"The sandbox in slot {plan.slot} belongs to another directory: {owner}.",
            f"Run `make down` in {owner.parent} first."
            if owner.exists()
            else "That directory is gone: run `make down` here, which removes what it left.",
        )
    marker = plan.state_dir / MARKER
    if not marker.exists():
        # What has the marker is removed as a whole: it must not get into a folder of the user's.
        if plan.state_dir.exists() and any(plan.state_dir.iterdir()):
            raise not_ours(plan.state_dir)
        # Their keys, disks and addresses were in the folder that was here before.
        if not removing and (left := _left_over(plan)):
            raise SandboxError(
                f"{plan.state_dir} is new, but of a sandbox in slot {plan.slot} whose folder was "
                f"removed by hand there still are: {', '.join(left)}.",
                f"Remove them with `make down` (python -m sandbox --slot {plan.slot} "
                f"--state-dir {plan.state_dir} down) first.",
            )
        plan.state_dir.mkdir(parents=True, exist_ok=True)
        plan.state_dir.chmod(0o700)
        marker.write_text("Removed by `make down`.\n")
    (plan.runtime_dir / "owner").write_text(f"{plan.state_dir}\n")


def _left_over(plan: Plan) -> list[str]:
    """Return the machines and namespaces of this slot, by their names."""
    groups = [tree / plan.prefix for tree in cgroups().trees]
    machines = {p.parent.name for group in groups for p in group.glob("*/launcher")}
    namespaces = {p.name for p in NETNS_DIR.glob(f"{plan.prefix}-*")}
    return sorted(machines) + sorted(namespaces)


def not_ours(folder: Path) -> SandboxError:
    """Return the refusal of a folder that is there and has no marker."""
    return SandboxError(
        f"{folder} has no file {MARKER}, so it may not be the sandbox's.",
        "Name another folder with --state-dir, or remove this one yourself if it is.",
    )
