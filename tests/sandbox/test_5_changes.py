"""Changed settings reach the running pair: only what follows from them, and no scrape is lost."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from sandbox import machine
from tests.sandbox.conftest import Sandbox, no_scrape_lost

# Shorter than a user's, so that these tests see many scrapes in little time.
INTERVAL_SECONDS = 2
FEDERATE = 'up{job="federate",site="dublin"}'


@pytest.fixture(scope="module")
def quick(sandbox: Sandbox) -> Sandbox:
    """The shared sandbox, scraping every two seconds: itself a change of a running pair."""
    before = sandbox.start_times()
    sandbox.set(scrapeInterval=f"{INTERVAL_SECONDS}s")
    printed = sandbox.up()
    assert "2 changed" in printed, "the two bundles"
    after = sandbox.start_times()
    for host, told in before.items():
        # Only the slave's Prometheus has the interval on its command line (its lookback).
        assert told.splitlines()[-1] == after[host].splitlines()[-1], "no reboot"
    sandbox.wait(f"count_over_time({FEDERATE}[10s]) >= 4")
    return sandbox


@contextlib.contextmanager
def nothing_lost(sandbox: Sandbox, *, rescheduled: bool = False) -> Iterator[None]:
    """No restart, no reboot, and not one failed or missing scrape at the master meanwhile."""
    before, since = sandbox.start_times(), time.time()
    yield
    time.sleep(2 * INTERVAL_SECONDS)
    early = since - 2 * INTERVAL_SECONDS
    no_scrape_lost(sandbox, FEDERATE, early, INTERVAL_SECONDS, rescheduled=rescheduled)
    after = sandbox.start_times()
    # Those that joined or left meanwhile are somebody's intention.
    stayed = before.keys() & after.keys()
    assert {host: after[host] for host in stayed} == {host: before[host] for host in stayed}


def test_a_fifth_core_host_joins_the_job(quick: Sandbox) -> None:
    quick.world["hosts"].append(
        {
            "name": "core05.example.internal",
            "subnet": "subnet-dublin",
            "address": "10.20.1.15",
        }
    )
    slaves = quick.get("slaves")
    slaves[0]["jobs"][0]["hosts"].append(
        {
            "host": "core05.example.internal",
            "address": "10.20.1.15",
            "hostKey": {"given": "core05.example.internal"},
        }
    )
    quick.set(slaves=slaves)
    since = time.time()
    with nothing_lost(quick):
        printed = quick.up()
        assert "1 changed" in printed
        assert "change Command slave-dublin-bundle" in printed
        assert "create Command slave-dublin-core05.example.internal" in printed
        quick.wait(
            'up{instance="core05.example.internal:9100",group="CoreSystems Monitoring"} == 1'
        )
    no_scrape_lost(quick, 'up{instance="core01.example.internal:9100"}', since, INTERVAL_SECONDS)


def test_the_match_is_narrowed(quick: Sandbox) -> None:
    slaves = quick.get("slaves")
    slaves[0]["match"] = ['up{job="CoreSystems"}', "node_load1"]
    quick.set(slaves=slaves)
    with nothing_lost(quick, rescheduled=True):
        printed = quick.up()
        assert "1 changed" in printed
        assert "change Command master-bundle" in printed
        quick.wait('absent(node_uname_info{job="CoreSystems"})')
    assert len(quick.query('up{job="CoreSystems"} == 1')) == 5
    assert len(quick.query('node_load1{job="CoreSystems"}')) == 5


def test_a_second_slave_joins_in_a_network_of_its_own(quick: Sandbox) -> None:
    quick.world["networks"].append(
        {"id": "vpc-osaka", "cidr": "10.20.0.0/16", "subnets": {"subnet-osaka": "10.20.1.0/24"}}
    )
    quick.world["hosts"].append(
        {
            "name": "app01.osaka.internal",
            "subnet": "subnet-osaka",
            "address": "10.20.1.11",
            "exporter": True,
        }
    )
    slaves = quick.get("slaves")
    slaves.append(
        {
            "site": "osaka",
            "host": "prometheus-osaka",
            "subnetId": "subnet-osaka",
            # Somebody else's exporter, which is not touched.
            "jobs": [{"name": "Apps", "targets": ["app01.osaka.internal:9100"], "scheme": "http"}],
        }
    )
    quick.set(slaves=slaves)
    with nothing_lost(quick):
        quick.up()
        quick.wait('up{site="osaka",job="Apps",instance="app01.osaka.internal:9100"} == 1')
    # The same private addresses in two networks: neither sees the other's.
    assert {s.labels["site"] for s in quick.query('up{job="CoreSystems"}')} == {"dublin"}


def test_a_firewall_source_changes_the_group_and_ufw_and_nothing_else(quick: Sandbox) -> None:
    more = [*quick.get("operatorCidrs"), "198.18.0.9/32"]
    quick.set(operatorCidrs=more)
    with nothing_lost(quick):
        printed = quick.up()
    created = [line for line in printed.splitlines() if " create " in line]
    assert len(created) == 4, "SSH at three hosts and the master's page"
    assert all("SecurityGroupIngressRule" in line for line in created)
    assert "198.18.0.9" in quick.inside("dublin", "ufw", "status")
    quick.set(operatorCidrs=more[:-1])
    with nothing_lost(quick):
        quick.up()
    assert "198.18.0.9" not in quick.inside("dublin", "ufw", "status")


BROKEN: dict[str, tuple[dict[str, Any], list[str]]] = {
    "an unknown key": ({"operatorCIDRs": []}, ["operatorCIDRs", "no such setting"]),
    "a bad CIDR": (
        {"operatorCidrs": ["203.0.113.300/32"]},
        ["operatorCidrs[0]", "'203.0.113.300/32'", "write it like"],
    ),
    "a target without port": (
        {"slaves": [{"site": "a", "host": "b", "jobs": [{"name": "j", "targets": ["core01"]}]}]},
        ["slaves[0].jobs[0].targets[0]", "'core01'", "write it like"],
    ),
    "a site twice": (
        {"slaves": [{"site": "a", "host": "b"}, {"site": "a", "host": "c"}]},
        ["slaves", "site 'a'", "give each its own"],
    ),
    "a short password": (
        {"slaves": [{"site": "a", "host": "b", "password": "tooshort"}]},
        ["slaves[0].password", "8 bytes", "24 to 72"],
    ),
    "a rule file that is none": (
        {"ruleFiles": ["Pulumi.yaml"]},
        ["ruleFiles", "Pulumi.yaml", "not a rule file"],
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_setting_stops_the_run_before_anything_changed(quick: Sandbox, kind: str) -> None:
    settings, told = BROKEN[kind]
    files = ("state.json", "cloud.json")
    before = [(quick.plan.state_dir / file).read_bytes() for file in files]
    config = dict(quick.config)
    try:
        quick.set(**settings)
        printed = quick.refused()
    finally:
        quick.config = config
    for words in told:
        assert words in printed
    assert "tooshort" not in printed
    assert "Traceback" not in printed
    assert [(quick.plan.state_dir / file).read_bytes() for file in files] == before


@pytest.fixture
def rule_file(quick: Sandbox) -> Iterator[Any]:
    path = quick.plan.state_dir.with_name(f"{quick.plan.state_dir.name}-inputs") / "tested.yml"
    yield path
    quick.set(ruleFiles=[])
    quick.up()


def test_a_rule_that_promtool_refuses_leaves_the_old_configuration_serving(
    quick: Sandbox, rule_file: Any
) -> None:
    good = "groups: [{name: tested, rules: [{record: tested, expr: sum(up)}]}]"
    rule_file.write_text(good)
    quick.set(ruleFiles=[str(rule_file)])
    with nothing_lost(quick):
        quick.up()
        quick.wait("tested > 0")
    rule_file.write_text(good.replace("sum(up)", "sum(up"))
    with nothing_lost(quick):
        printed = quick.refused()
        assert "unclosed left parenthesis" in printed, "promtool's own words"
        assert "tested.yml" in printed
        time.sleep(INTERVAL_SECONDS)
        assert quick.query("tested > 0")
        again = quick.refused()
        assert "unclosed left parenthesis" in again, "it is not forgotten"
    rule_file.write_text(good.replace("sum(up)", "count(up)"))
    with nothing_lost(quick):
        quick.up()


def test_a_match_that_the_slave_would_refuse_is_never_asked(quick: Sandbox) -> None:
    before, slaves = quick.get("slaves"), quick.get("slaves")
    slaves[0]["match"] = ['{job="CoreSystems"']
    quick.set(slaves=slaves)
    try:
        with nothing_lost(quick):
            printed = quick.refused()
            assert 'checking match {job="CoreSystems" of site dublin' in printed
            assert "parse error" in printed, "promtool's own words"
    finally:
        quick.set(slaves=before)
    with nothing_lost(quick):
        quick.up()


def bundle(sandbox: Sandbox, host: str) -> dict[str, Any]:
    (record,) = [r for r in sandbox.state.records.values() if r.name == f"{host}-bundle"]
    return json.loads(record.inputs["stdin"].value)


@pytest.mark.parametrize(
    ("path", "spoil", "words"),
    [
        ("/etc/nginx/federation.conf", "nonsense on;", 'unknown directive "nonsense"'),
        ("/etc/prometheus/prometheus.yml", "nonsense: 1", "field nonsense not found"),
        ("/etc/prometheus/web.yml", "nonsense: 1", "field nonsense not found"),
        ("/etc/node_exporter/config.yml", "nonsense: 1", "field nonsense not found"),
    ],
)
def test_a_bundle_that_a_validator_refuses_leaves_the_old_one_serving(
    quick: Sandbox, path: str, spoil: str, words: str
) -> None:
    broken = bundle(quick, "slave-dublin")
    (file,) = [file for file in broken["files"] if file["path"] == path]
    file["content"] += f"\n{spoil}\n"
    before = quick.inside("dublin", "readlink", "/opt/federation/current")
    with nothing_lost(quick):
        told = quick.inside(
            "dublin", "/usr/local/sbin/apply-bundle", stdin=json.dumps(broken), check=False
        )
    assert words in told
    assert quick.inside("dublin", "readlink", "/opt/federation/current") == before


def served_serial(sandbox: Sandbox, host: str, address: str) -> str:
    """The serial number of the certificate that a listener of a server shows."""
    return sandbox.script(
        host,
        f"openssl s_client -connect {address} </dev/null 2>/dev/null | openssl x509 -noout -serial",
    )


def test_a_new_certificate_is_in_use_without_a_restart_or_a_lost_scrape(quick: Sandbox) -> None:
    # As if its last 30 days had begun: from then on a plain `up` renews it.
    state = quick.state
    for record in state.records.values():
        if record.name in ("slave-dublin-nginx-certificate", "slave-dublin-prometheus-certificate"):
            record.outputs["validityEndTime"] = "2026-01-01T00:00:00+00:00"
    state.save()
    listeners = ("127.0.0.1:9095", "127.0.0.1:9090")
    before = [served_serial(quick, "dublin", address) for address in listeners]
    with nothing_lost(quick):
        printed = quick.up()
        assert "2 replaced" in printed
    after = [served_serial(quick, "dublin", address) for address in listeners]
    assert all(before)
    assert all(after)
    assert not set(before) & set(after)


def test_an_instance_type_change_stops_and_starts_its_machine_and_keeps_the_data(
    quick: Sandbox,
) -> None:
    slaves = quick.get("slaves")
    slaves[1]["instanceType"] = "t3.small"
    quick.set(slaves=slaves)
    # Its own database: where that was made, and what it says of the time before.
    made = quick.script("osaka", "stat --format=%W /data/lost+found")
    query = 'count_over_time(up{job="Apps"}[1m])'
    then = str(int(time.time()) - 5)
    past = quick.own_api("osaka", "query", query=query, time=then)["result"]
    assert past
    boots = quick.start_times()
    printed = quick.up()
    assert "change Instance slave-osaka-1" in printed
    _, limit = machine.memory_bytes(quick.plan, quick.machine("osaka"))
    assert limit == 2048 << 20
    after = quick.start_times()
    assert after["osaka"] != boots["osaka"]
    assert after["dublin"] == boots["dublin"]
    quick.wait('up{site="osaka",job="Apps"} == 1')
    assert quick.script("osaka", "stat --format=%W /data/lost+found") == made
    assert quick.own_api("osaka", "query", query=query, time=then)["result"] == past


def test_a_bumped_generation_replaces_the_machine_and_keeps_address_and_data(
    quick: Sandbox,
) -> None:
    slaves = quick.get("slaves")
    slaves[1]["generation"] = 2
    quick.set(slaves=slaves)
    address, old = quick.public_ip("osaka"), quick.machine("osaka")
    blocks = quick.script("osaka", "stat -c %W /data/lost+found")
    printed = quick.up()
    assert "create Instance slave-osaka-2" in printed
    assert "delete Instance slave-osaka-1" in printed
    assert quick.machine("osaka") != old
    assert old not in machine.machines(quick.plan)
    assert quick.public_ip("osaka") == address
    assert quick.script("osaka", "stat -c %W /data/lost+found") == blocks, "the same file system"
    quick.wait('up{site="osaka",job="Apps"} == 1')


def test_a_slave_that_is_taken_out_of_the_settings_is_gone(quick: Sandbox) -> None:
    slaves = quick.get("slaves")
    quick.set(slaves=slaves[:1])
    with nothing_lost(quick):
        printed = quick.up()
        assert "delete Instance slave-osaka-" in printed
    assert not [m for m in machine.machines(quick.plan) if "osaka" in m]
    # Its last samples stay to be seen for Prometheus's look-back of five minutes.
    scraped = {target["scrapePool"] for target in quick.master.get("targets")["activeTargets"]}
    assert scraped == {"prometheus", "node", "alertmanager", "federate-dublin"}


def test_a_machine_that_died_is_started_again_with_its_data(quick: Sandbox) -> None:
    died = quick.machine("dublin")
    since = time.time()
    machine.stop(quick.plan, died, seconds=0)
    assert "stopped" in quick.run("status")
    printed = quick.up()
    assert "1 started" in printed
    quick.wait(f"{FEDERATE} == 1")
    assert time.time() - since < 90
    # The log of before the death is still there, replayed and not made anew.
    born = quick.script("dublin", "stat -c %W /data/wal/0*").split()
    assert min(float(second) for second in born) < since
