"""Remote commands: what ssh is told, and what is told of what ssh says."""

from __future__ import annotations

import os
import stat
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from sandbox.command import CommandError, CommandProvider, why_unreachable, write_config
from sandbox.host import is_alive, wait_until
from sandbox.program import Resource

CONNECTION: dict[str, Any] = {
    "host": "10.20.1.11",
    "user": "admin",
    "port": 22,
    "privateKey": "canary target key",
    "hostKey": "ssh-ed25519 AAAAtarget",
    "dialErrorLimit": -1,
    "perDialTimeout": 15,
}
PROXY: dict[str, Any] = {
    "host": "198.51.100.1",
    "user": "jumper",
    "port": 2200,
    "privateKey": "canary jump key\n",
    "hostKey": "ssh-ed25519 AAAAjump\n",
    "perDialTimeout": 5,
}
JUMPING = {**CONNECTION, "proxy": PROXY}


def sections(config: Path) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for line in config.read_text().splitlines():
        key, _, value = line.partition(" ")
        if key == "Host":
            found[value] = {}
        else:
            found[list(found)[-1]][key] = value
    return found


def test_each_hop_has_its_own_user_key_and_pinned_host_key(tmp_path: Path) -> None:
    found = sections(write_config(tmp_path, JUMPING))
    assert found["target"]["ProxyJump"] == "jump"
    assert "ProxyJump" not in found["jump"]
    for name, connection in (("target", CONNECTION), ("jump", PROXY)):
        hop = found[name]
        assert (hop["HostName"], hop["User"]) == (connection["host"], connection["user"])
        assert hop["Port"] == str(connection["port"])
        assert hop["StrictHostKeyChecking"] == "yes"
        assert hop["GlobalKnownHostsFile"] == "/dev/null"
        key = Path(hop["IdentityFile"])
        assert key.read_text() == connection["privateKey"].strip() + "\n"
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
    # ssh calls a host on another port by both.
    assert Path(found["jump"]["UserKnownHostsFile"]).read_text() == (
        "[198.51.100.1]:2200 ssh-ed25519 AAAAjump\n"
    )
    assert Path(found["target"]["UserKnownHostsFile"]).read_text() == (
        "10.20.1.11 ssh-ed25519 AAAAtarget\n"
    )
    # Counted from before the jump is connected, so it must outlast that.
    assert (found["jump"]["ConnectTimeout"], found["target"]["ConnectTimeout"]) == ("5", "20")
    assert "canary" not in (tmp_path / "config").read_text()


@pytest.mark.parametrize(
    "wrong", [{"hostKey": ""}, {"host": "a b"}, {"host": "h\nProxyCommand x"}, {"user": "%r"}]
)
def test_a_connection_that_could_be_anything_is_refused(
    tmp_path: Path, wrong: dict[str, str]
) -> None:
    with pytest.raises(CommandError):
        write_config(tmp_path, {**CONNECTION, **wrong})
    with pytest.raises(CommandError):
        write_config(tmp_path, {**CONNECTION, "proxy": {**PROXY, **wrong}})


LOST = "Connection closed by UNKNOWN port 65535\n"
THROUGH = " (through the jump host 198.51.100.1)"
JUMP = "the jump host 198.51.100.1: "
# As OpenSSH 9.2 says it.
SAID = [
    (
        f"ssh: connect to host 198.51.100.1 port 2200: Connection refused\r\n{LOST}",
        f"{JUMP}Connection refused",
    ),
    (
        "ssh: connect to host 198.51.100.1 port 2200: Connection timed out\n" + LOST,
        f"{JUMP}Connection timed out",
    ),
    (
        "channel 0: open failed: connect failed: Connection refused\nstdio forwarding failed\n"
        f"kex_exchange_identification: Connection closed by remote host\n{LOST}",
        f"Connection refused{THROUGH}",
    ),
    (
        "channel 0: open failed: administratively prohibited: open failed\n" + LOST,
        f"administratively prohibited: open failed{THROUGH}",
    ),
    (
        "Connection timed out during banner exchange\r\n"
        "Connection to UNKNOWN port 65535 timed out\n",
        f"Connection timed out{THROUGH}",
    ),
    (
        "Connection timed out during banner exchange\r\n"
        f"Connection to 198.51.100.1 port 2200 timed out\r\n{LOST}",
        f"{JUMP}Connection timed out",
    ),
    (
        "@@@@\nHost key for [198.51.100.1]:2200 has changed and you have requested strict "
        f"checking.\nHost key verification failed.\n{LOST}",
        f"{JUMP}Host key verification failed",
    ),
    (
        "No ED25519 host key is known for 10.20.1.11 and you have requested strict checking.\n"
        "Host key verification failed.\n",
        f"Host key verification failed{THROUGH}",
    ),
    (
        "jumper@198.51.100.1: Permission denied (publickey).\n" + LOST,
        f"{JUMP}Permission denied (publickey).",
    ),
    (
        "admin@10.20.1.11: Permission denied (publickey).\n",
        f"Permission denied (publickey).{THROUGH}",
    ),
    ("something else entirely\n", "something else entirely"),
    ("", "no answer"),
]


@pytest.mark.parametrize(("said", "told"), SAID)
def test_the_reason_and_the_hop_are_told(said: str, told: str) -> None:
    assert why_unreachable(said, JUMPING) == told


def test_without_a_jump_there_is_only_the_reason() -> None:
    said = "ssh: connect to host 10.20.1.11 port 22: No route to host\n"
    assert why_unreachable(said, CONNECTION) == "No route to host"


class Fake:
    """An ssh of our own, first on PATH: a shell script that gets the configuration as $2."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.cancelled = threading.Event()
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def says(self, script: str) -> None:
        path = self.folder / "ssh"
        path.write_text(
            f'#!/bin/sh\necho "$@" >> {self.folder}/argv\n'
            f'connected() {{ touch "$(dirname "$2")/connected"; }}\n{script}\n'
        )
        path.chmod(0o755)

    def run(self, seconds: int = 3, **inputs: Any) -> dict[str, Any]:
        resource = Resource(
            urn="u",
            type="command:remote:Command",
            name="slave-core01",
            inputs={},
            custom=True,
            parent="",
            timeout_create=f"{seconds}s",
        )
        given = {"connection": JUMPING, "create": "do it", "stdin": "canary stdin", **inputs}
        return CommandProvider(self.cancelled, self.folder / "keys").create(resource, given)[1]


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    return Fake(tmp_path, monkeypatch)


def test_what_the_command_gets_and_says_comes_through_whole(ssh: Fake) -> None:
    ssh.says('connected "$@"; sleep 0.5; cat; echo warned >&2')
    text = "x" * 1_000_000
    assert ssh.run(stdin=text) == {"stdout": text, "stderr": "warned\n"}
    argv = (ssh.folder / "argv").read_text()
    assert "canary" not in argv
    assert argv.split()[-2:] == ["do", "it"]
    assert not Path(argv.split()[1]).parent.exists(), "the keys are gone"


def test_a_host_that_never_answers_is_told_with_the_last_reason(ssh: Fake) -> None:
    ssh.says('echo "ssh: connect to host 198.51.100.1 port 22: Connection refused" >&2; exit 255')
    began = time.monotonic()
    with pytest.raises(CommandError) as told:
        ssh.run(seconds=2)
    assert time.monotonic() - began < 3
    assert str(told.value) == (
        "slave-core01: 10.20.1.11 could not be reached over SSH within 2 s: "
        "the jump host 198.51.100.1: Connection refused"
    )
    assert len((ssh.folder / "argv").read_text().splitlines()) > 1, "it was tried again"


def test_a_limit_of_dial_errors_ends_it_sooner(ssh: Fake) -> None:
    ssh.says("exit 255")
    with pytest.raises(CommandError, match="could not be reached"):
        ssh.run(seconds=30, connection={**CONNECTION, "dialErrorLimit": 1})
    assert len((ssh.folder / "argv").read_text().splitlines()) == 2


def test_a_command_that_fails_is_not_run_again_and_its_words_are_told(ssh: Fake) -> None:
    # Also where it ends with the number that ssh has for a failed connection.
    for code in (3, 255):
        ssh.says(f'connected "$@"; echo its words >&2; exit {code}')
        with pytest.raises(CommandError, match=rf"exited with {code}:\nits words"):
            ssh.run()
    assert len((ssh.folder / "argv").read_text().splitlines()) == 2


def test_a_command_that_does_not_end_is_told_as_such(ssh: Fake) -> None:
    ssh.says('connected "$@"; sleep 60')
    with pytest.raises(CommandError, match=r"10\.20\.1\.11 did not end within 1 s"):
        ssh.run(seconds=1)


@pytest.mark.parametrize("waits", ["sleep 60", 'connected "$@"; sleep 60', "exit 255"])
def test_a_call_to_stop_ends_the_waiting_at_once(ssh: Fake, waits: str) -> None:
    ssh.says(waits)
    threading.Timer(0.5, ssh.cancelled.set).start()
    began = time.monotonic()
    with pytest.raises(InterruptedError):
        ssh.run(seconds=60)
    assert time.monotonic() - began < 2


def test_ctrl_c_leaves_no_ssh_behind(ssh: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    ssh.says("echo $$ > $(dirname $0)/pid; exec sleep 60")

    def ctrl_c(self: object, **_: object) -> None:
        while not (ssh.folder / "pid").exists() or not (ssh.folder / "pid").read_text():
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr("subprocess.Popen.communicate", ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        ssh.run()
    pid = int((ssh.folder / "pid").read_text())
    assert wait_until(lambda: not is_alive(pid), seconds=2)


def test_the_keys_that_a_killed_run_left_are_removed_by_the_next(ssh: Fake) -> None:
    left = ssh.folder / "keys" / "tmp" / "target.key"
    left.parent.mkdir(parents=True)
    left.touch()
    ssh.says('connected "$@"; ls -A "$(dirname "$2")"/..')
    (own,) = ssh.run()["stdout"].split()
    assert own != "tmp"
    assert list((ssh.folder / "keys").iterdir()) == []


def test_a_deletion_uses_the_commands_own_time_and_its_last_connection(ssh: Fake) -> None:
    ssh.says("exit 255")
    provider = CommandProvider(ssh.cancelled, ssh.folder / "keys")
    inputs = {"connection": JUMPING, "create": "do it", "delete": "undo it"}
    with pytest.raises(CommandError, match=r"slave-core01: 10\.20\.1\.11 .* within 2 s"):
        provider.delete("command:remote:Command", "command-slave-core01", inputs, "2s")
    assert (ssh.folder / "argv").read_text().splitlines()[0].endswith("undo it")
    (ssh.folder / "argv").unlink()
    del inputs["delete"]
    provider.delete("command:remote:Command", "command-slave-core01", inputs, "2s")
    assert not (ssh.folder / "argv").exists()
