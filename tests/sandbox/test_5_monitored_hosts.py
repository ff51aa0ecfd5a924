"""Monitored hosts come, change and go: no scrape is lost, and nothing of the user's is touched."""

from __future__ import annotations

import contextlib
import json
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

import pytest

from hostfiles import monitored_host
from sandbox import providers
from sandbox.host import wait_until
from sandbox.program import plain
from sandbox.releases import ReleaseServer
from sandbox.world import USER
from tests.sandbox.conftest import Sandbox
from tests.sandbox.test_6_interrupted import Step, killed_at

CORES = [f"core0{n}" for n in range(1, 5)]
JOB = 'job="CoreSystems"'
# Two cores do much else meanwhile, and a new password costs each host a hash within this time.
INTERVAL_SECONDS = 4
# Everything that could hold a trace, with what it is; logs and what changes by itself left out.
SNAPSHOT = r"""
find /etc /usr /opt /var/lib /root /home -xdev \
    -not -path '/var/lib/systemd/*' -not -path '/var/lib/private*' \
    -not -path '/var/lib/cloud/*' -not -path '/var/lib/dhcp*' -not -name '__pycache__' \
    -not -name '*.pyc' -printf '%p %y %m %U %G %l\n' -type f -exec sha256sum {} +
getent passwd; getent group; systemctl list-unit-files --no-legend
"""


@pytest.fixture(scope="module")
def quick(sandbox: Sandbox) -> Iterator[Sandbox]:
    """The shared sandbox, whose slave scrapes its hosts every few seconds."""
    slaves = sandbox.get("slaves")
    # Whatever tests before these took out of it.
    slaves[0].pop("match", None)
    sandbox.set(slaves=slaves)
    change_job(sandbox, scrape_interval=f"{INTERVAL_SECONDS}s")
    sandbox.up()
    seen = f"sum_over_time(up{{{JOB}}}[{5 * INTERVAL_SECONDS}s]) >= 4"
    ask(sandbox, f"count({seen}) >= {len(CORES)}", seconds=60)
    yield sandbox
    # The next `up` brings the interval of all others back to this job.
    slaves = sandbox.get("slaves")
    del slaves[0]["jobs"][0]["scrape_interval"]
    sandbox.set(slaves=slaves)


def change_slave(sandbox: Sandbox, **change: Any) -> None:
    slaves = sandbox.get("slaves")
    slaves[0].update(change)
    sandbox.set(slaves=slaves)


def change_job(sandbox: Sandbox, **change: Any) -> None:
    slaves = sandbox.get("slaves")
    slaves[0]["jobs"][0].update(change)
    sandbox.set(slaves=slaves)


def rotate(sandbox: Sandbox, *names: str) -> None:
    rotation = sandbox.get("slaves")[0].get("rotation", {})
    change_slave(sandbox, rotation=rotation | {name: rotation.get(name, 1) + 1 for name in names})


def hosts(sandbox: Sandbox) -> list[dict[str, Any]]:
    return sandbox.get("slaves")[0]["jobs"][0]["hosts"]


def slave_address(sandbox: Sandbox) -> str:
    """In its own network."""
    return sandbox.fabric.model.attachments[sandbox.machine("dublin")].private_ip


def add_host(sandbox: Sandbox, number: int, **world: Any) -> dict[str, Any]:
    """A host of the world's, and what settings would say of it (which do not yet)."""
    name, address = f"core{number:02}.example.internal", f"10.20.1.{10 + number}"
    sandbox.world["hosts"].append(
        {"name": name, "subnet": "subnet-dublin", "address": address, **world}
    )
    return {"host": name, "address": address, "hostKey": {"given": name}}


def query(sandbox: Sandbox, promql: str) -> list[dict[str, Any]]:
    """An instant query of the slave's own Prometheus, by loopback."""
    path = f"/api/v1/query?query={urllib.parse.quote(promql)}"
    answer = sandbox.script(
        "dublin",
        f"sed -e 's#/-/ready#{path}#' -e '/^output/d' /etc/prometheus/secrets/ready.curl"
        " | curl --config -",
    )
    return json.loads(answer)["data"]["result"]


def ask(sandbox: Sandbox, promql: str, seconds: float = 30) -> list[dict[str, Any]]:
    found = wait_until(lambda: query(sandbox, promql), seconds=seconds, step=0.5)
    assert found, f"{promql} had no answer within {seconds:g} s"
    return found


def started(sandbox: Sandbox, name: str) -> str:
    return sandbox.inside(
        name, "systemctl", "show", "-p", "MainPID,ExecMainStartTimestamp", "node_exporter"
    )


@contextlib.contextmanager
def no_scrape_failed(sandbox: Sandbox) -> Iterator[None]:
    """Every scrape of every core host succeeded meanwhile, and none of their exporters restarted.

    A changed job gets another place within its interval, so of many scrapes one may be missing.
    """
    before, since = {name: started(sandbox, name) for name in CORES}, time.time()
    yield
    time.sleep(1.5 * INTERVAL_SECONDS)
    seconds = int(time.time() - since)
    for name in CORES:
        series = f'{{{JOB},instance="{name}.example.internal:9100"}}[{seconds}s]'
        (up,), (took,) = (query(sandbox, of + series) for of in ("up", "scrape_duration_seconds"))
        values = [value for _, value in up["values"]]
        # One that was refused failed at once; one that a busy machine answered late, at its end.
        assert "0" not in values, (name, up["values"], took["values"])
        assert len(values) >= seconds / INTERVAL_SECONDS - 2, name
    assert {name: started(sandbox, name) for name in CORES} == before


def test_password_and_certificates_are_renewed_without_a_failed_scrape(
    quick: Sandbox,
) -> None:
    sandbox = quick
    read = ("cat", "/etc/node_exporter/tls/node_exporter.crt", "/etc/node_exporter/config.yml")
    before = {name: sandbox.inside(name, *read) for name in CORES}
    with no_scrape_failed(sandbox):
        rotate(sandbox, "exporterPassword", "leafCertificates")
        sandbox.up()
    for name in CORES:
        after = sandbox.inside(name, *read)
        assert " prometheus:" in before[name]
        assert " prometheus:" not in after, "the old password is refused from now on"
        assert " prometheus-2:" in after
        assert before[name].partition("-----END")[0] != after.partition("-----END")[0]
    users = sandbox.script("dublin", "grep -h username /etc/prometheus/jobs.d/CoreSystems.yml")
    assert users.strip() == "username: prometheus-2"


def test_a_delivery_that_was_made_already_restarts_nothing(quick: Sandbox) -> None:
    sandbox = quick
    state = sandbox.state
    known = [
        record
        for record in state.records.values()
        if record.type == providers.COMMAND and "core0" in record.name
    ]
    assert len(known) >= len(CORES)
    for record in known:
        state.forget(record)
    with no_scrape_failed(sandbox):
        printed = sandbox.up()
    assert printed.count("create Command slave-dublin-core0") == len(known)


def test_a_host_that_cannot_be_reached_is_named_and_the_others_are_done(
    quick: Sandbox,
) -> None:
    sandbox = quick
    slaves = sandbox.get("slaves")
    slaves[0]["hostAccess"]["timeout"] = "20s"
    sandbox.set(slaves=slaves)
    away = ("blackhole", slave_address(sandbox))
    sandbox.inside("core03", "ip", "route", "add", *away)
    try:
        rotate(sandbox, "exporterPassword")
        printed = sandbox.refused()
        assert "core03.example.internal" in printed
        assert "10.20.1.13" in printed
        assert "could not be reached over SSH within 20 s: no answer" in printed
        for name in ("core01", "core02", "core04"):
            assert "prometheus-4:" in sandbox.inside(name, "cat", "/etc/node_exporter/config.yml")
            assert f"{name}.example.internal: " not in printed
    finally:
        sandbox.inside("core03", "ip", "route", "del", *away)
    # It knows the password that the others have changed to, although it was away.
    ask(sandbox, f'up{{{JOB},instance="core03.example.internal:9100"}} == 1')
    with no_scrape_failed(sandbox):
        printed = sandbox.up()
    assert "1 changed" in printed
    assert "prometheus-4:" in sandbox.inside("core03", "cat", "/etc/node_exporter/config.yml")


def test_a_foreign_service_on_the_port_is_left_alone_and_named(quick: Sandbox) -> None:
    sandbox = quick
    before = sandbox.get("slaves")
    change_job(sandbox, hosts=[*hosts(sandbox), add_host(sandbox, 8, exporter=True)])
    printed = sandbox.refused()
    assert "core08.example.internal" in printed
    assert "9100" in printed
    assert "prometheus-node-exporter" in printed
    assert "targets" in printed, "what to do instead"
    sandbox.inside("core08", "systemctl", "is-active", "prometheus-node-exporter")
    sandbox.script("core08", "! test -e /etc/node_exporter && ! test -e /opt/federation")
    assert "no such user" in sandbox.inside("core08", "id", "node_exporter", check=False)

    # As the message says: a plain target, with the access that it has.
    sandbox.set(slaves=before)
    plain_job = {"name": "colleague", "targets": ["core08.example.internal:9100"], "scheme": "http"}
    change_slave(sandbox, jobs=[*sandbox.get("slaves")[0]["jobs"], plain_job])
    sandbox.up()
    ask(sandbox, 'up{job="colleague"} == 1')
    sandbox.set(slaves=before)
    sandbox.up()


def test_a_bad_configuration_never_reaches_a_running_exporter(quick: Sandbox) -> None:
    sandbox = quick
    (record,) = (
        r
        for r in sandbox.state.records.values()
        if r.type == providers.COMMAND and r.name.endswith("core01.example.internal")
    )
    delivery = json.loads(plain(record.inputs)["stdin"])
    (config,) = (f for f in delivery["bundle"]["files"] if f["path"].endswith("config.yml"))
    good = config["content"]
    broken = {
        "": "TLS is disabled",
        good.replace("RequireAndVerifyClientCert", "Whatever"): "Whatever",
        good.replace("TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256", "ROT13"): "ROT13",
        good.replace("$2b$12$", "$9z$"): "hash",
        good.replace("node_exporter.key", "another.key"): "another.key",
    }
    assert good not in broken
    with no_scrape_failed(sandbox):
        for content, complaint in broken.items():
            config["content"] = content
            told = sandbox.inside(
                "core01",
                "sh",
                "-c",
                monitored_host.INSTALL,
                stdin=json.dumps(delivery),
                check=False,
            )
            assert complaint in told, told
            assert "Nothing was changed" in told
            assert sandbox.inside("core01", "cat", "/etc/node_exporter/config.yml") == good


def test_a_host_is_left_exactly_as_it_was(quick: Sandbox) -> None:
    sandbox = quick
    guarded = add_host(sandbox, 6, ufw=True)
    unguarded = add_host(sandbox, 7)
    # Booted, and not yet in any job.
    sandbox.up()
    sandbox.script("core06", "ufw allow from 10.20.1.11 to any port 8080 proto tcp")
    sandbox.script("core07", "useradd --system colleague; userdel colleague")
    for name in ("core06", "core07"):
        # sudo leaves a mark of its own at the first use, which a host in use has had.
        sandbox.script(name, f"runuser -u {USER} -- sudo true")
    before = {name: sandbox.script(name, SNAPSHOT) for name in ("core06", "core07")}
    assert "/etc/passwd" in before["core07"]
    without = hosts(sandbox)

    change_job(sandbox, hosts=[*without, guarded, unguarded])
    sandbox.up()
    for name in before:
        ask(sandbox, f'up{{{JOB},instance="{name}.example.internal:9100"}} == 1')
        assert sandbox.script(name, SNAPSHOT) != before[name]
    rule = next(
        line for line in sandbox.inside("core06", "ufw", "status").splitlines() if "9100" in line
    )
    assert "ALLOW" in rule
    assert slave_address(sandbox) in rule
    knock = "timeout 3 bash -c '</dev/tcp/10.20.1.{}/9100'; echo $?"
    assert sandbox.script("core01", knock.format(16)).strip().endswith("124"), "dropped by ufw"
    assert sandbox.script("core01", knock.format(17)).strip().endswith("0"), "no ufw, no rule"

    change_job(sandbox, hosts=without)
    printed = sandbox.up()
    assert printed.count("delete Command slave-dublin-core0") == 2
    for name, was in before.items():
        assert sandbox.script(name, SNAPSHOT) == was


PROGRAM = "bin/monitored-host"
INSTALL_STEPS = (
    # Run out of the delivery, its source has no path.
    ("monitored-host", "write_programs", "/opt/.federation/bin"),
    ("monitored-host", "apply_bundle", ""),
    ("monitored-host", "firewall", ""),
    ("monitored-host", "run", "'comment'"),
)
REMOVE_STEPS = (
    (PROGRAM, "run", "'delete'"),
    (PROGRAM, "run", "'stop'"),
    (PROGRAM, "remove_user", ""),
    (PROGRAM, "remove_trees", "/opt/federation/trees"),
    ("pathlib/_local.py", "rename", "PosixPath('/opt/.federation')"),
    # Its second call: the first is that of what a killed one left.
    ("shutil.py", "rmtree", "PosixPath('/opt/.federation'), 'ignore_errors': False"),
)


def test_a_host_is_left_exactly_as_it_was_however_often_both_ways_were_killed(
    quick: Sandbox,
) -> None:
    sandbox, without = quick, hosts(quick)
    host, name = add_host(sandbox, 10, ufw=True), "core10"
    sandbox.up("--no-verify")
    sandbox.script(name, f"runuser -u {USER} -- sudo true")
    before = sandbox.script(name, SNAPSHOT)
    change_job(sandbox, hosts=[*without, host])
    sandbox.up()
    delivery = sandbox.sent(f"slave-dublin-{host['host']}")["stdin"]
    remove = monitored_host.remove(json.loads(delivery)["owner"])

    def kill(steps: tuple[tuple[str, str, str], ...], shell: str, stdin: str = "") -> None:
        for program, function, about in steps:
            step = Step(function, about, name, program=program)
            killed_at(sandbox, step, "sh", "-c", shell, stdin=stdin)

    assert "removed" in sandbox.script(name, remove)
    # Where `up` serves the exporter's release from, too.
    with ReleaseServer(sandbox.plan):
        # Only what it runs is killed: it undoes all of it.
        step = Step("converge", "", name, program="bin/apply-bundle")
        shell = ("sh", "-c", monitored_host.INSTALL)
        killed_at(sandbox, step, *shell, stdin=delivery, told="Killed; run it again")
        assert sandbox.script(name, SNAPSHOT) == before
        kill(INSTALL_STEPS, monitored_host.INSTALL, delivery)
    sandbox.forget(f"slave-dublin-{host['host']}")
    sandbox.up()
    ask(sandbox, f'up{{{JOB},instance="{host["host"]}:9100"}} == 1')

    kill(REMOVE_STEPS, remove)
    change_job(sandbox, hosts=without)
    sandbox.up()
    assert sandbox.script(name, SNAPSHOT) == before


def test_a_host_with_a_public_address_is_reached_and_scraped_over_the_internet(
    quick: Sandbox,
) -> None:
    sandbox = quick
    without = hosts(sandbox)
    name = add_host(sandbox, 9, public=True, ufw=True)["host"]
    direct = {"host": {"given": f"{name}/publicAddress"}, "hostKey": {"given": name}, "jump": False}
    change_job(sandbox, hosts=[*without, direct])
    sandbox.up()
    ask(sandbox, f"count(up{{{JOB}}} == 1) == {len(without) + 1}")
    assert sandbox.public_ip("dublin") in sandbox.inside("core09", "ufw", "status")
    change_job(sandbox, hosts=without)
    sandbox.up()
    assert "9100" not in sandbox.inside("core09", "ufw", "status")


def test_targets_in_a_file_of_the_users_are_scraped_with_the_same_access(
    quick: Sandbox,
) -> None:
    sandbox = quick
    before = sandbox.get("slaves")
    found = {"name": "found", "file_sd_configs": [{"files": ["/data/targets/found.yml"]}]}
    change_slave(sandbox, jobs=[*before[0]["jobs"], found])
    sandbox.up()
    sandbox.script(
        "dublin",
        "echo '- targets: [core01.example.internal:9100]' > /data/targets/found.yml",
    )
    ask(sandbox, 'up{job="found",instance="core01.example.internal:9100"} == 1')
    sandbox.set(slaves=before)
    sandbox.up()
