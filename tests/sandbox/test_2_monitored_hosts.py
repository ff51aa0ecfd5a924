"""Each lock on the way to the node_exporter of a monitored host, tried with all the others open.

And what this exporter may and does on the host, which is not ours. Nothing is changed here.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from hostfiles.model import Leaf
from sandbox import providers
from sandbox.command import write_config
from tests.sandbox.conftest import CORES, NAMED, Sandbox
from tests.sandbox.keyring import DAY, Keyring, forge_authority, issue
from tests.sandbox.probe import OPEN, SILENCE, Answer, Client, Door, Request, ask, knock

SLAVE = "prometheus-slave.example.com"
JOB = "CoreSystems"
GROUP = "CoreSystems Monitoring"
NO_TLS = "Client sent an HTTP request to an HTTPS server"
METRIC = "federation_certificate_expiry_timestamp_seconds"
SERVERS = ("master", "dublin")
# Where an exporter without any limits runs for comparison.
FREE_PORT = 9101


def _fqdn(core: str) -> str:
    return f"{core}.example.internal"


def _door(sandbox: Sandbox, core: str) -> Door:
    return Door(address=sandbox.private_ip(core), port=9100, name=_fqdn(core))


def _metrics(
    sandbox: Sandbox, door: Door, clients: Mapping[str, Client], *, tls: str = ""
) -> dict[str, Answer]:
    """What each client gets, asking from the slave: nothing on the way is closed to it."""
    requests = [
        Request(door=door, client=client, path="/metrics", tls=tls) for client in clients.values()
    ]
    answers = ask(sandbox.namespace("dublin"), requests)
    return dict(zip(clients, answers, strict=True))


# ---- the locks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("core", CORES)
def test_plain_http_gets_nothing(sandbox: Sandbox, keys: Keyring, core: str) -> None:
    right, door = keys.exporter_client("dublin"), _door(sandbox, core)
    plain = _metrics(sandbox, replace(door, name=""), {"right": right})["right"]
    assert (plain.short, plain.body) == (400, f"{NO_TLS}.\n")
    assert _metrics(sandbox, door, {"right": right})["right"].short == 200


@pytest.mark.parametrize("tls", ["1.2", "1.3"])
@pytest.mark.parametrize("core", CORES)
def test_only_its_slaves_own_valid_certificate_is_let_in(
    sandbox: Sandbox, keys: Keyring, core: str, tls: str
) -> None:
    # All of them know the password.
    right, ours = keys.exporter_client("dublin"), keys.authority
    other = "core02" if core == "core01" else "core01"
    good = {
        "the slave's": keys.leaf("slave-dublin-prometheus"),
        # What the forged ones below differ from in one point each.
        "one that our CA signs for the slave": issue(SLAVE, ours),
    }
    bad = {
        "none": ("certificate", Leaf(certificate="", key="", not_after=0)),
        "another CA's for the slave": ("authority", issue(SLAVE, forge_authority())),
        "self-signed for the slave": ("authority", issue(SLAVE, None)),
        "the master's": ("name", keys.leaf("master-prometheus")),
        "another name": ("name", issue("other.example.com", ours)),
        "a longer name": ("name", issue(f"{SLAVE}.example.org", ours)),
        "the name in the subject alone": ("name", issue(SLAVE, ours, names=["other.example.com"])),
        # The slave's name, but for servers alone; and so are the exporters' own.
        "the slave's nginx's": ("use", keys.leaf("slave-dublin-nginx")),
        "this exporter's": ("use", keys.leaf(f"slave-dublin-{_fqdn(core)}")),
        "another exporter's": ("use", keys.leaf(f"slave-dublin-{_fqdn(other)}")),
        "expired": ("time", issue(SLAVE, ours, starts=-2 * DAY, ends=-DAY / 24)),
        "not valid yet": ("time", issue(SLAVE, ours, starts=DAY / 24, ends=DAY)),
    }
    leaves = good | {name: leaf for name, (_, leaf) in bad.items()}
    clients = {
        name: right.but(certificate=leaf.certificate, key=leaf.key) for name, leaf in leaves.items()
    }
    found = _metrics(sandbox, _door(sandbox, core), clients, tls=tls)
    assert {name: found[name].short for name in good} == dict.fromkeys(good, 200)
    # Alerts of the handshake, before HTTP, by what was wrong (RFC 8446, section 6.2).
    alerts = {
        "certificate": {
            "1.2": "TLS: SSLV3_ALERT_HANDSHAKE_FAILURE",
            "1.3": "TLS: TLSV13_ALERT_CERTIFICATE_REQUIRED",
        }[tls],
        "authority": "TLS: TLSV1_ALERT_UNKNOWN_CA",
        "name": "TLS: SSLV3_ALERT_BAD_CERTIFICATE",
        "use": "TLS: SSLV3_ALERT_BAD_CERTIFICATE",
        "time": "TLS: SSLV3_ALERT_CERTIFICATE_EXPIRED",
    }
    assert {name: found[name].short for name in bad} == {
        name: alerts[what] for name, (what, _) in bad.items()
    }


@pytest.mark.parametrize("core", CORES)
def test_with_the_certificate_alone_nobody_is_let_in(
    sandbox: Sandbox, keys: Keyring, core: str
) -> None:
    # All of them have the slave's certificate.
    right = keys.exporter_client("dublin")
    later = keys.password("slave-dublin-exporters-2")
    good = {
        "what the slave sends": right,
        "what it will send after the next rotation": right.but(user="prometheus-2", password=later),
    }
    bad = {
        "no password": right.but(user="", password=""),
        "an empty one": right.but(password=""),
        "a wrong one": right.but(password="x" * 48),
        "all but its last letter": right.but(password=right.password[:-1]),
        "the other user's": right.but(password=later),
        "a wrong user": right.but(user="nobody"),
        "the user of another generation": right.but(user="prometheus-2"),
        "the slave's own user": right.but(
            user="local", password=keys.password("slave-dublin-local")
        ),
        "the federation's": right.but(
            user="prometheus-admin", password=sandbox.outputs["federationPasswords"]["dublin"]
        ),
    }
    found = _metrics(sandbox, _door(sandbox, core), good | bad)
    for name in good:
        assert found[name].short == 200
        assert "node_exporter_build_info{" in found[name].body
    assert {name: found[name].short for name in bad} == dict.fromkeys(bad, 401)
    assert {found[name].body for name in bad} == {"Unauthorized\n"}


@pytest.mark.parametrize("core", CORES)
def test_every_path_asks_for_the_password(sandbox: Sandbox, keys: Keyring, core: str) -> None:
    client = keys.exporter_client("dublin").but(user="", password="")
    paths = ["/", "/metrics", "/metrics?collect[]=uname", "/debug/pprof/", "/-/ready", "/nowhere"]
    requests = [Request(door=_door(sandbox, core), client=client, path=path) for path in paths]
    answers = ask(sandbox.namespace("dublin"), requests)
    assert [answer.short for answer in answers] == [401] * len(paths)


def test_in_the_same_network_tls_and_password_are_all_that_keeps_others_out(
    sandbox: Sandbox, keys: Keyring
) -> None:
    # These hosts have no firewall of their own, and their network lets each to each: what ufw does
    # where there is one is shown in test_5_monitored_hosts.py.
    door, neighbour = _door(sandbox, "core01"), sandbox.namespace("core02")
    right = keys.exporter_client("dublin")
    own = keys.leaf(f"slave-dublin-{_fqdn('core02')}")
    clients = [
        right.but(certificate="", key=""),
        # All that root of the neighbour has.
        right.but(certificate=own.certificate, key=own.key, user="", password=""),
        right.but(user="", password=""),
        right,
    ]
    assert knock(neighbour, [(door.address, door.port)])[door.address, door.port] == OPEN
    bare, stolen, without, known = ask(
        neighbour, [Request(door=door, client=client, path="/metrics") for client in clients]
    )
    assert (bare.status, bare.why) == (0, "TLS: TLSV13_ALERT_CERTIFICATE_REQUIRED")
    assert (stolen.status, stolen.why) == (0, "TLS: SSLV3_ALERT_BAD_CERTIFICATE")
    assert without.short == 401
    assert known.short == 200


# ---- scraped, and by whom ----------------------------------------------------------------------


def test_all_four_are_up_on_the_slave_and_on_the_master_with_their_labels(
    sandbox: Sandbox,
) -> None:
    labels = [
        {"__name__": "up", "job": JOB, "instance": f"{_fqdn(core)}:9100", "group": GROUP}
        for core in CORES
    ]
    answer = sandbox.own_api("dublin", "query", query=f'up{{job="{JOB}"}}')["result"]
    found = sorted((row["metric"] for row in answer), key=lambda metric: metric["instance"])
    assert found == labels
    assert {row["value"][1] for row in answer} == {"1"}
    samples = sorted(
        sandbox.query(f'up{{job="{JOB}"}}'), key=lambda sample: sample.labels["instance"]
    )
    assert [sample.labels for sample in samples] == [{**one, "site": "dublin"} for one in labels]
    assert {sample.value for sample in samples} == {1.0}


def test_the_slave_scrapes_them_by_name_over_https_without_an_error(sandbox: Sandbox) -> None:
    pools = sandbox.own_api("dublin", "targets", state="active", scrapePool=JOB)["activeTargets"]
    assert sorted(target["scrapeUrl"] for target in pools) == [
        f"https://{_fqdn(core)}:9100/metrics" for core in CORES
    ]
    assert {(target["health"], target["lastError"]) for target in pools} == {("up", "")}


# ---- certificates end --------------------------------------------------------------------------

SERVED = {
    "/etc/node_exporter/tls/node_exporter.crt": 9100,
    "/etc/prometheus/tls/prometheus.crt": 9090,
    "/etc/nginx/tls/server.crt": {"master": 443, "dublin": 9095},
}


def _ends(pem: str) -> tuple[frozenset[bytes], float]:
    """Which certificates these are, and when the first of them ends."""
    found = x509.load_pem_x509_certificates(pem.encode())
    serials = frozenset(str(one.serial_number).encode() for one in found)
    return serials, min(one.not_valid_after_utc.timestamp() for one in found)


@pytest.mark.parametrize("name", [*SERVERS, *CORES])
def test_the_master_knows_when_every_certificate_of_every_machine_ends(
    sandbox: Sandbox, name: str
) -> None:
    rows = {**sandbox.outputs["slaves"], "master": sandbox.outputs["master"]}
    monitored = name in CORES
    instance = f"{_fqdn(name)}:9100" if monitored else rows[name]["host"]
    told = {
        sample.labels["path"]: sample.value
        for sample in sandbox.query(f'{METRIC}{{instance="{instance}"}}')
    }
    # The image's own are the distribution's business.
    listed = sandbox.script(
        name,
        "grep --dereference-recursive --files-with-matches --no-messages 'BEGIN CERTIFICATE' /etc"
        " --exclude-dir=ssl --exclude-dir=ca-certificates || true",
    ).split()
    held = {path: _ends(sandbox.inside(name, "cat", path)) for path in listed}
    assert told.items() <= {path: end for path, (_, end) in held.items()}.items()
    # One of several copies is enough.
    assert {held[path][0] for path in told} == {serials for serials, _ in held.values()}
    ports = {path: port for path, port in SERVED.items() if path in held}
    assert len(ports) == (1 if monitored else 3)
    for path, port in ports.items():
        number = port if isinstance(port, int) else port[name]
        host = sandbox.private_ip(name) if monitored else "127.0.0.1"
        served = sandbox.script(
            name,
            f"openssl s_client -connect {host}:{number} </dev/null 2>/dev/null | openssl x509",
        )
        assert _ends(served) == held[path]
        assert told[path] == held[path][1]


# ---- on the host -------------------------------------------------------------------------------


@pytest.mark.parametrize("core", CORES)
def test_nothing_listens_on_a_monitored_host_but_its_sshd_and_the_exporter(
    sandbox: Sandbox, core: str
) -> None:
    found = set()
    for line in sandbox.inside(core, "ss", "-Hltnup").splitlines():
        protocol, _, _, _, local, _, users = line.split(None, 6)
        found.add((protocol, local, *set(re.findall(r'\("([^"]+)"', users))))
    # Where settings know no address, it listens on all of them.
    address = "*" if core in NAMED else sandbox.private_ip(core)
    assert found == {
        ("tcp", "0.0.0.0:22", "sshd"),
        ("tcp", "[::]:22", "sshd"),
        ("tcp", f"{address}:9100", "node_exporter"),
    }


@pytest.mark.parametrize("core", CORES)
def test_its_files_are_roots_and_only_it_reads_its_key(sandbox: Sandbox, core: str) -> None:
    listed = sandbox.script(
        core,
        "find -L /etc/node_exporter /opt/releases /var/lib/node_exporter"
        r" -printf '%p %u:%g %m\n'",
    )
    found = dict(line.split(" ", 1) for line in listed.splitlines())
    (release,) = [path for path in found if re.fullmatch(r"/opt/releases/[^/]+", path)]
    assert found == {
        "/etc/node_exporter": "root:root 755",
        "/etc/node_exporter/config.yml": "root:node_exporter 640",
        "/etc/node_exporter/textfile": "root:root 755",
        "/etc/node_exporter/textfile/certificates.prom": "root:root 644",
        "/etc/node_exporter/tls": "root:root 755",
        "/etc/node_exporter/tls/ca.pem": "root:root 644",
        "/etc/node_exporter/tls/node_exporter.crt": "root:root 644",
        "/etc/node_exporter/tls/node_exporter.key": "root:node_exporter 640",
        "/opt/releases": "root:root 755",
        release: "root:root 755",
        f"{release}/node_exporter": "root:root 755",
        "/var/lib/node_exporter": "node_exporter:node_exporter 755",
        "/var/lib/node_exporter/textfile": "node_exporter:node_exporter 755",
    }
    config = sandbox.inside(core, "cat", "/etc/node_exporter/config.yml")
    # bcrypt of cost 12, for both generations.
    hashes = dict(re.findall(r"^  (prometheus\S*): (\$2b\$12\$\S{53})$", config, re.MULTILINE))
    assert sorted(hashes) == ["prometheus", "prometheus-2"]
    assert config.count("$2b$") == 2


@pytest.mark.parametrize("name", [*SERVERS, *CORES])
def test_its_user_has_no_shell_no_home_no_password_and_no_right(
    sandbox: Sandbox, name: str
) -> None:
    told = sandbox.script(
        name,
        "set -e; getent passwd node_exporter; getent shadow node_exporter | cut -d: -f2;"
        " id -Gn node_exporter; pid=$(systemctl show -p MainPID --value node_exporter);"
        " stat -c %U:%G /proc/$pid;"
        " grep -E '^(CapEff|CapPrm|CapBnd|NoNewPrivs|Seccomp):' /proc/$pid/status",
    )
    passwd, password, groups, owner, *status = told.splitlines()
    assert passwd.split(":")[5:] == ["/", "/usr/sbin/nologin"]
    assert password == "!*"
    assert groups == "node_exporter"
    assert owner == "node_exporter:node_exporter"
    assert {line.split()[0]: int(line.split()[1], 16) for line in status} == {
        "CapPrm:": 0,
        "CapEff:": 0,
        "CapBnd:": 0,
        "NoNewPrivs:": 1,
        "Seccomp:": 2,
    }


@pytest.mark.parametrize("name", CORES)
def test_the_unit_is_hardened(sandbox: Sandbox, name: str) -> None:
    told = sandbox.inside(name, "systemd-analyze", "security", "--no-pager", "node_exporter")
    exposure = re.search(r"Overall exposure level for \S+: ([0-9.]+)", told)
    assert exposure is not None, told
    assert float(exposure[1]) <= 2.0


def _hardened(sandbox: Sandbox, keys: Keyring, name: str) -> str:
    """What the exporter of a machine tells its Prometheus."""
    if name in CORES:
        door, client = _door(sandbox, name), keys.exporter_client("dublin")
    else:
        row = {**sandbox.outputs["slaves"], "master": sandbox.outputs["master"]}[name]
        door = Door(address="127.0.0.1", port=9100, name=row["host"])
        client = keys.own_client(name)
    namespace = sandbox.namespace("dublin" if name in CORES else name)
    (answer,) = ask(namespace, [Request(door=door, client=client, path="/metrics")])
    assert answer.short == 200
    return answer.body


def _unhardened(sandbox: Sandbox, name: str) -> str:
    """What the same program tells as root on the same machine, without any limit of a unit's."""
    return sandbox.script(
        name,
        "set -eu; trap 'systemctl stop unhardened' EXIT;"
        " process=$(systemctl show --property=MainPID --value node_exporter);"
        " mapfile -d '' -t argv </proc/$process/cmdline; flags=();"
        ' for word in "${argv[@]:1}"; do [[ $word = --web.* ]] || flags+=("$word"); done;'
        ' systemd-run --quiet --collect --unit=unhardened "${argv[0]}" "${flags[@]}"'
        f" --web.listen-address=127.0.0.1:{FREE_PORT};"
        " curl --silent --show-error --fail --max-time 20 --retry 20 --retry-delay 1"
        f" --retry-connrefused http://127.0.0.1:{FREE_PORT}/metrics 2>/dev/null",
    )


def _series(metrics: str, name: str) -> dict[str, str]:
    """Of one metric: labels and value."""
    return dict(re.findall(rf"^{name}{{(.+)}} (\S+)$", metrics, re.MULTILINE))


@pytest.mark.parametrize("name", [*SERVERS, *CORES])
def test_every_collector_works_as_well_as_without_hardening(
    sandbox: Sandbox, keys: Keyring, name: str
) -> None:
    free, ours = _unhardened(sandbox, name), _hardened(sandbox, keys, name)
    success = "node_scrape_collector_success"
    assert _series(ours, success) == _series(free, success)
    worked = [labels for labels, value in _series(free, success).items() if value == "1"]
    assert len(worked) > 20
    # Nor does one of them tell less.
    names = re.compile(r"^[a-z]\w*", re.MULTILINE)
    assert set(names.findall(ours)) == set(names.findall(free))
    size = "node_filesystem_size_bytes"
    assert _series(ours, size) == _series(free, size)


def test_a_home_on_a_file_system_of_its_own_is_told_with_its_own_size(
    sandbox: Sandbox, keys: Keyring
) -> None:
    sandbox.script("core01", "mount -t tmpfs -o size=7m separate /home")
    try:
        sizes = _series(_hardened(sandbox, keys, "core01"), "node_filesystem_size_bytes")
    finally:
        sandbox.script("core01", "umount /home")
    (home,) = [value for labels, value in sizes.items() if 'mountpoint="/home"' in labels]
    assert float(home) == 7 << 20


# ---- the way to the hosts ----------------------------------------------------------------------


def _ssh(
    sandbox: Sandbox, keys: Keyring, server: str, *arguments: str
) -> subprocess.CompletedProcess[str]:
    """ssh to a server of ours, as an operator and as `up` do."""
    row: Mapping[str, Any] = {**sandbox.outputs["slaves"], "master": sandbox.outputs["master"]}
    connection = {
        "host": row[server]["publicIp"],
        "user": row[server]["sshCommand"].split()[-1].partition("@")[0],
        "privateKey": keys.ssh_key("operator-ssh")[0],
        "hostKey": row[server]["sshHostKey"],
    }
    with tempfile.TemporaryDirectory(prefix="pf-ssh-") as folder:
        config = write_config(Path(folder), connection)
        return subprocess.run(
            ["ssh", "-F", str(config), "-T", "-o", "ExitOnForwardFailure=yes", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )


def test_the_slave_forwards_to_the_ssh_of_its_network_and_to_nothing_else(
    sandbox: Sandbox, keys: Keyring
) -> None:
    core = sandbox.private_ip("core01")
    banner = _ssh(sandbox, keys, "dublin", "-W", f"{core}:22", "target")
    assert banner.stdout.startswith("SSH-2.0-OpenSSH"), banner
    # The slave itself may connect to all of these.
    for door in (f"{core}:9100", "127.0.0.1:9090", "127.0.0.1:9100"):
        refused = _ssh(sandbox, keys, "dublin", "-W", door, "target")
        assert (refused.returncode, refused.stdout) == (255, ""), door
        assert "open failed: administratively prohibited" in refused.stderr
    # How far port 22 goes is the firewalls' business; that ufw has the same table, test_2_locks's.
    ports = [
        record.inputs
        for record in sandbox.state.records.values()
        if record.type == providers.EGRESS_RULE and record.inputs["fromPort"] == 22
    ]
    assert [(rule["toPort"], rule["cidrIpv4"]) for rule in ports] == [(22, "10.20.0.0/16")]
    slave, outside = sandbox.namespace("dublin"), sandbox.public_ip("master")
    assert knock(slave, [(core, 22), (outside, 22)]) == {(core, 22): OPEN, (outside, 22): SILENCE}


def test_the_master_forwards_nothing(sandbox: Sandbox, keys: Keyring) -> None:
    for door in ("127.0.0.1:22", "127.0.0.1:9090", f"{sandbox.public_ip('dublin')}:9095"):
        refused = _ssh(sandbox, keys, "master", "-W", door, "target")
        assert (refused.returncode, refused.stdout) == (255, ""), door
        assert "open failed: administratively prohibited" in refused.stderr


@pytest.mark.parametrize("server", SERVERS)
def test_no_server_listens_for_whoever_logs_in(
    sandbox: Sandbox, keys: Keyring, server: str
) -> None:
    allowed = _ssh(sandbox, keys, server, "target", "true")
    assert allowed.returncode == 0, allowed.stderr
    for where in ("2222:127.0.0.1:22", "/tmp/forwarded.sock:127.0.0.1:22"):  # noqa: S108
        refused = _ssh(sandbox, keys, server, "-R", where, "target", "true")
        assert refused.returncode == 255, where
        assert "remote port forwarding failed" in refused.stderr
