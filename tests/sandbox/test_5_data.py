"""The data outlives its server, a damaged database, and its volume; all of it is measured."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from sandbox import host, machine
from sandbox.program import plain
from tests.sandbox.conftest import Sandbox, no_scrape_lost, silence
from tests.sandbox.keyring import Keyring
from tests.sandbox.probe import Door, Request, ask

INTERVAL_SECONDS = 2
# What the site's slave scraped and the master took over.
FEDERATED = 'up{job="CoreSystems",instance="core01.example.internal:9100",site="dublin"}'
# The same as the slave knows it.
SCRAPED = 'up{job="CoreSystems",instance="core01.example.internal:9100"}'
GAP_SECONDS = 60
SERVERS = ("dublin", "master")
NAMES = {"dublin": "prometheus-slave.example.com", "master": "prometheus-master.example.com"}
KEPT_ON_HOST = 3


@pytest.fixture(scope="module")
def quick(sandbox: Sandbox) -> Sandbox:
    """The shared sandbox, scraping every two seconds."""
    sandbox.set(scrapeInterval=f"{INTERVAL_SECONDS}s")
    # The metrics of backups come over, too, whatever other tests have narrowed.
    change(sandbox, "dublin", match=['{__name__=~".+"}'])
    sandbox.up()
    sandbox.wait(f"count_over_time({FEDERATED}[10s]) >= 4")
    return sandbox


def change(sandbox: Sandbox, server: str, **settings: Any) -> None:
    """Changes settings of one server."""
    if server == "master":
        sandbox.set(master={**sandbox.get("master"), **settings})
    else:
        slaves = sandbox.get("slaves")
        slaves[0] |= settings
        sandbox.set(slaves=slaves)


def history(sandbox: Sandbox, server: str, since: float, until: float) -> Any:
    """Every series of a server between two moments: an answer of its own query API."""
    selector = '{__name__=~"up|node_load1|scrape_samples_scraped"}'
    found = sandbox.own_api(
        server,
        "query_range",
        query=selector,
        start=f"{since:.3f}",
        end=f"{until:.3f}",
        step=str(INTERVAL_SECONDS),
    )
    return sorted(found["result"], key=lambda row: sorted(row["metric"].items()))


def alertmanager(sandbox: Sandbox, server: str, new: str = "") -> Any:
    """The silences of a server's Alertmanager, asked on its loopback, or a new one for it."""
    wanted = Request(
        door=Door(address="127.0.0.1", port=9093, name=NAMES[server]),
        client=Keyring(sandbox.state).own_client(server),
        path="/alertmanager/api/v2/silences",
        method="POST" if new else "GET",
        body=new,
    )
    (answer,) = ask(sandbox.namespace(server), [wanted])
    assert answer.short == 200, answer
    return json.loads(answer.body)


def silenced(sandbox: Sandbox, server: str) -> set[str]:
    """The comments of its silences that are in force."""
    found = alertmanager(sandbox, server)
    return {one["comment"] for one in found if one["status"]["state"] == "active"}


def gap(sandbox: Sandbox, since: float) -> float:
    """The longest time without a federated sample at the master since a moment."""
    seconds = time.time() - since
    times = [sample.timestamp for sample in sandbox.scrapes(FEDERATED, seconds)]
    return max(later - earlier for earlier, later in itertools.pairwise(times))


def backups(sandbox: Sandbox, server: str) -> list[str]:
    return sandbox.script(server, "ls -A /data/backups").split()


def back_up(sandbox: Sandbox, server: str) -> str:
    """What the timer starts, now; the name of the backup."""
    # Named after the second.
    sandbox.script(server, "systemctl start prometheus-backup.service && sleep 1")
    return backups(sandbox, server)[-1]


@pytest.mark.parametrize("server", SERVERS)
def test_a_backup_is_made_old_ones_go_and_the_master_knows_when(
    quick: Sandbox, server: str
) -> None:
    properties = "ActiveState,NextElapseUSecRealtime"
    timer = quick.script(server, f"systemctl show -p {properties} prometheus-backup.timer")
    assert "ActiveState=active" in timer
    assert re.search("NextElapseUSecRealtime=.+", timer)
    first = back_up(quick, server)
    quick.script(server, f"cp -al /data/backups/{first} /data/backups/20200101T000000Z-long-ago")
    # As if one had been killed.
    quick.script(server, f"cp -al /data/backups/{first} /data/backups/.half-gone")
    since = time.time()
    made = [back_up(quick, server) for _ in range(KEPT_ON_HOST)]
    assert backups(quick, server) == made
    assert quick.script(server, "ls -A /data/snapshots") == ""
    name = "prometheus-master" if server == "master" else "prometheus-slave"
    told = quick.wait(
        f'federation_backup_last_success_timestamp_seconds{{instance=~"{name}.*"}} > {since:.0f}'
    )
    assert time.time() - told[0].value < 60
    size = quick.query(f'federation_backup_size_bytes{{instance=~"{name}.*"}}')
    assert size[0].value > 10_000
    assert not quick.query('node_textfile_scrape_error{instance=~"prometheus-.*"} != 0')


def test_the_service_of_backups_is_hardened(quick: Sandbox) -> None:
    told = quick.script("dublin", "systemd-analyze security --no-pager prometheus-backup.service")
    exposure = re.search(r"exposure level for prometheus-backup.service: ([\d.]+)", told)
    assert exposure
    assert float(exposure[1]) <= 1.5


def test_a_damaged_database_is_restored_from_the_volume_by_one_command(quick: Sandbox) -> None:
    since = time.time()
    time.sleep(3 * INTERVAL_SECONDS)
    backup = back_up(quick, "dublin")
    until = time.time() - 2 * INTERVAL_SECONDS
    before = history(quick, "dublin", since, until)
    assert before
    # What others than Prometheus have on the volume stays.
    others = sorted(["alertmanager", "backups", "letsencrypt", "lost+found", "targets"])
    quick.script("dublin", "mkdir /data/letsencrypt")
    quick.script("dublin", "systemctl kill -s KILL prometheus; rm -rf /data/wal /data/chunks_head")
    started = time.time()
    told = quick.inside("dublin", "/usr/local/sbin/restore-data", backup)
    assert f"restored /data/backups/{backup}" in told
    again = host.wait_until(
        lambda: history(quick, "dublin", since, until) == before or None, seconds=30
    )
    assert again, "the history is not what it was"
    print(f"restored from the volume in {time.time() - started:.1f} s")
    quick.wait(f"count_over_time({FEDERATED}[6s]) >= 2")
    moved = quick.script("dublin", "ls /data/replaced/*").split()
    kept = quick.script("dublin", "ls /data").split()
    assert (set(others) - set(kept), set(others) & set(moved)) == (set(), set())
    quick.script("dublin", "rm -r /data/replaced /data/letsencrypt")
    refused = quick.inside("dublin", "/usr/local/sbin/restore-data", "../wal", check=False)
    assert "the backups are" in refused
    assert backup in refused


# In brackets, so that it does not find the script that looks for it.
FETCH = "[i]nstall-release"


@contextlib.contextmanager
def first_boot_held(sandbox: Sandbox, server: str) -> Iterator[str]:
    """Runs `up` with a server's generation raised. In the block the first boot of the new machine,
    whose name this is, stands still; then it goes on, and `up` is waited for."""
    known = set(machine.machines(sandbox.plan))
    settings = sandbox.get("master") if server == "master" else sandbox.get("slaves")[0]
    change(sandbox, server, generation=settings.get("generation", 1) + 1)

    def booting() -> str | None:
        new = set(machine.machines(sandbox.plan)) - known
        return next((name for name in new if machine.leader_pid(sandbox.plan, name)), None)

    def run(name: str, script: str, *, check: bool = True) -> None:
        argv = ["bash", "-c", script]
        machine.exec(sandbox.plan, name, argv, check=check, timeout=120)

    with ThreadPoolExecutor(1) as beside:
        up = beside.submit(sandbox.run, "up")
        name = host.wait_until(booting, seconds=180, step=0.1)
        assert name, up.result()
        found = f"until pgrep -f '{FETCH}' >/dev/null; do sleep 0.05; done"
        run(name, f"{found}; pkill -STOP -f '{FETCH}'")
        try:
            yield name
        finally:
            run(name, f"pkill -CONT -f '{FETCH}'", check=False)
            up.result()


def federates_on(sandbox: Sandbox) -> None:
    """Waits for three federated samples that are all newer than this call."""
    since = time.time()
    assert host.wait_until(
        lambda: len([s for s in sandbox.scrapes(FEDERATED, 60) if s.timestamp > since]) >= 3,
        seconds=60,
    )


def test_an_instance_whose_first_boot_fails_gets_neither_address_nor_volume(
    quick: Sandbox,
) -> None:
    quick.wait(f"count_over_time({FEDERATED}[10s]) >= 4")
    old, since = quick.machine("dublin"), time.time()
    volume = machine.recorded_devices(quick.plan, old)
    with first_boot_held(quick, "dublin") as new:
        script = f"pkill -9 -f '[s]cripts/runcmd'; pkill -9 -f '{FETCH}'"
        machine.exec(quick.plan, new, ["bash", "-c", script])
    assert quick.last is not None
    assert quick.last.returncode == 1, quick.last.stdout
    assert "slave-dublin-first-boot" in quick.last.stdout
    assert "runcmd" in quick.last.stdout, "cloud-init's own words"
    assert "raise generation" in quick.last.stdout
    federates_on(quick)
    no_scrape_lost(quick, 'up{job="federate",site="dublin"}', since, INTERVAL_SECONDS)
    assert machine.recorded_devices(quick.plan, old) == volume
    assert machine.recorded_devices(quick.plan, new) == []
    # The next test asks the slave that serves, and replaces this one, too.
    machine.stop(quick.plan, new, seconds=0)


@pytest.mark.parametrize("server", SERVERS)
def test_a_replaced_server_has_its_history_and_federation_is_back_within_a_minute(
    quick: Sandbox, server: str
) -> None:
    quick.wait(f"count_over_time({FEDERATED}[20s]) >= 8")
    until = time.time() - 2 * INTERVAL_SECONDS
    since = until - 60
    before = {name: history(quick, name, since, until) for name in SERVERS}
    alertmanager(quick, server, silence("of the one before"))
    started = time.time()
    with first_boot_held(quick, server) as new:
        # However long it takes to boot, the old one serves.
        federates_on(quick)
    assert quick.last is not None
    assert quick.last.returncode == 0, quick.last.stdout
    print(f"{server} replaced in {time.time() - started:.1f} s")
    prefix = "master-" if server == "master" else f"slave-{server}-"
    left = [name for name in machine.machines(quick.plan) if name.startswith(prefix)]
    assert left == [new], "also gone: one whose first boot failed"
    quick.wait(f"count_over_time({FEDERATED}[6s]) >= 2")
    assert {name: history(quick, name, since, until) for name in SERVERS} == before
    assert "of the one before" in silenced(quick, server)
    lost = gap(quick, started - 10)
    print(f"{server} replaced: {lost:.1f} s without federated samples")
    assert lost < GAP_SECONDS


def test_silences_that_lay_on_the_root_disk_come_along(quick: Sandbox) -> None:
    alertmanager(quick, "dublin", silence("of long ago"))
    # Where an earlier release of this program had them.
    move = "systemctl stop alertmanager && mv /data/alertmanager /var/lib/alertmanager"
    # As the delivery does that brings this one.
    quick.script(
        "dublin", f"{move} && systemctl reload data-volume && systemctl start alertmanager"
    )
    try:
        assert host.wait_until(lambda: "of long ago" in silenced(quick, "dublin"), seconds=10)
        where = quick.script("dublin", "stat -c '%U %a' /data/alertmanager /data/alertmanager/*")
        assert where.split("\n")[0] == "alertmanager 750"
        assert {line.split()[0] for line in where.splitlines()} == {"alertmanager"}
    finally:
        quick.script("dublin", "rm -r /var/lib/alertmanager")


def volume_of(sandbox: Sandbox, server: str) -> Any:
    """The data volume that a server's instance has: its file here."""
    (device,) = machine.recorded_devices(sandbox.plan, sandbox.machine(server))
    return device.image


def snapshots(sandbox: Sandbox) -> dict[str, str]:
    """The newest snapshot of each server: what `snapshot` lists."""
    printed = sandbox.run("snapshot")
    assert sandbox.last is not None
    assert sandbox.last.returncode == 0, printed
    rows = re.findall(r"^ *(snap-\w+) +\S+?-(master|slave-dublin)-data ", printed, re.MULTILINE)
    return {name.removeprefix("slave-"): id_ for id_, name in rows}


def test_destroyed_volumes_are_restored_from_snapshots_into_new_instances(quick: Sandbox) -> None:
    since = time.time() - 60
    for name in SERVERS:
        alertmanager(quick, name, silence("in the snapshot"))
        # It writes them down every minute, and when it ends.
        quick.script(name, "systemctl restart alertmanager")
    newest = snapshots(quick)
    # The file systems were at rest for a moment: what had been answered before is in the copy.
    until = time.time() - 4 * INTERVAL_SECONDS
    before = {name: history(quick, name, since, until) for name in SERVERS}
    assert all(before.values())
    lost = {name: volume_of(quick, name) for name in SERVERS}
    for name in SERVERS:
        machine.stop(quick.plan, quick.machine(name), seconds=0)
    for volume in lost.values():
        size = volume.stat().st_size
        with volume.open("r+b") as file:
            file.truncate(0)
            file.truncate(size)
    for name in SERVERS:
        change(quick, name, restoreFrom=newest[name])
    started = time.time()
    printed = quick.up()
    print(f"both restored in {time.time() - started:.1f} s")
    for name, type_ in (("master", "master"), ("dublin", "slave-dublin")):
        assert f"create Volume {type_}-data-{newest[name]}" in printed
        assert volume_of(quick, name) != lost[name]
        assert lost[name].exists(), "what was replaced is the user's to remove"
    assert "delete Volume " not in printed
    assert all("in the snapshot" in silenced(quick, name) for name in SERVERS)
    assert {name: history(quick, name, since, until) for name in SERVERS} == before
    quick.wait(f"count_over_time({FEDERATED}[6s]) >= 2")


def test_replaced_volumes_go_when_the_user_says_so(quick: Sandbox) -> None:
    for name in SERVERS:
        change(quick, name, keepReplacedVolumes=False)
    started = quick.start_times()
    printed = quick.up()
    for name in ("master", "slave-dublin"):
        assert f"delete Volume {name}-data" in printed
    assert quick.start_times() == started
    files = sorted((quick.plan.state_dir / "volumes").glob("*.img"))
    assert files == sorted(volume_of(quick, name) for name in SERVERS)


def test_a_snapshot_that_is_not_there_is_named_and_nothing_stops(quick: Sandbox) -> None:
    before = quick.get("slaves")
    started = quick.start_times()
    change(quick, "dublin", restoreFrom="snap-0123456789abcdef0")
    printed = quick.refused()
    quick.set(slaves=before)
    assert "There is no snapshot snap-0123456789abcdef0" in printed
    assert quick.start_times() == started
    quick.up()


def test_the_policy_keeps_so_many_snapshots_of_each_volume(quick: Sandbox) -> None:
    quick.set(backup={"keep": 2})
    quick.up("--no-verify")
    taken = [snapshots(quick)["dublin"] for _ in range(3)]
    folder = quick.plan.state_dir / "snapshots"
    assert [(folder / f"{id_}.img").exists() for id_ in taken] == [False, True, True]
    quick.set(backup={})
    quick.up("--no-verify")


def ids(records: Sequence[Any]) -> list[str]:
    return [record.id for record in records]


def test_a_site_with_protected_data_is_not_taken_out_by_accident(quick: Sandbox) -> None:
    quick.set(protectData=True)
    quick.up("--no-verify")
    slaves, state = quick.get("slaves"), quick.state
    volumes = [r for r in state.records.values() if r.type.endswith(":Volume")]
    quick.set(slaves=[])
    told = quick.refused("--no-verify")
    assert "it is protected" in told
    assert "Set protectData to false" in told
    assert set(ids(volumes)) <= set(ids(list(quick.state.records.values())))
    assert all(volume_of(quick, name).exists() for name in SERVERS)
    quick.set(slaves=slaves, protectData=False)
    quick.up()
    assert plain(quick.state.outputs)["slaves"]
