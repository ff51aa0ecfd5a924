"""Every change of a running pair, interrupted at its steps, is whole meanwhile and goes on.

The processes are stopped where a test wants it, looked at, and then killed or cut off: see stop_at.
Killed before each of its changes, without machines: tests/hostfiles/test_apply_bundle.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from sandbox import host, machine, providers, releases
from sandbox.command import CommandProvider
from sandbox.host import wait_until
from sandbox.program import Resource
from tests.sandbox.conftest import NAMESPACE, ROOT, Sandbox
from tests.sandbox.test_5_data import back_up, backups, history, snapshots

SOURCE = Path(__file__).with_name("stop_at.py")
# What Debian's Python looks at first.
HOOK = "/usr/local/lib/python3.13/dist-packages/stop_at"
APPLY_BUNDLE = "bin/apply-bundle"
FEDERATED = 'up{job="CoreSystems",instance="core01.example.internal:9100",site="dublin"}'
LISTENERS = {
    "dublin": {
        "127.0.0.1:9095": "/etc/nginx/tls/server.crt",
        "127.0.0.1:9090": "/etc/prometheus/tls/prometheus.crt",
        "127.0.0.1:9100": "/etc/node_exporter/tls/node_exporter.crt",
    },
    "master": {
        "127.0.0.1:443": "/etc/nginx/tls/server.crt",
        "127.0.0.1:9090": "/etc/prometheus/tls/prometheus.crt",
    },
    "core01": {"10.20.1.11:9100": "/etc/node_exporter/tls/node_exporter.crt"},
}
# On a host: every managed path, read as services read it, against what its tree says of itself; of
# each listener the certificate that it has the key of, and that of its file; and what is left.
LOOK = """
import hashlib, json, os, pathlib, ssl, sys

def shown(address):
    try:
        return ssl.get_server_certificate(tuple(address.rsplit(":", 1)), timeout=5)
    except OSError:
        return ""

def is_whole(entry):
    try:
        content = pathlib.Path(entry["path"]).read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content).hexdigest() == entry["sha256"]

tree = pathlib.Path("/opt/federation/current").resolve()
files = json.loads((tree / ".manifest.json").read_text())["files"]
found = {
    "bundle": tree.name,
    "disturbed": [entry["path"] for entry in files if not is_whole(entry)],
    "shown": {address: shown(address) for address in json.loads(sys.argv[1])},
    "held": {a: pathlib.Path(f).read_text() for a, f in json.loads(sys.argv[1]).items()},
    "trees": os.listdir("/opt/federation/trees"),
    "half releases": [name for name in os.listdir("/opt/releases") if name.startswith(".")],
}
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Step:
    """A call of a function of ours; on a host, or of `up` itself."""

    function: str
    about: str = ""
    host: str = ""
    program: str = APPLY_BUNDLE
    how: str = "SIGSTOP"

    @property
    def hook(self) -> str:
        """What stops it."""
        call = f"stop_at({self.program!r}, {self.function!r}, {self.about!r}, {self.how!r})"
        return f"{SOURCE.read_text()}\n\n{call}\n"


@contextlib.contextmanager
def armed(sandbox: Sandbox, step: Step) -> Iterator[None]:
    """While the block runs, whoever comes to the step on its host stops there."""
    write = f"cat >{HOOK}.py; echo import stop_at >{HOOK}.pth"
    sandbox.inside(step.host, "bash", "-c", write, stdin=step.hook)
    try:
        yield
    finally:
        sandbox.script(
            step.host, f"rm -r {HOOK}.pth {HOOK}.py; rm -rf $(dirname {HOOK})/__pycache__"
        )


def killed_at(
    sandbox: Sandbox, step: Step, *argv: str, stdin: str | None = None, told: str = ""
) -> None:
    """Runs a program on the step's host, which is killed when it comes to the step.

    `told` is said of it by who started it, where that is another one than we.
    """
    with armed(sandbox, replace(step, how="SIGKILL")):
        done = machine.exec(
            sandbox.plan,
            sandbox.machine(step.host),
            argv,
            stdin=stdin,
            check=False,
            timeout=120,
        )
    if told:
        assert told in done.stderr, (step, done)
    else:
        assert done.returncode == -signal.SIGKILL, (step, done)


def is_stopped(sandbox: Sandbox, step: Step) -> bool:
    found = sandbox.inside(
        step.host, "pgrep", "--runstates", "T", "-f", f"python3.*{step.program}", check=False
    )
    return bool(found)


def signalled(sandbox: Sandbox, step: Step, name: str) -> None:
    """Sends a signal to the program on its host, and to the sudo that waits for it."""
    sandbox.inside(step.host, "pkill", f"-{name}", "-f", step.program, check=False)


@contextlib.contextmanager
def up_stopped(
    sandbox: Sandbox, step: Step, folder: Path, first: str = ""
) -> Iterator[subprocess.Popen[str]]:
    """An `up` that has come to a step, and stands there. `first`: what it executes before all."""
    folder.joinpath("sitecustomize.py").write_text(first if step.host else step.hook)
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}"}
    with (
        subprocess.Popen(
            sandbox.arguments("up", "--no-verify"),
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process,
    ):
        try:
            with armed(sandbox, step) if step.host else contextlib.nullcontext():
                there = wait_until(
                    lambda: is_there(sandbox, step, process) or process.poll() is not None,
                    seconds=90,
                    step=0.1,
                )
            if not there or process.poll() is not None:
                os.killpg(process.pid, signal.SIGKILL)
                pytest.fail(f"`up` did not come to {step}: {process.communicate()[0]}")
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            if step.host:
                signalled(sandbox, step, "CONT")


def is_there(sandbox: Sandbox, step: Step, process: subprocess.Popen[str]) -> bool:
    if step.host:
        return is_stopped(sandbox, step)
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def killed(sandbox: Sandbox, step: Step, process: subprocess.Popen[str]) -> None:
    """Ends the program on the host by an uncatchable signal; `up` must tell."""
    signalled(sandbox, step, "KILL")
    fails(process)


def cut(sandbox: Sandbox, step: Step, process: subprocess.Popen[str]) -> None:
    """Ends the connections to the host; the program goes on without anyone who listens."""
    sandbox.inside(step.host, "pkill", "-KILL", "-f", "^sshd-session: .*notty")
    fails(process)


def up_killed(sandbox: Sandbox, step: Step, process: subprocess.Popen[str]) -> None:
    """Ends `up` with its whole process group; the program on the host goes on."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL


def fails(process: subprocess.Popen[str]) -> str:
    printed, _ = process.communicate(timeout=90)
    assert process.returncode == 1, printed
    assert ": the command on " in printed
    return printed


def look(sandbox: Sandbox, name: str) -> dict[str, Any]:
    """What is on a host, once all of its listeners answer."""
    found: dict[str, Any] = {}

    def all_answer() -> bool:
        told = sandbox.inside(name, "python3", "-c", LOOK, json.dumps(LISTENERS[name]))
        found.update(json.loads(told))
        return all(found["shown"].values())

    assert wait_until(all_answer, seconds=30, step=0.2), (name, found["shown"])
    return found


def whole(sandbox: Sandbox) -> dict[tuple[str, str], str]:
    """Returns what each listener shows; fails unless what every service reads is of one bundle, and
    the master gets what it wants."""
    since, certificates = time.time(), {}
    for name in LISTENERS:
        found = look(sandbox, name)
        assert found["disturbed"] == [], name
        certificates |= {(name, address): shown for address, shown in found["shown"].items()}
    sandbox.wait(f"timestamp({FEDERATED} == 1) > {since:.3f}")
    return certificates


def is_finished(sandbox: Sandbox) -> dict[tuple[str, str], str]:
    """`up` finishes, another has nothing to do, and of each host there is one bundle, in force."""
    sandbox.up("--no-verify")
    assert "no changes" in sandbox.up("--no-verify")
    assert list((sandbox.plan.runtime_dir / "ssh").iterdir()) == [], "the keys of a killed run"
    for name in LISTENERS:
        found = look(sandbox, name)
        assert found["trees"] == [found["bundle"]], (
            "neither a half nor an old one, with its secrets"
        )
        assert found["half releases"] == []
        for address, shown in found["shown"].items():
            assert found["held"][address].startswith(shown.strip()), (name, address)
    return whole(sandbox)


@pytest.fixture(scope="module")
def pair(own: Sandbox) -> Sandbox:
    """The sandbox, up."""
    own.up()
    return own


@pytest.fixture(scope="module")
def other_release(own: Sandbox) -> Iterator[dict[str, str]]:
    """The same Prometheus under another version, as settings name it."""
    programs = {name: releases.tool(name) for name in ("prometheus", "promtool")}
    release = releases.add("prometheus", "3.5.995", programs, "for a test")
    yield {"version": release.version, "sha256": release.sha256, "url": release.url}
    release.path.unlink()


# Each changes settings, and returns how the change is seen once it is made.
Seen = Callable[[], bool]


def rotate(sandbox: Sandbox, *names: str) -> int:
    """Starts the next generation of what these name, at slave and master. Returns its number."""
    slaves, master = sandbox.get("slaves"), sandbox.get("master")
    before = slaves[0].get("rotation", {})
    number = before.get(names[0], 1) + 1
    slaves[0]["rotation"] = {**before, **dict.fromkeys(names, number)}
    both = {name: number for name in names if name == "leafCertificates"}
    master["rotation"] = {**master.get("rotation", {}), **both}
    sandbox.set(slaves=slaves, master=master)
    return number


def password(sandbox: Sandbox) -> Seen:
    number = rotate(sandbox, "password")
    held = "cat /etc/prometheus/secrets/federate-dublin-*.password"
    return lambda: (
        sandbox.outputs["slaves"]["dublin"]["federationUser"] == f"prometheus-admin-{number}"
        and sandbox.script("master", held).strip()
        == sandbox.outputs["federationPasswords"]["dublin"]
    )


def leaves_and_exporter_password(sandbox: Sandbox) -> Seen:
    before = whole(sandbox)
    number = rotate(sandbox, "leafCertificates", "exporterPassword")
    users = ("core01", "cat", "/etc/node_exporter/config.yml")
    return lambda: (
        all(before[listener] != shown for listener, shown in whole(sandbox).items())
        and f" prometheus-{number}:" in sandbox.inside(*users)
    )


def new_authority(sandbox: Sandbox) -> Seen:
    newest = sandbox.config.get(f"{NAMESPACE}:rotation", {}).get("ca", 1)
    sandbox.set(rotation={"ca": newest + 1, "oldestCa": newest})
    before = whole(sandbox)
    return lambda: all(before[listener] != shown for listener, shown in whole(sandbox).items())


def old_authority_goes(sandbox: Sandbox) -> Seen:
    oldest, *_ = sandbox.outputs["caCertificate"].split("-----END")
    sandbox.set(rotation={"ca": sandbox.get("rotation")["ca"]})
    return lambda: (
        not any(
            oldest in sandbox.script(name, "cat /etc/*/tls/ca.pem") for name in ("dublin", "master")
        )
    )


def upgrade(sandbox: Sandbox, release: dict[str, str]) -> Seen:
    """To the other release, or back."""
    chosen = {} if sandbox.config.get(f"{NAMESPACE}:releases") else {"prometheus": release}
    sandbox.set(releases=chosen)
    return lambda: (f"-{release['version']}/" in running(sandbox)) == bool(chosen)


def running(sandbox: Sandbox) -> str:
    return sandbox.script("dublin", "readlink /proc/$(systemctl show -P MainPID prometheus)/exe")


def interrupt(
    sandbox: Sandbox,
    change: Callable[[Sandbox], Seen],
    step: Step,
    end: Callable[[Sandbox, Step, subprocess.Popen[str]], None],
    folder: Path,
) -> None:
    """Makes a change, interrupts it at a step, and has the next `up` finish it."""
    before, seen = whole(sandbox), change(sandbox)
    with up_stopped(sandbox, step, folder) as process:
        meanwhile = whole(sandbox)
        end(sandbox, step, process)
    then = whole(sandbox)
    after = is_finished(sandbox)
    assert seen()
    for listener, old in before.items():
        assert {meanwhile[listener], then[listener]} <= {old, after[listener]}, listener


@pytest.mark.parametrize(
    ("change", "step", "end"),
    [
        (password, Step("swap", host="master"), cut),
        (leaves_and_exporter_password, Step("act", "'nginx.service'", "dublin"), killed),
        (leaves_and_exporter_password, Step("stage", host="core01"), cut),
        (new_authority, Step("check", host="master"), up_killed),
        (old_authority_goes, Step("wait_until_ready", "'nginx.service'", "dublin"), killed),
    ],
)
def test_a_rotation_is_whole_at_each_step_and_the_next_up_finishes_it(
    pair: Sandbox,
    tmp_path: Path,
    change: Callable[[Sandbox], Seen],
    step: Step,
    end: Callable[[Sandbox, Step, subprocess.Popen[str]], None],
) -> None:
    interrupt(pair, change, step, end, tmp_path)


@pytest.mark.parametrize(
    ("step", "end"),
    [
        (Step("install_releases", host="dublin"), killed),
        (Step("remove_releases", host="dublin"), up_killed),
    ],
)
def test_an_upgrade_and_the_way_back_are_finished_by_the_next_up(
    pair: Sandbox,
    tmp_path: Path,
    other_release: dict[str, str],
    step: Step,
    end: Callable[[Sandbox, Step, subprocess.Popen[str]], None],
) -> None:
    interrupt(pair, lambda own: upgrade(own, other_release), step, end, tmp_path)


# Made in the cloud, and not written down yet; or gone there, and still written down.
def noted(kind: str) -> Step:
    return Step("_record", f"aws:{kind}", program="sandbox/engine.py")


def forgotten(kind: str) -> Step:
    return Step("forget", f"aws:{kind}", program="sandbox/state.py")


def kill_up_at(sandbox: Sandbox, step: Step, folder: Path) -> None:
    with up_stopped(sandbox, step, folder) as process:
        os.killpg(process.pid, signal.SIGKILL)


def past(sandbox: Sandbox) -> Callable[[], Any]:
    """What both servers say of the last half minute, now and whenever it is asked again."""
    sandbox.wait(f"count_over_time({FEDERATED}[20s]) >= 8")
    until = time.time() - 4
    return lambda: {
        name: history(sandbox, name, until - 20, until) for name in ("dublin", "master")
    }


def renew(
    sandbox: Sandbox,
    server: str,
    steps: Sequence[Step],
    folder: Path,
    ask: Callable[[], Any],
    **settings: Any,
) -> None:
    """Another instance in the place of a server's, with `up` killed at each of these steps; what
    both servers answer to `ask` is the same after it."""
    before, old = ask(), sandbox.machine(server)
    assert all(before.values())
    slaves, master = sandbox.get("slaves"), sandbox.get("master")
    chosen = master if server == "master" else slaves[0]
    chosen |= {"generation": chosen.get("generation", 1) + 1, **settings}
    sandbox.set(slaves=slaves, master=master)
    for step in steps:
        kill_up_at(sandbox, step, folder)
    is_finished(sandbox)
    assert ask() == before
    assert sandbox.machine(server) != old
    servers = [m for m in machine.machines(sandbox.plan) if not m.startswith("core")]
    assert len(servers) == 2, "what the killed runs had begun is gone"


def test_a_server_is_replaced_with_its_history_however_often_up_is_killed(
    pair: Sandbox, tmp_path: Path
) -> None:
    steps = [noted("ec2/instance:"), noted("ec2/eipAssociation:"), forgotten("ec2/instance:")]
    renew(pair, "dublin", steps, tmp_path, past(pair))


def test_a_server_is_restored_with_its_history_however_often_up_is_killed(
    pair: Sandbox, tmp_path: Path
) -> None:
    steps = [noted("ebs/volume:"), noted("ec2/volumeAttachment:")]
    # Of the time before the snapshot.
    ask = past(pair)
    renew(pair, "master", steps, tmp_path, ask, restoreFrom=snapshots(pair)["master"])


def test_a_second_up_is_refused_by_the_name_of_the_first_which_goes_on_unharmed(
    pair: Sandbox, tmp_path: Path
) -> None:
    seen, step = password(pair), Step("stage", host="dublin")
    with up_stopped(pair, step, tmp_path) as first:
        told = pair.refused()
        assert f"process {first.pid}, directory {pair.plan.state_dir}" in told
        assert "Wait until it has ended" in told
        signalled(pair, step, "CONT")
        printed, _ = first.communicate(timeout=90)
        assert first.returncode == 0, printed
    is_finished(pair)
    assert seen()


def edited(bundle: str) -> str:
    """Another bundle: two services read another file."""
    other = json.loads(bundle)
    files = {file["path"]: file for file in other["files"]}
    for path in ("/etc/prometheus/prometheus.yml", "/etc/nginx/federation.conf"):
        files[path]["content"] += "# Another.\n"
    return json.dumps(other)


def name_of(bundle: str) -> str:
    """How apply-bundle calls its tree."""
    return hashlib.sha256(bundle.encode()).hexdigest()[:16]


def test_of_two_bundles_at_once_the_second_waits_and_is_in_force_wholly(
    pair: Sandbox, tmp_path: Path
) -> None:
    command = "slave-dublin-bundle"
    inputs, step = pair.sent(command), Step("converge", host="dublin")
    second = inputs["stdin"]
    first = edited(second)

    def deliver(bundle: str) -> str:
        """As `up` does it: over SSH."""
        given = {**inputs, "stdin": bundle}
        resource = Resource(
            urn="", type=providers.COMMAND, name=command, inputs=given, custom=True, parent=""
        )
        provider = CommandProvider(threading.Event(), tmp_path / name_of(bundle))
        return provider.create(resource, given)[1]["stdout"]

    def waits() -> bool:
        found = pair.script(
            "dublin", "find /proc/[0-9]*/fd -lname '*/apply-bundle.lock' 2>&-; true"
        )
        return len(found.splitlines()) == 2

    with ThreadPoolExecutor(2) as beside:
        try:
            with armed(pair, step):
                one = beside.submit(deliver, first)
                assert wait_until(lambda: is_stopped(pair, step), seconds=30), one
            other = beside.submit(deliver, second)
            assert wait_until(waits, seconds=30)
            meanwhile = look(pair, "dublin")
            assert meanwhile["disturbed"] == []
            assert meanwhile["bundle"] == name_of(first)
            assert not other.done()
        finally:
            signalled(pair, step, "CONT")
        told = [one.result(timeout=60), other.result(timeout=60)]
    # What the first had not done yet, it did before the second began.
    changes = ("changed /etc/prometheus/prometheus.yml", "reloaded prometheus.service")
    assert all(change in words for change in changes for words in told), told
    found = look(pair, "dublin")
    assert (found["bundle"], found["trees"]) == (name_of(second), [name_of(second)])
    whole(pair)


# Nothing is refused and nobody is told: packets to and from a host's SSH are lost.
SILENCE = """
table inet silence {
    chain in { type filter hook input priority -300; tcp dport 22 drop; }
    chain out { type filter hook output priority -300; tcp sport 22 drop; }
}
"""


@contextlib.contextmanager
def silent(sandbox: Sandbox, name: str) -> Iterator[None]:
    nft = ["ip", "netns", "exec", sandbox.namespace(name), "nft"]
    host.run([*nft, "-f", "-"], stdin=SILENCE)
    try:
        yield
    finally:
        host.run([*nft, "delete", "table", "inet", "silence"])


def silenced(
    sandbox: Sandbox,
    change: Callable[[Sandbox], Seen],
    step: Step,
    folder: Path,
    first: str = "",
) -> float:
    """Has `up` meet silence at a step of a delivery, and the next one finish it. Returns how many
    seconds the first one waited in it; what was sent goes on meanwhile."""
    seen = change(sandbox)
    with up_stopped(sandbox, step, folder, first) as process, silent(sandbox, step.host):
        signalled(sandbox, step, "CONT")
        began = time.monotonic()
        printed = fails(process)
        seconds = time.monotonic() - began
        assert "not responding" in printed
    whole(sandbox)
    is_finished(sandbox)
    assert seen()
    return seconds


def test_silence_in_the_middle_of_a_delivery_ends_up_and_the_next_one_finishes(
    pair: Sandbox, tmp_path: Path
) -> None:
    # How long it takes as it is: tests/soak/test_silence.py.
    sooner = "from sandbox import command; command._EVERY_HOST['ServerAliveInterval'] = '2'"
    assert silenced(pair, password, Step("swap", host="dublin"), tmp_path, sooner) < 30


def test_a_backup_that_was_killed_is_made_by_the_next_run(pair: Sandbox) -> None:
    service = "prometheus-backup.service"
    # Before it is among the backups, and before anybody is told of it.
    for program, function, about in (
        ("pathlib/_local.py", "rename", "/data/backups/"),
        ("backup-data", "tell", ""),
    ):
        step = Step(function, about, "dublin", program=program)
        killed_at(pair, step, "systemctl", "start", service, told="failed")
        result = pair.inside("dublin", "systemctl", "show", "-P", "Result", service)
        assert result.strip() == "signal", step
    since = time.time()
    made = back_up(pair, "dublin")
    there = backups(pair, "dublin")
    assert there[-1] == made
    assert pair.script("dublin", "ls -A /data/snapshots") == ""
    for backup in there:
        assert "meta.json" in pair.script("dublin", f"ls /data/backups/{backup}/*/"), backup
    told = pair.script("dublin", "grep -v '#' /var/lib/prometheus-backup/backup.prom").split()
    metrics = dict(zip(told[::2], told[1::2], strict=True))
    assert metrics["federation_backup_count"] == str(len(there))
    assert int(metrics["federation_backup_last_success_timestamp_seconds"]) >= int(since)


# First on PATH as $1: ends restore-data and all that it runs, in the place of call number $2.
KILLED_RESTORE = r"""
mkdir -p /root/stub && cat >/root/stub/$1 <<END
#!/bin/sh
echo >>/root/stub/calls
[ "\$(wc -l </root/stub/calls)" = $2 ] && kill -9 0
exec /usr/bin/$1 "\$@"
END
chmod +x /root/stub/$1
PATH=/root/stub:$PATH setsid --wait restore-data $3
echo $?; rm -r /root/stub
"""


def test_a_restore_on_the_volume_that_was_killed_serves_no_half_and_is_finished_by_another(
    pair: Sandbox,
) -> None:
    ask = past(pair)
    before, backup = ask(), back_up(pair, "dublin")
    assert all(before.values())
    for program, call in (("mv", "2"), ("cp", "1")):
        told = pair.inside("dublin", "bash", "-c", KILLED_RESTORE, "sh", program, call, backup)
        assert told.startswith("137"), told
        # Nor after a restart of the host, nor by a delivery.
        refused = pair.inside("dublin", "systemctl", "start", "prometheus.service", check=False)
        assert "Assertion failed" in refused
    told = pair.inside("dublin", "/usr/local/sbin/restore-data", backup)
    assert f"restored /data/backups/{backup}" in told
    assert wait_until(lambda: ask() == before, seconds=30, step=0.5)
    whole(pair)
    pair.script("dublin", "rm -r /data/replaced")
