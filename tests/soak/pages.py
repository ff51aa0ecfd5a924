"""Prometheus and Alertmanager with their web pages, which Debian's builds and plain Go lack."""

from __future__ import annotations

import json
import os
import shutil

from sandbox import releases
from sandbox.host import SandboxError, kill_with_parent, run
from sandbox.releases import LocalRelease

# The last major version that runs on Node.js 20. https://pnpm.io/installation#compatibility
PNPM = "pnpm@10"
# The last one whose Go module holds its pages, already compiled. Later ones are compiled by Elm,
# whose packages come from nowhere but their own registry and GitHub.
ALERTMANAGER = "0.31.1"
MODULE = "github.com/prometheus/prometheus"
STAMP = "github.com/prometheus/common/version.Version"


def alertmanager() -> LocalRelease:
    """An older Alertmanager than the pinned one, with its pages."""
    programs = releases.go_build("alertmanager", ALERTMANAGER)
    return releases.add("alertmanager", ALERTMANAGER, programs, "built from its Go module")


def prometheus(version: str) -> LocalRelease:
    """A Prometheus with its pages, but without discovery in clouds; kept in the cache.

    Raises SandboxError where there is no Go or Node.js, or no module or package can be had.
    """
    folder = releases.RELEASES_DIR / f"built-prometheus-{version}-pages"
    if not folder.exists():
        if not shutil.which("npx"):
            raise SandboxError(
                "There is no Node.js to build Prometheus's pages.",
                "Install version 20 or later: https://nodejs.org/en/download",
            )
        work = folder.with_name(f"tmp-{folder.name}")
        shutil.rmtree(work, ignore_errors=True)
        module = f"{MODULE}@{releases.module_version('prometheus', version)}"
        told = json.loads(releases.go(releases.RELEASES_DIR, "mod", "download", "-json", module))
        source = work / "source"
        # The workspace names modules that are not in the archive of this one.
        without = shutil.ignore_patterns("go.work*")
        shutil.copytree(told["Dir"], source, ignore=without, copy_function=shutil.copyfile)
        ui = source / "web" / "ui"
        for folder_of, argv in (
            (ui, ["npx", "--yes", PNPM, "install", "--frozen-lockfile"]),
            (ui, ["npx", "--yes", PNPM, "run", "build:mantine-ui"]),
            (source, ["bash", "scripts/compress_assets.sh"]),
        ):
            wrapped = kill_with_parent(["env", "-C", folder_of, *argv])
            run(wrapped, env={**os.environ, "CI": ""}, timeout=1800)
        # Without discovery in clouds: their libraries take longer to compile than all the rest.
        build = ["build", "-trimpath", "-tags", "netgo,builtinassets,remove_all_sd"]
        build += ["-ldflags", f"-s -w -X {STAMP}={version}"]
        for program in ("prometheus", "promtool"):
            releases.go(source, *build, "-o", work / program, f"./cmd/{program}")
        shutil.rmtree(source)
        work.rename(folder)
    programs = {name: folder / name for name in ("prometheus", "promtool")}
    origin = "built from its Go module, with its pages"
    return releases.add("prometheus", f"{version}-pages", programs, origin)
