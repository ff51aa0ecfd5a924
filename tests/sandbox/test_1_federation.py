"""The main job: the master federates the slave, on machines that booted from user-data."""

from __future__ import annotations

import contextlib
import fcntl
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sandbox import machine
from tests.sandbox.conftest import CORES, ROOT, Sandbox

INSTANCES = [f"{core}.example.internal:9100" for core in CORES]
INTERVAL_SECONDS = 15
MIB = 1 << 20


def test_the_four_cores_are_up_on_the_master_with_their_own_labels(sandbox: Sandbox) -> None:
    found = {s.labels["instance"]: s for s in sandbox.query('up{job="CoreSystems"}')}
    assert sorted(found) == INSTANCES
    for sample in found.values():
        assert sample.value == 1
        assert sample.labels["group"] == "CoreSystems Monitoring"
        assert sample.labels["site"] == "dublin"


def test_federated_samples_are_fresh(sandbox: Sandbox) -> None:
    ages = sandbox.query('time() - timestamp(up{job="CoreSystems"})')
    assert len(ages) == len(INSTANCES)
    assert max(sample.value for sample in ages) <= 2 * INTERVAL_SECONDS


def test_the_cores_own_metrics_cross_and_not_only_up(sandbox: Sandbox) -> None:
    names = {s.labels["nodename"] for s in sandbox.query('node_uname_info{job="CoreSystems"}')}
    assert names == set(CORES)


def test_the_master_keeps_its_own_jobs_beside_the_federated_ones(sandbox: Sandbox) -> None:
    own = {(s.labels["job"], s.labels["instance"], s.value) for s in sandbox.query('up{site=""}')}
    name = "prometheus-master.example.com"
    assert own == {(job, name, 1.0) for job in ("prometheus", "node", "alertmanager")}
    slave = "prometheus-slave.example.com"
    theirs = {(s.labels["job"], s.labels["instance"]) for s in sandbox.query('up{site="dublin"}')}
    assert theirs == {
        *(("CoreSystems", core) for core in INSTANCES),
        *((job, slave) for job in ("prometheus", "node", "alertmanager")),
        ("federate", f"{slave}:9095"),
    }


def test_jobs_are_scraped_every_fifteen_seconds_over_tls(sandbox: Sandbox) -> None:
    targets = {t["labels"]["job"]: t for t in sandbox.master.get("targets")["activeTargets"]}
    assert set(targets) == {"prometheus", "node", "alertmanager", "federate"}
    for target in targets.values():
        assert target["scrapeInterval"] == "15s"
        assert target["scrapeUrl"].startswith("https://")
        assert target["health"] == "up"


@pytest.mark.parametrize("host", ["master", "dublin"])
def test_servers_booted_from_the_program_s_user_data(sandbox: Sandbox, host: str) -> None:
    assert "status: done" in sandbox.inside(host, "cloud-init", "status")
    assert machine.failed_units(sandbox.plan, sandbox.machine(host)) == []
    resource = "master-1" if host == "master" else f"slave-{host}-1"
    (record,) = [r for r in sandbox.state.records.values() if r.name == resource and r.inputs]
    assert record.inputs["instanceType"] == "t3.micro"
    _, limit = machine.memory_bytes(sandbox.plan, sandbox.machine(host))
    assert limit == 1024 * MIB


@pytest.mark.parametrize("host", ["master", "dublin"])
def test_prometheus_is_the_official_layout_with_least_rights(sandbox: Sandbox, host: str) -> None:
    home_and_shell = sandbox.inside(host, "getent", "passwd", "prometheus").strip().split(":")[5:]
    assert home_and_shell == ["/", "/usr/sbin/nologin"]
    told = sandbox.inside(
        host,
        *("systemctl", "show", "prometheus"),
        *("-p", "User,Restart,StartLimitIntervalUSec,ExecStart,ExecStartPre,MemoryMax,ActiveState"),
    )
    shown = dict(line.split("=", 1) for line in told.splitlines())
    assert shown["User"] == "prometheus"
    assert shown["ActiveState"] == "active"
    assert shown["Restart"] == "always"
    # No limit: it is tried for ever.
    assert shown["StartLimitIntervalUSec"] == "0"
    assert "promtool check config" in told
    assert "promtool check web-config" in told
    assert "127.0.0.1:9090" in shown["ExecStart"]
    assert 0 < int(shown["MemoryMax"]) < 1024 * MIB
    mode = sandbox.inside(host, "stat", "-Lc", "%U:%G %a", "/data").strip()
    assert mode == "prometheus:prometheus 750"
    assert sandbox.inside(host, "findmnt", "-no", "FSTYPE", "/data").strip() == "ext4"


@pytest.mark.parametrize(
    ("host", "unit", "limit"),
    [
        (host, unit, limit)
        for host in ("master", "dublin")
        for unit, limit in (
            ("prometheus", 1.5),
            ("node_exporter", 2.0),
            ("nginx", 3.0),
            ("alertmanager", 2.0),
            ("federation-watch", 2.0),
        )
    ],
)
def test_units_are_hardened(sandbox: Sandbox, host: str, unit: str, limit: float) -> None:
    told = sandbox.inside(host, "systemd-analyze", "security", "--no-pager", unit)
    exposure = re.search(r"Overall exposure level for \S+: ([0-9.]+)", told)
    assert exposure is not None, told
    assert float(exposure[1]) <= limit


@pytest.mark.parametrize("host", ["master", "dublin"])
@pytest.mark.parametrize(
    ("unit", "user"),
    [(name, name) for name in ("prometheus", "node_exporter", "alertmanager")]
    + [("nginx", "www-data")],
)
def test_no_service_of_ours_is_roots(sandbox: Sandbox, host: str, unit: str, user: str) -> None:
    owner = f"stat --format=%U /proc/$(systemctl show -P MainPID {unit})"
    assert sandbox.script(host, owner).strip() == user


def test_the_slave_s_name_resolves_from_the_record_that_the_program_registered(
    sandbox: Sandbox,
) -> None:
    resolved = sandbox.inside("master", "getent", "ahostsv4", "prometheus-slave.example.com")
    assert resolved.split()[0] == sandbox.public_ip("dublin")


def test_private_names_are_known_inside_their_network_only(sandbox: Sandbox) -> None:
    assert "10.20.1.11" in sandbox.inside("dublin", "getent", "hosts", "core01.example.internal")
    assert sandbox.inside("master", "getent", "hosts", "core01.example.internal", check=False) == ""


def test_a_busy_computer_hardly_slows_its_machines(sandbox: Sandbox) -> None:
    busy = "end=$((SECONDS+2)); while [ $SECONDS -lt $end ]; do :; done"
    measure = f"TIMEFORMAT=%U; time ({busy})"
    with contextlib.ExitStack() as others:
        for _ in range(8):
            hog = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            others.callback(hog.wait)
            others.callback(hog.kill)
        # Of the machine's own processes, with its limits.
        run = ("systemd-run", "--wait", "--pipe", "--quiet", "bash", "-c", measure)
        seconds = float(sandbox.inside("core01", *run).split()[-1])
    assert seconds > 1, "of two, one processor's"


def test_a_second_up_touches_nothing_and_says_so(sandbox: Sandbox) -> None:
    before = sandbox.start_times()
    used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    printed = sandbox.up()
    # Not the time on the clock: other tests run beside it.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - used < 10
    assert "no changes" in printed
    assert sandbox.start_times() == before


def test_verify_and_status_agree_that_all_is_well(sandbox: Sandbox) -> None:
    for command in ("verify", "status"):
        printed = sandbox.run(command)
        assert sandbox.last is not None
        assert sandbox.last.returncode == 0, printed
    assert "core04" in printed


def test_ssh_gives_a_shell_with_the_pinned_host_key(sandbox: Sandbox) -> None:
    assert sandbox.run("ssh", "prometheus-slave", "id", "-un").strip().endswith("admin")
    assert sandbox.run("ssh", "core01", "hostname").strip().endswith("core01")
    assert "Name one of" in sandbox.run("ssh", "nobody")
    # Another host's key in its place.
    known_hosts = sandbox.plan.state_dir / "outputs" / "known_hosts"
    kept = known_hosts.read_text()
    master, slave = (sandbox.public_ip(name) for name in ("master", "dublin"))
    keys = {line.split()[0]: line for line in kept.splitlines()}
    try:
        known_hosts.write_text(keys[master].replace(master, slave) + "\n")
        assert "Host key verification failed" in sandbox.run("ssh", "prometheus-slave", "id")
    finally:
        known_hosts.write_text(kept)


def test_a_second_run_at_once_is_refused_and_told_who_holds_the_first(sandbox: Sandbox) -> None:
    held = sandbox.plan.runtime_dir / "lock"
    with held.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        told = sandbox.refused("--no-verify")
    assert "under way" in told
    assert "Wait until it has ended" in told


@pytest.mark.parametrize("host", ["master", "dublin", *CORES])
def test_no_file_of_ours_switches_the_check_of_a_certificate_off(
    sandbox: Sandbox, host: str
) -> None:
    words = "insecure_skip_verify|proxy_ssl_verify +off"
    searched = "grep -rsE --dereference-recursive"
    folders = "/etc /opt/federation/current/ /opt/federation/bin /usr/local/sbin"
    found = sandbox.script(host, f"{searched} -l '{words}' {folders} || true")
    assert found == ""
    # It looks into our files, behind their links.
    assert "/etc/node_exporter/config.yml" in sandbox.script(
        host, f"{searched} -l client_ca_file /etc || true"
    )


@pytest.mark.parametrize(("host", "count"), [("master", 4), ("dublin", 4)])
def test_every_scrape_is_over_tls_that_verifies_with_our_ca(
    sandbox: Sandbox, host: str, count: int
) -> None:
    listed = sandbox.script(host, "ls /etc/prometheus/*.d/*.yml").split()
    jobs = [
        job
        for path in listed
        for job in yaml.safe_load(sandbox.inside(host, "cat", path))["scrape_configs"]
    ]
    assert len(jobs) == count
    for job in jobs:
        assert job["scheme"] == "https"
        assert job["tls_config"]["ca_file"] == "../tls/ca.pem"
        assert job["tls_config"]["cert_file"] == "../tls/prometheus.crt"
        assert job["basic_auth"]["password_file"].startswith("../secrets/")
    # None beside them.
    main = yaml.safe_load(sandbox.inside(host, "cat", "/etc/prometheus/prometheus.yml"))
    assert "scrape_configs" not in main
    assert {pattern.partition("/")[0] for pattern in main["scrape_config_files"]} == {
        Path(path).parent.name for path in listed
    }


def test_no_program_of_ours_switches_the_check_of_a_certificate_off() -> None:
    folders = ("cloud-init", "components", "hostfiles", "rules", "sandbox", "tests")
    # Those on hosts have no ending.
    files = [*ROOT.glob("*.py"), *(path for name in folders for path in ROOT.glob(f"{name}/**/*"))]
    assert ROOT / "cloud-init" / "existing-master" in files
    words = re.compile(
        r"insecure_skip_verify: *true|verify *= *False|CERT_NONE|check_hostname *= *False"
        r"|_create_unverified_context|--insecure\b"
    )
    texts = [path for path in files if path.is_file() and path.suffix != ".pyc"]
    found = [path.name for path in texts if words.search(path.read_text())]
    assert found == [Path(__file__).name]
