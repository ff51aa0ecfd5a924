"""The pinned Prometheus, built by Go, takes over an older one's data and gives it back."""

from __future__ import annotations

import time
from collections.abc import Callable

from sandbox import releases
from sandbox.releases import LocalRelease
from settings import RELEASES
from tests.sandbox.conftest import Sandbox
from tests.sandbox.test_5_upgrade import answers, longest_gaps, running, setting

LIMIT_SECONDS = 15


def build(version: str) -> LocalRelease:
    """A release as Go builds it."""
    programs = releases.go_build("prometheus", version)
    # Not under the official release's name: that one may be in the cache, too.
    return releases.add("prometheus", f"{version}-built", programs, "built from its Go module")


def test_another_prometheus_and_back(fresh: Sandbox, results: Callable[..., None]) -> None:
    sandbox = fresh
    release = build(RELEASES["prometheus"].version)
    sandbox.set(scrapeInterval="1s")
    sandbox.up()
    old = running(sandbox, "dublin", "prometheus")
    sandbox.wait('count_over_time(up{job="federate",site="dublin"}[60s]) >= 55', seconds=120)
    end = int(time.time()) - 5
    before = answers(sandbox, end - 45, end)
    rows: dict[str, str] = {}
    for chosen, wanted in (
        ({"prometheus": setting(release)}, f"prometheus-{release.version}"),
        ({}, old),
    ):
        since = time.time() - 5
        sandbox.set(releases=chosen)
        sandbox.up()
        time.sleep(5)
        assert running(sandbox, "dublin", "prometheus") == wanted
        assert running(sandbox, "master", "prometheus") == wanted
        assert answers(sandbox, end - 45, end) == before
        gaps = {
            what: max(longest_gaps(sandbox, server, since).values())
            for what, server in (("scraped", "dublin"), ("federated", "master"))
        }
        rows[f"longest time between two samples, to {wanted}"] = ", ".join(
            f"{what} {gap:.1f} s" for what, gap in gaps.items()
        )
        assert max(gaps.values()) < LIMIT_SECONDS
    rows["queries over the time before"] = "the same answers each time, on both servers"
    results(f"{old} to {release.version} and back", rows)
