"""Somebody on the internet takes the way to the slave over: the master tells him nothing.

The internet's route to the slave's address is led to a machine of an attacker, who has that address
and listens on 9095. What the master's Prometheus then tells him is all that he can get.

And somebody in the slave's network takes the place of the exporters: the slave tells him nothing.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from hostfiles.model import Leaf
from sandbox import host, network
from sandbox.host import run
from sandbox.plan import NETNS_DIR
from tests.sandbox import attacker
from tests.sandbox.conftest import CORES, Sandbox
from tests.sandbox.keyring import DAY, Keyring, forge_authority, issue

MASTER = "prometheus-master.example.com"
SLAVE = "prometheus-slave.example.com"
INTERVAL_SECONDS = 15
FEDERATE_JOB = "/etc/prometheus/federate.d/dublin.yml"
THIEF = "thief"
NO_CERTIFICATE = Leaf(certificate="", key="", not_after=0)


@dataclass(frozen=True, kw_only=True)
class Caught:
    """One connection to the attacker: its bytes, what he could read, why TLS failed."""

    raw: str
    heard: str
    alert: str


@pytest.fixture
def thief(sandbox: Sandbox) -> Iterator[str]:
    """The namespace to which the internet leads the slave's address, while the test runs."""
    inet, address = sandbox.plan.inet_netns, sandbox.public_ip("dublin")
    before = run(["ip", "-netns", inet, "-4", "route", "show", address]).stdout.split()
    assert before[0] == address
    try:
        namespace = sandbox.stranger(THIEF)
        run(["ip", "-netns", namespace, "address", "add", f"{address}/32", "dev", "lo"])
        via = ["via", network.address_of(namespace), "dev", sandbox.plan.link("s", THIEF)]
        run(["ip", "-netns", inet, "route", "replace", f"{address}/32", *via, "onlink"])
        yield namespace
    finally:
        run(["ip", "-netns", inet, "route", "replace", *before])
        network.remove_stranger(sandbox.plan, THIEF)


@pytest.fixture(scope="module")
def hurried(sandbox: Sandbox) -> Iterator[None]:
    """Has the master federate every second; all else of its job stays as it was delivered."""
    file = sandbox.script("master", f"readlink -f {FEDERATE_JOB}").strip()
    before = sandbox.script("master", f"stat --format='%y %U:%G %a' {file}; cat {file}")
    # Not beside the file: whoever kills the test shall leave nothing that Prometheus reads.
    kept = "/run/federate-job-before-the-test.yml"
    sandbox.script(
        "master",
        f"set -e; cp -p {file} {kept};"
        rf"sed -i -E 's/^( *scrape_(interval|timeout)): .*/\1: 1s/' {file};"
        "systemctl reload prometheus.service",
    )
    try:
        _wait_for_interval(sandbox, "1s")
        yield
        _wait_until_up(sandbox, time.time(), 10)
    finally:
        sandbox.script(
            "master", f"set -e; cp -p {kept} {file}; rm {kept}; systemctl reload prometheus.service"
        )
        _wait_for_interval(sandbox, f"{INTERVAL_SECONDS}s")
    assert sandbox.script("master", f"stat --format='%y %U:%G %a' {file}; cat {file}") == before


def _wait_for_interval(sandbox: Sandbox, interval: str) -> None:
    # Prometheus looks at new targets every five seconds.
    assert host.wait_until(
        lambda: _target(sandbox)["scrapeInterval"] == interval, seconds=20, step=0.2
    )


def _target(sandbox: Sandbox) -> dict[str, Any]:
    """The federate job's target, by the master's own word."""
    (found,) = (
        target
        for target in sandbox.master.get("targets")["activeTargets"]
        if target["labels"]["job"] == "federate"
    )
    return found


@contextmanager
def _attack(namespace: str, address: str, port: int, leaf: Leaf) -> Iterator[Iterator[Caught]]:
    """The attacker's server; what it catches, as it comes."""
    process = subprocess.Popen(
        ["nsenter", f"--net={NETNS_DIR / namespace}", sys.executable, attacker.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin
    assert process.stdout
    lines = process.stdout
    try:
        order = {"address": address, "port": port}
        order |= {"certificate": leaf.certificate, "key": leaf.key}
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        assert json.loads(lines.readline()) == {"listening": True}
        # Ends when the process does, which is a minute from now at the latest.
        yield (Caught(**json.loads(line)) for line in lines)
    finally:
        process.kill()
        process.communicate()


def _attack_slave(
    sandbox: Sandbox, thief: str, leaf: Leaf
) -> AbstractContextManager[Iterator[Caught]]:
    return _attack(thief, sandbox.public_ip("dublin"), 9095, leaf)


def _login(sandbox: Sandbox) -> tuple[str, str]:
    """The user and password that the master sends."""
    user = sandbox.outputs["slaves"]["dublin"]["federationUser"]
    return user, sandbox.outputs["federationPasswords"]["dublin"]


def _assert_learnt_nothing(caught: Caught, user: str, password: str) -> None:
    pair = base64.b64encode(f"{user}:{password}".encode()).decode()
    # He saw a connection, and it began with TLS.
    assert caught.raw.startswith("\x16\x03")
    assert caught.heard == ""
    for secret in (password, pair, user, "Authorization", "GET ", "federate?", "metrics"):
        assert secret not in caught.raw


def _sent(heard: str) -> tuple[str, str, str]:
    """A request's first line, and the user and password in it."""
    head, *lines = heard.split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines if line)
    basic = base64.b64decode(headers["Authorization"].removeprefix("Basic ")).decode()
    user, _, password = basic.partition(":")
    return head, user, password


def _failed_scrape(sandbox: Sandbox, since: float, seconds: float) -> str:
    """Waits for a failed scrape and its record in `up`; returns Prometheus's error."""

    def failed() -> str:
        target = _target(sandbox)
        (up,) = sandbox.query('up{job="federate"}')
        stored = sandbox.query('timestamp(up{job="federate"})')[0].value
        return target["lastError"] if up.value == 0 and stored > since else ""

    error = host.wait_until(failed, seconds=seconds, step=0.2)
    assert error, "no scrape failed"
    return error


def _wait_until_up(sandbox: Sandbox, since: float, seconds: float) -> None:
    assert host.wait_until(
        lambda: [
            sample
            for sample in sandbox.query('timestamp(up{job="federate"} == 1)')
            if sample.value > since
        ],
        seconds=seconds,
        step=0.2,
    ), "the master does not federate again"


def test_another_ca_with_the_same_names_gets_nothing_and_the_scrape_fails(
    sandbox: Sandbox, keys: Keyring, thief: str
) -> None:
    # In the job's own rhythm, with nothing changed on the master.
    began = time.time()
    with _attack_slave(sandbox, thief, issue(SLAVE, forge_authority())) as caught:
        first = next(caught)
        error = _failed_scrape(sandbox, began, 5)
    assert time.time() - began < INTERVAL_SECONDS + 10
    _assert_learnt_nothing(first, *_login(sandbox))
    assert first.alert.endswith("ALERT_BAD_CERTIFICATE")
    assert "x509: certificate signed by unknown authority" in error
    # What it held of the site is stale at once.
    assert sandbox.query('up{job="CoreSystems"}') == []


@pytest.mark.usefixtures("hurried")
def test_the_way_given_back_the_master_federates_again(sandbox: Sandbox) -> None:
    _wait_until_up(sandbox, time.time(), 30)
    # Each core's series comes back with its next sample, which may be an interval from now.
    assert sandbox.wait('up{job="CoreSystems"} == 1', seconds=INTERVAL_SECONDS + 5)


@pytest.mark.usefixtures("hurried")
def test_a_server_that_the_master_would_trust_does_get_the_password(
    sandbox: Sandbox, keys: Keyring, thief: str
) -> None:
    # The attacker of the other tests, with a certificate that only the CA's key can make: what he
    # hears now is what he would have heard there.
    with _attack_slave(sandbox, thief, issue(SLAVE, keys.authority)) as caught:
        heard = next(one.heard for one in caught if one.heard)
    head, *login = _sent(heard)
    assert head.startswith("GET /federate?match%5B%5D=")
    assert tuple(login) == _login(sandbox)


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("self-signed", "x509: certificate signed by unknown authority"),
        ("of another host of ours", f"x509: certificate is valid for {MASTER}, not {SLAVE}"),
        ("expired", "x509: certificate has expired or is not yet valid"),
        ("none", "server gave HTTP response to HTTPS client"),
    ],
)
def test_whatever_else_the_man_in_the_middle_shows_he_gets_nothing(
    sandbox: Sandbox, keys: Keyring, thief: str, kind: str, error: str
) -> None:
    shown = {
        "self-signed": lambda: issue(SLAVE, None),
        "of another host of ours": lambda: keys.leaf("master-nginx"),
        "expired": lambda: issue(SLAVE, keys.authority, starts=-2 * DAY, ends=-DAY / 24),
        "none": lambda: NO_CERTIFICATE,
    }[kind]()
    began = time.time()
    with _attack_slave(sandbox, thief, shown) as caught:
        first = next(caught)
        said = _failed_scrape(sandbox, began, 5)
    _assert_learnt_nothing(first, *_login(sandbox))
    assert error in said


# ---- in the place of an exporter ---------------------------------------------------------------


@pytest.fixture
def vacant(sandbox: Sandbox) -> Iterator[None]:
    """The four exporters' places are free while the test runs."""
    try:
        for core in CORES:
            sandbox.inside(core, "systemctl", "stop", "node_exporter.service")
        yield
    finally:
        for core in CORES:
            sandbox.inside(core, "systemctl", "start", "node_exporter.service")


def _cores(sandbox: Sandbox) -> dict[str, dict[str, Any]]:
    """The monitored hosts as targets, by the slave's own word."""
    targets = sandbox.own_api("dublin", "targets", scrapePool="CoreSystems")["activeTargets"]
    return {target["labels"]["instance"].partition(".")[0]: target for target in targets}


@pytest.mark.usefixtures("vacant")
def test_in_the_exporters_places_only_a_server_of_our_ca_with_the_hosts_name_hears_anything(
    sandbox: Sandbox, keys: Keyring
) -> None:
    # One in each place, all at once; every scrape from here on is theirs.
    names = {core: f"{core}.example.internal" for core in CORES}
    ours = keys.authority
    shown = {
        "core01": issue(names["core01"], forge_authority()),
        "core02": keys.leaf(f"slave-dublin-{names['core01']}"),
        "core03": issue(names["core03"], ours, starts=-2 * DAY, ends=-DAY / 24),
        # With what only the CA's key can make: what he hears, the others would have heard.
        "core04": issue(names["core04"], ours),
    }
    errors = {
        "core01": "x509: certificate signed by unknown authority",
        "core02": f"x509: certificate is valid for {names['core01']}, not {names['core02']}",
        "core03": "x509: certificate has expired or is not yet valid",
    }
    sender = keys.exporter_client("dublin")
    user, password = sender.user, sender.password
    with ExitStack() as attacks:
        caught = {
            core: attacks.enter_context(
                _attack(sandbox.namespace(core), sandbox.private_ip(core), 9100, leaf)
            )
            for core, leaf in shown.items()
        }
        first = {core: next(caught[core]) for core in errors}
        heard = next(one.heard for one in caught["core04"] if one.heard)
        targets = _cores(sandbox)
    for core, error in errors.items():
        _assert_learnt_nothing(first[core], user, password)
        assert first[core].alert.endswith("ALERT_BAD_CERTIFICATE"), core
        assert targets[core]["health"] == "down"
        assert error in targets[core]["lastError"]
    assert _sent(heard) == ("GET /metrics HTTP/1.1", user, password)


def test_the_exporters_back_in_their_places_are_scraped_again(sandbox: Sandbox) -> None:
    assert host.wait_until(
        lambda: {target["health"] for target in _cores(sandbox).values()} == {"up"},
        seconds=INTERVAL_SECONDS + 5,
        step=0.5,
    )
    # The master hears of it an interval later.
    assert host.wait_until(
        lambda: len(sandbox.query('up{job="CoreSystems"} == 1')) == len(CORES),
        seconds=2 * INTERVAL_SECONDS,
        step=0.5,
    )
