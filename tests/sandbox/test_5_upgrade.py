"""Other releases come by one setting: with the data kept, and less than one scrape interval lost.

Prometheus: only one version that can be gone to and come back from is to be had as a package, so
its second release here is the same program under another version. That is a whole upgrade for
everything of ours (fetch, sum, stage, check, swap, restart, wait); what another Prometheus makes
of the data, `make soak` tries. node_exporter's two versions are real ones.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox import releases
from sandbox.progress import silent
from sandbox.releases import LocalRelease
from tests.sandbox.conftest import Sandbox, no_scrape_lost

# Short, so that a gap is seen to the second. Less than a user's interval must be lost.
INTERVAL_SECONDS = 1
USERS_INTERVAL_SECONDS = 15
# One that crashes is given a second chance before the old one is started again.
ROLLED_BACK_SECONDS = 30
FEDERATE = 'up{job="federate",site="dublin"}'
SCRAPED = 'up{job="CoreSystems"}'
SERVERS = ("master", "dublin")
QUERIES = ("up", "node_load1", 'rate(node_cpu_seconds_total{mode="idle"}[10s])', 'count({job!=""})')

# Passes every check, then dies or hangs: promtool is the one that is there already.
PROMTOOL = '#!/bin/sh\nexec /opt/releases/prometheus-{version}/promtool "$@"\n'
CRASHES = '#!/bin/sh\n[ "$1" != --version ] || exit 0\necho "panic: tested words" >&2\nexit 2\n'
HANGS = '#!/bin/sh\n[ "$1" != --version ] || exit 0\necho "still thinking"\nexec sleep 600\n'


@pytest.fixture(scope="module")
def every_second(sandbox: Sandbox) -> Iterator[Sandbox]:
    """The shared sandbox, scraping every second; its settings are put back at the end."""
    before = dict(sandbox.config)
    slaves = sandbox.get("slaves")
    for job in slaves[0]["jobs"]:
        job.pop("scrape_interval", None)
        job.pop("scrape_timeout", None)
    sandbox.set(slaves=slaves, scrapeInterval=f"{INTERVAL_SECONDS}s")
    sandbox.up("--no-verify")
    sandbox.wait(f"count_over_time({FEDERATE}[20s]) >= 19")
    yield sandbox
    sandbox.config = before
    sandbox.up("--no-verify")


@contextlib.contextmanager
def cached(release: LocalRelease) -> Iterator[dict[str, str]]:
    """A release in the cache for a while, as settings name it."""
    try:
        yield setting(release)
    finally:
        release.path.unlink()


def setting(release: LocalRelease) -> dict[str, str]:
    return {"version": release.version, "sha256": release.sha256, "url": release.url}


@pytest.fixture(scope="module")
def other_prometheus(every_second: Sandbox) -> Iterator[dict[str, str]]:
    programs = {name: releases.tool(name) for name in ("prometheus", "promtool")}
    origin = "the same program as the pinned one, under another version"
    with cached(releases.add("prometheus", "3.5.999", programs, origin)) as found:
        yield found


def running(sandbox: Sandbox, host: str, unit: str) -> str:
    """The release that a unit's process is of, as name and version."""
    path = sandbox.script(host, f"readlink /proc/$(systemctl show -P MainPID {unit})/exe")
    return path.strip().split("/")[3]


def answers(sandbox: Sandbox, start: float, end: float) -> dict[tuple[str, str], Any]:
    """What both servers answer of a time that has passed."""
    window = {"start": str(start), "end": str(end), "step": "1"}
    found = {
        (server, query): sandbox.own_api(server, "query_range", query=query, **window)["result"]
        for server in SERVERS
        for query in QUERIES
    }
    assert all(found.values()), "each has an answer"
    return found


def longest_gaps(sandbox: Sandbox, server: str, since: float) -> dict[str, float]:
    """Of each core host the longest time without a good scrape, as a server stored them.

    Until now: who is never scraped again has no gap between two scrapes.
    """
    now = time.time()
    query = f"{SCRAPED}[{int(now - since)}s]"
    gaps = {}
    for row in sandbox.own_api(server, "query", query=query)["result"]:
        good = [timestamp for timestamp, value in row["values"] if value == "1"]
        moments = itertools.pairwise([since, *good, now])
        gaps[row["metric"]["instance"]] = max(later - earlier for earlier, later in moments)
    assert gaps
    return gaps


@contextlib.contextmanager
def measured_gap(sandbox: Sandbox, what: str, limit: float) -> Iterator[None]:
    """What was stored before is the same afterwards, and no more time missing than `limit`."""
    end = int(time.time()) - 5
    before, since = answers(sandbox, end - 10, end), time.time() - 5
    yield
    # Until everything is scraped and federated again.
    time.sleep(5 * INTERVAL_SECONDS)
    assert answers(sandbox, end - 10, end) == before
    scraped = max(longest_gaps(sandbox, "dublin", since).values())
    federated = max(longest_gaps(sandbox, "master", since).values())
    print(f"{what}: {scraped:.1f} s between two scrapes, {federated:.1f} s between two federated")
    assert 0 < scraped < limit
    assert 0 < federated < limit


@contextlib.contextmanager
def untouched(sandbox: Sandbox) -> Iterator[None]:
    """Nothing was restarted meanwhile, and no scrape was lost."""
    before, since = sandbox.start_times(), time.time()
    yield
    time.sleep(2 * INTERVAL_SECONDS)
    no_scrape_lost(sandbox, FEDERATE, since - 2 * INTERVAL_SECONDS, INTERVAL_SECONDS)
    assert sandbox.start_times() == before


def assert_restarted_alone(sandbox: Sandbox, unit: str, before: dict[str, str]) -> None:
    """Of ours that unit was restarted since, on both servers, and nothing else anywhere."""
    after = sandbox.start_times()
    for host, told in before.items():
        units = dict(zip(told.split("\n\n"), after[host].split("\n\n"), strict=True))
        changed = [then for then, now in units.items() if then != now]
        assert len(changed) == (host in SERVERS), changed
        assert all(unit in then for then in changed)


def test_a_release_with_another_sum_is_refused_before_anything_changes(
    every_second: Sandbox, other_prometheus: dict[str, str]
) -> None:
    sandbox = every_second
    wrong = {**other_prometheus, "version": "3.5.998", "sha256": "0" * 64}
    sandbox.set(releases={"prometheus": wrong})
    with untouched(sandbox):
        printed = sandbox.refused()
    sandbox.set(releases={})
    assert "installing prometheus 3.5.998" in printed
    assert f"has sha256 {other_prometheus['sha256']}, expected {'0' * 64}" in printed
    assert "Nothing was changed." in printed
    assert "3.5.998" not in sandbox.script("dublin", "ls -A /opt/releases")


def fake(tmp_path: Path, sandbox: Sandbox, program: str) -> dict[str, Path]:
    """The programs of a release that is no Prometheus."""
    version = running(sandbox, "dublin", "prometheus").partition("-")[2]
    files = {"prometheus": program, "promtool": PROMTOOL.format(version=version)}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    return {name: tmp_path / name for name in files}


def test_a_release_that_crashes_at_its_start_is_rolled_back_with_its_own_words(
    every_second: Sandbox, tmp_path: Path
) -> None:
    sandbox = every_second
    before = running(sandbox, "dublin", "prometheus")
    programs = fake(tmp_path, sandbox, CRASHES)
    with cached(releases.add("prometheus", "3.5.997", programs, "for a test")) as release:
        sandbox.set(releases={"prometheus": release})
        with measured_gap(sandbox, "rolled back", ROLLED_BACK_SECONDS):
            printed = sandbox.refused()
    sandbox.set(releases={})
    assert "panic: tested words" in printed
    assert "The old configuration is back and serving." in printed
    for server in SERVERS:
        assert running(sandbox, server, "prometheus") == before
    sandbox.up("--no-verify")


def test_a_release_that_never_gets_ready_is_rolled_back(
    every_second: Sandbox, tmp_path: Path
) -> None:
    sandbox = every_second
    before = running(sandbox, "dublin", "prometheus")
    (record,) = [r for r in sandbox.state.records.values() if r.name == "slave-dublin-bundle"]
    bundle = json.loads(record.inputs["stdin"].value.replace(f"/{before}/", "/prometheus-3.5.996/"))
    bundle["releases"] = [r for r in bundle["releases"] if r["name"] != "prometheus"]
    # The user's patience is 180 seconds: a long log is read at the start.
    (unit,) = [unit for unit in bundle["units"] if unit["name"] == "prometheus.service"]
    unit["ready_seconds"] = 3
    for name, path in fake(tmp_path, sandbox, HANGS).items():
        file = f"/opt/releases/prometheus-3.5.996/{name}"
        sandbox.inside("dublin", "install", "-D", "/dev/stdin", file, stdin=path.read_text())
    with measured_gap(sandbox, "rolled back, not ready", ROLLED_BACK_SECONDS):
        told = sandbox.inside(
            "dublin", "/usr/local/sbin/apply-bundle", stdin=json.dumps(bundle), check=False
        )
    assert "prometheus.service does not get ready" in told
    assert "still thinking" in told
    assert "The old configuration is back and serving." in told
    assert running(sandbox, "dublin", "prometheus") == before
    sandbox.script("dublin", "rm -r /opt/releases/prometheus-3.5.996")


def test_prometheus_is_upgraded_by_one_setting_and_back_with_its_data(
    every_second: Sandbox, other_prometheus: dict[str, str]
) -> None:
    sandbox = every_second
    pinned = running(sandbox, "dublin", "prometheus")
    other = f"prometheus-{other_prometheus['version']}"
    for chosen, wanted in (({"prometheus": other_prometheus}, other), ({}, pinned)):
        before = sandbox.start_times()
        sandbox.set(releases=chosen)
        with measured_gap(sandbox, wanted, USERS_INTERVAL_SECONDS):
            printed = sandbox.up("--no-verify")
        assert "2 changed" in printed, "the two bundles"
        for server in SERVERS:
            assert running(sandbox, server, "prometheus") == wanted
        assert_restarted_alone(sandbox, "prometheus.service", before)
    # The one before is kept; what was tried in vain is gone.
    there = sandbox.script("dublin", "ls -A /opt/releases").split()
    assert [name for name in there if "prometheus" in name] == sorted([pinned, other])


def test_node_exporter_is_upgraded_everywhere_by_one_setting_and_back(
    every_second: Sandbox,
) -> None:
    sandbox = every_second
    hosts = [host["host"] for host in sandbox.get("slaves")[0]["jobs"][0]["hosts"]]
    names = [host.partition(".")[0] for host in hosts]
    everywhere = [*SERVERS, *names]
    pinned = running(sandbox, "core01", "node_exporter")

    other = releases.debian_build(silent, "node_exporter", "trixie")
    assert pinned != f"node_exporter-{other.version}"
    for chosen, version in (
        ({"nodeExporter": setting(other)}, other.version),
        ({}, pinned.partition("-")[2]),
    ):
        sandbox.set(releases=chosen)
        since = time.time()
        printed = sandbox.up("--no-verify")
        assert f"{2 + len(hosts)} changed" in printed
        # By its own word, as the master has it from the slave.
        told = f'count(node_exporter_build_info{{job="CoreSystems",version="{version}"}})'
        sandbox.wait(f"{told} == {len(hosts)}")
        time.sleep(2 * INTERVAL_SECONDS)
        gaps = longest_gaps(sandbox, "dublin", since)
        assert len(gaps) == len(hosts)
        print(f"node_exporter {version}:", {name: f"{gap:.1f} s" for name, gap in gaps.items()})
        # Of scrapes at a user's interval one at most is lost.
        assert max(gaps.values()) < USERS_INTERVAL_SECONDS
        for name in everywhere:
            assert running(sandbox, name, "node_exporter") == f"node_exporter-{version}"
    both = sorted([pinned, f"node_exporter-{other.version}"])
    for name in everywhere:
        there = sandbox.script(name, "ls -A /opt/releases").split()
        assert [release for release in there if "node_exporter" in release] == both
    for name in names:
        undo = json.loads(sandbox.inside(name, "cat", "/opt/federation/undo.json"))
        trees = [tree for tree in undo["trees"] if tree.startswith("/opt/releases/")]
        assert sorted(trees) == [f"/opt/releases/{release}" for release in both], "to be undone"


def nginx_package(sandbox: Sandbox, host: str) -> str:
    """The version of nginx's package. Its process is of the very file that lies there."""
    program = sandbox.script(host, "readlink /proc/$(systemctl show -P MainPID nginx)/exe")
    assert program == "/usr/sbin/nginx\n"
    return sandbox.script(host, "dpkg-query -W -f '${Version}' nginx")


@pytest.fixture(scope="module")
def nginx_versions(every_second: Sandbox) -> tuple[str, str]:
    """The newest and the oldest that the mirror has."""
    listed = every_second.script("dublin", "apt-cache madison nginx").splitlines()
    versions = [line.split("|")[1].strip() for line in listed]
    assert versions[0] != versions[-1], "a mirror with one version of nginx: nothing to go to"
    return versions[0], versions[-1]


def test_nginx_is_brought_to_a_version_by_one_setting_and_back(
    every_second: Sandbox, nginx_versions: tuple[str, str]
) -> None:
    sandbox = every_second
    newest, oldest = nginx_versions
    assert nginx_package(sandbox, "dublin") == newest
    for chosen, wanted, held in (
        ({"nginx": {"version": oldest}}, oldest, "nginx\nnginx-common\n"),
        ({}, newest, ""),
    ):
        before = sandbox.start_times()
        sandbox.set(releases=chosen)
        with measured_gap(sandbox, f"nginx {wanted}", USERS_INTERVAL_SECONDS):
            printed = sandbox.up("--no-verify")
        assert "2 changed" in printed, "the two bundles"
        assert_restarted_alone(sandbox, "nginx.service", before)
        for server in SERVERS:
            assert nginx_package(sandbox, server) == wanted
            assert sandbox.script(server, "apt-mark showhold") == held


def test_a_version_of_nginx_that_nobody_has_is_refused_before_anything_changes(
    every_second: Sandbox, nginx_versions: tuple[str, str]
) -> None:
    sandbox = every_second
    sandbox.set(releases={"nginx": {"version": "1.0-nowhere"}})
    before = sandbox.start_times()
    with measured_gap(sandbox, "nginx refused", USERS_INTERVAL_SECONDS):
        printed = sandbox.refused()
    sandbox.set(releases={})
    assert sandbox.start_times() == before
    assert "releases.nginx.version is 1.0-nowhere" in printed
    assert all(version in printed for version in nginx_versions), "what to choose from"
    assert "Nothing was changed." in printed
    sandbox.up("--no-verify")


def test_an_nginx_that_never_answers_gives_way_to_the_one_before(
    every_second: Sandbox, nginx_versions: tuple[str, str]
) -> None:
    sandbox = every_second
    newest, oldest = nginx_versions
    (record,) = [r for r in sandbox.state.records.values() if r.name == "slave-dublin-bundle"]
    bundle = json.loads(record.inputs["stdin"].value)
    (file,) = [f for f in bundle["files"] if f["path"].endswith("/nginx-package.service")]
    file["content"] = file["content"].replace("/install-nginx", f"/install-nginx {oldest}")
    (unit,) = [unit for unit in bundle["units"] if unit["name"] == "nginx.service"]
    unit |= {"ready": ["false"], "ready_seconds": 1}
    with measured_gap(sandbox, "nginx rolled back", ROLLED_BACK_SECONDS):
        told = sandbox.inside(
            "dublin", "/usr/local/sbin/apply-bundle", stdin=json.dumps(bundle), check=False
        )
    assert "nginx.service does not get ready" in told
    assert "The old configuration is back and serving." in told
    assert nginx_package(sandbox, "dublin") == newest
