"""A master federates a site that another stack made: its rotations lose no scrape either.

The two stacks have a sandbox of their own, in another slot: one world, one cloud, two states.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.sandbox.conftest import ROOT, Sandbox
from tests.sandbox.keyring import Keyring
from tests.sandbox.probe import SILENCE, Client, Door, Request, ask

FEDERATE = 'up{job="federate",site="dublin"}'
SLAVE = "prometheus-slave.example.com"
INTERVAL_SECONDS = 2
REMOTE = [{"stack": "dublin", "sites": ["dublin"]}]


@dataclass(frozen=True, kw_only=True)
class Stacks:
    """The master's stack and the slave's, in one sandbox."""

    hq: Sandbox
    dublin: Sandbox


@pytest.fixture(scope="module")
def both() -> Iterator[Stacks]:
    """Both up, and the master's stack federates the other one's site."""
    slot = int(os.environ.get("SANDBOX_TEST_SLOT", "1")) + 1
    hq, dublin = (Sandbox.fresh(slot, ROOT / f".sandbox-test{slot}") for _ in range(2))
    hq.stack, dublin.stack = "hq", "dublin"
    master, (site,) = hq.get("master"), dublin.get("slaves")
    for one in (hq, dublin):
        one.set(scrapeInterval=f"{INTERVAL_SECONDS}s", master={}, slaves=[])
        one.world["hosts"] = []
    hq.run("down")
    try:
        # The master first: its address is what the slaves' stacks need to know.
        hq.set(master=master)
        hq.up("--no-verify")
        there = hq.outputs["master"]
        dublin.set(
            slaves=[{key: site[key] for key in ("site", "host", "subnetId")}],
            existingMaster={"host": there["host"], "cidrs": [there["publicIp"]]},
        )
        dublin.up()
        hq.set(master=master | {"otherStacks": REMOTE})
        printed = hq.up()
        assert f'up{{job="federate", instance="{SLAVE}:9095", site="dublin"}} = 1' in printed
        yield Stacks(hq=hq, dublin=dublin)
    finally:
        hq.run("down")


@contextlib.contextmanager
def nothing_failed(hq: Sandbox) -> Iterator[None]:
    """Not one scrape of the other stack's site fails or is left out."""
    since = time.time()
    yield
    time.sleep(2 * INTERVAL_SECONDS)
    seconds = int(time.time() - since)
    values = [sample.value for sample in hq.scrapes(FEDERATE, seconds)]
    assert set(values) == {1.0}
    # A changed job is scraped at another moment of its interval.
    assert len(values) >= seconds / INTERVAL_SECONDS - 2


def client(both: Stacks) -> Client:
    """What the master comes in with, as its stack has read it."""
    known = both.dublin.outputs["federationSecrets"]["dublin"]
    return Client(
        certificate=known["certificate"],
        key=known["key"],
        ca=known["caCertificate"],
        user=both.dublin.outputs["federation"]["dublin"]["user"],
        password=known["password"],
    )


def federate(both: Stacks, *clients: Client) -> list[int | str]:
    """What each gets who knocks at the slave's 9095 from the master's own address."""
    door = Door(address=both.dublin.public_ip("dublin"), port=9095, name=SLAVE)
    answers = ask(
        both.hq.namespace("master"),
        [Request(door=door, client=one, path="/federate?match[]=up") for one in clients],
        pause=0.2,
    )
    return [answer.short for answer in answers]


def rotate(dublin: Sandbox, **rotation: int | bool) -> None:
    (site,) = dublin.get("slaves")
    dublin.set(slaves=[{**site, "rotation": {**site.get("rotation", {}), **rotation}}])


def test_neither_stack_takes_part_in_the_other(both: Stacks) -> None:
    assert set(both.hq.outputs["slaves"]) == set()
    assert "master" not in both.dublin.outputs
    assert both.hq.up("--no-verify").splitlines()[-1].startswith("no changes")
    assert both.dublin.up().splitlines()[-1].startswith("no changes")
    # Commands are of the sandbox, and so of both.
    assert "prometheus-slave" in both.hq.run("status")
    assert 'site="dublin"} = 1' in both.hq.run("verify")
    name = f"ip-{both.dublin.private_ip('dublin').replace('.', '-')}"
    assert both.hq.run("ssh", "prometheus-slave", "hostname").strip() == name
    # The master's own certificate is of another CA, to which the slave's door is shut.
    own, good = Keyring(both.hq.state).leaf("master-prometheus"), client(both)
    stranger = good.but(certificate=own.certificate, key=own.key)
    assert federate(both, stranger, good) == [400, 200]


def test_what_the_other_stack_does_not_have_is_told_before_anything_changes(both: Stacks) -> None:
    hq, master, before = both.hq, both.hq.get("master"), both.hq.state.records
    hq.set(master=master | {"otherStacks": [{"stack": "dublin", "sites": ["dublin", "cork"]}]})
    told = hq.refused()
    assert "the stack 'dublin' exports no site 'cork', but dublin;" in told
    hq.set(master=master | {"otherStacks": [{"stack": "oslo", "sites": ["oslo"]}]})
    assert "the stack 'oslo' exports no federation; set existingMaster there" in hq.refused()
    hq.set(master=master)
    assert hq.state.records == before


def test_password_and_authority_are_renewed_over_both_stacks_and_no_scrape_fails(
    both: Stacks,
) -> None:
    old = client(both)
    with nothing_failed(both.hq):
        rotate(both.dublin, password=2, keepOldPassword=True)
        both.dublin.set(rotation={"ca": 2, "oldestCa": 1})
        both.dublin.up()
        both.hq.up()
        rotate(both.dublin, keepOldPassword=False)
        both.dublin.set(rotation={"ca": 2})
        both.dublin.up()
    new = client(both)
    old_password = new.but(user=old.user, password=old.password)
    old_certificate = new.but(certificate=old.certificate, key=old.key)
    assert federate(both, old_password, old_certificate, new) == [401, 400, 200]


def test_of_a_site_that_is_taken_out_no_key_stays_on_the_master(both: Stacks) -> None:
    hq, master = both.hq, both.hq.get("master")
    secret = client(both).password
    look = f"grep -rl {secret} /opt/federation; find -L /etc/prometheus -name '*dublin*'; true"
    assert hq.script("master", look).count("dublin") == 6
    hq.set(master={**master, "otherStacks": []})
    printed = hq.up()
    assert "site=" not in printed
    assert hq.script("master", look) == ""
    # And the network lets nothing out to it any more.
    assert federate(both, client(both)) == [SILENCE]
