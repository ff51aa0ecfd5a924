"""No secret in clear, but in the one file that its program reads and nobody else may.

The secrets are those of this sandbox's own state, each of them random: whatever holds one of them
got it from there. They are looked for everywhere that a machine, this one included, keeps anything.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
import subprocess
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from hostfiles.prometheus import password_file
from sandbox import machine, providers, world
from sandbox.program import Secret, plain
from sandbox.state import Record
from tests.sandbox.conftest import CORES, Sandbox
from tests.sandbox.keyring import Keyring
from tests.sandbox.probe import Client, Door, Request, ask

PEM = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----\n(.+?)\n-----END", re.DOTALL)
BCRYPT = re.compile(r"\$2b\$\d\d\$[./A-Za-z0-9]{53}")
# Of a user or token, in nginx's callers.map.
DIGEST = re.compile(r'^"[a-z0-9-]*/[a-z0-9-]*" "([A-Za-z0-9_-]{22})";$', re.MULTILINE)
OPAQUE = re.compile(r"[A-Za-z0-9+/=]{16,100}")
USERS = ("prometheus-admin", "local", "prometheus", "prometheus-2", "nginx")
# What the user's own key to the monitored hosts is called here.
GIVEN = "hostAccess"
# What a password's hashes are called here.
HASH = "hash"
MAKERS = (providers.PRIVATE_KEY, providers.RANDOM_PASSWORD, providers.RANDOM_BYTES)

GROUPS = {"etc/prometheus": "prometheus", "etc/nginx": "www-data"}
GROUPS |= {"etc/node_exporter": "node_exporter", "etc/alertmanager": "alertmanager"}


class Needles:
    """Every secret of a state as the byte strings by which it would be known, and its name.

    `given`: those of the user's settings, by name.
    """

    def __init__(self, records: Mapping[str, Record], given: Mapping[str, str]) -> None:
        self._names: dict[str, set[str]] = {}
        self.barren: list[str] = []
        for name, text in given.items():
            self._take(name, text, True)
        # What makes a secret names it; others only pass it on.
        custom = [record for record in records.values() if record.custom]
        for record in sorted(custom, key=lambda r: r.type not in MAKERS):
            for path, text in _secret_texts({"in": record.inputs, "out": record.outputs}):
                if not self._take(record.name, text, record.type in MAKERS):
                    self.barren.append(f"{record.name} {path}")
        # A private key's file begins with a line that all of its kind have, and holds its public
        # half, whose lines anybody may have.
        public = [
            record.outputs[form]
            for record in custom
            if record.type == providers.PRIVATE_KEY
            for form in ("publicKeyOpenssh", "publicKeyPem")
        ]
        self._names = {
            needle: names
            for needle, names in self._names.items()
            if len(names) == 1 and not any(needle in text for text in public)
        }

    def _take(self, name: str, text: str, maker: bool) -> int:
        """Notes what is secret in a text; returns how much that is."""
        if text.startswith("{"):
            # A monitored host's bundle is in a delivery of more.
            delivery = json.loads(text)
            files = delivery.get("bundle", delivery)["files"]
            return sum(self._take(name, file["content"], maker) for file in files if file["secret"])
        keys = [line for body in PEM.findall(text) for line in body.splitlines() if len(line) > 15]
        opaque = [text] if OPAQUE.fullmatch(text) else []
        pairs = [
            base64.b64encode(f"{user}:{secret}".encode()).decode()
            for secret in opaque
            for user in USERS
        ]
        for needle in (*keys, *opaque, *pairs):
            if maker or needle not in self._names:
                self._names.setdefault(needle, set()).add(name)
        hashes = [*BCRYPT.findall(text), *DIGEST.findall(text)]
        self._names |= {needle: {HASH} for needle in hashes}
        return len(keys) + len(opaque) + len(hashes)

    @property
    def lines(self) -> str:
        """As grep takes them."""
        return "".join(f"{needle}\n" for needle in sorted(self._names))

    @property
    def names(self) -> set[str]:
        """Of all secrets."""
        return {name for names in self._names.values() for name in names}

    def among(self, data: bytes) -> set[str]:
        """The names of the secrets that stand in some bytes, in clear, gzipped or in base64."""
        found: set[str] = set()
        for layer in _layers(data):
            for needle, names in self._names.items():
                if needle.encode() in layer:
                    found |= names
        return found


def _secret_texts(value: Any, path: str = "", secret: bool = False) -> Iterator[tuple[str, str]]:
    """Every string below a Secret, with the way to it."""
    if isinstance(value, Secret):
        yield from _secret_texts(value.value, path, True)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _secret_texts(item, f"{path}.{key}".lstrip("."), secret)
    elif isinstance(value, list):
        for item in value:
            yield from _secret_texts(item, path, secret)
    elif secret and isinstance(value, str):
        yield path, value


def _layers(data: bytes) -> Iterator[bytes]:
    yield data
    if data.startswith(b"\x1f\x8b"):
        yield from _layers(gzip.decompress(data))
    elif len(data) > 16 and re.fullmatch(rb"[A-Za-z0-9+/\s]+={0,2}\s*", data):
        try:
            yield from _layers(base64.b64decode(data))
        except ValueError:
            return


@pytest.fixture(scope="module")
def needles(sandbox: Sandbox) -> Needles:
    return Needles(sandbox.state.records, {GIVEN: world.world_key(sandbox.plan).read_text()})


@pytest.fixture(scope="module")
def servers(sandbox: Sandbox) -> dict[str, str]:
    """Our servers, and what the program calls them."""
    return {"master": "master", **{site: f"slave-{site}" for site in sandbox.outputs["slaves"]}}


def _roots(sandbox: Sandbox) -> dict[str, Path]:
    """The root of each machine's own file system, its mounts included, as this machine sees it."""
    found = {}
    for name in machine.machines(sandbox.plan):
        leader = machine.leader_pid(sandbox.plan, name)
        assert leader
        found[name] = Path(f"/proc/{leader}/root")
    return found


def test_the_needles_are_all_the_secrets_of_the_state(sandbox: Sandbox, needles: Needles) -> None:
    made = {record.name for record in sandbox.state.records.values() if record.type in MAKERS}
    assert needles.names == {*made, HASH, GIVEN}
    # What is kept secret for caution only: which host, and what a command said of its work.
    harmless = r".* (out\.(stdout|stderr)|in\.connection(\.proxy)?\.(host|hostKey|user))"
    assert [name for name in needles.barren if not re.fullmatch(harmless, name)] == []
    for record in sandbox.state.records.values():
        if record.type == providers.COMMAND:
            assert needles.among(plain(record.outputs["stdout"]).encode()) == set()
    # And they are found where they stand, however wrapped.
    password = Keyring(sandbox.state).password("master-ui")
    for shown in (
        password.encode(),
        gzip.compress(f"password: {password}\n".encode()),
        base64.b64encode(f"prometheus-admin:{password}".encode()),
    ):
        assert needles.among(shown) == {"master-ui-password"}


# ---- the machines' disks, memories and words ---------------------------------------------------


def test_each_secret_is_in_the_files_of_its_program_and_nobody_else_may_read_them(
    sandbox: Sandbox, needles: Needles, servers: Mapping[str, str]
) -> None:
    keys = Keyring(sandbox.state)
    expected: dict[str, dict[str, set[str]]] = {
        core: {
            "etc/node_exporter/tls/node_exporter.key": {
                f"slave-dublin-{core}.example.internal-key"
            },
            "etc/node_exporter/config.yml": {HASH},
        }
        for core in CORES
    }
    for server, name in servers.items():
        local = {f"{name}-local-password"}
        files = {
            f"etc/prometheus/{password_file('local', keys.password(f'{name}-local'))}": local,
            "etc/prometheus/secrets/ready.curl": local,
            "etc/prometheus/secrets/reload.curl": local,
            "etc/prometheus/secrets/node_exporter.curl": local,
            "etc/prometheus/secrets/snapshot.curl": local,
            "etc/prometheus/tls/prometheus.key": {f"{name}-prometheus-key"},
            "etc/prometheus/web.yml": {HASH},
            "etc/node_exporter/tls/node_exporter.key": {f"{name}-node-exporter-key"},
            "etc/node_exporter/config.yml": {HASH},
            "etc/nginx/tls/server.key": {f"{name}-nginx-key"},
            "etc/prometheus/secrets/alertmanager.password": local,
            "etc/alertmanager/secrets/ready.curl": local,
            "etc/alertmanager/secrets/reload.curl": local,
            "etc/alertmanager/tls/alertmanager.key": {f"{name}-alertmanager-key"},
            "etc/alertmanager/web.yml": {HASH},
            "etc/nginx/users.htpasswd": {HASH},
            "etc/nginx/callers.map": {HASH},
        }
        if server == "master":
            files["etc/nginx/upstream.conf"] = {f"{name}-nginx-password"}
            files |= {
                f"etc/prometheus/{password_file(f'federate-{site}', password)}": {
                    f"slave-{site}-federation-password"
                }
                for site, password in sandbox.outputs["federationPasswords"].items()
            }
        if server == "dublin":
            # The password that it will send next is a hash on the hosts, and nothing anywhere yet.
            sent = f"{name}-exporters"
            path = password_file("exporters", keys.password(sent))
            files[f"etc/prometheus/{path}"] = {f"{sent}-password"}
        expected[sandbox.machine(server)] = files | {
            "etc/ssh/ssh_host_ed25519_key": {f"{name}-host-key-1"}
        }
    assert sorted(expected) == machine.machines(sandbox.plan)
    with ThreadPoolExecutor() as pool:
        found = dict(pool.map(lambda m: (m, _files_with_secrets(sandbox, needles, m)), expected))
    for name, files in found.items():
        # cloud-init's own copies of user-data are the next test's business.
        ours = {path: file for path, file in files.items() if "/cloud" not in path}
        assert {path: file[0] for path, file in ours.items()} == expected[name]
        for path, (_, access) in ours.items():
            group = next((g for start, g in GROUPS.items() if path.startswith(start)), "root")
            mode = "600" if group == "root" else "640"
            assert access == f"root:{group} {mode}", (name, path)


def _files_with_secrets(
    sandbox: Sandbox, needles: Needles, name: str
) -> dict[str, tuple[set[str], str]]:
    """All files of a machine that hold a secret: which, and who may read it."""
    # What was changed last before there was any secret is the image's. A date of change (unlike one
    # of modification) cannot be set back.
    born = (sandbox.plan.state_dir / "passphrase").stat().st_mtime
    script = (
        # The needles lie in memory, in a file without a name, which each grep opens anew.
        "set -e; needles=$(mktemp -p /dev/shm); exec 3<>$needles; rm $needles; cat >&3; </dev/null "
        rf"find / \( -path /proc -o -path /sys \) -prune -o -type f -newerct @{born} -print0 |"
        "LC_ALL=C xargs -0 grep --text --fixed-strings --files-with-matches --null"
        " --file=/proc/self/fd/3 |"
        "xargs -0 --no-run-if-empty stat --format='%U:%G %a %n'"
    )
    listed = sandbox.inside(name, "bash", "-c", script, stdin=needles.lines)
    found = {}
    for line in listed.splitlines():
        owner, mode, path = line.split(" ", 2)
        data = (_roots(sandbox)[name] / path[1:]).read_bytes()
        path = re.sub(r"^/opt/federation/trees/[0-9a-f.]+/", "/", path)
        found[path[1:]] = (needles.among(data), f"{owner} {mode}")
    return found


def test_user_data_and_all_that_cloud_init_keeps_hold_one_key_and_no_other(
    sandbox: Sandbox, needles: Needles, servers: Mapping[str, str]
) -> None:
    given = {
        record.name: gzip.decompress(base64.b64decode(plain(record.inputs)["userDataBase64"]))
        for record in sandbox.state.records.values()
        if record.type == providers.INSTANCE
    }
    for server, name in servers.items():
        first_contact = {f"{name}-first-contact-1"}
        assert needles.among(given[f"{name}-1"]) == first_contact
        assert len(PEM.findall(re.sub(r"\n +", "\n", given[f"{name}-1"].decode()))) == 1
        root = _roots(sandbox)[sandbox.machine(server)]
        holders = set()
        for folder in ("var/lib/cloud", "run/cloud-init"):
            for path in (root / folder).rglob("*"):
                if not path.is_file() or path.is_symlink():
                    continue
                if found := needles.among(path.read_bytes()):
                    holders.add(str(path.relative_to(root)))
                    assert found == first_contact, path
                    assert path.stat().st_mode & 0o077 == 0, path
        # Where the sandbox lays what AWS hands out by its metadata service.
        assert "var/lib/cloud/seed/nocloud/user-data" in holders


def test_no_journal_no_log_and_no_console_has_a_secret(sandbox: Sandbox, needles: Needles) -> None:
    def said(name: str) -> set[str]:
        # Every field of every entry, the command lines of who wrote it among them.
        journal = sandbox.inside(name, "journalctl", "--all", "--output=export")
        assert "_CMDLINE=" in journal
        logs = [path for path in (_roots(sandbox)[name] / "var/log").rglob("*") if path.is_file()]
        console = sandbox.plan.machine_dir(name) / "console.log"
        found = needles.among(journal.encode())
        for path in (*logs, console):
            found |= needles.among(path.read_bytes())
        return found

    names = machine.machines(sandbox.plan)
    with ThreadPoolExecutor() as pool:
        assert dict(zip(names, pool.map(said, names), strict=True)) == {n: set() for n in names}


def test_neither_prometheus_tells_a_secret(
    sandbox: Sandbox, needles: Needles, servers: Mapping[str, str]
) -> None:
    keys = Keyring(sandbox.state)
    paths = ["status/config", "status/flags", "status/runtimeinfo", "targets"]
    for server, name in servers.items():
        leaf = keys.leaf(f"{name}-prometheus")
        client = Client(
            certificate=leaf.certificate,
            key=leaf.key,
            user="local",
            password=keys.password(f"{name}-local"),
            ca=keys.authority.certificate,
        )
        row = sandbox.outputs["master"] if server == "master" else sandbox.outputs["slaves"][server]
        door = Door(address="127.0.0.1", port=9090, name=row["host"])
        requests = [Request(door=door, client=client, path=f"/api/v1/{path}") for path in paths]
        namespace = sandbox.plan.machine_netns(sandbox.machine(server))
        answers = ask(namespace, requests)
        assert "scrape_config_files" in answers[0].body
        for path, answer in zip(paths, answers, strict=True):
            assert answer.short == 200
            assert needles.among(answer.body.encode()) == set(), path


# ---- this machine ------------------------------------------------------------------------------


class Watch:
    """Notes the arguments and environment of every process that starts while it runs."""

    def __init__(self) -> None:
        self.seen: set[bytes] = set()
        self._before = set(os.listdir("/proc"))
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        # Often enough for a curl that lives for some hundredths of a second.
        while not self._end.wait(0.003):
            for pid in os.listdir("/proc"):
                if pid.isdigit() and pid not in self._before:
                    self.seen |= _told_of(pid)


def _told_of(pid: str) -> set[bytes]:
    found = set()
    for part in ("cmdline", "environ"):
        try:
            found.add(Path("/proc", pid, part).read_bytes())
        except OSError:
            continue
    return found


def test_no_process_here_or_there_has_a_secret_in_its_arguments_or_environment(
    sandbox: Sandbox, needles: Needles, servers: Mapping[str, str]
) -> None:
    # A delivery of every bundle by `up`, as if they had changed.
    state = sandbox.state
    delivered = [f"{name}-bundle" for name in servers.values()]
    delivered += [f"slave-dublin-{core}.example.internal" for core in CORES]
    for name in delivered:
        (record,) = (r for r in state.records.values() if r.name == name and r.custom)
        record.inputs["stdin"] = Secret("")
    state.save()
    with Watch() as watch:
        printed = sandbox.up("--no-verify")
        for server in servers:
            sandbox.inside(server, "systemctl", "reload", "prometheus.service", "nginx.service")
    assert f"{len(delivered)} changed" in printed
    # It saw what came and went: our own ssh, the one it jumps through, and on the machines what ran
    # for moments.
    for witness in (
        b"ssh\0-F\0" + bytes(sandbox.plan.runtime_dir / "ssh"),
        b"\0-W\0[10.20.1.11]:22\0jump",
        b"/usr/local/sbin/apply-bundle",
        b"/usr/bin/curl\0--config",
        b"python3\0-c\0import json, sys; d = json.load(sys.stdin)",
        b"/opt/federation/bin/apply-bundle",
    ):
        assert any(witness in told for told in watch.seen), witness
    # Processes of the machines are processes of this one.
    running = {told for pid in filter(str.isdigit, os.listdir("/proc")) for told in _told_of(pid)}
    assert any(b"--web.config.file=/etc/prometheus/web.yml" in told for told in running)
    for told in watch.seen | running:
        assert needles.among(told) == set(), told[:200]


def test_up_never_prints_a_secret(sandbox: Sandbox, needles: Needles) -> None:
    printed = "".join(sandbox.log)
    assert sandbox.public_ip("master") in printed
    assert needles.among(printed.encode()) == set()


def test_the_sandbox_keeps_secrets_encrypted_but_for_its_outputs(
    sandbox: Sandbox, needles: Needles, servers: Mapping[str, str]
) -> None:
    folder = sandbox.plan.state_dir
    # Whoever ran sudo passes through it to the outputs, and nobody to anything else.
    assert folder.stat().st_mode & 0o066 == 0
    for part in ("outputs", "machines", "volumes", "world"):
        assert (folder / part).stat().st_mode & 0o077 == 0, part
    found: dict[str, set[str]] = {}
    for where, folders, files in os.walk(folder):
        # The machines' disks: looked at from inside.
        if Path(where).parent == folder / "machines":
            folders[:] = [name for name in folders if name not in ("root", "upper", "work")]
        if Path(where) == folder:
            folders.remove("volumes")
        for name in files:
            path = Path(where, name)
            if names := needles.among(path.read_bytes()):
                found[str(path.relative_to(folder))] = names
                assert path.stat().st_mode & 0o777 == 0o600 or "instance" in where, path
    user_data = {
        f"machines/{sandbox.machine(server)}/instance/user-data": {f"{name}-first-contact-1"}
        for server, name in servers.items()
    }
    assert found == {
        "outputs/operator.key": {"operator-ssh"},
        "outputs/master.curl": {"master-ui-password"},
        # The user's own.
        "world/id_ed25519": {GIVEN},
        **user_data,
    }
    assert (folder / "passphrase").stat().st_mode & 0o777 == 0o600
    assert "__secret__" in (folder / "state.json").read_text()
    # What ssh was given for a delivery went with it.
    assert list((sandbox.plan.runtime_dir / "ssh").iterdir()) == []


# ---- the key of first contact ------------------------------------------------------------------


def _ssh(
    folder: Path, key: str, host_key: str, user: str, address: str
) -> subprocess.CompletedProcess[str]:
    """ssh as an operator, who takes the host for itself by this key alone."""
    files = {"key": key, "known_hosts": f"{address} {host_key}\n"}
    for name, content in files.items():
        path = folder / name
        path.touch(mode=0o600)
        path.write_text(content)
    options = {
        "BatchMode": "yes",
        "ConnectTimeout": "10",
        "GlobalKnownHostsFile": "/dev/null",
        "IdentitiesOnly": "yes",
        "IdentityAgent": "none",
        "StrictHostKeyChecking": "yes",
        "UserKnownHostsFile": str(folder / "known_hosts"),
    }
    argv = ["ssh", "-F", "none", "-T", "-i", str(folder / "key")]
    argv += [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
    try:
        return subprocess.run(
            [*argv, f"{user}@{address}", "sudo cat /etc/hostname"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    finally:
        for name in files:
            (folder / name).unlink()


def test_the_first_contact_key_opens_nothing_any_more(
    sandbox: Sandbox, servers: Mapping[str, str], tmp_path: Path
) -> None:
    keys = Keyring(sandbox.state)
    operator, _ = keys.ssh_key("operator-ssh")
    for server, name in servers.items():
        row = sandbox.outputs["master"] if server == "master" else sandbox.outputs["slaves"][server]
        user = row["sshCommand"].split()[-1].partition("@")[0]
        first, first_public = keys.ssh_key(f"{name}-first-contact-1")
        _, permanent = keys.ssh_key(f"{name}-host-key-1")
        assert row["sshHostKey"].strip() == permanent
        good = _ssh(tmp_path, operator, permanent, user, row["publicIp"])
        assert good.returncode == 0, good.stderr
        assert good.stdout
        # The host no longer proves itself by it …
        stale = _ssh(tmp_path, operator, first_public, user, row["publicIp"])
        assert (stale.returncode, stale.stdout) == (255, "")
        assert "REMOTE HOST IDENTIFICATION HAS CHANGED" in stale.stderr
        assert "Host key verification failed" in stale.stderr
        # … and nobody comes in by it.
        for other in (user, "root"):
            thief = _ssh(tmp_path, first, permanent, other, row["publicIp"])
            assert (thief.returncode, thief.stdout) == (255, "")
            assert "Permission denied (publickey)" in thief.stderr
        scan = ["ssh-keyscan", "-T", "10", row["publicIp"]]
        offered = subprocess.run(scan, capture_output=True, text=True, timeout=60, check=True)
        shown = [line.partition(" ")[2] for line in offered.stdout.splitlines() if line[0] != "#"]
        assert shown == [permanent]
        ssh = sandbox.script(server, "ls /etc/ssh; systemctl list-units --all 'host-key-*'")
        assert "ssh_host_ed25519_key" in ssh
        for gone in ("first_contact_host_key", "federation_host_key", "host-key-turn"):
            assert gone not in ssh
