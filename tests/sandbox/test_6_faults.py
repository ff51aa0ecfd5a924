"""What is killed half way is finished by the next run, and what is taken down leaves nothing.

These tests have a sandbox of their own, in another slot, and may run beside the others.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sandbox import host, machine, releases
from sandbox.host import wait_until
from sandbox.plan import RUNTIME_ROOT
from tests.sandbox.conftest import NAMESPACE, ROOT, Sandbox


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


@pytest.fixture(scope="module")
def own() -> Iterator[Sandbox]:
    """A sandbox for faults, down at first and at last."""
    slot = int(os.environ.get("SANDBOX_TEST_SLOT", "1")) + 1
    mine = Sandbox.fresh(slot, ROOT / f".sandbox-test{slot}")
    # One interval less to wait for: speed is not what is tested here.
    mine.set(scrapeInterval="2s")
    mine.run("down")
    yield mine
    mine.run("down")


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
    kill_up(own, "", 8.0)
    printed = own.up()
    assert "Proof of federation" in printed
    servers = [m for m in machine.machines(own.plan) if not m.startswith("core")]
    assert len(servers) == 2, "what the killed runs had begun is gone"
    assert "no changes" in own.up()


def test_ctrl_c_ends_up_cleanly_and_the_next_one_goes_on(own: Sandbox) -> None:
    own.set(retentionTime="29d")
    with subprocess.Popen(
        own.arguments("up"),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # As from a terminal: tests/run starts these tests in the background, where a shell has
        # Ctrl-C ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        time.sleep(2.5)
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    assert "Traceback" not in printed
    assert "make down" in printed
    own.up()
    assert "retention.time=29d" in own.inside("master", "pgrep", "-af", "prometheus-")


def running(sandbox: Sandbox) -> str:
    """The process ids of apply-bundle on the slave."""
    return sandbox.inside("dublin", "pgrep", "-f", "sbin/apply-bundle", check=False)


def test_apply_bundle_killed_at_any_moment_is_finished_by_the_next_up(own: Sandbox) -> None:
    for number in range(6):
        own.set(retentionTime=f"{20 + number}d")
        with subprocess.Popen(
            own.arguments("up", "--no-verify"), cwd=ROOT, stdout=subprocess.PIPE, text=True
        ) as process:
            # From the moment the program is there, so much later each time.
            assert host.wait_until(lambda: running(own), seconds=30, step=0.02)
            time.sleep(0.25 * number)
            own.inside("dublin", "pkill", "-9", "-f", "sbin/apply-bundle", check=False)
            process.communicate(timeout=120)
        own.up()
        line = own.inside("dublin", "pgrep", "-af", "prometheus-")
        assert f"retention.time={20 + number}d" in line
        trees = own.script("dublin", "ls /opt/federation/trees | wc -l").strip()
        assert trees == "1", "neither a half tree nor an old one with its secrets"


APPLY_BUNDLE = "sbin/apply-bundle"
LISTENERS = {
    ("dublin", "127.0.0.1:9095"): "/etc/nginx/tls/server.crt",
    ("dublin", "127.0.0.1:9090"): "/etc/prometheus/tls/prometheus.crt",
    ("dublin", "127.0.0.1:9100"): "/etc/node_exporter/tls/node_exporter.crt",
    ("core01", "10.20.1.11:9100"): "/etc/node_exporter/tls/node_exporter.crt",
}


@pytest.fixture(scope="module")
def other_release(own: Sandbox) -> Iterator[dict[str, str]]:
    """The same Prometheus under another version, as settings name it."""
    own.up()
    programs = {name: releases.tool(name) for name in ("prometheus", "promtool")}
    release = releases.add("prometheus", "3.5.995", programs, "for a test")
    yield {"version": release.version, "sha256": release.sha256, "url": release.url}
    release.path.unlink()


def change_everything(sandbox: Sandbox, release: dict[str, str]) -> str:
    """Another password, other certificates, another Prometheus. Returns the release to come."""
    slaves = sandbox.get("slaves")
    generation = slaves[0].get("rotation", {}).get("exporterPassword", 1) + 1
    slaves[0]["rotation"] = dict.fromkeys(("exporterPassword", "leafCertificates"), generation)
    chosen = {} if sandbox.config.get(f"{NAMESPACE}:releases") else {"prometheus": release}
    sandbox.set(slaves=slaves, releases=chosen)
    return chosen["prometheus"]["version"] if chosen else "3.5.3"


def kill_at(sandbox: Sandbox, host_name: str, step: str, victim: str) -> str:
    """Runs `up`, and on a host kills `victim` when it runs `step`. Returns what `up` printed."""
    # In brackets, so that they do not find the script that looks for them.
    look, end = (f"[{word[0]}]{word[1:]}" for word in (step, victim))
    script = f"until pgrep -f '{look}' >/dev/null; do :; done; pkill -9 -f '{end}'"
    with ThreadPoolExecutor(1) as beside:
        killing = beside.submit(sandbox.script, host_name, script)
        printed = sandbox.refused("--no-verify")
        killing.result(timeout=1)
    return printed


def serials(sandbox: Sandbox) -> dict[tuple[str, str], tuple[str, str]]:
    """Of each listener the certificate that it proves to have the key of, and that of its file."""
    found = {}
    for (name, address), file in LISTENERS.items():
        shown = sandbox.script(
            name,
            f"openssl s_client -connect {address} </dev/null 2>/dev/null"
            " | openssl x509 -noout -serial 2>/dev/null",
            check=False,
        )
        found[name, address] = (
            shown,
            sandbox.inside(name, "openssl", "x509", "-noout", "-serial", "-in", file),
        )
    return found


def serves_whole(sandbox: Sandbox) -> None:
    """Every listener has a certificate and its key, and every target is up, whatever was killed."""
    served = wait_until(lambda: all(shown for shown, _ in serials(sandbox).values()), seconds=30)
    assert served, serials(sandbox)
    sandbox.wait("min(up) == 1")


def is_finished(sandbox: Sandbox, version: str) -> None:
    """After an `up`: one tree, and everything that runs is of it."""
    for name in ("dublin", "core01"):
        trees = sandbox.script(name, "ls /opt/federation/trees | wc -l").strip()
        assert trees == "1", "neither a half tree nor an old one with its secrets"
    for listener, (shown, held) in serials(sandbox).items():
        assert shown == held, listener
    assert f"/prometheus-{version}/" in sandbox.script(
        "dublin", "readlink /proc/$(systemctl show -P MainPID prometheus)/exe"
    )
    generation = sandbox.get("slaves")[0]["rotation"]["exporterPassword"]
    assert f" prometheus-{generation}:" in sandbox.inside(
        "core01", "cat", "/etc/node_exporter/config.yml"
    )
    left = sandbox.script("dublin", "ls -A /opt/releases")
    assert not [name for name in left.split() if name.startswith(".")], left


def test_rotation_and_upgrade_killed_at_the_first_step_are_finished_by_the_next_up(
    own: Sandbox, other_release: dict[str, str]
) -> None:
    version = change_everything(own, other_release)
    printed = kill_at(own, "dublin", "install-release prometheus", APPLY_BUNDLE)
    assert "slave-dublin-bundle" in printed
    serves_whole(own)
    own.up()
    is_finished(own, version)


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
