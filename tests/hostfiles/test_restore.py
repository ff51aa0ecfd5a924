"""restore-data, killed before each program that it runs; with a real Prometheus: tests/sandbox."""

from __future__ import annotations

import pytest

from hostfiles.templates import FOLDER
from tests.hostfiles.conftest import Root

pytestmark = pytest.mark.machines

OLD = {"wal/1", "chunks_head/1", "01OLD/meta.json"}
NEW = {"01A/meta.json", "01B/meta.json"}
OTHERS = {"backups/one/01A/meta.json", "backups/one/01B/meta.json", "targets/a.yml"}
OTHERS |= {"letsencrypt/account", "lost+found/a", "snapshots/a"}
PROGRAMS = ("cp", "date", "flock", "mkdir", "mktemp", "mv", "rm", "touch")
# Ends whoever runs it, and all that they run, in the place of call number /stub/kill; else it does
# what it is called for. Prometheus's calls are noted, with the folder as they find it.
STUB = """#!/bin/bash
echo "$0" >>/stub/calls
[ "$(wc -l </stub/calls)" != "$(cat /stub/kill)" ] || kill -9 0
case $0 in
/stub/systemctl) echo "$* $([ -e /data/.restoring ] && echo refused)" >>/stub/systemd ;;
*) exec "/usr/bin/${0##*/}" "$@" ;;
esac
"""
SHOW = "cd /data; find . -type f -not -path './replaced/*' -printf '%P\\n'; "
KILLED = f"""
export PATH=/usr/local/sbin:/usr/bin:/bin
echo $1 >/stub/kill; rm -f /stub/calls
PATH=/stub:$PATH setsid --wait restore-data one >/dev/null 2>&1; echo $?
{SHOW} echo; echo 0 >/stub/kill; >/stub/systemd
PATH=/stub:$PATH restore-data one >/dev/null; echo $?
{SHOW} cat /stub/systemd; echo
cd replaced; find . -type f -not -path './*/01[AB]/*' -printf '%P\\n'
"""


@pytest.fixture
def root(tool_root: Root) -> Root:
    for name in (*PROGRAMS, "systemctl"):
        tool_root.write(f"/stub/{name}", STUB, 0o755)
    tool_root.write("/usr/local/sbin/restore-data", (FOLDER / "restore-data").read_text(), 0o755)
    return tool_root


def test_killed_before_any_program_it_runs_nothing_serves_half_and_the_next_run_finishes(
    root: Root,
) -> None:
    number, status = 0, "137"
    while status == "137":
        number += 1
        root.run(["rm", "-rf", "/data"])
        for name in OLD | OTHERS:
            root.write(f"/data/{name}", name)
        told = root.run(["/usr/bin/bash", "-c", KILLED, "killed", str(number)]).stdout
        meanwhile, after, replaced = (part.splitlines() for part in told.split("\n\n"))
        status, *there = meanwhile
        database = set(there) - OTHERS - {".restoring"}
        assert ".restoring" in there or database in (OLD, NEW), number
        assert set(there) >= OTHERS, "what is not Prometheus's stays where it is"
        finished, *there = after
        assert finished == "0", number
        *there, _, started = there
        assert started.strip() == "start prometheus.service prometheus-backup.timer"
        assert set(there) == NEW | OTHERS, number
        assert sorted(name.partition("/")[2] for name in replaced) == sorted(OLD), number
    assert status == "0", "it came to its end, and there was nothing more to be killed before"
    assert number > 12, "there is so much to do"


def test_a_second_one_at_once_is_refused(root: Root) -> None:
    root.write("/data/backups/one/01A/meta.json", "")
    script = "flock /run/lock/restore-data.lock sleep 2 & sleep 0.5; restore-data one"
    done = root.run(["sh", "-c", f"echo 0 >/stub/kill; {script}"])
    assert done.returncode == 1
    assert "another one is at work" in done.stderr
    assert not (root.upper / "stub/systemd").exists()
