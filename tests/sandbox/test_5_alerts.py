"""Faults are caused for real: the alert that names each reaches the right receiver, and clears.

Everything counts in samples, so with one every two seconds minutes become seconds. Faults are
caused side by side and waited for once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from sandbox import host, network
from tests.sandbox.conftest import Sandbox
from tests.sandbox.keyring import Keyring
from tests.sandbox.notified import (
    ALERTMANAGER,
    CERTIFICATES,
    CHANGED,
    FEDERATE,
    HOOK,
    PASSWORD,
    PATIENCE_SECONDS,
    PROMETHEUS,
    SERVERS,
    STRANGER,
    TOKEN,
    Fault,
    Listener,
    caused,
    changed_by_hand,
    listening,
    on,
    put_back,
    reload,
)
from tests.sandbox.probe import Door, Request, ask


@pytest.fixture(scope="module")
def listener(sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Listener]:
    """The shared sandbox with notifications, and who gets them."""
    before = {key: sandbox.config.get(f"prometheus-federation:{key}") for key in CHANGED}
    try:
        with listening(sandbox, tmp_path_factory.mktemp("told")) as told:
            yield told
    finally:
        for key, value in before.items():
            if value is None:
                sandbox.config.pop(f"prometheus-federation:{key}", None)
            else:
                sandbox.set(**{key: value})
        sandbox.up()
        network.remove_stranger(sandbox.plan, STRANGER)


def bad_log_ins(sandbox: Sandbox) -> None:
    keys = Keyring(sandbox.state)
    client = keys.client(keys.leaf("master-prometheus"))
    door = Door(address=sandbox.public_ip("dublin"), port=9095, name="prometheus-slave.example.com")
    requests = [Request(door=door, client=client, path="/federate")] * 60
    answers = ask(sandbox.namespace("master"), requests, at_once=4)
    assert {answer.short for answer in answers} <= {401, 429}


def broken_prometheus(sandbox: Sandbox) -> None:
    changed_by_hand(sandbox, "dublin", PROMETHEUS, "s/^global:/glubal:/")
    reload(sandbox, "dublin")


def cured_prometheus(sandbox: Sandbox) -> None:
    put_back(sandbox, "dublin", PROMETHEUS)
    reload(sandbox, "dublin")


def broken_alertmanager(sandbox: Sandbox) -> None:
    changed_by_hand(sandbox, "master", ALERTMANAGER, "s/^route:/rout:/")
    reload(sandbox, "master", "alertmanager")


def cured_alertmanager(sandbox: Sandbox) -> None:
    put_back(sandbox, "master", ALERTMANAGER)
    reload(sandbox, "master", "alertmanager")


def small_limit(sandbox: Sandbox) -> None:
    changed_by_hand(sandbox, "master", FEDERATE, "s/sample_limit: .*/sample_limit: 10/")
    changed_by_hand(sandbox, "master", CERTIFICATES, "s/ [0-9]*$/ 1700000000/")
    # A rule that promtool takes and that fails: two series on each side of a multiplication.
    rule = "groups: [{name: g, rules: [{record: a, expr: up * on () up}]}]"
    changed_by_hand(
        sandbox, "master", PROMETHEUS, "s#^rule_files:#rule_files:\\n  - /root/bad.yml#"
    )
    sandbox.script(
        "master", f"mkdir -p /etc/prometheus/bad; echo '{rule}' >/etc/prometheus/bad/r.yml"
    )
    sandbox.script("master", "sed -i s#/root/bad.yml#bad/r.yml# /etc/prometheus/prometheus.yml")
    reload(sandbox, "master")


def usual_limit(sandbox: Sandbox) -> None:
    put_back(sandbox, "master", FEDERATE, CERTIFICATES, PROMETHEUS)
    sandbox.script("master", "rm -r /etc/prometheus/bad")
    reload(sandbox, "master")


OLD_BACKUP = """
systemctl start prometheus-backup
sed -i 's/^federation_backup_last_success_timestamp_seconds .*/federation_backup_last_success_\
timestamp_seconds 1700000000/' /var/lib/prometheus-backup/backup.prom
"""

# With room for Prometheus to begin a file of chunks (128 MiB): without, it ends.
FULL_VOLUME = """
fallocate -l $(($(df --output=avail -B1 /data | tail -n1) - 150000000)) /data/filler
"""

TIMERS = "apt-daily.timer apt-daily-upgrade.timer prometheus-backup.timer"

FAULTS = {
    "a target is gone": Fault(
        cause=on("core01", "systemctl stop node_exporter"),
        cure=on("core01", "systemctl start node_exporter"),
        raises=(("TargetDown", "dublin"),),
    ),
    "timers are stopped": Fault(
        cause=on("dublin", f"systemctl stop {TIMERS}"),
        cure=on("dublin", f"systemctl start {TIMERS}"),
        raises=(("TimerStopped", "dublin"),),
    ),
    "a backup fails": Fault(
        cause=on(
            "dublin",
            "mkdir -p /data/backups; chown root /data/backups; chmod 700 /data/backups; "
            "! systemctl start prometheus-backup",
        ),
        cure=on(
            "dublin",
            "chown prometheus /data/backups; chmod 755 /data/backups; "
            "systemctl start prometheus-backup",
        ),
        raises=(("UnitFailed", "dublin"), ("NotificationsFailing", "dublin")),
    ),
    "nginx dies again and again": Fault(
        cause=on("master", "for i in 1 2 3 4; do systemctl kill -s KILL nginx; sleep 3; done"),
        cure=on("master", "true"),
        raises=(("UnitFlapping", "master"),),
    ),
    "a configuration is broken by hand": Fault(
        cause=broken_prometheus,
        cure=cured_prometheus,
        raises=(("PrometheusBadConfig", "dublin"), ("BundleDrift", "dublin")),
    ),
    "Alertmanager's is broken by hand": Fault(
        cause=broken_alertmanager,
        cure=cured_alertmanager,
        raises=(("AlertmanagerBadConfig", "master"), ("BundleDrift", "master")),
    ),
    "passwords are tried": Fault(
        cause=bad_log_ins,
        cure=on("dublin", "true"),
        raises=(("AuthenticationFailures", "dublin"),),
    ),
    "a site has more than its limit, certificates end, a rule fails": Fault(
        cause=small_limit,
        cure=usual_limit,
        raises=(
            ("FederationErrors", "master"),
            ("FederationDown", "master"),
            ("CertificateExpiring", "master"),
            ("CertificateExpiringSoon", "master"),
            ("PrometheusRuleFailures", "master"),
        ),
    ),
    # One after the other: a backup takes room for a moment.
    "backups stay away, and the volume is full": Fault(
        cause=on("master", OLD_BACKUP + FULL_VOLUME),
        cure=on("master", "rm /data/filler; systemctl start prometheus-backup"),
        raises=(("BackupTooOld", "master"), ("HostDiskFull", "master")),
    ),
    "a metric's file is broken": Fault(
        cause=on("master", "echo '{' >/var/lib/node_exporter/textfile/bad.prom"),
        cure=on("master", "rm /var/lib/node_exporter/textfile/bad.prom"),
        raises=(("HostMetricsUnreadable", "master"),),
    ),
}


def test_each_fault_raises_its_alert_at_the_right_receiver_and_it_clears(
    sandbox: Sandbox, listener: Listener
) -> None:
    listener.wait_for_quiet()
    with caused(sandbox, listener, FAULTS.values()) as since:
        # By mail too, and nothing that can wait.
        critical = {("TargetDown", "dublin"), ("FederationDown", "master")}
        listener.wait("pager@example.net", since, critical)
        paged = {alert for alert, _ in listener.fired("pager@example.net", since)}
        can_wait = {"TimerStopped", "UnitFailed", "BundleDrift", "BackupTooOld"}
        assert not paged & (can_wait | {"AuthenticationFailures"})
        timers = {("dublin", name) for name in TIMERS.split()}
        listener.wait_for_units("TimerStopped", since, timers)
        for one in listener.told:
            assert "<no value>" not in one.text
            assert "error" not in one.text
    listener.wait_for_quiet()


STOPPED = [
    ("dublin", "node_exporter", {("TargetDown", "dublin")}),
    ("dublin", "alertmanager", {("SiteAlertmanagerDown", "master")}),
    ("dublin", "prometheus", {("FederationDown", "master")}),
    ("master", "prometheus", {("MasterNotFederating", "dublin")}),
]


WITHOUT_NGINX = {
    ("ServiceDown", "master"),
    ("ServiceDown", "dublin"),
    ("FederationDown", "master"),
}


@pytest.mark.parametrize(("server", "unit", "raises"), STOPPED)
def test_a_service_that_stops_is_told_by_whom_it_leaves(
    sandbox: Sandbox, listener: Listener, server: str, unit: str, raises: set[tuple[str, str]]
) -> None:
    since = time.time()
    sandbox.script(server, f"systemctl stop {unit}")
    try:
        listener.wait("team", since, raises)
    finally:
        sandbox.script(server, f"systemctl start {unit}")
    listener.wait_for_quiet()


def test_nginx_that_is_stopped_is_told_to_the_team_and_the_pager(
    sandbox: Sandbox, listener: Listener
) -> None:
    since = time.time()
    try:
        for server in ("master", "dublin"):
            sandbox.script(server, "systemctl stop nginx")
        listener.wait("team", since, WITHOUT_NGINX)
        listener.wait("pager@example.net", since, WITHOUT_NGINX)
        stopped = {(server, "nginx.service") for server in ("master", "dublin")}
        listener.wait_for_units("ServiceDown", since, stopped)
    finally:
        for server in ("master", "dublin"):
            sandbox.script(server, "systemctl start nginx")
    listener.wait_for_quiet()


def test_a_master_that_can_tell_nobody_is_missed_by_the_dead_mans_switch(
    sandbox: Sandbox, listener: Listener
) -> None:
    def beats(since: float) -> set[str]:
        return {server for _, server in listener.fired("deadman", since)}

    both, started = set(SERVERS.values()), time.time()
    assert host.wait_until(lambda: beats(started) == both, seconds=30)
    sandbox.script("master", "systemctl stop alertmanager")
    try:
        stopped = time.time() + 2
        host.wait_until(lambda: time.time() > stopped + 10, seconds=20)
        assert beats(stopped) == {"dublin"}
    finally:
        sandbox.script("master", "systemctl start alertmanager")
    # Prometheus tells an Alertmanager of the same alert once a minute.
    assert host.wait_until(lambda: beats(stopped) == both, seconds=PATIENCE_SECONDS)
    listener.wait_for_quiet()


@pytest.mark.parametrize("server", ["master", "dublin"])
def test_secrets_of_receivers_are_in_their_files_alone(
    sandbox: Sandbox, listener: Listener, server: str
) -> None:
    words = "|".join((TOKEN, PASSWORD, HOOK))
    found = sandbox.script(
        server,
        f"grep -rlE '{words}' /etc /opt /data /var/lib /var/log /run 2>/dev/null",
        check=False,
    )
    held = sandbox.script(server, "find /opt/federation/trees -path '*/alertmanager/secrets/rec*'")
    held += sandbox.script(server, "find /opt/federation/trees -path '*/alertmanager/secrets/glo*'")
    assert sorted(found.split()) == sorted(held.split())
    for path in held.split():
        assert sandbox.script(server, f"stat -c '%U:%G %a' {path}") == "root:alertmanager 640\n"
    said = sandbox.script(server, "journalctl --all; ps axeww")
    assert not [word for word in (TOKEN, PASSWORD, HOOK) if word in said]
    assert host.wait_until(lambda: listener.told, seconds=5)
