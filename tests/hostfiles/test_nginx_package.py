"""The version of nginx that settings name. That it gets there: tests/sandbox/test_5_upgrade.py."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest

from hostfiles import nginx, slave
from hostfiles.model import SlaveServer
from hostfiles.templates import FOLDER
from tests.hostfiles.conftest import Root


@pytest.mark.parametrize("version", [None, "1.26.3-3+deb13u7"])
def test_a_version_is_tried_before_it_is_installed_and_none_lets_go_of_it(
    slave_server: Callable[..., SlaveServer], version: str | None
) -> None:
    host = slave.host_files(slave_server(nginx_version=version))
    (unit,) = [f.content for f in host.files if f.path == nginx.PACKAGE_SERVICE]
    (start,) = [line for line in unit.splitlines() if line.startswith("ExecStart=")]
    assert start.endswith(f"/install-nginx {version}" if version else "/install-nginx")
    tried = [check.argv[-1] for check in host.checks if check.name == "nginx's package"]
    assert tried == ([version] if version else [])
    names = [unit.name for unit in host.units]
    assert names.index("nginx-package.service") < names.index("nginx.service")


# As unattended-upgrades does it.
LOCKED = """
import fcntl, sys, time
files = [open(f"/var/lib/dpkg/{name}", "w") for name in ("lock-frontend", "lock")]
for file in files:
    fcntl.lockf(file, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(float(sys.argv[1]))
"""
# Runs $2 with the lock in another's hand for $1 seconds.
WHILE_LOCKED = """
coproc python3 /srv/locked.py "$1"
read -r _ <&"${COPROC[0]}"
eval "$2"
told=$?
kill "$COPROC_PID"
exit $told
"""
NOTED = """#!/bin/sh
echo "${0##*/} $*" >>/stub/calls
"""


class Host:
    """A root with nginx and install-nginx in it, whose patience is two seconds."""

    def __init__(self, root: Root) -> None:
        self.root = root
        program = (FOLDER / "install-nginx").read_text()
        assert program.count("patience=120\n") == 1
        program = program.replace("patience=120\n", "patience=2\n")
        root.write("/usr/local/sbin/install-nginx", program, 0o755)
        root.write("/srv/locked.py", LOCKED)
        # There is no network, and nothing to install. All others are the real ones.
        root.write("/stub/apt-get", NOTED, 0o755)
        root.write("/stub/dpkg", f'{NOTED}exec /usr/bin/dpkg "$@"\n', 0o755)
        root.write("/stub/calls", "")
        self.version = self.script("dpkg-query -W -f '${Version}' nginx")

    def script(self, script: str) -> str:
        done = self.root.run(["sh", "-euc", script])
        assert done.returncode == 0, done.stderr
        return done.stdout

    def while_locked(self, seconds: int, command: str) -> subprocess.CompletedProcess[str]:
        self.root.write("/stub/calls", "")
        return self.root.run(["bash", "-c", WHILE_LOCKED, "locked", str(seconds), command])

    def calls(self, program: str) -> list[str]:
        lines = (self.root.upper / "stub/calls").read_text().splitlines()
        return [line for line in lines if line.startswith(program)]


@pytest.fixture
def host(tool_root: Root) -> Host:
    return Host(tool_root)


@pytest.mark.machines
def test_another_ones_lock_does_not_matter_where_there_is_nothing_to_do(host: Host) -> None:
    done = host.while_locked(60, "install-nginx")
    assert done.returncode == 0, done.stderr
    held = f"install-nginx {host.version}"
    assert "nginx set on hold" in host.script(held)
    done = host.while_locked(60, held)
    assert done.returncode == 0, done.stderr
    assert host.calls("apt-get") == []


@pytest.mark.machines
@pytest.mark.parametrize("version", ["1.0-other", ""])
def test_a_change_waits_for_another_ones_lock(host: Host, version: str) -> None:
    host.script("apt-mark hold nginx nginx-common")
    done = host.while_locked(1, f"install-nginx {version}")
    assert done.returncode == 0, done.stderr
    first, *others = host.calls("dpkg --configure")
    assert set(others) == {first}, "it was asked until it could"
    assert len(host.calls("apt-get")) == 1
    held = host.script("apt-mark showhold").split()
    assert held == (["nginx", "nginx-common"] if version else [])


@pytest.mark.machines
def test_a_lock_that_is_not_let_go_of_is_told_of_and_nothing_is_changed(host: Host) -> None:
    for command in ("install-nginx 1.0-other", f"install-nginx {host.version}"):
        done = host.while_locked(60, command)
        assert done.returncode == 1
        assert "another program changes packages here, for 2 s already" in done.stderr
        assert "with pid" in done.stderr, "whose it is"
        assert host.calls("apt-get") == []


@pytest.mark.machines
def test_what_a_killed_run_left_half_done_is_finished(host: Host) -> None:
    host.root.write("/stub/dpkg", f'{NOTED}[ "$1" = --configure ] || exec /usr/bin/dpkg "$@"\n')
    half = "s/^Status: install ok installed/Status: install ok half-configured/"
    host.script(f"chmod +x /stub/dpkg; sed -i '/^Package: nginx$/,/^$/{half}' /var/lib/dpkg/status")
    host.script("install-nginx")
    assert host.calls("dpkg --configure") == ["dpkg --configure -a"]


@pytest.mark.machines
def test_what_dpkg_says_of_anything_but_a_lock_is_told_at_once(host: Host) -> None:
    words = "package nginx is in a very bad inconsistent state"
    host.root.write("/stub/dpkg", f"{NOTED}echo {words} >&2; exit 1\n", 0o755)
    done = host.root.run(["install-nginx", "1.0-other"])
    assert done.returncode == 1
    assert done.stderr == f"{words}\n"
    assert len(host.calls("dpkg --configure")) == 1
