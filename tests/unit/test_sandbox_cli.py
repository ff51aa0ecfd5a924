"""What the sandbox says where it cannot work, and who it asks."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from sandbox import cli, host
from sandbox.host import SandboxError
from tests.unit.conftest import ROOT


@pytest.mark.parametrize(("system", "named"), [("darwin", "macOS"), ("win32", "Windows")])
def test_another_system_is_told_what_to_use_instead(
    monkeypatch: pytest.MonkeyPatch, system: str, named: str
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    with pytest.raises(SandboxError, match=named) as refusal:
        host.require_platform()
    assert "Linux virtual machine or a CI runner" in refusal.value.remedy


def test_another_processor_is_told_what_to_use_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(SandboxError, match="aarch64"):
        host.require_platform()


def test_a_user_is_asked_through_sudo_and_told_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[str]] = []

    def instead(program: str, argv: list[str]) -> None:
        asked.append(argv)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(os, "execvp", instead)
    assert cli.main(["status"]) == 130
    ((sudo, *_, command),) = [asked[0]]
    assert (sudo, command) == ("sudo", "status")
    assert "to make machines, mounts, network links" in capsys.readouterr().err


def test_without_sudo_the_remedy_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(program: str, argv: list[str]) -> None:
        raise FileNotFoundError(program)

    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(os, "execvp", missing)
    assert cli.main(["status"]) == 1
    assert "Run the same command as root." in capsys.readouterr().out


@pytest.mark.parametrize("command", [[], ["up"], ["down"], ["status"], ["verify"], ["ssh"]])
def test_every_command_has_help(command: list[str]) -> None:
    told = subprocess.run(
        [sys.executable, "-m", "sandbox", *command, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "usage: python -m sandbox" in told.stdout


def test_make_lists_its_targets() -> None:
    told = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for target in ("up", "down", "test", "test-unit", "lint", "preview"):
        assert f"make {target} " in told.stdout
