"""What the sandbox needs of this machine, and how it runs programs here.

Nothing in this module belongs to one sandbox. It answers whether machines can be booted here
at all, names and installs the Debian packages that are missing, and says where the kernel's
control groups are. It changes nothing but installed packages, and those only after naming them.
"""

import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

LINUX_INSTEAD = (
    "Use a Linux virtual machine or a CI runner (Debian 12 or later, 4 GiB of memory), "
    "and run the same command there as root."
)

# Debian package → what of it is used. A name is looked for on PATH, a path as a file.
PACKAGES = {
    "systemd-container": "systemd-nspawn",
    "mmdebstrap": "mmdebstrap",
    "debian-archive-keyring": "/usr/share/keyrings/debian-archive-keyring.gpg",
    "nftables": "nft",
    "iproute2": "ip",
    "dnsmasq-base": "dnsmasq",
    "openssh-client": "ssh",
    "e2fsprogs": "mkfs.ext4",
    "util-linux": "nsenter",
    "mount": "losetup",
}

T = TypeVar("T")

KERNEL_NAMESPACES = ("mnt", "net", "pid", "uts", "ipc", "cgroup")


class SandboxError(Exception):
    """Something that the user can understand and mend: what is wrong, and the remedy."""

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n{self.remedy}" if self.remedy else self.message


class Progress(Protocol):
    """Announces a step: shown while it runs, with its time when it is done."""

    def __call__(self, text: str, /) -> AbstractContextManager[None]:
        """Return the context in which the step named `text` runs."""
        ...


def run(
    argv: Sequence[str | Path],
    *,
    stdin: str | None = None,
    check: bool = True,
    timeout: float = 600,
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end and return what it said.

    Raises SandboxError with the program's own last words when `check` is set and it fails, or
    when it takes more than `timeout` seconds.
    """
    command = [str(word) for word in argv]
    try:
        done = subprocess.run(
            command,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            env=env,
            check=False,
        )
    except FileNotFoundError as error:
        raise SandboxError(
            f"The program '{command[0]}' is not installed.", "Run `make up`, which installs it."
        ) from error
    except subprocess.TimeoutExpired as error:
        raise SandboxError(
            f"'{' '.join(command)}' did not end within {timeout:g} s.", "Run the command again."
        ) from error
    if check and done.returncode != 0:
        words = "\n".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-15:])
        raise SandboxError(f"'{' '.join(command)}' failed ({done.returncode}): {words}")
    return done


def kill_with_parent(argv: Sequence[str | Path]) -> list[str | Path]:
    """Wrap a long command so that it dies, with all that it started, when this process does.

    It runs in mount and process namespaces of its own, so that neither its mounts nor its
    children can outlive it. The thread that starts it must wait for it: the kernel ties the
    child to the thread.
    """
    return [
        *("setpriv", "--pdeathsig", "KILL", "--"),
        *("unshare", "--mount", "--propagation", "private"),
        *("--pid", "--fork", "--kill-child", "--mount-proc", "--"),
        *argv,
    ]


def wait_until(probe: Callable[[], T | None], *, seconds: float, step: float = 0.05) -> T | None:
    """Call `probe` until it answers something true; None when it did not within `seconds`."""
    end = time.monotonic() + seconds
    while True:
        if answer := probe():
            return answer
        if time.monotonic() >= end:
            return None
        time.sleep(step)


def is_alive(pid: int) -> bool:
    """Whether a process is there and has not ended: one that nobody has taken note of has."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def require_platform() -> None:
    """Refuse a system on which no installed package would help; complete PATH on others."""
    if sys.platform != "linux":
        system = {"darwin": "macOS", "win32": "Windows"}.get(sys.platform, sys.platform)
        raise SandboxError(
            f"The sandbox boots real systemd machines, which needs Linux; this is {system}.",
            LINUX_INSTEAD,
        )
    if platform.machine() != "x86_64":
        raise SandboxError(
            f"The sandbox's machines are x86_64 (t3.micro); this is {platform.machine()}.",
            LINUX_INSTEAD,
        )
    absent = [name for name in KERNEL_NAMESPACES if not Path(f"/proc/self/ns/{name}").exists()]
    if absent:
        raise SandboxError(f"This kernel lacks the namespaces {', '.join(absent)}.", LINUX_INSTEAD)
    _complete_path()


def missing(packages: Mapping[str, str] = PACKAGES) -> list[str]:
    """Return the packages of which the file or program that they are needed for is not there."""

    def installed(thing: str) -> bool:
        return Path(thing).exists() if thing.startswith("/") else shutil.which(thing) is not None

    return [package for package, thing in packages.items() if not installed(thing)]


def install(progress: Progress, wanted: Mapping[str, str] = PACKAGES) -> list[str]:
    """Install what `missing` names, having named it; return the packages."""
    packages = missing(wanted)
    if not packages:
        return []
    if shutil.which("apt-get") is None:
        raise SandboxError(
            f"Missing: {', '.join(packages)}. This machine has no apt-get to install them with.",
            "Install their equivalents, or " + LINUX_INSTEAD[0].lower() + LINUX_INSTEAD[1:],
        )
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with progress(f"Installing the Debian packages {', '.join(packages)}"):
        command = ["apt-get", "install", "--yes", "--no-install-recommends", *packages]
        if run(command, check=False, env=env).returncode != 0:
            run(["apt-get", "update"], env=env)
            run(command, env=env)
    return packages


def require_kernel() -> None:
    """Try, in throw-away namespaces, each thing that the machines will need of the kernel."""
    for module in ("overlay", "loop", "veth", "nf_tables"):
        if shutil.which("modprobe"):
            run(["modprobe", "--quiet", module], check=False)
    lacking = [what for what, probe in _KERNEL_PROBES.items() if not probe()]
    if lacking:
        raise SandboxError(
            f"This kernel or container does not allow: {'; '.join(lacking)}.", LINUX_INSTEAD
        )
    cgroups()


def prepare(progress: Progress) -> None:
    """Make sure that this machine can run a sandbox; raise SandboxError saying why it cannot."""
    require_platform()
    install(progress)
    require_kernel()


def _complete_path() -> None:
    """Add the sbin directories, which PATH lacks on Debian for a plain user, and after `su`."""
    have = os.environ.get("PATH", "").split(":")
    more = [d for d in ("/usr/local/sbin", "/usr/sbin", "/sbin") if d not in have]
    os.environ["PATH"] = ":".join([*have, *more])


def _allowed(*argv: str) -> Callable[[], bool]:
    return lambda: run(argv, check=False, timeout=30).returncode == 0


_KERNEL_PROBES: dict[str, Callable[[], bool]] = {
    "mounting (mount namespaces)": _allowed(
        "unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"
    ),
    "overlay file systems": lambda: "\toverlay\n" in Path("/proc/filesystems").read_text(),
    "loop devices (/dev/loop-control)": lambda: Path("/dev/loop-control").exists(),
    "virtual network links": _allowed(
        *"unshare --net ip link add pf-a type veth peer name pf-b".split()
    ),
    "nftables with address translation": _allowed(
        *"unshare --net nft add table inet pf ;".split(),
        *"add chain inet pf nat { type nat hook postrouting priority srcnat ; } ;".split(),
        *"add rule inet pf nat ct state new masquerade".split(),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Cgroups:
    """Where this machine's control groups are.

    version: 2 where one tree holds every controller, 1 where each controller has its own.
    limits: the trees in which memory and CPU are limited, by controller (v2: the same one).
    trees: every tree that a machine needs a group of its own in. On v1 that includes the named
        systemd tree and the empty v2 tree: machines that shared a group there would take each
        other's services for their own.
    """

    version: int
    limits: dict[str, Path]
    trees: tuple[Path, ...]


def cgroups() -> Cgroups:
    """Find the control groups, or raise SandboxError when memory or CPU cannot be limited."""
    return parse_cgroups(Path("/proc/self/mountinfo").read_text())


def parse_cgroups(mountinfo: str) -> Cgroups:
    """Read the control group mounts out of the text of /proc/self/mountinfo."""
    v1: dict[str, Path] = {}
    v2: Path | None = None
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        mount_point = Path(before.split(" ")[4])
        if kind == "cgroup2":
            v2 = v2 or mount_point
        elif kind == "cgroup":
            for option in options.split(","):
                if option in ("memory", "cpu", "pids", "name=systemd"):
                    v1.setdefault(option, mount_point)
    if "memory" in v1 and "cpu" in v1:
        trees = [*v1.values(), *([v2] if v2 else [])]
        limits = {name: v1[name] for name in ("memory", "cpu")}
        return Cgroups(version=1, limits=limits, trees=tuple(dict.fromkeys(trees)))
    if v2 is not None and "memory" not in v1:
        return Cgroups(version=2, limits={"memory": v2, "cpu": v2}, trees=(v2,))
    raise SandboxError(
        "No control groups for memory and CPU are mounted, so machines cannot get the size "
        "of their instance type.",
        LINUX_INSTEAD,
    )
