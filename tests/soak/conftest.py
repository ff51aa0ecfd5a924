"""What is too slow for `make test`: run by `make soak`, its results added to docs/soak.md."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime

import pytest

from tests.sandbox.conftest import ROOT, Sandbox

RESULTS = ROOT / "docs" / "soak.md"


@contextlib.contextmanager
def own_sandbox() -> Iterator[Sandbox]:
    """A sandbox that is not up yet; gone at the end."""
    slot = int(os.environ.get("SANDBOX_TEST_SLOT", "1"))
    own = Sandbox.fresh(slot, ROOT / f".sandbox-test{slot}")
    own.run("down")
    try:
        yield own
    finally:
        own.run("down")


@pytest.fixture
def fresh() -> Iterator[Sandbox]:
    """A sandbox of a test's own."""
    with own_sandbox() as own:
        yield own


@pytest.fixture
def results() -> Callable[[str, Mapping[str, str]], None]:
    """Adds a table to docs/soak.md, with the day and the machine."""
    load = os.getloadavg()[0]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30

    def write(title: str, rows: Mapping[str, str]) -> None:
        lines = [
            f"\n## {title}, {datetime.now(UTC):%Y-%m-%d}\n",
            f"{os.cpu_count()} cores, {memory} GiB, Linux {platform.release()}, load {load:.1f} "
            "when it began.\n",
            "| | |\n|---|---|",
            *(f"| {what} | {value} |" for what, value in rows.items()),
        ]
        with RESULTS.open("a") as file:
            file.write("\n".join(lines) + "\n")

    return write


def timed(call: Callable[[], str]) -> tuple[float, str]:
    """How many seconds it took, and what it returned."""
    begin = time.monotonic()
    found = call()
    return time.monotonic() - begin, found
