"""What is killed half way is finished by the next run, and what is taken down leaves nothing.

These tests have a sandbox of their own, in another slot, and may run beside the others.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from sandbox import host, machine
from sandbox.host import wait_until
from sandbox.plan import RUNTIME_ROOT
from tests.sandbox.conftest import CORES, ROOT, Sandbox


def traces(sandbox: Sandbox) -> dict[str, list[str]]:
    """Everything on this machine that bears the sandbox's name, by kind."""
    prefix, folder = sandbox.plan.prefix, str(sandbox.plan.state_dir)

    def lines(*argv: str) -> list[str]:
        return host.run(argv).stdout.splitlines()

    processes = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if folder in words or f"--machine={prefix}-" in words or f"/{prefix}/" in words:
            processes.append(words)
    groups = [tree / prefix for tree in host.cgroups().trees]
    found = {
        "processes": processes,
        "namespaces": [n for n in lines("ip", "netns") if n.startswith(f"{prefix}-")],
        "links": [n for n in lines("ip", "-br", "link") if n.startswith(f"{prefix}-")],
        "routes": [r for r in lines("ip", "route") if f"dev {prefix}-" in r],
        "rules": [t for t in lines("nft", "list", "tables") if t.split()[-1] == prefix],
        "mounts": [m for m in Path("/proc/mounts").read_text().splitlines() if folder in m],
        "loops": [row for row in lines("losetup", "--list", "--noheadings") if folder in row],
        "groups": [str(group) for group in groups if group.exists()],
        "folders": [
            str(path)
            for path in (sandbox.plan.state_dir, sandbox.plan.runtime_dir)
            if path.exists()
        ],
        "machines": [str(p) for p in Path("/run/systemd/nspawn").glob(f"**/{prefix}-*")],
    }
    return {kind: names for kind, names in found.items() if names}


def kill_up(sandbox: Sandbox, once_it_said: str, seconds: float = 0.0) -> None:
    """Starts `up` and kills it so long after a line of its progress, by an uncatchable signal."""
    with subprocess.Popen(
        sandbox.arguments("up"),
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        printed = []
        for line in process.stdout:
            printed.append(line)
            if once_it_said in line:
                break
        time.sleep(seconds)
        process.kill()
    assert process.returncode == -signal.SIGKILL, "".join(printed)


def test_down_where_nothing_was_up_says_so(own: Sandbox) -> None:
    own.run("down")
    assert "nothing was up" in own.run("down")
    assert traces(own) == {}


def test_up_that_was_killed_again_and_again_is_finished_by_the_next(own: Sandbox) -> None:
    kill_up(own, "create Eip")
    kill_up(own, "create SecurityGroup ")
    kill_up(own, "create Instance")
    kill_up(own, "first-contact", 0.2)
    kill_up(own, "first-boot", 0.2)
    kill_up(own, "create EipAssociation", 0.5)
    # From its first line on: in the middle of the bundles.
    kill_up(own, "", 2.5)
    # Host keys that were on their way find theirs after a reboot, too.
    for name in machine.machines(own.plan):
        machine.stop(own.plan, name, seconds=0)
    printed = own.up()
    assert "Proof of federation" in printed
    servers = [m for m in machine.machines(own.plan) if not m.startswith("core")]
    assert len(servers) == 2, "what the killed runs had begun is gone"
    assert "no changes" in own.up()


def in_a_terminal(own: Sandbox) -> subprocess.Popen[str]:
    """`up`, which Ctrl-C reaches: a shell has that ignored in the background, where tests/run
    starts these tests."""
    return subprocess.Popen(
        own.arguments("up"),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def stopped(process: subprocess.Popen[str], seconds: float) -> None:
    printed, _ = process.communicate(timeout=seconds)
    assert process.returncode == 130, printed
    assert "Traceback" not in printed
    assert "make down" in printed


def test_ctrl_c_ends_up_cleanly_and_the_next_one_goes_on(own: Sandbox) -> None:
    own.set(retentionTime="29d")
    with in_a_terminal(own) as process:
        # It has begun, and is in the middle soon.
        assert process.stdout
        assert process.stdout.readline()
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        stopped(process, 60)
    own.up()
    assert "retention.time=29d" in own.inside("master", "pgrep", "-af", "prometheus-")


def test_a_second_ctrl_c_waits_for_nothing(own: Sandbox) -> None:
    for name in CORES:
        machine.stop(own.plan, name, seconds=0)
    with in_a_terminal(own) as process:
        leader = wait_until(lambda: machine.leader_pid(own.plan, CORES[0]), seconds=60)
        assert leader
        # A host that does not come to the end of its boot.
        os.kill(leader, signal.SIGSTOP)
        try:
            process.send_signal(signal.SIGINT)
            # It is waited for, the slot held.
            with pytest.raises(subprocess.TimeoutExpired):
                process.communicate(timeout=5)
            process.send_signal(signal.SIGINT)
            stopped(process, 20)
        finally:
            os.kill(leader, signal.SIGCONT)
    assert "Proof of federation" in own.up()


def test_down_after_a_kill_in_the_middle_of_up_leaves_nothing(own: Sandbox) -> None:
    own.run("down")
    assert traces(own) == {}
    kill_up(own, "create Instance")
    assert traces(own) != {}, "there was something to remove"
    printed = own.run("down")
    assert own.last is not None
    assert own.last.returncode == 0
    assert "all is gone" in printed
    assert traces(own) == {}


def test_a_slot_of_another_directory_is_refused_by_its_name(own: Sandbox, tmp_path: Path) -> None:
    kill_up(own, "create Eip")
    other = Sandbox.fresh(own.plan.slot, tmp_path / "other")
    told = other.refused("--no-verify")
    assert str(own.plan.state_dir) in told
    assert "make down" in told
    own.run("down")
    assert not (RUNTIME_ROOT / own.plan.prefix).exists()
