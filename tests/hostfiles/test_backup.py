"""The backups on the host: the timer, and the program that it runs."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hostfiles import backup
from hostfiles.model import Backup, SlaveServer
from hostfiles.templates import FOLDER


def unit(server: SlaveServer, path: str) -> str:
    return next(file.content for file in backup.files(server) if file.path == path)


@pytest.mark.parametrize(
    ("hours", "when"), [(24, "00"), (12, "00,12"), (6, "00,06,12,18"), (8, "00,08,16")]
)
def test_the_timer_runs_every_so_many_hours(
    slave_server: Callable[..., SlaveServer], hours: int, when: str
) -> None:
    server = slave_server(backup=Backup(interval_hours=hours, keep=3, max_age_days=7))
    assert f"OnCalendar=*-*-* {when}:00:00\n" in unit(server, backup.TIMER)


def test_the_service_has_the_settings_and_no_secret(
    slave_server: Callable[..., SlaveServer],
) -> None:
    server = slave_server(backup=Backup(interval_hours=24, keep=5, max_age_days=9))
    assert "ExecStart=/usr/bin/python3 /usr/local/sbin/backup-data 5 9\n" in unit(
        server, backup.SERVICE
    )


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """backup-data, in a folder of the test's, with a Prometheus that always obeys."""
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    loader = importlib.machinery.SourceFileLoader("backup_data", str(FOLDER / "backup-data"))
    spec = importlib.util.spec_from_loader("backup_data", loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    (tmp_path / "snapshots").mkdir()
    counter = iter(range(100))
    now = datetime.now(UTC)

    def curl(argv: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert argv == ["curl", "--config", "/etc/prometheus/secrets/snapshot.curl"]
        made = now + timedelta(seconds=next(counter))
        name = f"{made.strftime(module.FORMAT)}-{os.getpid()}"
        (tmp_path / "snapshots" / name).mkdir()
        (tmp_path / "snapshots" / name / "block").write_text("x" * 100)
        answer = json.dumps({"status": "success", "data": {"name": name}})
        return subprocess.CompletedProcess(argv, 0, answer)

    monkeypatch.setattr(module, "DATA", tmp_path)
    monkeypatch.setattr(module, "SNAPSHOTS", tmp_path / "snapshots")
    monkeypatch.setattr(module, "BACKUPS", tmp_path / "backups")
    monkeypatch.setattr(module, "METRICS", tmp_path / "backup.prom")
    monkeypatch.setattr(module, "free_share", lambda: 0.5)
    monkeypatch.setattr(module.subprocess, "run", curl)
    return module


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "backups").iterdir())


def days_ago(program: ModuleType, folder: Path, days: int) -> str:
    name = (datetime.now(UTC) - timedelta(days=days)).strftime(program.FORMAT) + "-abc"
    (folder / "backups" / name).mkdir(parents=True)
    return name


def test_it_keeps_so_many(program: ModuleType, tmp_path: Path) -> None:
    for _ in range(5):
        program.main(3, 7)
    assert len(names(tmp_path)) == 3
    told = (tmp_path / "backup.prom").read_text()
    assert "federation_backup_count 3\n" in told
    assert "federation_backup_size_bytes 100\n" in told
    assert (tmp_path / "backup.prom").stat().st_mode & 0o777 == 0o644


def test_what_is_too_old_goes(program: ModuleType, tmp_path: Path) -> None:
    old, young = days_ago(program, tmp_path, 8), days_ago(program, tmp_path, 6)
    program.main(3, 7)
    assert young in names(tmp_path)
    assert old not in names(tmp_path)


def test_the_newest_one_stays_however_old_when_no_other_can_be_made(
    program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    days_ago(program, tmp_path, 90)
    old = days_ago(program, tmp_path, 80)

    def refused(argv: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(argv, 22, '{"error":"admin APIs disabled"}')

    monkeypatch.setattr(program.subprocess, "run", refused)
    with pytest.raises(SystemExit, match="admin APIs disabled"):
        program.main(3, 7)
    assert names(tmp_path) == [old]
    assert not (tmp_path / "backup.prom").exists()


def test_a_full_volume_loses_backups_before_prometheus_loses_samples(
    program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for days in (3, 2, 1):
        days_ago(program, tmp_path, days)
    monkeypatch.setattr(program, "free_share", lambda: 0.01)
    with pytest.raises(SystemExit, match="nothing was made"):
        program.main(3, 7)
    assert len(names(tmp_path)) == 1


def test_what_killed_runs_left_is_removed(program: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "snapshots" / "half").mkdir()
    (tmp_path / "backups" / ".going").mkdir(parents=True)
    program.main(3, 7)
    assert len(names(tmp_path)) == 1
    assert not list((tmp_path / "snapshots").iterdir())


KILLED = 9
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "shutil.rmtree"}


def killed_before(program: ModuleType, number: int) -> int:
    """Runs it in a process that ends before its change of so high a number. Its exit status."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    count = itertools.count(1)

    def before(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_ACCMODE
        if (event in CHANGES or writes) and next(count) == number:
            os._exit(KILLED)

    status = 1
    try:
        sys.addaudithook(before)
        program.main(2, 7)
        status = 0
    finally:
        os._exit(status)


def test_killed_before_any_of_its_changes_what_has_a_name_is_whole_and_the_next_run_finishes(
    program: ModuleType, tmp_path: Path
) -> None:
    def backups() -> list[Path]:
        there = [path for path in (tmp_path / "backups").iterdir() if path.name[0] != "."]
        for path in there:
            assert (path / "block").read_text() == "x" * 100, number
        return there

    number, status = 0, KILLED
    program.main(2, 7)
    program.main(2, 7)
    while status == KILLED:
        number += 1
        status = killed_before(program, number)
        assert backups()
        program.main(2, 7)
        assert len(backups()) == 2
        assert names(tmp_path) == sorted(path.name for path in backups()), "no rest"
        assert not list((tmp_path / "snapshots").iterdir())
        assert "federation_backup_count 2\n" in (tmp_path / "backup.prom").read_text()
    assert status == 0, "it came to its end, and there was nothing more to be killed before"
    assert number > 10, "there is so much to do"
