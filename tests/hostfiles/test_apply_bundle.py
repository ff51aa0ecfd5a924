"""apply-bundle on a small bundle, with a systemctl that notes its calls.

Its steps with real services are shown on booted machines (tests/sandbox).
"""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from hostfiles.templates import FOLDER
from tests.hostfiles.conftest import Root

pytestmark = pytest.mark.machines

SYSTEMCTL = """#!/bin/sh
echo "$*" >>/stub/calls
case "$1" in
show) echo 0 ;;
is-active) [ -e "/stub/active/$3" ] || exit 3 ;;
restart | start) touch "/stub/active/$2" ;;
stop) rm "/stub/active/$2" 2>/dev/null || { echo "Unit $2 not loaded." >&2; exit 5; } ;;
esac
[ "$(cat /stub/fail 2>/dev/null)" != "$1 $2" ] || { echo "the unit's own words" >&2; exit 1; }
[ "$(cat /stub/kill 2>/dev/null)" != "$1 $2" ] || { rm /stub/kill; kill -9 $PPID; }
exit 0
"""


VERBS = {"restart", "reload", "start", "stop"}


class Host:
    """A root with apply-bundle and the stub in it."""

    def __init__(self, root: Root) -> None:
        self.root = root
        root.write("/stub/systemctl", SYSTEMCTL, 0o755)
        root.write("/stub/active/none", "")
        program = (FOLDER / "apply-bundle").read_text()
        root.write("/usr/local/sbin/apply-bundle", program, 0o755)

    def apply(self, bundle: dict[str, Any] | str) -> subprocess.CompletedProcess[str]:
        self.root.write("/stub/calls", "")
        text = bundle if isinstance(bundle, str) else json.dumps(bundle)
        return self.root.run(["/usr/local/sbin/apply-bundle"], stdin=text)

    def on(self, event: str, call: str) -> None:
        """Lets the stub fail, or kill its caller, at that call."""
        self.root.write(f"/stub/{event}", call)

    def off(self, event: str) -> None:
        (self.root.upper / "stub" / event).unlink()

    @property
    def calls(self) -> list[str]:
        """What systemctl was asked to do."""
        lines = (self.root.upper / "stub/calls").read_text().splitlines()
        return [line for line in lines if line.split()[0] in VERBS]

    def cat(self, path: str) -> str:
        return self.root.run(["cat", path]).stdout

    def trees(self) -> list[str]:
        return self.root.run(["ls", "/opt/federation/trees"]).stdout.split()


def bundle(**contents: str) -> dict[str, Any]:
    """A bundle of files /etc/demo/<name>; a.service restarts on `a`, reloads on the others."""
    return {
        "format": 1,
        "files": [
            {
                "path": f"/etc/demo/{name}",
                "content": content,
                "owner": "root",
                "group": "root",
                "mode": 0o640,
                "secret": True,
            }
            for name, content in sorted(contents.items())
        ],
        "checks": [{"name": "demo", "argv": ["grep", "-q", "good", "{tree}/etc/demo/a"]}],
        "units": [
            {
                "name": name,
                "restart_on": restart_on,
                "reload_on": ["/etc/demo/"],
                "ready": [],
                "ready_seconds": 1,
            }
            for name, restart_on in (("a.service", ["/etc/demo/a"]), ("b.service", []))
        ],
        "releases": [],
    }


@pytest.fixture
def host(tool_root: Root) -> Host:
    return Host(tool_root)


@pytest.fixture
def applied(host: Host) -> Host:
    done = host.apply(bundle(a="good 1", b="1"))
    assert done.returncode == 0, done.stderr
    return host


def test_the_first_bundle_starts_every_unit_and_links_every_file(applied: Host) -> None:
    assert applied.calls == ["restart a.service", "start b.service"]
    link = applied.root.run(["readlink", "/etc/demo/a"]).stdout.strip()
    assert link == "/opt/federation/current/etc/demo/a"
    assert applied.cat("/etc/demo/a") == "good 1"


def test_the_same_bundle_again_touches_nothing(applied: Host) -> None:
    done = applied.apply(bundle(a="good 1", b="1"))
    assert (done.returncode, done.stdout) == (0, "no changes\n")
    assert applied.calls == []


def test_a_unit_that_is_down_is_started_by_the_same_bundle(applied: Host) -> None:
    (applied.root.upper / "stub/active/b.service").unlink()
    done = applied.apply(bundle(a="good 1", b="1"))
    assert (done.returncode, done.stdout) == (0, "started b.service\n")


def test_a_changed_file_reloads_what_reads_it_and_restarts_nothing(applied: Host) -> None:
    done = applied.apply(bundle(a="good 1", b="2"))
    assert done.stdout == "changed /etc/demo/b\nreloaded a.service\nreloaded b.service\n"
    assert len(applied.trees()) == 1


def test_content_is_never_printed(host: Host) -> None:
    for text in ("good CANARY", "bad CANARY"):
        done = host.apply(bundle(a=text))
        assert "CANARY" not in done.stdout + done.stderr


def test_a_refused_bundle_changes_nothing(applied: Host) -> None:
    done = applied.apply(bundle(a="bad", b="2"))
    assert done.returncode == 1
    assert "checking demo" in done.stderr
    assert "Nothing was changed." in done.stderr
    assert applied.calls == []
    assert applied.cat("/etc/demo/b") == "1"
    assert len(applied.trees()) == 1


def test_a_key_that_is_not_its_certificates_is_refused(
    applied: Host, leaves: dict[str, Any]
) -> None:
    one, other = leaves.values()
    pair = {"x.crt": one.certificate, "x.key": other.key}
    done = applied.apply(bundle(a="good 1", b="1", **pair))
    assert done.returncode == 1
    assert "/etc/demo/x.crt and its key match" in done.stderr
    done = applied.apply(bundle(a="good 1", b="1", **{**pair, "x.key": one.key}))
    assert done.returncode == 0, done.stderr


def test_a_unit_that_does_not_take_it_brings_the_old_files_back(applied: Host) -> None:
    applied.on("fail", "reload b.service")
    done = applied.apply(bundle(a="good 1", b="2", c="new"))
    assert done.returncode == 1
    assert "systemctl reload b.service: the unit's own words" in done.stderr
    assert applied.cat("/etc/demo/b") == "1"
    assert applied.root.run(["test", "-e", "/etc/demo/c"]).returncode == 1
    applied.off("fail")
    done = applied.apply(bundle(a="good 1", b="1"))
    assert done.returncode == 0, done.stderr
    assert len(applied.trees()) == 1


def test_a_removed_file_is_gone(applied: Host) -> None:
    done = applied.apply(bundle(a="good 1"))
    assert "removed /etc/demo/b" in done.stdout
    assert applied.root.run(["test", "-L", "/etc/demo/b"]).returncode == 1


def test_a_unit_that_left_the_bundle_is_stopped_and_comes_back_with_the_old_files(
    applied: Host,
) -> None:
    less = bundle(a="good 1", b="2")
    del less["units"][0]
    applied.on("fail", "reload b.service")
    assert applied.apply(less).returncode == 1
    assert applied.calls[:3] == ["stop a.service", "reload b.service", "restart a.service"]
    applied.off("fail")
    # Killed before it noted that the unit is stopped: systemd knows it no more.
    applied.on("kill", "stop a.service")
    assert applied.apply(less).returncode != 0
    done = applied.apply(less)
    assert done.returncode == 0, done.stderr
    assert "stop a.service" not in applied.calls
    assert applied.apply(less).stdout == "no changes\n"
    assert applied.apply(bundle(a="good 1", b="2")).returncode == 0
    assert "restart a.service" in applied.calls


# Python runs it before any program: the process ends before its change number so much.
DIE = """
import os, sys

CHANGES = {"os.rename", "os.symlink", "os.remove", "os.mkdir", "os.chmod", "os.chown", "os.utime"}
count = 0

def before(event, arguments):
    global count
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_ACCMODE
    if event in CHANGES | {"subprocess.Popen", "os.rmdir", "shutil.rmtree"} or writes:
        count += 1
        if count == NUMBER:
            os.kill(os.getpid(), 9)

if "/usr/local/sbin/apply-bundle" in sys.orig_argv:
    sys.addaudithook(before)
"""
DIE_AT = "/usr/local/lib/python3.13/dist-packages/die"
# Killed, what was in force; finished, what is; and once more.
KILLED = """
: >/stub/calls
apply-bundle </stub/bundle >/dev/null 2>&1; echo $?
cat /etc/demo/b /etc/demo/c; echo
rm /usr/local/lib/python3.13/dist-packages/die.pth
apply-bundle </stub/bundle >/dev/null; echo $?
cat /etc/demo/b /etc/demo/c; echo
ls -A /opt/federation/trees | wc -l
grep -o 'reload [ab].service' /stub/calls | sort -u
apply-bundle </stub/bundle
"""


def test_killed_before_any_of_its_changes_it_is_whole_and_the_next_run_finishes(
    applied: Host,
) -> None:
    assert applied.apply(bundle(a="good 1", b="0", c="0")).returncode == 0
    number, status = 0, "137"
    while status == "137":
        number += 1
        applied.root.write(f"{DIE_AT}.pth", "import die\n")
        applied.root.write(f"{DIE_AT}.py", DIE.replace("NUMBER", str(number)))
        old, new = f"{number - 1}", f"{number}"
        applied.root.write("/stub/bundle", json.dumps(bundle(a="good 1", b=new, c=new)))
        told = applied.root.run(["sh", "-c", KILLED]).stdout.splitlines()
        status, meanwhile = told[:2]
        assert meanwhile in (old * 2, new * 2), number
        reloaded = ["reload a.service", "reload b.service"]
        assert told[2:] == ["0", new * 2, "1", *reloaded, "no changes"], number
    assert status == "0", "it came to its end, and there was nothing more to be killed before"
    assert number > 30, "there is so much to do"


def test_killed_in_the_middle_a_refused_bundle_goes_back_to_the_last_whole_one(
    applied: Host,
) -> None:
    applied.on("kill", "reload b.service")
    assert applied.apply(bundle(a="good 1", b="2")).returncode != 0
    done = applied.apply(bundle(a="bad", b="3"))
    assert done.returncode == 1
    assert "The old configuration is back and serving." in done.stderr
    assert applied.cat("/etc/demo/b") == "1"
    assert applied.calls == ["reload a.service", "reload b.service"]


FULL = """
mount -t tmpfs -o size=256k none /opt/federation
deliver() { apply-bundle <"/stub/$1" >/dev/null; echo $?; }
deliver good
[ -z "$1" ] || { echo "$1" >/stub/kill; deliver next; }
deliver big
cat /etc/demo/b; echo
ls -A /opt/federation/trees | wc -l
deliver next
cat /etc/demo/b; echo
umount /opt/federation
"""


@pytest.mark.parametrize(
    ("killed_at", "statuses", "words"),
    [
        ("", ["0"], "Nothing was changed."),
        ("reload b.service", ["0", "137"], "The old configuration is back and serving."),
    ],
)
def test_a_full_disk_is_told_of_and_changes_nothing(
    host: Host, killed_at: str, statuses: list[str], words: str
) -> None:
    bundles = {
        "good": bundle(a="good 1", b="1"),
        "next": bundle(a="good 1", b="2"),
        "big": bundle(a="good 1", b="3", c="c" * 1_000_000),
    }
    host.root.write("/opt/federation/none", "")
    for name, content in bundles.items():
        host.root.write(f"/stub/{name}", json.dumps(content))
    done = host.root.run(["sh", "-c", FULL, "full", killed_at])
    disk = "writing to the disk of /opt/federation: [Errno 28] No space left on device"
    assert f"apply-bundle: {disk}\n{words}\n" in done.stderr
    assert done.stdout.split() == [*statuses, "1", "1", "1", "0", "2"]


def test_a_state_that_cannot_be_written_before_the_swap_changes_nothing(applied: Host) -> None:
    applied.root.run(["mkdir", "/opt/federation/state.json.new"])
    done = applied.apply(bundle(a="good 1", b="2"))
    assert done.returncode == 1
    assert "state.json.new" in done.stderr
    assert "Nothing was changed." in done.stderr
    assert applied.cat("/etc/demo/b") == "1"
    assert len(applied.trees()) == 1
    assert applied.calls == []


def test_what_somebody_changed_on_the_host_is_put_right(applied: Host) -> None:
    applied.root.run(["sh", "-c", "echo odd >>/etc/demo/b"])
    done = applied.apply(bundle(a="good 1", b="1"))
    assert done.stdout == "repaired /etc/demo/b\nreloaded a.service\nreloaded b.service\n"
    assert applied.cat("/etc/demo/b") == "1"
    applied.root.run(["sh", "-c", "rm /etc/demo/b; echo odd >/etc/demo/b"])
    assert "repaired /etc/demo/b" in applied.apply(bundle(a="good 1", b="1")).stdout
    assert applied.apply(bundle(a="good 1", b="1")).stdout == "no changes\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"format": 1, "files": [', "cut off or no JSON"),
        ("", "cut off or no JSON"),
        ('{"format": 2}', "format is 2"),
        ('{"format": 1, "files": [{"path": "/etc/../x/y"}]}', "absolute, plain path"),
        ('{"format": 1, "files": [{"path": "etc/x/y"}]}', "absolute, plain path"),
    ],
)
def test_a_bundle_that_is_none_is_refused(host: Host, text: str, words: str) -> None:
    done = host.apply(text)
    assert done.returncode == 1
    assert words in done.stderr


def test_an_owner_who_does_not_exist_is_named(host: Host) -> None:
    wrong = bundle(a="good")
    wrong["files"][0]["group"] = "nobodys"
    done = host.apply(wrong)
    assert done.returncode == 1
    assert "nobodys" in done.stderr


def test_a_second_run_waits_for_the_first(applied: Host) -> None:
    # The lock is a file of the host: one root for both.
    script = (
        "flock /run/lock/apply-bundle.lock sleep 1 & sleep 0.3; exec apply-bundle </stub/bundle"
    )
    applied.root.write("/stub/bundle", json.dumps(bundle(a="good 1", b="2")))
    applied.root.write("/stub/calls", "")
    done = applied.root.run(["sh", "-c", script])
    assert done.returncode == 0, done.stderr
    assert "changed /etc/demo/b" in done.stdout


def test_a_second_run_that_has_waited_long_enough_is_refused_by_the_name_of_the_first(
    applied: Host,
) -> None:
    patient = (FOLDER / "apply-bundle").read_text()
    assert patient.count("LOCK_SECONDS = 300\n") == 1
    program = patient.replace("LOCK_SECONDS = 300\n", "LOCK_SECONDS = 1\n")
    applied.root.write("/usr/local/sbin/apply-bundle", program, 0o755)
    applied.root.write("/stub/bundle", json.dumps(bundle(a="good 1", b="2")))
    applied.root.write("/stub/a-bundle", json.dumps(bundle(a="good 1", b="3")))
    # The first waits in what it runs.
    applied.root.write("/stub/grep", "#!/bin/sh\nsleep 4\n", 0o755)
    script = (
        "apply-bundle </stub/a-bundle & echo $!; sleep 1; apply-bundle </stub/bundle; echo $?; wait"
    )
    done = applied.root.run(["sh", "-c", script])
    first, status, *_ = done.stdout.split()
    assert status == "1"
    assert f"process {first} is applying a bundle already" in done.stderr
    assert applied.cat("/etc/demo/b") == "3"


def released(*versions: str, a: str = "good 1") -> dict[str, Any]:
    """A bundle whose program `demo` is of the last of these versions."""
    release = {"name": "demo", "version": versions[-1], "url": "file:///none", "sha256": "0"}
    return bundle(a=a, b=versions[-1]) | {"releases": [release]}


def test_of_each_program_the_release_before_is_kept_and_older_ones_are_removed(
    host: Host,
) -> None:
    host.root.write(
        "/stub/install-release", "#!/bin/sh\nexec mkdir -p /opt/releases/$1-$2\n", 0o755
    )
    # Somebody else's.
    host.root.write("/opt/releases/demo-0/program", "")

    def there() -> list[str]:
        names = host.root.run(["ls", "-A", "/opt/releases"]).stdout.split()
        return [name for name in names if "demo-" in name]

    for version in ("1", "2"):
        assert host.apply(released(version)).returncode == 0
    assert there() == ["demo-0", "demo-1", "demo-2"]
    # One that was refused stays until another was taken, and is not the one before.
    assert host.apply(released("3", a="bad")).returncode == 1
    assert there() == ["demo-0", "demo-1", "demo-2", "demo-3"]
    assert host.apply(released("4")).returncode == 0
    assert there() == ["demo-0", "demo-2", "demo-4"]
    # Back: the one before is there already.
    assert host.apply(released("2")).returncode == 0
    assert there() == ["demo-0", "demo-2", "demo-4"]


def test_a_release_that_cannot_be_had_changes_nothing(applied: Host) -> None:
    words = "its sum is another"
    applied.root.write("/stub/install-release", f"#!/bin/sh\necho {words} >&2\nexit 1\n", 0o755)
    done = applied.apply(released("2"))
    assert done.returncode == 1
    assert done.stderr == f"apply-bundle: installing demo 2: {words}\nNothing was changed.\n"
    assert applied.cat("/etc/demo/b") == "1"
    assert applied.calls == []


def checked(host: Host) -> tuple[str, dict[str, str]]:
    """What `--check` prints, and the metrics that it writes."""
    done = host.root.run(["/usr/local/sbin/apply-bundle", "--check", "/run/bundle.prom"])
    assert done.returncode == 0, done.stderr
    lines = [line for line in host.cat("/run/bundle.prom").splitlines() if line[0] != "#"]
    return done.stdout, dict(line.rsplit(" ", 1) for line in lines)


def test_a_check_tells_what_somebody_changed_and_touches_nothing(applied: Host) -> None:
    printed, metrics = checked(applied)
    assert printed == ""
    assert metrics["federation_bundle_changed_files"] == "0"
    assert metrics["federation_bundle_unfinished"] == "0"
    applied.root.run(["sh", "-c", "echo more >>/etc/demo/a; rm /etc/demo/b; echo 1 >/etc/demo/b"])
    printed, metrics = checked(applied)
    assert printed == "not as delivered: /etc/demo/a\nnot as delivered: /etc/demo/b\n"
    assert metrics["federation_bundle_changed_files"] == "2"
    assert applied.cat("/etc/demo/a") == "good 1more\n"
    assert applied.apply(bundle(a="good 1", b="1")).returncode == 0
    assert checked(applied)[1]["federation_bundle_changed_files"] == "0"


def test_a_check_tells_of_a_delivery_that_was_killed(applied: Host) -> None:
    applied.on("kill", "restart a.service")
    assert applied.apply(bundle(a="good 2", b="2")).returncode != 0
    assert checked(applied)[1]["federation_bundle_unfinished"] == "1"
    assert applied.apply(bundle(a="good 2", b="2")).returncode == 0
    assert checked(applied)[1]["federation_bundle_unfinished"] == "0"


def test_a_check_of_a_host_without_bundle_fails(host: Host) -> None:
    done = host.root.run(["/usr/local/sbin/apply-bundle", "--check", "/run/bundle.prom"])
    assert done.returncode == 1
    assert "no bundle here" in done.stderr
