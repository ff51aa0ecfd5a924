"""What machines take of this computer, as far as it needs no kernel."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from sandbox import machine
from sandbox.plan import Plan


def loops(monkeypatch: pytest.MonkeyPatch, rows: dict[str, str | None]) -> list[str]:
    """Says which loop devices there are; returns which will have been freed."""
    freed: list[str] = []

    def run(argv: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        if "--detach" in argv:
            freed.append(argv[-1])
        assert "--detach" in argv or "--json" in argv
        listed = {"loopdevices": [{"name": n, "back-file": file} for n, file in rows.items()]}
        # As losetup: nothing where there is none.
        return subprocess.CompletedProcess(argv, 0, json.dumps(listed) if rows else "", "")

    monkeypatch.setattr(machine, "run", run)
    return freed


def test_a_volume_finds_its_loop_device_whatever_its_folder_is_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image = Path('/srv/Fünf "Äpfel"/.sandbox/volumes/vol-1.img')
    freed = loops(
        monkeypatch,
        {"/dev/loop0": None, "/dev/loop1": str(image), "/dev/loop2": f"{image}.old (deleted)"},
    )
    assert machine.loop_device(image) == "/dev/loop1"
    assert machine.release_loops_below(image.parents[1]) == ["/dev/loop1", "/dev/loop2"]
    assert freed == ["/dev/loop1", "/dev/loop2"]


def test_no_loop_device_is_none_to_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    loops(monkeypatch, {})
    assert machine.release_loops_below(tmp_path) == []


def test_a_folder_behind_a_link_is_named_as_the_kernel_names_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    plan = Plan(3, tmp_path / "link" / ".sandbox")
    loops(monkeypatch, {"/dev/loop1": f"{(tmp_path / 'disk').resolve()}/.sandbox/volumes/v.img"})
    assert machine.loop_device(plan.state_dir / "volumes" / "v.img") == "/dev/loop1"
