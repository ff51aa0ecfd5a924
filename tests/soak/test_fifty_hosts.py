"""Fifty monitored hosts on one slave: how long everything takes, and that nothing is lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from sandbox import world
from sandbox.program import evaluate, read_project
from sandbox.recorder import Recorder
from tests.sandbox.conftest import ROOT, Sandbox
from tests.soak.conftest import timed

HOSTS = 50
# A user's.
INTERVAL_SECONDS = 15
NAMES = [f"host{number:02}.example.internal" for number in range(1, HOSTS + 1)]
FIRST = 11


def scrapes(sandbox: Sandbox, since: float) -> dict[str, list[tuple[float, str]]]:
    """Each scrape since a moment, by host, as the slave stored it: when, and whether it went."""
    query = f'up{{job="fleet"}}[{int(time.time() - since)}s]'
    rows = sandbox.own_api("dublin", "query", query=query)["result"]
    return {row["metric"]["instance"]: row["values"] for row in rows}


def test_fifty_hosts(fresh: Sandbox, results: Callable[..., None]) -> None:
    sandbox = fresh
    addresses = {name: f"10.20.1.{FIRST + number}" for number, name in enumerate(NAMES)}
    sandbox.world["hosts"] = [
        {"name": name, "subnet": "subnet-dublin", "address": address, "memoryMib": 128}
        for name, address in addresses.items()
    ]
    slaves = sandbox.get("slaves")
    slaves[0] |= {"jobs": [], "instanceType": "t3.small"}
    sandbox.set(slaves=slaves, scrapeInterval=f"{INTERVAL_SECONDS}s")
    rows: dict[str, str] = {}

    seconds, _ = timed(sandbox.up)
    rows["two servers and fifty hosts booted, nothing monitored yet"] = f"{seconds:.0f} s"

    hosts = [
        {"host": name, "address": address, "hostKey": {"given": name}}
        for name, address in addresses.items()
    ]
    slaves[0]["jobs"] = [{"name": "fleet", "hosts": hosts}]
    sandbox.set(slaves=slaves)
    sandbox.arguments("up")
    inputs = sandbox.plan.state_dir.with_name(f"{sandbox.plan.state_dir.name}-inputs")
    project = read_project(ROOT, "sandbox", stack_file=inputs / "sandbox.yaml")
    given = world.load_world(inputs / "world.yaml")
    config = world.resolve_given(project.config, sandbox.plan, given, stand_ins=True)
    recorder = Recorder()
    seconds, _ = timed(lambda: str(evaluate(replace(project, config=config), recorder)))
    rows[f"program evaluated, {len(recorder.resources)} resources"] = f"{seconds:.1f} s"

    seconds, printed = timed(lambda: sandbox.up("--no-verify"))
    assert all(f"create Command slave-dublin-{name}" in printed for name in NAMES)
    rows["first delivery to all fifty, the slave's bundle included"] = f"{seconds:.0f} s"
    sandbox.wait(f'count(up{{job="fleet"}} == 1) == {HOSTS}')

    time.sleep(4 * INTERVAL_SECONDS)
    slaves[0]["rotation"] = {"exporterPassword": 2}
    sandbox.set(slaves=slaves)
    since = time.time()
    seconds, printed = timed(lambda: sandbox.up("--no-verify"))
    assert all(f"change Command slave-dublin-{name}" in printed for name in NAMES)
    rows["a new password on all fifty"] = f"{seconds:.0f} s"
    time.sleep(2 * INTERVAL_SECONDS)
    found = scrapes(sandbox, since)
    assert len(found) == HOSTS
    failed = [value for values in found.values() for _, value in values].count("0")
    total = sum(map(len, found.values()))
    rows["scrapes meanwhile, and failed ones"] = f"{total}, {failed}"
    # One that failed at its timeout came too late; one that was refused failed at once.
    query = (
        f'max(max_over_time(scrape_duration_seconds{{job="fleet"}}[{int(time.time() - since)}s]))'
    )
    (slowest,) = sandbox.own_api("dublin", "query", query=query)["result"]
    rows["slowest of them"] = f"{float(slowest['value'][1]):.1f} s"
    expected = (seconds / INTERVAL_SECONDS - 1) * HOSTS

    seconds, printed = timed(lambda: sandbox.up("--no-verify"))
    assert "no changes" in printed
    rows["nothing to do"] = f"{seconds:.0f} s"

    results("Fifty monitored hosts on one slave", rows)
    assert failed == 0
    assert total >= expected, "none is missing either"
