"""Every secret that is renewed on purpose overlaps with the one before it: no scrape fails.

What was renewed is refused afterwards, and nothing is restarted for it.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sandbox.conftest import CORES, NAMESPACE, Sandbox
from tests.sandbox.keyring import Keyring
from tests.sandbox.probe import Client, Door, Request, ask

FEDERATE = 'up{job="federate",site="dublin"}'
SLAVE = "prometheus-slave.example.com"
INTERVAL_SECONDS = 2


@pytest.fixture(scope="module")
def quick(sandbox: Sandbox) -> Sandbox:
    """The shared sandbox, in which everybody scrapes every two seconds."""
    sandbox.set(scrapeInterval=f"{INTERVAL_SECONDS}s")
    sandbox.up()
    sandbox.wait(f"sum_over_time({FEDERATE}[10s]) >= 4")
    return sandbox


def rotate(sandbox: Sandbox, server: str, **rotation: int | bool) -> None:
    if server == "master":
        master = sandbox.get("master")
        sandbox.set(master=master | {"rotation": {**master.get("rotation", {}), **rotation}})
        return
    slaves = sandbox.get("slaves")
    slaves[0]["rotation"] = {**slaves[0].get("rotation", {}), **rotation}
    sandbox.set(slaves=slaves)


@contextlib.contextmanager
def nothing_failed(sandbox: Sandbox) -> Iterator[None]:
    """No restart anywhere, and not one failed scrape between any two of our machines."""
    before, since = sandbox.start_times(), time.time()
    yield
    time.sleep(3)
    seconds = int(time.time() - since)
    series = {"master": [FEDERATE], "dublin": [up("CoreSystems", name) for name in CORES]}
    for server, selectors in series.items():
        for selector in [*selectors, 'up{job="node",site=""}']:
            (found,) = sandbox.own_api(server, "query", query=f"{selector}[{seconds}s]")["result"]
            values = [value for _, value in found["values"]]
            assert set(values) == {"1"}, (server, selector)
            # A changed job is scraped at another moment of its interval.
            assert len(values) >= seconds / INTERVAL_SECONDS - 2, (server, selector)
    assert sandbox.start_times() == before


def up(job: str, host: str) -> str:
    return f'up{{job="{job}",instance="{host}.example.internal:9100"}}'


def federate(sandbox: Sandbox, *clients: Client) -> list[int | str]:
    """What each gets who knocks at the slave's 9095 from the master's own address."""
    door = Door(address=sandbox.public_ip("dublin"), port=9095, name=SLAVE)
    path = "/federate?match[]=up"
    answers = ask(
        sandbox.namespace("master"),
        [Request(door=door, client=client, path=path) for client in clients],
        pause=0.2,
    )
    return [answer.short for answer in answers]


def master_client(sandbox: Sandbox) -> Client:
    """Every key to 9095 as the master has them now."""
    keys = Keyring(sandbox.state)
    return keys.client(
        keys.leaf("master-prometheus"),
        sandbox.outputs["slaves"]["dublin"]["federationUser"],
        sandbox.outputs["federationPasswords"]["dublin"],
    )


def order(printed: str, *steps: str) -> list[int]:
    """Where the lines of these steps are."""
    lines = printed.splitlines()
    return [next(n for n, line in enumerate(lines) if step in line) for step in steps]


def test_the_federation_password(quick: Sandbox) -> None:
    sandbox = quick
    old = master_client(sandbox)
    with nothing_failed(sandbox):
        rotate(sandbox, "dublin", password=2)
        printed = sandbox.up()
    first, second = order(printed, "Command master-bundle", "Command slave-dublin-bundle")
    assert first < second, "who sends it learns it before who asks for it"
    assert sandbox.outputs["slaves"]["dublin"]["federationUser"] == "prometheus-admin-2"
    assert federate(sandbox, old, master_client(sandbox)) == [401, 200]


def test_an_old_password_is_kept_for_clients_that_change_by_and_by(quick: Sandbox) -> None:
    sandbox = quick
    old = master_client(sandbox)
    with nothing_failed(sandbox):
        rotate(sandbox, "dublin", password=3, keepOldPassword=True)
        sandbox.up()
    assert federate(sandbox, old, master_client(sandbox)) == [200, 200]
    with nothing_failed(sandbox):
        rotate(sandbox, "dublin", keepOldPassword=False)
        sandbox.up()
    assert federate(sandbox, old, master_client(sandbox)) == [401, 200]


def test_a_password_of_the_users_own_is_made_known_first(quick: Sandbox) -> None:
    sandbox = quick
    chosen = "a-password-of-the-user-s-own-choice"
    slaves = sandbox.get("slaves")
    with nothing_failed(sandbox):
        slaves[0]["nextPassword"] = chosen
        sandbox.set(slaves=slaves)
        sandbox.up()
        slaves[0]["password"] = slaves[0].pop("nextPassword")
        sandbox.set(slaves=slaves)
        rotate(sandbox, "dublin", password=4)
        sandbox.up()
    held = sandbox.script("master", "cat /etc/prometheus/secrets/federate-dublin-*.password")
    assert held.strip() == chosen


def test_the_password_of_the_page(quick: Sandbox) -> None:
    sandbox = quick
    door = Door(address=sandbox.public_ip("master"), port=443, name="prometheus-master.example.com")
    ca = sandbox.outputs["caCertificate"]
    then = {
        name: Client(user=user, password=sandbox.outputs[name], ca=ca)
        for name, user in (
            ("masterPassword", "prometheus-admin"),
            ("masterNextPassword", "prometheus-admin-2"),
        )
    }

    def answers() -> list[int | str]:
        requests = [Request(door=door, client=c, path="/-/ready") for c in then.values()]
        return [answer.short for answer in ask(None, requests)]

    assert answers() == [200, 200], "the next one can be handed out before"
    with nothing_failed(sandbox):
        rotate(sandbox, "master", password=2)
        sandbox.up()
    assert answers() == [401, 200]
    assert sandbox.outputs["masterPassword"] == then["masterNextPassword"].password


def test_leaf_certificates_of_slave_and_master(quick: Sandbox) -> None:
    sandbox = quick

    def served() -> list[str]:
        show = "openssl s_client -connect {} </dev/null 2>/dev/null | openssl x509 -noout -serial"
        return [
            sandbox.script(server, show.format(f"127.0.0.1:{port}"))
            for server, ports in {"dublin": (9095, 9090, 9100), "master": (443, 9090)}.items()
            for port in ports
        ]

    before = served()
    with nothing_failed(sandbox):
        rotate(sandbox, "dublin", leafCertificates=7)
        rotate(sandbox, "master", leafCertificates=7)
        sandbox.up()
    after = served()
    assert all(before)
    assert all(after)
    assert not set(before) & set(after)


def rotation(sandbox: Sandbox) -> dict[str, int]:
    """What of the whole environment was renewed already: a number never goes back."""
    return sandbox.config.get(f"{NAMESPACE}:rotation", {})


def test_the_certificate_authority(quick: Sandbox) -> None:
    sandbox = quick
    of_the_old = master_client(sandbox)
    old_ca = sandbox.outputs["caCertificate"]
    kept = rotation(sandbox)
    with nothing_failed(sandbox):
        sandbox.set(rotation={**kept, "ca": 2, "oldestCa": 1})
        sandbox.up()
    # Both are good, until nobody has a leaf of the old one.
    assert federate(sandbox, of_the_old, master_client(sandbox)) == [200, 200]
    with nothing_failed(sandbox):
        sandbox.set(rotation={**kept, "ca": 2})
        sandbox.up()
    of_the_old = of_the_old.but(ca=sandbox.outputs["caCertificate"])
    assert federate(sandbox, of_the_old, master_client(sandbox)) == [400, 200]
    (first, *_) = old_ca.split("-----END")
    assert first not in sandbox.outputs["caCertificate"]
    # The operator's own way in trusts the new one, too.
    assert sandbox.query("up")


def test_the_operators_ssh_key(quick: Sandbox, tmp_path: Path) -> None:
    sandbox = quick
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text(sandbox.outputs["sshPrivateKey"])
    with nothing_failed(sandbox):
        kept = rotation(sandbox)
        sandbox.set(rotation={**kept, "sshKey": kept.get("sshKey", 1) + 1})
        sandbox.up()
    new.write_text(sandbox.outputs["sshPrivateKey"])
    known = sandbox.plan.state_dir / "outputs" / "known_hosts"
    for server in ("master", "dublin"):
        for key, expected in ((old, 255), (new, 0)):
            key.chmod(0o600)
            options = ["-F", "none", "-i", str(key), "-o", "IdentitiesOnly=yes"]
            options += ["-o", "BatchMode=yes", "-o", f"UserKnownHostsFile={known}"]
            options += ["-o", "StrictHostKeyChecking=yes"]
            target = f"admin@{sandbox.public_ip(server)}"
            done = subprocess.run(
                ["ssh", *options, target, "true"],
                capture_output=True,
                text=True,
                timeout=30,
                check=False,
            )
            assert done.returncode == expected, (server, done.stderr)
    # The next change arrives by the new one, at monitored hosts through the slave, too.
    now = sandbox.get("slaves")[0].get("rotation", {}).get("leafCertificates", 1)
    rotate(sandbox, "dublin", leafCertificates=now + 1)
    printed = sandbox.up()
    assert "change Command slave-dublin-core01.example.internal" in printed
