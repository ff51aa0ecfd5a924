"""EBS snapshots: copies of a volume as it was at one moment, in a folder of their own.

Neither the engine's state nor the aws provider's file knows them: as on AWS, they outlive the
volume, the policy that had them made, and a state that was lost.
https://docs.aws.amazon.com/ebs/latest/userguide/ebs-snapshots.html
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from sandbox import machine
from sandbox.host import SandboxError, run
from sandbox.plan import Plan

_MOUNT_POINT = "/data"
_FREEZE_SECONDS = 30
# Thaws when whoever froze it goes away, however he ends: his end of the pipe is closed.
_FROZEN = f"""
fsfreeze --freeze {_MOUNT_POINT} || exit
echo frozen
read -t {_FREEZE_SECONDS} _
told=$?
fsfreeze --unfreeze {_MOUNT_POINT}
[ $told -le 128 ]
"""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A snapshot of a volume; `name` is the volume's, `time` in Unix seconds."""

    id: str
    volume: str
    name: str
    size_gib: int
    time: float


def every(plan: Plan) -> list[Snapshot]:
    """All snapshots, oldest first."""
    found = [Snapshot(**json.loads(f.read_text())) for f in _folder(plan).glob("snap-*.json")]
    return sorted(found, key=lambda snapshot: snapshot.time)


def on_disk(plan: Plan, snapshot: Snapshot) -> int:
    """The bytes that a snapshot takes here."""
    return _image(plan, snapshot.id).stat().st_blocks * 512


def take(plan: Plan, volume: Path, snapshot: Snapshot, holder: str | None) -> Snapshot:
    """Copies a volume. `holder`: the machine that has it mounted and holds still meanwhile."""
    _folder(plan).mkdir(mode=0o700, exist_ok=True)
    # Of a run that was killed.
    for rest in _folder(plan).glob("*.new"):
        rest.unlink()
    new = _folder(plan) / f"{snapshot.id}.new"
    with _frozen(plan, holder):
        _copy(volume, new)
    new.rename(_image(plan, snapshot.id))
    new.write_text(json.dumps(asdict(snapshot)))
    # Last: what has this file is whole.
    new.rename(_folder(plan) / f"{snapshot.id}.json")
    return snapshot


def prune(plan: Plan, volume: str, keep: int) -> None:
    """Removes all but the newest so many snapshots of a volume."""
    of_volume = [snapshot for snapshot in every(plan) if snapshot.volume == volume]
    for snapshot in of_volume[:-keep]:
        (_folder(plan) / f"{snapshot.id}.json").unlink()
        _image(plan, snapshot.id).unlink()


def check(plan: Plan, id_: str, size_gib: int) -> None:
    """Fails unless a volume of that size can be made from a snapshot."""
    known = {snapshot.id: snapshot for snapshot in every(plan)}
    if id_ not in known:
        raise SandboxError(
            f"There is no snapshot {id_}.",
            f"There are: {', '.join(known) or 'none; make one with `make snapshot`'}.",
        )
    if size_gib < known[id_].size_gib:
        raise SandboxError(
            f"{id_} has {known[id_].size_gib} GiB, the volume {size_gib}.",
            "Set dataVolumeGib to at least as much.",
        )


def restore(plan: Plan, id_: str, volume: Path) -> None:
    """Makes a volume's file from a snapshot."""
    volume.parent.mkdir(parents=True, exist_ok=True)
    _copy(_image(plan, id_), volume)


def _folder(plan: Plan) -> Path:
    return plan.state_dir / "snapshots"


def _image(plan: Plan, id_: str) -> Path:
    return _folder(plan) / f"{id_}.img"


def _copy(source: Path, target: Path) -> None:
    run(["cp", "--sparse=always", "--reflink=auto", str(source), str(target)], timeout=600)


@contextlib.contextmanager
def _frozen(plan: Plan, holder: str | None) -> Iterator[None]:
    """The file system of a volume as it is, whole and at rest, while the block runs."""
    if holder is None or not machine.is_running(plan, holder):
        yield
        return
    command = machine.command_inside(plan, holder, ["bash", "-c", _FROZEN])
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as guard:
        assert guard.stdout is not None  # noqa: S101 - for the type checker
        assert guard.stdin is not None  # noqa: S101
        if guard.stdout.readline() != "frozen\n":
            raise SandboxError(
                f"The data volume of {holder} could not be frozen.", "Is it mounted? See its log."
            )
        yield
        guard.stdin.close()
        if guard.wait():
            raise SandboxError(
                f"The data volume of {holder} took more than {_FREEZE_SECONDS} s to copy.",
                "Nothing was kept; try again when this machine has less to do.",
            )
