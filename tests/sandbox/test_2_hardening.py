"""The operating system under it all: SSH, the journal, security updates."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hostfiles import system
from tests.sandbox.conftest import Sandbox

SERVERS = ("master", "dublin")

# What is left of OpenSSH 10's own lists, by the names that it has in the protocol. Names that
# begin with `ext-` or `kex-` are no algorithms.
OFFERED = {
    "KEX algorithms": {
        "mlkem768x25519-sha256",
        "sntrup761x25519-sha512",
        "sntrup761x25519-sha512@openssh.com",
        "curve25519-sha256",
        "curve25519-sha256@libssh.org",
    },
    "host key algorithms": {"ssh-ed25519"},
    "ciphers stoc": {
        "chacha20-poly1305@openssh.com",
        "aes256-gcm@openssh.com",
        "aes128-gcm@openssh.com",
    },
    "MACs stoc": {"hmac-sha2-512-etm@openssh.com", "hmac-sha2-256-etm@openssh.com"},
    "compression stoc": {"none"},
}
WEAK = (
    ("KexAlgorithms", "diffie-hellman-group14-sha256", "no matching key exchange method"),
    ("HostKeyAlgorithms", "rsa-sha2-512", "no matching host key type"),
    ("Ciphers", "aes128-ctr", "no matching cipher"),
)


def ssh(
    sandbox: Sandbox,
    server: str,
    *options: str,
    command: str = "true",
    key: Path | None = None,
    under: tuple[str, ...] = (),
) -> str:
    """What an operator's ssh says (run by another program), or that of who has another key."""
    folder = sandbox.plan.state_dir / "outputs"
    shown = str(key or folder / "operator.key")
    argv = [*under, "ssh", "-F", "none", "-i", shown, "-o", "IdentitiesOnly=yes"]
    argv += ["-o", f"UserKnownHostsFile={folder / 'known_hosts'}", "-o", "BatchMode=yes"]
    argv += [*options, f"admin@{sandbox.public_ip(server)}", *([command] if command else [])]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout + done.stderr


@pytest.mark.parametrize("server", SERVERS)
def test_ssh_offers_the_algorithms_of_today_and_no_other(sandbox: Sandbox, server: str) -> None:
    told = ssh(sandbox, server, "-vv").partition("peer server KEXINIT proposal")[2]
    offered = dict(re.findall(r"^debug2: ([^:]+): (\S+)", told, re.MULTILINE))
    for kind, wanted in OFFERED.items():
        names = {n for n in offered[kind].split(",") if not n.startswith(("ext-", "kex-"))}
        assert names == wanted
        both = kind.replace("stoc", "ctos")
        assert offered[both] == offered[kind]


# Of what listens there, so that a shut port is not taken for a refusal.
LEADS = [
    ("dublin", "core01.example.internal:22", True),
    ("dublin", "core01.example.internal:9100", False),
    ("dublin", "127.0.0.1:9090", False),
    # The master of the sandbox monitors no hosts.
    ("master", "127.0.0.1:22", False),
    ("master", "127.0.0.1:9090", False),
]


@pytest.mark.parametrize(("server", "target", "let"), LEADS)
def test_ssh_leads_on_to_the_ssh_of_monitored_hosts_alone(
    sandbox: Sandbox, server: str, target: str, let: bool
) -> None:
    told = ssh(sandbox, server, "-W", target, command="")
    if let:
        assert told.startswith("SSH-2.0-")
    else:
        assert "administratively prohibited: open failed" in told


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("end", ["127.0.0.1:4444", "/home/admin/way"])
def test_no_port_or_socket_of_a_server_leads_back_to_the_operator(
    sandbox: Sandbox, server: str, end: str
) -> None:
    back = ("-o", "ExitOnForwardFailure=yes", "-R", f"{end}:127.0.0.1:1")
    assert "remote port forwarding failed for listen p" in ssh(sandbox, server, *back)


@pytest.mark.parametrize("server", SERVERS)
def test_neither_the_operators_agent_nor_his_screen_is_lent_to_a_server(
    sandbox: Sandbox, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISPLAY", ":9")
    # Without that program a server lends no screen, whatever it is told.
    sandbox.script(server, "! test -e /usr/bin/xauth && ln -s /bin/true /usr/bin/xauth")
    try:
        told = ssh(
            sandbox,
            server,
            *("-A", "-X"),
            command="echo agent:$SSH_AUTH_SOCK screen:$DISPLAY",
            under=("ssh-agent",),
        )
    finally:
        sandbox.script(server, "rm /usr/bin/xauth")
    assert told.startswith("agent: screen:\n")


# sshd lets nobody in for a while who failed too often (PerSourcePenalties): what gets in comes
# first, and failures are spread over both servers.


@pytest.mark.parametrize(("option", "algorithm", "words"), WEAK, ids=[weak[0] for weak in WEAK])
def test_a_client_with_a_weak_algorithm_alone_is_refused(
    sandbox: Sandbox, option: str, algorithm: str, words: str
) -> None:
    assert words in ssh(sandbox, "master", "-o", f"{option}={algorithm}")


def test_the_operators_key_gets_in_and_says_which_one_it_was(sandbox: Sandbox) -> None:
    assert ssh(sandbox, "master", command="id -un").endswith("admin\n")
    told = sandbox.inside("master", "journalctl", "-u", "ssh", "-o", "cat", "--no-pager")
    assert re.search(r"Accepted publickey for admin from \S+ port \d+ ssh2: ED25519 SHA256:", told)


def test_a_key_of_the_account_lets_nobody_in(sandbox: Sandbox, tmp_path: Path) -> None:
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    folder = "/home/admin/.ssh"
    sandbox.script(
        "master",
        f"install -d -o admin -m 700 {folder} && cp -a {folder} /root/ssh && "
        f"echo '{key.with_suffix('.pub').read_text().strip()}' >>{folder}/authorized_keys && "
        f"chown admin {folder}/authorized_keys && chmod 600 {folder}/authorized_keys",
    )
    try:
        assert "Permission denied (publickey)." in ssh(sandbox, "master", key=key)
    finally:
        sandbox.script("master", f"rm -r {folder} && mv /root/ssh {folder}")


def test_no_password_is_asked_for_and_root_is_refused(sandbox: Sandbox) -> None:
    password = ssh(sandbox, "master", "-o", "PreferredAuthentications=password")
    assert "Permission denied (publickey)." in password
    root = ssh(sandbox, "master", "-l", "root")
    assert "Permission denied (publickey)." in root


def test_after_three_wrong_keys_the_right_one_is_not_looked_at(
    sandbox: Sandbox, tmp_path: Path
) -> None:
    wrong = [tmp_path / str(number) for number in range(3)]
    for key in wrong:
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    right = sandbox.plan.state_dir / "outputs" / "operator.key"

    def told(first: Path, *others: Path) -> str:
        more = [word for key in (*others, right) for word in ("-i", str(key))]
        return ssh(sandbox, "dublin", *more, command="id -un", key=first)

    assert told(*wrong[:2]).endswith("admin\n")
    assert "Too many authentication failures" in told(*wrong)


# ---- the journal -------------------------------------------------------------------------------

# More than any burst: journald multiplies its limit by up to six where the disk is empty.
FLOOD = 20_000


def test_the_journal_is_on_disk_and_bounded(sandbox: Sandbox) -> None:
    for server in SERVERS:
        told = sandbox.inside(
            server,
            *("journalctl", "-u", "systemd-journald", "-o", "cat", "--no-pager"),
        )
        assert re.search(r"System Journal \(/var/log/journal/\w+\) is .*, max 1G,", told)


def logged(sandbox: Sandbox, tag: str, since: float) -> int:
    """How many lines of the flood are in the journal."""
    sandbox.inside("dublin", "journalctl", "--sync")
    lines = f"journalctl -t {tag} --since @{since:.3f} -o cat --no-pager"
    return int(sandbox.script("dublin", f"{lines} | grep -c ^line"))


def test_no_line_of_nginx_is_dropped_and_a_wild_service_is_cut_off(sandbox: Sandbox) -> None:
    since = time.time()
    # From within each service's own control group, which is what journald goes by.
    flood = f"seq -f 'line %g' {FLOOD} | logger --tag"
    sandbox.script(
        "dublin",
        "pid=$(systemctl show -P MainPID nginx);"
        "echo $$ >/sys/fs/cgroup$(sed -n 's/^0:://p' /proc/$pid/cgroup)/cgroup.procs;"
        f"{flood} flood-of-nginx",
    )
    wild = f"{flood} flood-of-another"
    sandbox.inside("dublin", "systemd-run", "--quiet", "--wait", "bash", "-c", wild)
    assert logged(sandbox, "flood-of-nginx", since) == FLOOD
    assert 0 < logged(sandbox, "flood-of-another", since) < FLOOD


# ---- security updates --------------------------------------------------------------------------

# Two installed packages, and a newer one of each: one in a repository that says it is the
# distribution's security updates, one in a repository that says it is the distribution.
REPOSITORIES = """
set -eu
mkdir -p /srv/updates/lists/partial
package() {
    mkdir -p /srv/updates/build/DEBIAN
    printf 'Package: %s\nVersion: %s\nArchitecture: all\n' "$1" "$2" >/srv/updates/control
    printf 'Maintainer: nobody <nobody@example.com>\nDescription: test\n' >>/srv/updates/control
    cp /srv/updates/control /srv/updates/build/DEBIAN/control
    dpkg-deb --build /srv/updates/build "$3/$1.deb" >/dev/null
}
repository() {
    mkdir -p "/srv/updates/$1" /srv/updates/old
    package "canary-$1" 1.0 /srv/updates/old
    dpkg --install "/srv/updates/old/canary-$1.deb" >/dev/null
    cd "/srv/updates/$1"
    package "canary-$1" 2.0 .
    {
        cat /srv/updates/control
        echo "Filename: ./canary-$1.deb"
        echo "Size: $(stat -c %s "canary-$1.deb")"
        echo "SHA256: $(sha256sum "canary-$1.deb" | cut -d' ' -f1)"
    } >Packages
    {
        printf 'Origin: Debian\nLabel: %s\nCodename: %s\nSuite: %s\n' "$2" "$3" "$3"
        printf 'SHA256:\n %s %s Packages\n' \
            "$(sha256sum Packages | cut -d' ' -f1)" "$(stat -c %s Packages)"
    } >Release
    echo "deb [trusted=yes] file:/srv/updates/$1 ./" >>/srv/updates/sources.list
}
codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
repository security Debian-Security "$codename-security"
repository ordinary Debian "$codename"
cat >/etc/apt/apt.conf.d/99test <<END
Dir::Etc::SourceList "/srv/updates/sources.list";
Dir::Etc::SourceParts "/dev/null";
Dir::State::Lists "/srv/updates/lists";
END
apt-get --quiet update
"""
CLEAN = """
rm -rf /etc/apt/apt.conf.d/99test /srv/updates
dpkg --purge canary-security canary-ordinary
"""
# As the timer starts it, on another day.
RUN_UPDATES = "rm -f /var/lib/apt/periodic/*; systemctl start apt-daily-upgrade.service"


@contextmanager
def repositories(sandbox: Sandbox) -> Iterator[None]:
    """apt on the slave knows of two repositories of its own and of no other."""
    try:
        sandbox.script("dublin", REPOSITORIES)
        yield
    finally:
        sandbox.script("dublin", CLEAN)


def version(sandbox: Sandbox, package: str) -> str:
    return sandbox.inside("dublin", "dpkg-query", "-W", "-f", "${Version}", package)


def main_pid(sandbox: Sandbox, unit: str) -> str:
    return sandbox.inside("dublin", "systemctl", "show", "-P", "MainPID", unit).strip()


def test_security_updates_and_no_others_are_installed_by_themselves(sandbox: Sandbox) -> None:
    for server in SERVERS:
        # The one fetches the lists, the other installs.
        timers = ("apt-daily.timer", system.UPDATES_TIMER)
        assert sandbox.inside(server, "systemctl", "is-active", *timers) == "active\n" * 2
    services = sandbox.start_times()
    with repositories(sandbox):
        assert version(sandbox, "canary-security") == "1.0"
        sandbox.script("dublin", RUN_UPDATES)
        assert version(sandbox, "canary-security") == "2.0"
        assert version(sandbox, "canary-ordinary") == "1.0"
    # Neither a service nor the machine was restarted for it.
    assert sandbox.start_times() == services


def test_nginx_is_started_anew_when_a_library_of_it_was_replaced_and_not_otherwise(
    sandbox: Sandbox,
) -> None:
    before = main_pid(sandbox, "nginx")
    with repositories(sandbox):
        sandbox.script("dublin", RUN_UPDATES)
        assert main_pid(sandbox, "nginx") == before
        # As dpkg does it: another file of the same name.
        folder = "/usr/lib/x86_64-linux-gnu"
        sandbox.script(
            "dublin", f"cd {folder} && cp -p libssl.so.3 libssl.new && mv libssl.new libssl.so.3"
        )
        sandbox.script("dublin", RUN_UPDATES)
        assert main_pid(sandbox, "nginx") not in (before, "0")


def test_an_upgrade_of_nginx_s_own_package_leaves_it_with_our_configuration(
    sandbox: Sandbox,
) -> None:
    before = main_pid(sandbox, "nginx")
    # What dpkg runs at the end of an upgrade.
    sandbox.inside("dublin", "dpkg-reconfigure", "--frontend=noninteractive", "nginx")
    assert main_pid(sandbox, "nginx") not in (before, "0")
    listening = sandbox.inside("dublin", "ss", "-Hltnp")
    assert re.search(r"0\.0\.0\.0:9095 .*nginx", listening)
    assert ":80 " not in listening
    # And federation goes on, which is also how the next test wants to find it.
    sandbox.wait(f'timestamp(up{{job="federate"}} == 1) > {time.time()}')


def test_nginx_can_put_aside_what_a_client_takes_slowly(sandbox: Sandbox) -> None:
    # Where it can not, an answer beyond its buffers is cut off.
    for server in ("master", "dublin"):
        owner = sandbox.script(server, "stat --format=%U /var/lib/nginx/proxy").strip()
        unit = sandbox.script(server, "systemctl show -P User nginx").strip()
        assert owner == unit, server
