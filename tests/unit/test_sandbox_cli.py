"""What the sandbox says where it cannot work, and who it asks."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
from concurrent.futures import Future
from pathlib import Path

import pytest

from sandbox import cli, host
from sandbox.aws import Cloud
from sandbox.host import SandboxError
from sandbox.plan import Plan
from sandbox.state import State
from tests.unit.conftest import ROOT

MASTER = {
    "host": "master.example.com",
    "publicIp": "198.51.100.1",
    "sshHostKey": "ssh-ed25519 A",
    "user": "reader",
}


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


def test_every_command_finds_what_is_in_sbin(monkeypatch: pytest.MonkeyPatch) -> None:
    """PATH after `su`, or of a plain user: `down` stopped half way for want of nft."""
    monkeypatch.setenv("PATH", "/usr/local/bin:/usr/bin:/bin")
    monkeypatch.setattr(cli, "_become_root", lambda argv: None)
    asked: list[list[str]] = []
    monkeypatch.setattr(
        cli, "_down", lambda chosen, console: asked.append(os.environ["PATH"].split(":")) or 0
    )
    assert cli.main(["down"]) == 0
    assert {"/usr/sbin", "/sbin", "/usr/local/sbin"} <= set(asked[0])


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
    ((sudo, *options, command),) = asked
    assert (sudo, command) == ("sudo", "status")
    # README.md: SANDBOX_DEBIAN_MIRROR=<address> make up.
    assert options[:2] == ["--preserve-env=SANDBOX_DEBIAN_MIRROR", "--"]
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


def test_ssh_without_a_name_says_which_names_there_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_become_root", lambda argv: pytest.fail("asked for root"))
    with pytest.raises(SystemExit) as ended:
        cli.main(["ssh"])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "NAME is missing" in told
    assert "`make status`" in told
    assert "required: " not in told


def test_ssh_takes_a_name_alone_or_with_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(host, "require_platform", lambda: None)
    monkeypatch.setattr(cli, "_become_root", lambda argv: None)
    monkeypatch.setattr(
        cli, "_ssh", lambda chosen, console: asked.append((chosen.name, chosen.command)) or 0
    )
    assert cli.main(["ssh", "core01"]) == 0
    assert cli.main(["ssh", "core01", "ls", "-l"]) == 0
    assert asked == [("core01", []), ("core01", ["ls", "-l"])]


def test_what_is_made_can_be_read_whatever_the_users_umask_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(host, "require_platform", lambda: None)
    monkeypatch.setattr(cli, "_become_root", lambda argv: None)
    monkeypatch.setattr(cli, "_status", lambda chosen, console: (tmp_path / "etc").mkdir() or 0)
    users = os.umask(0o077)
    try:
        assert cli.main(["status"]) == 0
    finally:
        os.umask(users)
    assert (tmp_path / "etc").stat().st_mode & 0o777 == 0o755


def test_what_is_secret_is_its_owners_alone_all_the_same(tmp_path: Path) -> None:
    outputs = {"caCertificate": "-", "sshPrivateKey": "-", "master": MASTER, "masterPassword": "-"}
    for part in ("machines", "volumes", "world"):
        (tmp_path / part).mkdir()
    users = os.umask(0o022)
    try:
        State.load(tmp_path / "state.json").save()
        Cloud().save(tmp_path / "cloud.json")
        cli._write_outputs(Plan(0, tmp_path), tmp_path, outputs)
    finally:
        os.umask(users)
    modes = {p.name: p.stat().st_mode & 0o777 for p in tmp_path.rglob("*") if p.is_file()}
    secret = {"state.json", "passphrase", "cloud.json", "operator.key", "master.curl"}
    assert secret <= modes.keys()
    assert set(modes.values()) == {0o600}


def test_hosts_that_do_not_boot_end_what_waits_for_them_and_are_the_reason_told() -> None:
    hosts: Future[list[str]] = Future()
    cancelled = threading.Event()
    with (  # noqa: PT012 - what fails in the block is what it is about
        pytest.raises(SandboxError, match="core01 did not boot"),
        cli.called_off_with(hosts, cancelled),
    ):
        assert not cancelled.is_set()
        hosts.set_exception(SandboxError("core01 did not boot", ""))
        assert cancelled.is_set()
        raise InterruptedError("stopped before this was done")


@pytest.mark.parametrize("booted", [True, False])
def test_what_fails_while_the_hosts_boot_or_after_is_told_itself(booted: bool) -> None:
    hosts: Future[list[str]] = Future()
    cancelled = threading.Event()
    with (  # noqa: PT012 - as above
        pytest.raises(ValueError, match="of its own"),
        cli.called_off_with(hosts, cancelled),
    ):
        if booted:
            hosts.set_result(["core01"])
        assert not cancelled.is_set()
        raise ValueError("of its own")
    assert cancelled.is_set()


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
