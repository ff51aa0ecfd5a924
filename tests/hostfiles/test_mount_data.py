"""mount-data on a file in the place of the volume; with a real volume: tests/sandbox."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from hostfiles.templates import FOLDER
from tests.hostfiles.conftest import Root

pytestmark = pytest.mark.machines

VOLUME = "/srv/nvme-Amazon_Elastic_Block_Store_vol0abc"
# A file cannot be mounted without a loop device: it is only noted that it is.
STUBS = {
    "mountpoint": "[ -e /stub/mounted ]",
    "mount": "echo mount >>/stub/calls; touch /stub/mounted",
    "mkfs.ext4": 'echo mkfs >>/stub/calls; exec /usr/sbin/mkfs.ext4 "$@"',
}
USERS = "u prometheus -\nu alertmanager -\n"


class Host:
    """A root with mount-data in it, whose volume is a file."""

    def __init__(self, root: Root) -> None:
        self.root = root
        program = (FOLDER / "mount-data").read_text()
        for real, here in (("/dev/disk/by-id/", "/srv/"), ("[ -b ", "[ -f ")):
            assert program.count(real) == 1
            program = program.replace(real, here)
        root.write("/usr/local/sbin/mount-data", program, 0o755)
        for name, script in STUBS.items():
            self.stub(name, script)
        root.write("/etc/sysusers.d/federation.conf", USERS)
        self.script("systemd-sysusers")

    def stub(self, name: str, script: str) -> None:
        self.root.write(f"/stub/{name}", f"#!/bin/sh\n{script}\n", 0o755)

    def script(self, script: str) -> str:
        done = self.root.run(["sh", "-euc", script])
        assert done.returncode == 0, done.stderr
        return done.stdout

    def mount(self) -> subprocess.CompletedProcess[str]:
        self.root.write("/stub/calls", "")
        return self.root.run(["mount-data", "vol-0abc", "/data"])

    def boot(self) -> subprocess.CompletedProcess[str]:
        (self.root.upper / "stub/mounted").unlink(missing_ok=True)
        return self.mount()

    @property
    def calls(self) -> list[str]:
        return (self.root.upper / "stub/calls").read_text().split()

    @property
    def image(self) -> Path:
        return self.root.upper / VOLUME.lstrip("/")


@pytest.fixture
def host(tool_root: Root) -> Host:
    """Its volume is as EBS makes a new one."""
    host = Host(tool_root)
    host.script(f"truncate --size=64M {VOLUME}")
    return host


def test_a_new_volume_gets_a_file_system_once(host: Host) -> None:
    done = host.boot()
    assert done.returncode == 0, done.stderr
    assert host.calls == ["mkfs", "mount"]
    made = host.script(f"blkid --probe {VOLUME}")
    assert "ext4" in made
    assert host.boot().returncode == 0
    assert host.calls == ["mount"]
    assert host.script(f"blkid --probe {VOLUME}") == made, "its UUID too"


def test_a_file_system_that_blkid_does_not_see_is_left_as_it_is(host: Host) -> None:
    assert host.boot().returncode == 0
    made = host.image.read_bytes()
    # So it ends where a read fails.
    host.stub("blkid", "exit 2")
    done = host.boot()
    assert done.returncode == 1
    assert VOLUME in done.stderr
    assert "left as it is" in done.stderr
    assert host.calls == []
    assert host.image.read_bytes() == made


def test_a_volume_that_cannot_be_read_is_left_as_it_is(host: Host) -> None:
    # What every read of it answers with: I/O error.
    host.script(f"ln -sf /proc/self/mem {VOLUME}")
    told = host.root.run(["sh", "-c", f"blkid --probe {VOLUME}; echo $?; cat {VOLUME}"])
    assert told.stdout == "2\n", "blkid found nothing, and that is all it says"
    assert "Input/output error" in told.stderr
    done = host.boot()
    assert done.returncode == 1
    assert "left as it is" in done.stderr
    assert host.calls == []


def test_one_that_was_killed_while_it_made_the_file_system_is_finished(host: Host) -> None:
    # Parts of a file system, and no superblock yet: mkfs writes that last.
    half = f"printf half | dd of={VOLUME} bs=1 seek=8192 conv=notrunc status=none"
    host.stub("mkfs.ext4", f"{half}; kill -9 $PPID")
    assert host.boot().returncode != 0
    host.stub("mkfs.ext4", STUBS["mkfs.ext4"])
    done = host.boot()
    assert done.returncode == 0, done.stderr
    assert host.calls == ["mkfs", "mount"]
    # Now there are data: never again.
    host.script(f"truncate --size=0 {VOLUME}; truncate --size=64M {VOLUME}; {half}")
    assert host.boot().returncode == 1
    assert host.calls == []


def test_a_volume_that_grew_has_its_file_system_grown(host: Host) -> None:
    assert host.boot().returncode == 0
    host.script(f"truncate --size=96M {VOLUME}")
    done = host.mount()
    assert done.returncode == 0
    assert done.stderr == "", "what goes well is no news"
    blocks = host.script(f"dumpe2fs -h {VOLUME} 2>/dev/null | grep '^Block'")
    sizes = {name: int(value) for name, value in (line.split(":") for line in blocks.splitlines())}
    assert sizes["Block count"] * sizes["Block size"] == 96 << 20


def test_one_that_does_not_grow_stops_no_boot_and_fails_a_delivery_with_its_words(
    host: Host,
) -> None:
    assert host.boot().returncode == 0
    host.stub("resize2fs", "echo 'Please run e2fsck' >&2; exit 1")
    for run, status in ((host.boot, 0), (host.mount, 1)):
        host.script("rm -rf /data/*; chown root /data")
        done = run()
        assert done.returncode == status
        assert "does not grow: Please run e2fsck" in done.stderr
        assert VOLUME in done.stderr
        shown = host.script("stat -c %U:%a /data /data/alertmanager").split()
        assert shown == ["prometheus:750", "alertmanager:750"], "all else is done"


# As an instance left it whose users had other numbers: each one's first number, and what is whose.
OLD_USERS = {"prometheus": 901, "alertmanager": 902, "certbot": 903}
LEFT = {
    "wal/1": "prometheus",
    "chunks_head/1": "prometheus",
    "01A/chunks/1": "prometheus",
    "backups/one/01A/chunks/1": "prometheus",
    "alertmanager/silences": "alertmanager",
    "letsencrypt/account": "certbot",
    "lost+found/1": "root",
    "targets/a.yml": "root:prometheus",
}
# prometheus and alertmanager have numbers here, certbot has none.
MINE = LEFT | {"letsencrypt/account": "903"}


def leave(host: Host) -> None:
    """A volume that comes from such an instance."""
    host.script("rm -rf /data")
    for name, owner in LEFT.items():
        user, _, group = owner.partition(":")
        host.root.write(f"/data/{name}", name, 0o640)
        numbers = [str(OLD_USERS.get(one, 0)) for one in (user, group or user)]
        host.script(f"chown {':'.join(numbers)} /data/{name} /data/{name.split('/')[0]}")
    host.script("chown 901:901 /data /data/01A/chunks && chmod 0700 /data/01A/chunks")


def owners(host: Host) -> dict[str, str]:
    """Whose each file is, by name, and by number where no user of this host has it."""
    shown = host.script("cd /data && find . -type f -printf '%P %u %g\\n'")
    rows = [line.split() for line in shown.splitlines()]
    return {name: user if user == group else f"{user}:{group}" for name, user, group in rows}


def test_files_of_an_instance_whose_users_had_other_numbers_are_their_users_again(
    host: Host,
) -> None:
    leave(host)
    assert owners(host) != MINE
    assert host.boot().returncode == 0
    assert owners(host) == MINE
    shown = host.script("cd /data && stat -c '%U:%G %a' . targets 01A/chunks wal")
    assert shown.split("\n")[:-1] == [
        "prometheus:prometheus 750",
        "root:prometheus 750",
        "prometheus:prometheus 700",
        "prometheus:prometheus 755",
    ]


def test_a_database_with_other_numbers_under_a_mountpoint_that_is_right_is_put_right(
    host: Host,
) -> None:
    # So they lie where this program had taken the mountpoint alone.
    leave(host)
    host.script("chown prometheus:prometheus /data")
    assert host.boot().returncode == 0
    assert owners(host) == MINE


def test_a_database_that_is_prometheus_already_is_not_walked_through(host: Host) -> None:
    leave(host)
    assert host.boot().returncode == 0
    host.stub("find", "exit 1")
    done = host.boot()
    assert done.returncode == 0, done.stderr


def test_killed_before_any_program_it_runs_the_next_run_finishes(host: Host) -> None:
    # Killed in the middle of the database, what it looks at first is done already.
    middle = (
        'case "$0 $*" in *chown*wal*) /usr/bin/chown -R prometheus:prometheus /data/wal ;; esac'
    )
    for name in ("chgrp", "chmod", "chown", "find", "install", "mkdir", "stat"):
        host.stub(
            name,
            "echo >>/stub/count\n"
            f'[ "$(wc -l </stub/count)" != "$(cat /stub/kill)" ] || {{ {middle}; kill -9 0; }}\n'
            f'exec /usr/bin/{name} "$@"',
        )
    number, status = 0, "137"
    while status == "137":
        number += 1
        host.root.write("/stub/kill", "0")
        leave(host)
        host.script("chown prometheus: /data; rm -f /stub/count /stub/mounted")
        host.root.write("/stub/kill", str(number))
        told = host.root.run(
            ["bash", "-c", "setsid --wait mount-data vol-0abc /data; echo $?"]
        ).stdout
        status = told.strip()
        host.root.write("/stub/kill", "0")
        assert host.boot().returncode == 0
        assert owners(host) == MINE, number
    assert status == "0", "it came to its end, and there was nothing more to be killed before"
    assert number > 8, "there is so much to do"
