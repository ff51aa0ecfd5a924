"""The pinned Prometheus, built by Go, takes over an older one's data and gives it back."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sandbox import releases
from sandbox.releases import RELEASES_DIR, LocalRelease
from settings import RELEASES
from tests.sandbox.conftest import Sandbox
from tests.sandbox.test_5_upgrade import answers, longest_gaps, running, setting

MODULE = "github.com/prometheus/prometheus"
LIMIT_SECONDS = 15


def build(version: str) -> LocalRelease:
    """A release as Go builds it, without the web pages; kept in the cache for the next time."""
    folder = RELEASES_DIR / f"built-prometheus-{version}"
    if not folder.exists():
        path = f"{os.environ['PATH']}:/usr/local/go/bin"
        if not shutil.which("go", path=path):
            pytest.fail("no Go toolchain: install one of https://go.dev/dl/ to /usr/local/go")
        work = folder.with_name(f"tmp-{folder.name}")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        # The module's versions are 0.<major><minor, two digits>.<patch>.
        major, minor, patch = version.split(".")
        stamp = f"-s -w -X github.com/prometheus/common/version.Version={version}"
        for argv in (
            ["go", "mod", "init", "built"],
            ["go", "get", f"{MODULE}@v0.{major}{int(minor):02}.{patch}"],
            *(
                ["go", "build", "-mod=mod", "-trimpath", "-ldflags", stamp, f"{MODULE}/cmd/{name}"]
                for name in ("prometheus", "promtool")
            ),
        ):
            env = {**os.environ, "PATH": path, "CGO_ENABLED": "0"}
            done = subprocess.run(
                argv, cwd=work, env=env, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr}"
        work.rename(folder)
    programs: dict[str, Path] = {name: folder / name for name in ("prometheus", "promtool")}
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
