"""Faults are caused for real: the alert that names each reaches the right receiver, and clears.

Everything counts in samples, so with one every two seconds minutes become seconds. Faults are
caused side by side and waited for once.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from sandbox import host, network
from sandbox.plan import NETNS_DIR
from tests.sandbox import receivers
from tests.sandbox.conftest import ROOT, Sandbox
from tests.sandbox.keyring import Keyring, forge_authority, issue
from tests.sandbox.probe import Door, Request, ask

INTERVAL_SECONDS = 2
PATIENCE_SECONDS = 120
# The machines have this machine's clock, whoever keeps that.
OF_THIS_MACHINE = "HostClockNotSynchronised"
TOKEN, PASSWORD, HOOK = "canary-token-canary", "canary-password-canary", "canary-hook-canary"
SERVERS = {
    "prometheus-master.example.com": "master",
    "prometheus-slave.example.com": "dublin",
}
FILES = {
    "prometheus.yml": "/etc/prometheus/prometheus.yml",
    "federate": "/etc/prometheus/federate.d/dublin.yml",
    "certificates": "/etc/node_exporter/textfile/certificates.prom",
    "alertmanager.yml": "/etc/alertmanager/alertmanager.yml",
}


@dataclass(frozen=True, kw_only=True)
class Told:
    """One alert of one notification; `server` is whose Alertmanager told it."""

    at: float
    receiver: str
    server: str
    status: str
    labels: Mapping[str, str]
    text: str

    @property
    def alert(self) -> str:
        return self.labels["alertname"]


class Listener:
    """The receivers, and what they were told so far."""

    def __init__(self, log: Path) -> None:
        self._log = log

    @property
    def told(self) -> list[Told]:
        lines = map(json.loads, self._log.read_text().splitlines())
        return [
            Told(server=SERVERS[urlsplit(line.pop("url")).hostname], **line)
            for line in lines
            if "url" in line
        ]

    def fired(self, receiver: str, since: float) -> set[tuple[str, str]]:
        """Alerts, and whose, of which a receiver was told that they fire."""
        return {
            (one.alert, one.server)
            for one in self.told
            if (one.receiver, one.status) == (receiver, "firing") and one.at >= since
        }

    @property
    def firing(self) -> set[tuple[str, str]]:
        """Those of which the team was not yet told that they are over."""
        last = {
            (one.server, *sorted(one.labels.items())): one
            for one in self.told
            if one.receiver == "team"
        }
        return {
            (one.alert, one.server)
            for one in last.values()
            if one.status == "firing" and one.alert != OF_THIS_MACHINE
        }

    def wait(self, receiver: str, since: float, wanted: set[tuple[str, str]]) -> None:
        """Until a receiver was told of all these."""
        host.wait_until(
            lambda: wanted <= self.fired(receiver, since), seconds=PATIENCE_SECONDS, step=1
        )
        assert wanted - self.fired(receiver, since) == set()

    def wait_for_quiet(self) -> None:
        """Until nothing fires any more."""
        host.wait_until(lambda: not self.firing, seconds=PATIENCE_SECONDS, step=1)
        assert self.firing == set()


@pytest.fixture(scope="module")
def listener(sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Listener]:
    """Receivers on the internet, and the shared sandbox with notifications to them."""
    namespace = sandbox.stranger("receivers")
    address = network.address_of(namespace)
    authority = forge_authority()
    leaf = issue("receivers.example.net", authority, address=address)
    log = tmp_path_factory.mktemp("told") / "log"
    before = {key: sandbox.config.get(f"prometheus-federation:{key}") for key in CHANGED}
    with log.open("w") as out:
        process = subprocess.Popen(
            [
                *("nsenter", f"--net={NETNS_DIR / namespace}"),
                *(sys.executable, "-m", receivers.__name__),
            ],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=out,
            text=True,
        )
        try:
            assert process.stdin is not None
            order = {"certificate": leaf.certificate, "key": leaf.key}
            order |= {"token": TOKEN, "password": PASSWORD}
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
            assert host.wait_until(lambda: "listening" in log.read_text(), seconds=20)
            sandbox.set(
                scrapeInterval=f"{INTERVAL_SECONDS}s",
                evaluationInterval=f"{INTERVAL_SECONDS}s",
                alerting=_alerting(address, authority.certificate),
            )
            sandbox.up()
            yield Listener(log)
        finally:
            process.terminate()
            process.wait()
    for key, value in before.items():
        if value is None:
            sandbox.config.pop(f"prometheus-federation:{key}")
        else:
            sandbox.set(**{key: value})
    sandbox.up()
    network.remove_stranger(sandbox.plan, "receivers")


CHANGED = ("scrapeInterval", "evaluationInterval", "alerting")


def _alerting(address: str, ca: str) -> dict[str, Any]:
    def hook(name: str, port: int = receivers.WEB_PORT) -> dict[str, Any]:
        access = {
            "authorization": {"credentials": TOKEN},
            "tls_config": {"ca": ca, "min_version": "TLS12"},
        }
        url = f"https://{address}:{port}/{HOOK}/{name}"
        return {"name": name, "webhook_configs": [{"url": url, "http_config": access}]}

    mail = {
        "to": "pager@example.net",
        "send_resolved": True,
        "tls_config": {"ca": ca},
        "headers": {"subject": "{{ .Status }} {{ .CommonLabels.alertname }} {{ .ExternalURL }}"},
        "text": "{{ .CommonAnnotations.summary }}",
        "html": "",
    }
    quick = {"group_wait": "1s", "group_interval": "2s"}
    return {
        "global": {
            "smtp_smarthost": f"{address}:{receivers.MAIL_PORT}",
            "smtp_from": "alerts@example.com",
            "smtp_auth_username": receivers.USER,
            "smtp_auth_password": PASSWORD,
        },
        "route": {
            **({"receiver": "team", "group_by": ["..."], "repeat_interval": "1h"} | quick),
            "routes": [
                {
                    "receiver": "deadman",
                    "matchers": ["alertname=Watchdog"],
                    "group_interval": "2s",
                    "repeat_interval": "2s",
                },
                # Its port is shut.
                {"receiver": "gone", "matchers": ["alertname=UnitFailed"], "continue": True},
                {"receiver": "pager", "matchers": ["severity=critical"], "continue": True},
                {"receiver": "team"},
            ],
        },
        "receivers": [
            *(hook("team"), hook("deadman"), hook("gone", port=8444)),
            {"name": "pager", "email_configs": [mail]},
        ],
    }


def changed_by_hand(sandbox: Sandbox, server: str, file: str, edit: str) -> None:
    """Puts a file with an edit (of sed) in the place of the link to what was delivered."""
    path = FILES[file]
    sandbox.script(
        server,
        f"cp --preserve {path} /root/new && sed -i '{edit}' /root/new && mv /root/new {path}",
    )


def put_back(sandbox: Sandbox, server: str, *files: str) -> None:
    """What apply-bundle would do."""
    for file in files:
        path = FILES[file]
        sandbox.script(server, f"ln -sfn /opt/federation/current{path} {path}")


def reload(sandbox: Sandbox, server: str, unit: str = "prometheus", *, check: bool = True) -> None:
    sandbox.script(server, f"systemctl kill --kill-whom=main -s HUP {unit}", check=check)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What is done, how it is undone, and the alerts that it must raise: which, by whom."""

    cause: Callable[[Sandbox], object]
    cure: Callable[[Sandbox], object]
    raises: tuple[tuple[str, str], ...]


def on(server: str, text: str) -> Callable[[Sandbox], object]:
    return lambda sandbox: sandbox.script(server, text)


def bad_log_ins(sandbox: Sandbox) -> None:
    keys = Keyring(sandbox.state)
    client = keys.client(keys.leaf("master-prometheus"))
    door = Door(address=sandbox.public_ip("dublin"), port=9095, name="prometheus-slave.example.com")
    requests = [Request(door=door, client=client, path="/federate")] * 60
    answers = ask(sandbox.namespace("master"), requests, at_once=4)
    assert {answer.short for answer in answers} <= {401, 429}


def broken_prometheus(sandbox: Sandbox) -> None:
    changed_by_hand(sandbox, "dublin", "prometheus.yml", "s/^global:/glubal:/")
    reload(sandbox, "dublin")


def cured_prometheus(sandbox: Sandbox) -> None:
    put_back(sandbox, "dublin", "prometheus.yml")
    reload(sandbox, "dublin")


def broken_alertmanager(sandbox: Sandbox) -> None:
    changed_by_hand(sandbox, "master", "alertmanager.yml", "s/^route:/rout:/")
    reload(sandbox, "master", "alertmanager")


def cured_alertmanager(sandbox: Sandbox) -> None:
    put_back(sandbox, "master", "alertmanager.yml")
    reload(sandbox, "master", "alertmanager")


def small_limit(sandbox: Sandbox) -> None:
    changed_by_hand(sandbox, "master", "federate", "s/sample_limit: .*/sample_limit: 10/")
    changed_by_hand(sandbox, "master", "certificates", "s/ [0-9]*$/ 1700000000/")
    # A rule that promtool takes and that fails: two series on each side of a multiplication.
    rule = "groups: [{name: g, rules: [{record: a, expr: up * on () up}]}]"
    changed_by_hand(
        sandbox, "master", "prometheus.yml", "s#^rule_files:#rule_files:\\n  - /root/bad.yml#"
    )
    sandbox.script(
        "master", f"mkdir -p /etc/prometheus/bad; echo '{rule}' >/etc/prometheus/bad/r.yml"
    )
    sandbox.script("master", "sed -i s#/root/bad.yml#bad/r.yml# /etc/prometheus/prometheus.yml")
    reload(sandbox, "master")


def usual_limit(sandbox: Sandbox) -> None:
    put_back(sandbox, "master", "federate", "certificates", "prometheus.yml")
    sandbox.script("master", "rm -r /etc/prometheus/bad")
    reload(sandbox, "master")


OLD_BACKUP = """
systemctl start prometheus-backup
sed -i 's/^federation_backup_last_success_timestamp_seconds .*/federation_backup_last_success_\
timestamp_seconds 1700000000/' /var/lib/prometheus-backup/backup.prom
"""

FAULTS = {
    "a target is gone": Fault(
        cause=on("core01", "systemctl stop node_exporter"),
        cure=on("core01", "systemctl start node_exporter"),
        raises=(("TargetDown", "dublin"),),
    ),
    "a timer is stopped": Fault(
        cause=on("dublin", "systemctl stop prometheus-backup.timer"),
        cure=on("dublin", "systemctl start prometheus-backup.timer"),
        raises=(("ServiceDown", "dublin"),),
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
    "backups stay away": Fault(
        cause=on("master", OLD_BACKUP),
        cure=on("master", "systemctl start prometheus-backup"),
        raises=(("BackupTooOld", "master"),),
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
    "the volume is full": Fault(
        cause=on(
            "master",
            "fallocate -l $(($(df --output=avail -B1 /data | tail -n1) - 60000000)) /data/filler",
        ),
        cure=on("master", "rm /data/filler"),
        raises=(("HostDiskFull", "master"),),
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
    since = time.time()
    wanted = {alert for fault in FAULTS.values() for alert in fault.raises}
    # Undone in the opposite order, whatever happens: a full volume takes no backup.
    with ExitStack() as cures:
        for fault in FAULTS.values():
            cures.callback(fault.cure, sandbox)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda fault: fault.cause(sandbox), FAULTS.values()))
        listener.wait("team", since, wanted)
        # By mail too, and nothing that can wait.
        critical = {
            alert for alert in wanted if alert[0] in {"TargetDown", "ServiceDown", "FederationDown"}
        }
        listener.wait("pager@example.net", since, critical)
        paged = {alert for alert, _ in listener.fired("pager@example.net", since)}
        assert not paged & {"UnitFailed", "BundleDrift", "BackupTooOld", "AuthenticationFailures"}
        for one in listener.told:
            assert "<no value>" not in one.text
            assert "error" not in one.text
    listener.wait_for_quiet()


@pytest.mark.parametrize(
    ("server", "unit", "raises"),
    [
        ("dublin", "node_exporter", {("TargetDown", "dublin")}),
        ("dublin", "alertmanager", {("SiteAlertmanagerDown", "master")}),
        ("dublin", "prometheus", {("FederationDown", "master")}),
        ("master", "prometheus", {("MasterNotFederating", "dublin")}),
    ],
)
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
        server, f"grep -rlE '{words}' /etc /opt /var/lib /var/log /run 2>/dev/null", check=False
    )
    held = sandbox.script(server, "find /opt/federation/trees -path '*/alertmanager/secrets/rec*'")
    held += sandbox.script(server, "find /opt/federation/trees -path '*/alertmanager/secrets/glo*'")
    assert sorted(found.split()) == sorted(held.split())
    for path in held.split():
        assert sandbox.script(server, f"stat -c '%U:%G %a' {path}") == "root:alertmanager 640\n"
    said = sandbox.script(server, "journalctl --all; ps axeww")
    assert not [word for word in (TOKEN, PASSWORD, HOOK) if word in said]
    assert host.wait_until(lambda: listener.told, seconds=5)


@pytest.mark.parametrize(
    ("unit", "most"), [("alertmanager.service", 2.0), ("federation-watch.service", 2.0)]
)
def test_its_services_are_hardened(sandbox: Sandbox, unit: str, most: float) -> None:
    told = sandbox.script("dublin", f"systemd-analyze security --no-pager {unit}")
    exposure = re.search(rf"exposure level for {unit}: ([\d.]+)", told)
    assert exposure
    assert float(exposure[1]) <= most
