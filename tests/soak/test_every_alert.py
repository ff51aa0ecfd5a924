"""The faults that `make test` has no time for: the alert that names each is told, and clears.

As there, minutes are seconds. What is hours in the rules is a minute here: HURRIED.
"""

from __future__ import annotations

import contextlib
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from sandbox import acme, host, machine
from sandbox.machine import Device
from sandbox.progress import silent
from tests.sandbox import test_7_letsencrypt as public
from tests.sandbox.conftest import Sandbox
from tests.sandbox.notified import (
    FEDERATE,
    OF_THIS_MACHINE,
    PROMETHEUS,
    Fault,
    Listener,
    caused,
    changed_by_hand,
    listening,
    on,
    put_back,
    reload,
)
from tests.sandbox.test_6_interrupted import Step, killed, up_stopped
from tests.soak.conftest import timed

# Some wait for twelve minutes at the usual intervals, for two here.
PATIENCE_SECONDS = 300
RULES = "/etc/prometheus/alerts"
HURRIED = {
    f"{RULES}/host.yml": r"s/\[6h\]/[1m]/; s/for: 1h/for: 10s/",
    f"{RULES}/prometheus.yml": r"s/\[3h\]/[1m]/",
    f"{RULES}/public-certificate.yml": "s/for: 1d/for: 10s/",
    # Prometheus repeats an alert after a minute: five shrank to less, and ten seconds more.
    f"{RULES}/alertmanager.yml": r"/prometheus_notifications_/s/\[[0-9]*s\]/[2m]/",
}
BACKUP = "/etc/node_exporter/textfile/backup.prom"

# Refused for want of a password.
REMOTE_WRITE = """
remote_write:
  - url: https://127.0.0.1:9090/api/v1/write
    tls_config:
      ca_file: tls/ca.pem
      cert_file: tls/prometheus.crt
      key_file: tls/prometheus.key
      server_name: prometheus-master.example.com
    write_relabel_configs: [{source_labels: [__name__], regex: up, action: keep}]
"""
# Sorts ten thousand numbers ten thousand times, every second.
SLOW_RULE = """
groups:
  - name: slow
    interval: 1s
    rules:
      - record: slow
        expr: sum_over_time(quantile_over_time(0.5, vector(time())[1000s:100ms])[10000s:1s])
"""
# Beside those that keep serving, each with its own index: of this one it is cut off.
DAMAGED_BLOCK = """
set -e
curl --config /etc/prometheus/secrets/snapshot.curl >/dev/null
block=$(ls -d /data/snapshots/*/01* | head -n 1)
truncate --size 20 $block/index
mv $block /data/ && echo /data/${block##*/} >/root/damaged
rm -r /data/snapshots
"""
DAMAGED_WAL = """
set -e
systemctl stop prometheus
segment=$(ls -S /data/wal/0* | head -n 1)
half=$(($(stat --format %s $segment) / 2))
dd if=/dev/urandom of=$segment bs=64 count=1 seek=$half oflag=seek_bytes conv=notrunc status=none
systemctl start prometheus
"""
FULL = """
fallocate --length $(($(df --output=avail -B1 /data | tail -n 1) - 1000000)) /data/filler
! cat /dev/zero 2>/dev/null >/data/last
"""
SPOOL = """
set -e
mkfs.ext4 -q -m 0 -N 64 /dev/disk/by-id/spool
mkdir /srv/spool && mount /dev/disk/by-id/spool /srv/spool
for megabyte in $(seq 45); do head -c 1M /dev/zero >>/srv/spool/filler; sleep 0.3; done
number=0; while touch /srv/spool/$((number += 1)) 2>/dev/null; do :; done
"""
HOG = """
systemd-run --quiet --collect --unit {unit} --property OOMScoreAdjust=1000 \
    python3 -c 'import time; held = b"1" * {size}; time.sleep(3600)'
"""


def small_volume_fills(sandbox: Sandbox) -> None:
    image = sandbox.plan.state_dir / "spool.img"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    device = Device(image=image, by_id="spool")
    machine.attach_device(sandbox.plan, sandbox.machine("master"), device)
    sandbox.script("master", SPOOL)


def delivery_killed(sandbox: Sandbox) -> None:
    master = sandbox.get("master")
    sandbox.set(master=master | {"tokens": [*master["tokens"], "another"]})
    step = Step("converge", host="master")
    with up_stopped(sandbox, step, sandbox.plan.state_dir) as process:
        killed(sandbox, step, process)


def slow_and_refused(sandbox: Sandbox) -> None:
    add = r"s#^rule_files:#rule_files:\n  - slow/rule.yml#"
    changed_by_hand(sandbox, "master", PROMETHEUS, add)
    sandbox.inside("master", "mkdir", "/etc/prometheus/slow")
    sandbox.inside("master", "tee", "/etc/prometheus/slow/rule.yml", stdin=SLOW_RULE)
    sandbox.inside("master", "tee", "--append", PROMETHEUS, stdin=REMOTE_WRITE)
    reload(sandbox, "master")


def quick_again(sandbox: Sandbox) -> None:
    put_back(sandbox, "master", PROMETHEUS)
    sandbox.script("master", "rm -r /etc/prometheus/slow")
    reload(sandbox, "master")


def nothing_to_scrape(sandbox: Sandbox) -> None:
    changed_by_hand(sandbox, "dublin", PROMETHEUS, "1!d; s/.*/global: {}/")
    reload(sandbox, "dublin")


def scrapes_again(sandbox: Sandbox) -> None:
    put_back(sandbox, "dublin", PROMETHEUS)
    reload(sandbox, "dublin")


def match(sandbox: Sandbox, old: str, new: str) -> None:
    """Has the master ask the slave for something else."""
    changed_by_hand(sandbox, "master", FEDERATE, f"s/{old}/{new}/")
    reload(sandbox, "master")


def backups_every_five_seconds(sandbox: Sandbox) -> None:
    changed_by_hand(sandbox, "master", BACKUP, r"s/^\(federation_[a-z_]*\) .*/\1 5/")


def first_backup(sandbox: Sandbox) -> None:
    put_back(sandbox, "master", BACKUP)
    sandbox.inside("master", "systemctl", "start", "prometheus-backup")


def full_volume(sandbox: Sandbox) -> None:
    """Once Prometheus has its file for chunks: it ends when it has no place to begin one."""
    assert host.wait_until(
        lambda: sandbox.inside("dublin", "ls", "/data/chunks_head"),
        seconds=PATIENCE_SECONDS,
        step=2,
    )
    sandbox.script("dublin", FULL)


def not_notifying(sandbox: Sandbox) -> None:
    """Its Alertmanager is stopped until Prometheus complains, and can tell it afterwards."""
    sandbox.inside("master", "systemctl", "stop", "alertmanager")
    query = 'ALERTS{alertname="PrometheusNotNotifying",alertstate="firing"}'
    try:
        assert host.wait_until(
            lambda: sandbox.own_api("master", "query", query=query)["result"],
            seconds=PATIENCE_SECONDS,
            step=1,
        )
    finally:
        sandbox.inside("master", "systemctl", "start", "alertmanager")


def memory_left(sandbox: Sandbox, name: str) -> tuple[int, int]:
    """What a machine has of memory, and what of it is free or easily so, in bytes."""
    used, limit = machine.memory_bytes(sandbox.plan, sandbox.machine(name))
    text = (_memory_group(sandbox, name) / "memory.stat").read_text()
    stat = {key: int(value) for key, value in map(str.split, text.splitlines())}
    # With version 1 of control groups, those below are in the total alone.
    return limit, limit - used + stat.get("total_inactive_file", stat["inactive_file"])


def _memory_group(sandbox: Sandbox, name: str) -> Path:
    return host.cgroups().limits["memory"] / sandbox.plan.prefix / sandbox.machine(name)


def tell_memory(sandbox: Sandbox, name: str) -> None:
    """The kernel's figures are of all machines together: puts this machine's own in their place."""
    total, left = (amount >> 10 for amount in memory_left(sandbox, name))
    text = f"MemTotal: {total} kB\nMemFree: {left} kB\nMemAvailable: {left} kB\n"
    sandbox.inside(name, "tee", "/run/meminfo", stdin=text)
    sandbox.script(name, "mountpoint -q /proc/meminfo || mount --bind /run/meminfo /proc/meminfo")


def little_memory(sandbox: Sandbox) -> None:
    def little() -> bool:
        total, left = memory_left(sandbox, "dublin")
        return left < total * 9 // 100

    # One after another: for what one takes, the kernel gives up files that it had kept.
    for number in range(10):
        total, left = memory_left(sandbox, "dublin")
        sandbox.script("dublin", HOG.format(unit=f"hog-{number}", size=left - total * 7 // 100))
        if host.wait_until(little, seconds=10, step=0.5):
            break
    assert little()
    tell_memory(sandbox, "dublin")


def enough_memory(sandbox: Sandbox) -> None:
    sandbox.inside("dublin", "systemctl", "stop", "hog-*")
    tell_memory(sandbox, "dublin")


def too_little_memory(sandbox: Sandbox) -> None:
    total, _ = memory_left(sandbox, "dublin")
    sandbox.script("dublin", HOG.format(unit="hog", size=2 * total))


def refused_certificate(sandbox: Sandbox) -> None:
    sandbox.script("dublin", "echo no_such_directive on\\; >/run/public-certificate/nginx-bad.conf")
    assert not public.attempt(sandbox, "dublin")


def good_certificate(sandbox: Sandbox) -> None:
    sandbox.inside("dublin", "rm", "/run/public-certificate/nginx-bad.conf")
    assert public.attempt(sandbox, "dublin")


def unreachable(sandbox: Sandbox) -> None:
    sandbox.inside("dublin", *"iptables -I INPUT -p tcp --dport 80 -j DROP".split())
    assert not public.attempt(sandbox, "dublin")


def reachable_again(sandbox: Sandbox) -> None:
    sandbox.inside("dublin", *"iptables -D INPUT -p tcp --dport 80 -j DROP".split())
    assert public.attempt(sandbox, "dublin")


UNSYNCHRONISED, OFF = (False, 0), (True, 200_000)
GOOD = (True, 100)


@contextlib.contextmanager
def clock(sandbox: Sandbox, server: str, answer: tuple[bool, int]) -> Iterator[None]:
    """What the kernel answers node_exporter about the clock: whether it is synchronised, and by
    how many microseconds it is off. All machines share one clock, which is left alone.

    https://man7.org/linux/man-pages/man2/adjtimex.2.html
    """
    synchronised, offset = answer
    error, status, state = (1000, 0, 0) if synchronised else (16_000_000, 0x40, 5)
    timex = struct.pack("<IIqqqqi", 0, 0, offset, 0, error, 0, status).hex()
    there = set(machine.pids_below(_memory_group(sandbox, server)))
    (pid,) = there & set(map(int, host.run(["pgrep", "-x", "node_exporter"]).stdout.split()))
    inject = f"inject=adjtimex:retval={state}:poke_exit=@arg1={timex}"
    tracer = subprocess.Popen(
        ["strace", "-f", "-q", "-e", "trace=adjtimex", "-e", inject, "-p", str(pid)],
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
        assert tracer.poll() is None
    finally:
        tracer.send_signal(signal.SIGTERM)
        tracer.wait()


ROUNDS: tuple[dict[str, Fault], ...] = (
    {
        "a delivery is killed": Fault(
            cause=delivery_killed,
            cure=Sandbox.up,
            raises=(("DeliveryUnfinished", "master"),),
        ),
    },
    # Nobody watches on the slave meanwhile: the others are the master's.
    {
        "a slave has nothing to scrape": Fault(
            cause=nothing_to_scrape,
            cure=scrapes_again,
            raises=(("FederationEmpty", "master"), ("FederationStale", "master")),
        ),
        "a rule is slow, and a remote storage refuses": Fault(
            cause=slow_and_refused,
            cure=quick_again,
            raises=(
                ("PrometheusMissedRuleEvaluations", "master"),
                ("PrometheusRemoteStorageFailures", "master"),
            ),
        ),
        "there never was a backup": Fault(
            cause=backups_every_five_seconds,
            cure=first_backup,
            raises=(("BackupMissing", "master"),),
        ),
        "a block is damaged": Fault(
            cause=on("master", DAMAGED_BLOCK),
            cure=on("master", "rm -r $(cat /root/damaged)"),
            raises=(("PrometheusCompactionsFailing", "master"),),
        ),
        "a small volume fills": Fault(
            cause=small_volume_fills,
            cure=on("master", "find /srv/spool -type f -delete"),
            raises=(("HostDiskFilling", "master"), ("HostInodesExhausted", "master")),
        ),
    },
    # The slave stores nothing meanwhile, and so knows nothing else.
    {
        "the data volume is full to the last byte": Fault(
            cause=full_volume,
            cure=on("dublin", "rm /data/filler /data/last"),
            raises=(("PrometheusNotIngesting", "dublin"), ("FederationStale", "master")),
        ),
        "Alertmanager was away": Fault(
            cause=not_notifying,
            cure=on("master", "true"),
            raises=(("PrometheusNotNotifying", "master"),),
        ),
    },
    {
        "memory is nearly used up": Fault(
            cause=little_memory,
            cure=enough_memory,
            raises=(("HostMemoryLow", "dublin"),),
        ),
        "a site's match names nothing": Fault(
            cause=partial(match, old='__name__=~".+"', new='job="typo"'),
            cure=partial(match, old='job="typo"', new='__name__=~".+"'),
            raises=(("FederationEmpty", "master"),),
        ),
        "the write-ahead log is damaged": Fault(
            cause=on("master", DAMAGED_WAL),
            cure=on("master", "systemctl restart prometheus"),
            raises=(("PrometheusWalCorruption", "master"),),
        ),
    },
    {
        "memory is used up": Fault(
            cause=too_little_memory,
            cure=on("dublin", "true"),
            raises=(("HostOutOfMemory", "dublin"),),
        ),
        "nginx refuses a public certificate": Fault(
            cause=refused_certificate,
            cure=good_certificate,
            raises=(("PublicCertificateRefused", "dublin"),),
        ),
    },
    {
        "the authority cannot reach the slave": Fault(
            cause=unreachable,
            cure=reachable_again,
            raises=(("PublicCertificateFailing", "dublin"),),
        ),
    },
)
# The alert, whose, and the answer of the kernel that raises it.
CLOCKS = (
    ("HostClockSkew", "dublin", OFF),
    (OF_THIS_MACHINE, "master", UNSYNCHRONISED),
)


def clocks_go_wrong(sandbox: Sandbox, listener: Listener) -> None:
    """By themselves, since good answers end them, too: this machine's own clock may be bad."""
    servers = {(alert, server) for alert, server, _ in CLOCKS}
    with ExitStack() as good:
        for _, server, _ in CLOCKS:
            good.enter_context(clock(sandbox, server, GOOD))
        listener.wait_until_over(lambda *one: one in servers)
    since = time.time()
    with ExitStack() as bad:
        for _, server, answer in CLOCKS:
            bad.enter_context(clock(sandbox, server, answer))
        listener.wait("team", since, servers)
    with ExitStack() as good:
        for _, server, _ in CLOCKS:
            good.enter_context(clock(sandbox, server, GOOD))
        listener.wait_until_over(lambda *one: one in servers)


def hurry(sandbox: Sandbox) -> None:
    for server in ("master", "dublin"):
        for path, edit in HURRIED.items():
            if sandbox.script(server, f"ls {path}", check=False).startswith(path):
                changed_by_hand(sandbox, server, path, edit)
        reload(sandbox, server)


def test_the_other_alerts_fire_for_their_faults_and_clear(
    fresh: Sandbox, results: Callable[..., None], tmp_path: Path
) -> None:
    host.install(silent, {"strace": "strace"})
    fresh.world["acme"] = True
    slaves = fresh.get("slaves")
    slaves[0]["certificates"] = "letsencrypt"
    fresh.set(slaves=slaves, letsEncrypt=public.SETTINGS)
    fresh.up()
    rows: dict[str, str] = {}
    try:
        with listening(fresh, tmp_path, PATIENCE_SECONDS) as listener:
            tell_memory(fresh, "dublin")
            # Its view of /proc is made when it starts.
            fresh.inside("dublin", "systemctl", "restart", "node_exporter")
            first, *others = ROUNDS
            rows |= play(fresh, listener, first)
            hurry(fresh)
            # Its files are not as delivered from now on.
            hurried = replace(listener, ignored=listener.ignored | {"BundleDrift"})
            for faults in others:
                rows |= play(fresh, hurried, faults)
            seconds, _ = timed(lambda: str(clocks_go_wrong(fresh, listener)))
            rows["two clocks"] = f"all told and over after {seconds:.0f} s"
    finally:
        acme.stop(fresh.plan)
    results("Alerts that make test does not cause", rows)


def play(sandbox: Sandbox, listener: Listener, faults: Mapping[str, Fault]) -> dict[str, str]:
    """Causes faults side by side, and cures them; fails unless their alerts are told and clear."""
    listener.wait_for_quiet()
    with caused(sandbox, listener, faults.values()) as since:
        told = time.time() - since
    cured = time.time()
    listener.wait_for_quiet()
    over = time.time() - cured
    return {"; ".join(faults): f"all told after {told:.0f} s, over {over:.0f} s after the cures"}
