"""count-refusals, with a journal that the test writes."""

from __future__ import annotations

import json

import pytest

from hostfiles.templates import FOLDER
from hostfiles.watch import METRICS, PROGRAM
from tests.hostfiles.conftest import Root

pytestmark = pytest.mark.machines

# Prints the lines after the cursor, which is their number, as journalctl does.
JOURNALCTL = """#!/bin/sh
after=0
for argument; do case "$argument" in --after-cursor=*) after=${argument#*=} ;; esac; done
[ ! -e /stub/broken ] || exit 1
tail -n +$((after + 1)) /stub/journal
echo "-- cursor: $(wc -l </stub/journal)"
"""


@pytest.fixture
def host(tool_root: Root) -> Root:
    tool_root.write("/stub/journalctl", JOURNALCTL, 0o755)
    tool_root.write(PROGRAM, (FOLDER / "count-refusals").read_text(), 0o755)
    tool_root.write(f"{METRICS}/none", "")
    return tool_root


def log(host: Root, *statuses: int) -> None:
    """What is in the journal from now on."""
    lines = [json.dumps({"path": '/a "401"', "status": status}) + "\n" for status in statuses]
    host.write("/stub/journal", "".join(lines))


def counted(host: Root) -> dict[str, int]:
    done = host.run([PROGRAM])
    assert done.returncode == 0, done.stderr
    lines = host.run(["cat", f"{METRICS}/refusals.prom"]).stdout.splitlines()
    assert lines[1] == "# TYPE federation_refused_requests_total counter"
    pairs = (line.rsplit(" ", 1) for line in lines[2:])
    return {name.split('"')[1]: int(value) for name, value in pairs}


def test_refusals_are_counted_once_each_and_from_zero(host: Root) -> None:
    log(host)
    assert counted(host) == {"401": 0, "403": 0, "429": 0}
    log(host, 200, 401, 403, 401, 429, 404)
    assert counted(host) == {"401": 2, "403": 1, "429": 1}
    assert counted(host) == {"401": 2, "403": 1, "429": 1}
    log(host, 200, 401, 403, 401, 429, 404, 429)
    assert counted(host) == {"401": 2, "403": 1, "429": 2}


def test_what_is_no_line_of_the_access_log_counts_for_nothing(host: Root) -> None:
    host.write("/stub/journal", '{"status": 401}\n{"status": 40\n401\n{"path": 401}\n[401]\n')
    assert counted(host) == {"401": 1, "403": 0, "429": 0}


def test_bytes_that_are_no_text_do_not_end_the_count(host: Root) -> None:
    # What nginx logs of the path /%C0.
    host.write(
        "/stub/journalctl",
        JOURNALCTL + 'printf \'{"path": "/\\300", "status": 403}\\n\'\n',
        0o755,
    )
    log(host, 401)
    assert counted(host) == {"401": 1, "403": 1, "429": 0}


def test_a_journal_that_cannot_be_read_is_an_error_and_loses_nothing(host: Root) -> None:
    log(host, 401)
    assert counted(host)["401"] == 1
    log(host, 401, 401)
    host.write("/stub/broken", "")
    assert host.run([PROGRAM]).returncode != 0
    (host.upper / "stub/broken").unlink()
    assert counted(host)["401"] == 2
