"""DNS as the sandbox's machines see it.

One server on the internet answers for the public records and asks this machine's own name
servers for everything else. One in each network's router answers for that network's private
names and asks the one on the internet. No server of a network knows another network's names.

Each is a dnsmasq of its own, told of changed records by a signal. Its records and process id are
under the plan's runtime directory.
"""

import os
import shutil
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path

from sandbox.host import SandboxError, run, wait_until
from sandbox.plan import NETNS_DIR, Plan

# Route53 gives each record a TTL; nothing inside the machines caches, so one serves for all.
TTL_SECONDS = 60


@dataclass(frozen=True, kw_only=True)
class DnsServer:
    """One server: where it runs and listens, what it knows, and whom it asks.

    zones: domains that it alone answers for, so that an unknown name in them is no such name
        and is not looked up in the real world.
    delegated: names that another server answers for, and its address.
    cache: whether it may remember answers of those it asks.
    """

    netns: str
    address: str
    records: Mapping[str, str] = field(default_factory=dict)
    upstreams: tuple[str, ...] = ()
    zones: tuple[str, ...] = ()
    delegated: Mapping[str, str] = field(default_factory=dict)
    cache: bool = False


def parse_nameservers(resolv_conf: str) -> list[str]:
    """Return the IPv4 name servers of a resolv.conf."""
    servers: list[str] = []
    for line in resolv_conf.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == "nameserver":
            try:
                servers.append(str(IPv4Address(words[1])))
            except ValueError:
                continue  # IPv6: the sandbox's internet has none.
    return servers


def upstream_nameservers() -> list[str]:
    """Return this machine's name servers, behind a local stub if it has one.

    Raises SandboxError where all that it has is a server on its own loopback, which the
    sandbox's namespaces cannot reach.
    """
    for path in (Path("/etc/resolv.conf"), Path("/run/systemd/resolve/resolv.conf")):
        if path.exists():
            found = parse_nameservers(path.read_text())
            if usable := [server for server in found if not IPv4Address(server).is_loopback]:
                return usable
    raise SandboxError(
        "This machine's only name servers are on its own loopback address, where the sandbox's "
        "machines cannot reach them, so they could not install packages.",
        "Put a name server of your network into /etc/resolv.conf.",
    )


def apply(plan: Plan, servers: Sequence[DnsServer]) -> bool:
    """Bring the servers to this; start what is dead, end what is gone. Return if any changed."""
    folder = plan.runtime_dir / "dns"
    folder.mkdir(parents=True, exist_ok=True)
    changed = False
    for server in servers:
        changed |= _apply_one(folder / server.netns, server)
    wanted = {server.netns for server in servers}
    for stale in folder.iterdir():
        if stale.name not in wanted:
            if pid := running(stale):
                os.kill(pid, signal.SIGTERM)
            shutil.rmtree(stale)
            changed = True
    return changed


def render_hosts(records: Mapping[str, str]) -> str:
    """Render records as a hosts file, always in the same order."""
    return "".join(f"{address} {name}\n" for name, address in sorted(records.items()))


def render_servers(delegated: Mapping[str, str]) -> str:
    """Render who answers for which names as dnsmasq reads it, always in the same order."""
    return "".join(f"server=/{name}/{address}\n" for name, address in sorted(delegated.items()))


def _command(folder: Path, server: DnsServer) -> list[str]:
    return [
        "dnsmasq",
        "--conf-file=/dev/null",
        "--user=nobody",
        "--group=nogroup",
        f"--pid-file={folder / 'pid'}",
        f"--log-facility={folder / 'log'}",
        "--no-hosts",
        "--no-resolv",
        "--bind-interfaces",
        f"--listen-address={server.address}",
        f"--addn-hosts={folder / 'hosts'}",
        f"--servers-file={folder / 'servers'}",
        f"--local-ttl={TTL_SECONDS}",
        f"--cache-size={1000 if server.cache else 0}",
        *(f"--server={upstream}" for upstream in server.upstreams),
        *(f"--local=/{zone}/" for zone in server.zones),
    ]


def _apply_one(folder: Path, server: DnsServer) -> bool:
    folder.mkdir(exist_ok=True)
    flags, command = folder / "flags", _command(folder, server)
    # What it reads again when it gets the signal.
    texts = {
        folder / "hosts": render_hosts(server.records),
        folder / "servers": render_servers(server.delegated),
    }
    netns_inode = (NETNS_DIR / server.netns).stat().st_ino
    flags_text = f"{netns_inode} {' '.join(command)}\n"
    pid = running(folder)
    same = all(file.exists() and file.read_text() == text for file, text in texts.items())
    if not same:
        for file, text in texts.items():
            file.write_text(text)
            # Read again after the program has given up root.
            file.chmod(0o644)
    if pid and flags.exists() and flags.read_text() == flags_text:
        if not same:
            os.kill(pid, signal.SIGHUP)
        return not same
    if pid:
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: running(folder) is None, seconds=2, step=0.01)
    (folder / "pid").unlink(missing_ok=True)
    run(["nsenter", f"--net={NETNS_DIR / server.netns}", *command], timeout=10)
    flags.write_text(flags_text)
    return True


def running(folder: Path) -> int | None:
    """Return the process id, if that process is still the folder's server and not another's."""
    try:
        pid = int((folder / "pid").read_text())
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return None
    return pid if f"--pid-file={folder / 'pid'}".encode() in arguments else None
