"""Machines: real systemd, booted by systemd-nspawn from an image, each with a disk of its own.

A machine is a tree of processes in a control group named after it, and a folder with its disk.
Whether it runs is read from the control group, so nothing has to be remembered: it goes on when
this process ends, and the next one finds it. Its mounts are in a mount namespace of its own and
vanish with its last process, however that ends.
"""

import json
import os
import shutil
import signal
import stat
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sandbox.host import Cgroups, SandboxError, cgroups, is_alive, run, wait_until
from sandbox.image import Image
from sandbox.plan import NETNS_DIR, Plan

# systemd as a container's first process takes this signal as an order to power off.
_POWER_OFF = signal.SIGRTMIN + 4
_CPU_PERIOD_US = 100_000
# Of all machines together over any one process of this computer. They stand for computers of their
# own, which what goes on elsewhere does not slow; by default they would weigh as much as one.
_CPU_PRECEDENCE = 10
BY_ID = "/dev/disk/by-id"


@dataclass(frozen=True, kw_only=True)
class Device:
    """A volume: the file that holds it, and its name under /dev/disk/by-id in the machine."""

    image: Path
    by_id: str


# $1 the machine's control groups, $2 network namespace, $3 overlay options, $4 the machine's
# folder, then the command. The shell moves itself before it starts the machine, so that not one
# process of the machine ever runs without its limits.
#
# systemd-nspawn ends with 133 when the machine reboots, and leaves it to us to start it again.
# Each boot has a group of its own below the machine's, as the guest manages what is below.
_LAUNCH = """
set -eu
groups=$1 netns=$2 options=$3 folder=$4
shift 4
for group in $groups; do echo $$ > "$group/launcher/cgroup.procs"; done
exec nsenter --net="$netns" unshare --mount --propagation slave sh -c '
    set -u
    groups=$1 options=$2 folder=$3
    shift 3
    mount -t overlay overlay -o "$options" "$folder/root" || exit
    # systemd-nspawn notes things here, and would leave them behind when it is killed.
    mkdir -p /run/systemd/nspawn
    mount -t tmpfs tmpfs /run/systemd/nspawn || exit
    number=0
    while :; do
        number=$((number + 1))
        (
            set -e
            for group in $groups; do
                mkdir "$group/boot$number"
                sh -c "echo \\$PPID" > "$group/boot$number/cgroup.procs"
            done
            exec "$@" $(cat "$folder/binds")
        )
        code=$?
        for group in $groups; do
            find "$group/boot$number" -depth -type d -exec rmdir {} + 2> /dev/null
        done
        [ "$code" = 133 ] || exit "$code"
    done
' sh "$groups" "$options" "$folder" "$@"
"""


def boot(
    plan: Plan,
    name: str,
    *,
    image: Image,
    nameserver: str,
    seed: Mapping[str, str | bytes],
    memory_mib: int,
    cpus: float,
    devices: Sequence[Device] | None = None,
) -> bool:
    """Start a machine, unless it runs; return whether it was started.

    Its network namespace must exist (network.apply). seed: cloud-init's NoCloud files (user-data,
    meta-data, network-config; user-data may be gzipped), used when the machine boots for the
    first time only, as on AWS.
    devices: its volumes; None for those that it had. nameserver: for its resolv.conf.
    A machine that ran before keeps its disk, and the image that this disk was laid over. It is
    booting when this returns: see wait_for_boot.
    """
    if is_running(plan, name):
        return False
    folder = plan.machine_dir(name)
    upper, work, root = (folder / part for part in ("upper", "work", "root"))
    for directory in (upper, work, root):
        directory.mkdir(parents=True, exist_ok=True)
    upper.chmod(0o755)
    layers = _layers(folder, image)
    if devices is None:
        devices = recorded_devices(plan, name)
    _write(upper / "etc/resolv.conf", f"nameserver {nameserver}\noptions edns0\n", 0o644)
    seed_dir = upper / "var/lib/cloud/seed/nocloud"
    if not seed_dir.exists():
        # User-data is the business of root alone, as behind the metadata service's firewall.
        for file, content in seed.items():
            _write(seed_dir.with_name("nocloud.new") / file, content, 0o600)
        seed_dir.with_name("nocloud.new").rename(seed_dir)
    _record(folder, image=layers, devices=devices, memory_mib=memory_mib, cpus=cpus)
    groups = _make_groups(plan, name, memory_mib=memory_mib, cpus=cpus)
    overlay = f"lowerdir={':'.join(layers)},upperdir={upper},workdir={work}"
    command = [
        *("setsid", "--fork", "sh", "-c", _LAUNCH, "sh"),
        " ".join(str(group) for group in groups),
        *(str(NETNS_DIR / plan.machine_netns(name)), overlay, str(folder)),
        *("systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--boot"),
        *(f"--machine={plan.machine_name(name)}", f"--hostname={name}", f"--directory={root}"),
        *("--capability=CAP_NET_ADMIN", "--resolv-conf=off", "--timezone=off"),
        # To read the clock's state, as on any real host; setting it needs a right that is dropped.
        "--system-call-filter=adjtimex",
        *("--link-journal=no", "--console=pipe"),
    ]
    env = {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LC_ALL": "C.UTF-8",
        # A host with version 1 control groups gets a guest with version 2 all the same.
        "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1",
    }
    with (folder / "console.log").open("ab") as console:
        subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=console,
            env=env,
            cwd="/",
            check=True,
        )
    if wait_until(lambda: leader_pid(plan, name), seconds=15, step=0.02) is None:
        raise SandboxError(
            f"The machine {name} did not start: {console_tail(plan, name)}",
            f"Its console is in {folder / 'console.log'}.",
        )
    return True


def _write(path: Path, content: str | bytes, mode: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.touch(mode=mode)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def _layers(folder: Path, image: Image) -> list[str]:
    """A disk stays with the image that it was laid over."""
    recorded = _read_record(folder)
    layers = recorded["image"] if recorded else [str(layer) for layer in image.layers]
    if gone := [layer for layer in layers if not Path(layer).is_dir()]:
        raise SandboxError(
            f"The disk of {folder.name} was made over the image {gone[0]}, which is gone.",
            "Run `make down`, then `make up`.",
        )
    return layers


def _record(
    folder: Path, *, image: list[str], devices: Sequence[Device], memory_mib: int, cpus: float
) -> None:
    rows = [{"image": str(d.image), "by_id": d.by_id} for d in devices]
    record = {"image": image, "devices": rows, "memory_mib": memory_mib, "cpus": cpus}
    # What systemd-nspawn is told at this boot and at every reboot.
    binds = [f"--bind={loop_device(d.image)}:{BY_ID}/{d.by_id}\n" for d in devices]
    (folder / "binds").write_text("".join(binds))
    temporary = folder / "machine.tmp"
    temporary.write_text(json.dumps(record, indent=1))
    temporary.rename(folder / "machine.json")


def _read_record(folder: Path) -> dict | None:
    try:
        return json.loads((folder / "machine.json").read_text())
    except FileNotFoundError:
        return None


def machines(plan: Plan) -> list[str]:
    """Return the names of all machines that have a disk, running or not."""
    return sorted(file.parent.name for file in (plan.state_dir / "machines").glob("*/machine.json"))


# Control groups


def _groups(plan: Plan, name: str, where: Cgroups) -> list[Path]:
    return [tree / plan.prefix / name for tree in where.trees]


def _make_groups(plan: Plan, name: str, *, memory_mib: int, cpus: float) -> list[Path]:
    where = cgroups()
    groups = _groups(plan, name, where)
    if where.version == 2:
        for parent in (where.trees[0], where.trees[0] / plan.prefix, *groups):
            parent.mkdir(exist_ok=True)
            try:
                (parent / "cgroup.subtree_control").write_text("+memory +cpu +pids")
            except OSError as error:
                raise SandboxError(
                    f"Memory and CPU limits cannot be set below {parent}: {error.strerror}.",
                    "In a container, run the sandbox on the machine itself or with "
                    "the host's control groups (--cgroupns=host).",
                ) from error
    for group in groups:
        (group / "launcher").mkdir(parents=True, exist_ok=True)
    memory = str(memory_mib * 1024 * 1024)
    quota = int(cpus * _CPU_PERIOD_US)
    in_memory, in_cpu = (where.limits[c] / plan.prefix / name for c in ("memory", "cpu"))
    if where.version == 2:
        limits = {
            in_memory / "memory.max": memory,
            in_memory / "memory.swap.max": "0",
            in_cpu / "cpu.max": f"{quota} {_CPU_PERIOD_US}",
            in_cpu.parent / "cpu.weight": str(100 * _CPU_PRECEDENCE),
        }
    else:
        limits = {
            in_memory / "memory.limit_in_bytes": memory,
            # Memory and swap together: a t3.micro has no swap.
            in_memory / "memory.memsw.limit_in_bytes": memory,
            in_cpu / "cpu.cfs_period_us": str(_CPU_PERIOD_US),
            in_cpu / "cpu.cfs_quota_us": str(quota),
            in_cpu.parent / "cpu.shares": str(1024 * _CPU_PRECEDENCE),
        }
    for file, value in limits.items():
        if file.exists():  # A kernel may count no swap.
            file.write_text(value)
    return groups


def memory_bytes(plan: Plan, name: str) -> tuple[int, int]:
    """Return what a machine uses of its memory, and its limit, in bytes."""
    where = cgroups()
    group = where.limits["memory"] / plan.prefix / name
    files = ("memory.current", "memory.max")
    if where.version == 1:
        files = ("memory.usage_in_bytes", "memory.limit_in_bytes")
    used, limit = (int((group / file).read_text()) for file in files)
    return used, limit


def pids_below(group: Path) -> list[int]:
    """Return the processes of a control group and all groups in it."""
    found: list[int] = []
    for folder, _, files in os.walk(group):
        if "cgroup.procs" in files:
            try:
                found += [int(p) for p in (Path(folder) / "cgroup.procs").read_text().split()]
            except OSError:
                continue  # The group is just going.
    return [pid for pid in found if pid > 0]


def kill_groups(groups: Sequence[Path], *, seconds: float = 10) -> int:
    """Kill every process in these groups and remove the groups; return how many there were."""
    killed: set[int] = set()

    def gone() -> bool:
        left = {pid for group in groups for pid in pids_below(group)}
        killed.update(left)
        for pid in left:
            _signal(pid, signal.SIGKILL)
        return not left

    if wait_until(gone, seconds=seconds, step=0.02) is None:
        left = sorted({pid for group in groups for pid in pids_below(group)})
        raise SandboxError(
            f"Processes {left} do not end even when killed.", "Look at them with `ps`, or restart."
        )
    for group in groups:
        remove_group(group)
    # A process leaves its groups before it has let go of its mounts.
    wait_until(lambda: not any(is_alive(pid) for pid in killed), seconds=3)
    return len(killed)


def remove_group(group: Path) -> None:
    """Remove a control group that has no processes, with all groups in it."""
    if not group.is_dir():
        return
    for folder, _, _ in os.walk(group, topdown=False):
        # A group counts as busy for a moment after its last process ended.
        wait_until(lambda folder=folder: _rmdir(folder), seconds=2, step=0.01)


def _rmdir(folder: str) -> bool:
    try:
        Path(folder).rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


# A machine's life


def _pids(plan: Plan, name: str) -> list[int]:
    where = cgroups()
    return pids_below(where.limits["memory"] / plan.prefix / name)


def leader_pid(plan: Plan, name: str) -> int | None:
    """Return this machine's number of the machine's first process, or None."""
    for pid in _pids(plan, name):
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            names = Path(f"/proc/{pid}/comm").read_text().strip()
        except (FileNotFoundError, ProcessLookupError):
            continue
        numbers = next((line for line in status.splitlines() if line.startswith("NSpid:")), "")
        # Before it becomes systemd, the first process is still one of systemd-nspawn's.
        if len(numbers.split()) >= 3 and numbers.split()[-1] == "1" and names == "systemd":
            return pid
    return None


def is_running(plan: Plan, name: str) -> bool:
    """Whether the machine has processes: it is booting, up, or shutting down."""
    return bool(_pids(plan, name))


def command_inside(plan: Plan, name: str, argv: Sequence[str]) -> list[str]:
    """Return the command that runs `argv` as root inside a machine. For tests and `status`.

    The program's own way to a machine is SSH and nothing else.
    """
    leader = leader_pid(plan, name)
    if leader is None:
        raise SandboxError(f"The machine {name} is not running.", "Start it with `make up`.")
    return [
        # Namespaces do not keep the clock and the kernel apart: what is run inside must not have
        # this machine's own rights to them.
        *("setpriv", "--bounding-set=-sys_time,-sys_module,-sys_boot,-sys_rawio", "--"),
        *("nsenter", "--target", str(leader)),
        *("--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--"),
        *("env", "-i", "HOME=/root", "LANG=C.UTF-8", "TERM=dumb"),
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        *argv,
    ]


def exec(  # noqa: A001 - the name that `docker exec` and `kubectl exec` have given to it
    plan: Plan,
    name: str,
    argv: Sequence[str],
    *,
    stdin: str | None = None,
    check: bool = True,
    timeout: float = 60,
) -> subprocess.CompletedProcess[str]:
    """Run a program as root inside a running machine. For tests and `status`."""
    return run(command_inside(plan, name, argv), stdin=stdin, check=check, timeout=timeout)


def wait_for_boot(plan: Plan, name: str, *, seconds: float = 180) -> str:
    """Wait until systemd has started all that it should, cloud-init included.

    Returns "running", or "degraded" when a unit failed. Raises SandboxError with the end of the
    console when the machine dies, or is not up within `seconds`.
    """

    def state() -> str | None:
        if not is_running(plan, name):
            return "dead"
        if leader_pid(plan, name) is None:
            return None
        done = exec(plan, name, ["systemctl", "is-system-running"], check=False)
        word = done.stdout.strip()
        return word if word in ("running", "degraded", "maintenance") else None

    found = wait_until(state, seconds=seconds, step=0.1)
    if found in ("running", "degraded"):
        return found
    what = "stopped while it booted" if found == "dead" else f"was not up within {seconds:g} s"
    raise SandboxError(
        f"The machine {name} {what}: {console_tail(plan, name)}",
        f"Its console is in {plan.machine_dir(name) / 'console.log'}.",
    )


def failed_units(plan: Plan, name: str) -> list[str]:
    """Return the names of a machine's failed units."""
    done = exec(plan, name, ["systemctl", "list-units", "--failed", "--plain", "--no-legend"])
    return [line.split()[0] for line in done.stdout.splitlines() if line.strip()]


def console_tail(plan: Plan, name: str, lines: int = 5) -> str:
    """Return the last lines of a machine's console."""
    try:
        text = (plan.machine_dir(name) / "console.log").read_text(errors="replace")
    except FileNotFoundError:
        return "(no console)"
    return "\n".join(text.strip().splitlines()[-lines:])


def stop(plan: Plan, name: str, *, seconds: float = 20) -> bool:
    """Power a machine off, and kill what has not ended after `seconds`. Its disk stays.

    Returns whether it was running. With seconds=0 it is killed at once, like a power cut.
    """
    running = is_running(plan, name)
    if running and seconds > 0:
        leader = leader_pid(plan, name)
        if leader is not None:
            _signal(leader, _POWER_OFF)
            wait_until(lambda: not is_running(plan, name), seconds=seconds)
    kill_groups(_groups(plan, name, cgroups()))
    return running


def remove(plan: Plan, name: str) -> None:
    """Terminate a machine: its processes, its disk, and the loop devices of its volumes.

    The volumes' own files stay. Its network namespace goes with the network model.
    """
    stop(plan, name, seconds=0)
    folder = plan.machine_dir(name)
    for row in (_read_record(folder) or {}).get("devices", []):
        release_loop(Path(row["image"]))
    if folder.exists():
        shutil.rmtree(folder)


# Volumes


def create_volume(image: Path, *, size_gib: float) -> bool:
    """Make the sparse file of a volume, or let it grow; return whether anything changed.

    Never shrinks one, and never writes a file system: as on AWS, that is the machine's business.
    """
    size = int(size_gib * 1024**3)
    image.parent.mkdir(parents=True, exist_ok=True)
    if image.exists() and image.stat().st_size >= size:
        return False
    with image.open("ab") as file:
        file.truncate(size)
    for loop in _loops(image):
        run(["losetup", "--set-capacity", loop])
    return True


def _loop_rows() -> Iterator[tuple[str, str]]:
    listed = run(["losetup", "--list", "--json", "--output", "NAME,BACK-FILE"]).stdout
    # It says nothing at all where there is none.
    for row in json.loads(listed or "{}").get("loopdevices", []):
        yield row["name"], (row["back-file"] or "").removesuffix(" (deleted)")


def _loops(image: Path) -> list[str]:
    return [name for name, file in _loop_rows() if file == str(image)]


def loop_device(image: Path) -> str:
    """Return the loop device of a volume's file, setting one up where there is none."""
    if loops := _loops(image):
        return loops[0]
    return run(["losetup", "--find", "--show", image]).stdout.strip()


def release_loop(image: Path) -> bool:
    """Free a volume's loop devices; one that is mounted is freed when it no longer is."""
    loops = _loops(image)
    for loop in loops:
        run(["losetup", "--detach", loop], check=False)
    return bool(loops)


def release_loops_below(folder: Path) -> list[str]:
    """Free every loop device whose file is, or was, under a folder; return those."""
    ours = [name for name, file in _loop_rows() if Path(file).is_relative_to(folder)]
    for name in ours:
        run(["losetup", "--detach", name], check=False)
    return ours


def attach_device(plan: Plan, name: str, device: Device) -> bool:
    """Attach a volume to a machine, running or not; return whether it was not attached.

    It is there again after the machine boots anew.
    """
    changed = _update_devices(plan, name, add=device)
    leader = leader_pid(plan, name)
    if leader is not None:
        number = os.stat(loop_device(device.image)).st_rdev
        node = Path(f"/proc/{leader}/root{BY_ID}") / device.by_id
        if node.exists() and node.stat().st_rdev == number:
            return changed
        node.parent.mkdir(parents=True, exist_ok=True)
        node.unlink(missing_ok=True)
        os.mknod(node, 0o660 | stat.S_IFBLK, number)
        changed = True
    return changed


def detach_device(plan: Plan, name: str, device: Device) -> bool:
    """Detach a volume; return whether it was attached. Who has it mounted must let go first."""
    changed = _update_devices(plan, name, drop=device)
    leader = leader_pid(plan, name)
    if leader is not None:
        node = Path(f"/proc/{leader}/root{BY_ID}") / device.by_id
        mounts = Path(f"/proc/{leader}/mountinfo").read_text()
        if node.exists():
            number = node.stat().st_rdev
            if f" {os.major(number)}:{os.minor(number)} " in mounts:
                raise SandboxError(
                    f"The volume {device.by_id} is mounted in {name}.",
                    "Stop the machine or unmount it first: AWS, too, waits until it is let go.",
                )
            if f" {BY_ID}/{device.by_id} " in mounts:
                # One that was there at boot is bound, not made.
                run(
                    [
                        "nsenter",
                        "--target",
                        str(leader),
                        "--mount",
                        "umount",
                        f"{BY_ID}/{device.by_id}",
                    ]
                )
            node.unlink(missing_ok=True)
            changed = True
    return release_loop(device.image) or changed


def _update_devices(
    plan: Plan, name: str, *, add: Device | None = None, drop: Device | None = None
) -> bool:
    folder = plan.machine_dir(name)
    record = _read_record(folder)
    if record is None:
        raise SandboxError(f"There is no machine {name}.", "Boot it first.")
    devices = [Device(image=Path(r["image"]), by_id=r["by_id"]) for r in record["devices"]]
    wanted = [d for d in devices if d != drop]
    if add and add not in wanted:
        wanted.append(add)
    if wanted == devices:
        return False
    _record(
        folder,
        image=record["image"],
        devices=wanted,
        memory_mib=record["memory_mib"],
        cpus=record["cpus"],
    )
    return True


def recorded_devices(plan: Plan, name: str) -> list[Device]:
    """Return the volumes that a machine has or will have when it boots."""
    record = _read_record(plan.machine_dir(name)) or {"devices": []}
    return [Device(image=Path(r["image"]), by_id=r["by_id"]) for r in record["devices"]]
