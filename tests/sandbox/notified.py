"""Faults for tests, and receivers on the internet who are told of them."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sandbox import host, network
from sandbox.plan import NETNS_DIR
from tests.sandbox import receivers
from tests.sandbox.conftest import ROOT, Sandbox
from tests.sandbox.keyring import forge_authority, issue

INTERVAL_SECONDS = 2
PATIENCE_SECONDS = 120
STRANGER = "receivers"
DEAD_MAN = "Watchdog"
# The machines have this machine's clock, whoever keeps that.
OF_THIS_MACHINE = "HostClockNotSynchronised"
TOKEN, PASSWORD, HOOK = "canary-token-canary", "canary-password-canary", "canary-hook-canary"
SERVERS = {
    "prometheus-master.example.com": "master",
    "prometheus-slave.example.com": "dublin",
}
PROMETHEUS = "/etc/prometheus/prometheus.yml"
FEDERATE = "/etc/prometheus/federate.d/dublin.yml"
ALERTMANAGER = "/etc/alertmanager/alertmanager.yml"
CERTIFICATES = "/etc/node_exporter/textfile/certificates.prom"


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


@dataclass(frozen=True, kw_only=True)
class Listener:
    """The receivers, and what they were told so far.

    `ignored`: alerts that are not waited for until they are over.
    """

    log: Path
    patience: float = PATIENCE_SECONDS
    ignored: frozenset[str] = frozenset({OF_THIS_MACHINE})

    @property
    def told(self) -> list[Told]:
        lines = map(json.loads, self.log.read_text().splitlines())
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
        return {(one.alert, one.server) for one in last.values() if one.status == "firing"}

    def wait(self, receiver: str, since: float, wanted: set[tuple[str, str]]) -> None:
        """Until a receiver was told of all these."""
        host.wait_until(
            lambda: wanted <= self.fired(receiver, since), seconds=self.patience, step=1
        )
        assert wanted - self.fired(receiver, since) == set()

    def wait_for_units(self, alert: str, since: float, wanted: set[tuple[str, str]]) -> None:
        """Until the team was told of just these, each a server and a systemd unit there."""

        def named() -> set[tuple[str, str]]:
            return {
                (one.server, one.labels["name"])
                for one in self.told
                if (one.alert, one.receiver) == (alert, "team") and one.at >= since
            }

        host.wait_until(lambda: wanted <= named(), seconds=self.patience, step=1)
        assert named() == wanted

    def wait_for_quiet(self) -> None:
        """Until nothing fires any more."""
        self.wait_until_over(lambda alert, _: alert not in self.ignored)

    def wait_until_over(self, which: Callable[[str, str], bool]) -> None:
        """Until none of these alerts fires any more, each named with who tells it."""

        def left() -> set[tuple[str, str]]:
            return {one for one in self.firing if which(*one)}

        host.wait_until(lambda: not left(), seconds=self.patience, step=1)
        assert left() == set()


@contextlib.contextmanager
def listening(
    sandbox: Sandbox, folder: Path, patience: float = PATIENCE_SECONDS
) -> Iterator[Listener]:
    """Receivers on the internet, and a sandbox that is up with notifications to them."""
    namespace = sandbox.stranger(STRANGER)
    address = network.address_of(namespace)
    authority = forge_authority()
    leaf = issue("receivers.example.net", authority, address=address)
    log = folder / "log"
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
            yield Listener(log=log, patience=patience)
        finally:
            process.terminate()
            process.wait()


# What `listening` sets.
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
                    "matchers": [f"alertname={DEAD_MAN}"],
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


def changed_by_hand(sandbox: Sandbox, server: str, path: str, edit: str) -> None:
    """Puts a file with an edit (of sed) in the place of the link to what was delivered."""
    sandbox.script(
        server,
        f"new=$(mktemp -p /root) && cp --preserve {path} $new && sed -i '{edit}' $new"
        f" && mv $new {path}",
    )


def put_back(sandbox: Sandbox, server: str, *paths: str) -> None:
    """What apply-bundle would do."""
    for path in paths:
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


@contextlib.contextmanager
def caused(sandbox: Sandbox, listener: Listener, faults: Iterable[Fault]) -> Iterator[float]:
    """Causes faults side by side and waits until the team was told of all of their alerts.

    Gives when it began. They are undone at the end in the opposite order, whatever happens.
    """
    faults, since = tuple(faults), time.time()
    with ExitStack() as cures:
        for fault in faults:
            cures.callback(fault.cure, sandbox)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda fault: fault.cause(sandbox), faults))
        listener.wait("team", since, {alert for fault in faults for alert in fault.raises})
        yield since
