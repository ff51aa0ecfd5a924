"""Each lock on the way to a Prometheus, tried with all the others open.

From the outside in: security group, ufw, TLS with the master's certificate, rate limit, password,
paths, and Prometheus's own TLS and passwords. Whoever tries a lock here holds every key but the one
that it asks for, and the same client comes in when it holds that one too.
"""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import pytest

from hostfiles.model import Leaf
from sandbox import host, network, providers
from tests.sandbox.conftest import Sandbox
from tests.sandbox.keyring import DAY, Keyring, forge_authority, issue, resource
from tests.sandbox.probe import OPEN, SILENCE, Answer, Client, Door, Request, ask, knock

MASTER = "prometheus-master.example.com"
SLAVE = "prometheus-slave.example.com"
FEDERATE = "/federate?match[]=up"
# Slower than nginx's 10 requests a second, so that it is never the rate limit that refuses.
PACE_SECONDS = 0.11

# Mozilla's intermediate profile has six suites of TLS 1.2; three of them are for RSA certificates,
# and all of ours are ECDSA.
SUITES_1_2 = {
    "ECDHE-ECDSA-AES128-GCM-SHA256",
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "ECDHE-ECDSA-CHACHA20-POLY1305",
}
SUITES_1_3 = {
    "TLS_AES_128_GCM_SHA256",
    "TLS_AES_256_GCM_SHA384",
    "TLS_CHACHA20_POLY1305_SHA256",
}


@pytest.fixture
def outsider(sandbox: Sandbox) -> Iterator[str]:
    """The namespace of a machine on the internet that no firewall knows of."""
    name = "outsider"
    try:
        yield sandbox.stranger(name)
    finally:
        network.remove_stranger(sandbox.plan, name)


@pytest.fixture
def insider(sandbox: Sandbox) -> Iterator[str]:
    """The namespace of a machine on the internet to which both firewalls are open on 9095."""
    name = "insider"
    try:
        namespace = sandbox.stranger(name)
        address = network.address_of(namespace)
        with _group_opened(sandbox, address), _ufw_opened(sandbox, address):
            yield namespace
    finally:
        network.remove_stranger(sandbox.plan, name)


def _fqdn(server: str) -> str:
    return {"master": MASTER, "dublin": SLAVE}.get(server, f"{server}.example.internal")


@contextmanager
def _group_opened(
    sandbox: Sandbox, address: str, server: str = "dublin", port: int = 9095, *, out: bool = False
) -> Iterator[None]:
    """A server's security group is open to one more address on a port, inwards or outwards."""
    fabric = sandbox.fabric
    groups = fabric.model.attachments[sandbox.machine(server)].groups
    assert groups
    group = groups[0]
    before = fabric.model.groups[group]
    rule = network.Rule(protocol="tcp", peer=f"{address}/32", from_port=port, to_port=port)
    if out:
        opened = replace(before, egress=(*before.egress, rule))
    else:
        opened = replace(before, ingress=(*before.ingress, rule))
    try:
        fabric.update(lambda model: replace(model, groups={**model.groups, group: opened}))
        yield
    finally:
        fabric.update(lambda model: replace(model, groups={**model.groups, group: before}))


@contextmanager
def _ufw_opened(
    sandbox: Sandbox, address: str, server: str = "dublin", port: int = 9095, *, out: bool = False
) -> Iterator[None]:
    """The same of a server's ufw. Its files are the bundle's and stay."""
    chain, side = ("ufw-user-output", "-d") if out else ("ufw-user-input", "-s")
    rule = (chain, side, f"{address}/32", "-p", "tcp", "--dport", str(port), "-j", "ACCEPT")
    sandbox.inside(server, "iptables", "-I", *rule)
    try:
        yield
    finally:
        sandbox.inside(server, "iptables", "-D", *rule)


@contextmanager
def _ufw_stopped(sandbox: Sandbox, server: str) -> Iterator[None]:
    sandbox.inside(server, "systemctl", "stop", "ufw.service")
    try:
        yield
    finally:
        sandbox.inside(server, "systemctl", "start", "ufw.service")


def _kernel_rules(sandbox: Sandbox, server: str) -> list[str]:
    saved = sandbox.inside(server, "iptables-save")
    lines = re.sub(r"\[\d+:\d+\]", "", saved).splitlines()
    return [line for line in lines if not line.startswith("#")]


# ---- lock 1 and 2: the two firewalls -----------------------------------------------------------


def test_with_ufw_off_the_security_group_alone_keeps_a_stranger_out(
    sandbox: Sandbox, outsider: str, federation: Door, master_client: Client
) -> None:
    before = _kernel_rules(sandbox, "dublin")
    wanted = Request(door=federation, client=master_client, path=FEDERATE, timeout=1.5)
    with _ufw_stopped(sandbox, "dublin"):
        assert "-P INPUT ACCEPT" in sandbox.inside("dublin", "iptables", "-S", "INPUT")
        assert ask(outsider, [wanted])[0].short == SILENCE
        assert ask(sandbox.namespace("master"), [wanted])[0].short == 200
        # The group is what kept it out: with that open too, the stranger is in.
        with _group_opened(sandbox, network.address_of(outsider)):
            assert ask(outsider, [wanted])[0].short == 200
    assert _kernel_rules(sandbox, "dublin") == before


def test_with_the_security_group_open_ufw_alone_keeps_a_stranger_out(
    sandbox: Sandbox, outsider: str, federation: Door, master_client: Client
) -> None:
    address = network.address_of(outsider)
    wanted = Request(door=federation, client=master_client, path=FEDERATE, timeout=1.5)
    with _group_opened(sandbox, address):
        assert ask(outsider, [wanted])[0].short == SILENCE
        with _ufw_opened(sandbox, address):
            answer = ask(outsider, [wanted])[0]
    assert answer.short == 200
    assert "up{" in answer.body


OPERATORS_PORTS = (22, 443)


def test_each_firewall_alone_keeps_a_stranger_from_the_operators_ports(
    sandbox: Sandbox, outsider: str
) -> None:
    address, master = network.address_of(outsider), sandbox.public_ip("master")

    def found() -> set[str]:
        return set(
            knock(outsider, [(master, port) for port in OPERATORS_PORTS], seconds=1).values()
        )

    @contextmanager
    def opened(lock: Callable[..., AbstractContextManager[None]]) -> Iterator[None]:
        with ExitStack() as opens:
            for port in OPERATORS_PORTS:
                opens.enter_context(lock(sandbox, address, "master", port))
            yield

    with _ufw_stopped(sandbox, "master"):
        assert found() == {SILENCE}
        with opened(_group_opened):
            assert found() == {OPEN}
    with opened(_group_opened):
        assert found() == {SILENCE}
        with opened(_ufw_opened):
            assert found() == {OPEN}


def test_each_firewall_alone_keeps_a_server_from_calling_out(sandbox: Sandbox) -> None:
    # Somebody who answers on the internet, on a port that packages do not need.
    server, address, port = "dublin", sandbox.plan.inet_ip, 53
    out = partial(_group_opened, sandbox, address, server, port, out=True)

    def found() -> str:
        return knock(sandbox.namespace(server), [(address, port)], seconds=1)[address, port]

    with _ufw_stopped(sandbox, server):
        assert found() == SILENCE
        with out():
            assert found() == OPEN
    with out():
        assert found() == SILENCE
        with _ufw_opened(sandbox, address, server, port, out=True):
            assert found() == OPEN


def test_a_stranger_gets_no_answer_from_any_port_of_either_server(
    sandbox: Sandbox, outsider: str
) -> None:
    servers = [sandbox.public_ip("master"), sandbox.public_ip("dublin")]
    doors = [(server, port) for server in servers for port in (22, 80, 443, 9090, 9095, 9100)]
    internet = (sandbox.plan.inet_ip, 53)
    found = knock(outsider, [*doors, internet])
    # It is on the internet: others answer it.
    assert found.pop(internet) == OPEN
    assert found == dict.fromkeys(doors, SILENCE)


def test_an_operator_reaches_ssh_and_the_page_and_no_exporter(sandbox: Sandbox) -> None:
    master, slave = sandbox.public_ip("master"), sandbox.public_ip("dublin")
    ports = (22, 80, 443, 9090, 9095, 9100)
    doors = [(server, port) for server in (master, slave) for port in ports]
    found = knock(None, doors)
    assert {door for door in doors if found[door] == OPEN} == {
        (master, 22),
        (master, 443),
        (slave, 22),
    }
    assert {found[door] for door in doors} == {OPEN, SILENCE}


def test_a_monitored_host_is_reached_by_its_slave_and_by_nobody_outside(
    sandbox: Sandbox, outsider: str
) -> None:
    core = (sandbox.fabric.model.attachments["core01"].private_ip, 9100)
    namespaces = [sandbox.namespace("dublin"), sandbox.namespace("master"), outsider]
    with ThreadPoolExecutor(len(namespaces)) as pool:
        found = list(pool.map(lambda namespace: knock(namespace, [core])[core], namespaces))
    assert found == [OPEN, SILENCE, SILENCE]


@dataclass(frozen=True)
class Row:
    """A line of a firewall table, whoever wrote it."""

    direction: str
    protocol: str
    port: int
    cidr: str


@pytest.mark.parametrize("server", ["master", "dublin"])
def test_ufw_and_its_kernel_rules_equal_the_security_group(sandbox: Sandbox, server: str) -> None:
    group = _group_rows(sandbox, server)
    assert any(row.direction == "in" for row in group)
    status = sandbox.inside(server, "ufw", "status", "verbose")
    assert "Status: active" in status
    assert "Default: deny (incoming), deny (outgoing), deny (routed)" in status
    assert sorted(map(str, _ufw_rows(status))) == sorted(map(str, group))
    assert sorted(map(str, _iptables_rows(sandbox, server))) == sorted(map(str, group))
    # IPv6 is filtered too, and nothing is allowed on it.
    version6 = sandbox.script(server, "ip6tables -S INPUT; ip6tables -S ufw6-user-input")
    assert "-P INPUT DROP" in version6
    assert "ACCEPT" not in version6


def _group_rows(sandbox: Sandbox, server: str) -> list[Row]:
    records = [record for record in sandbox.state.records.values() if record.custom]
    (group,) = (
        record.id
        for record in records
        if record.type == providers.SECURITY_GROUP and record.name == resource(server)
    )
    directions = {providers.INGRESS_RULE: "in", providers.EGRESS_RULE: "out"}
    rows = []
    for record in records:
        if record.type in directions and record.inputs["securityGroupId"] == group:
            rule = record.inputs
            assert rule["fromPort"] == rule["toPort"]
            direction = directions[record.type]
            rows.append(Row(direction, rule["ipProtocol"], rule["fromPort"], rule["cidrIpv4"]))
    return rows


def _ufw_rows(status: str) -> list[Row]:
    """The table of `ufw status verbose`: To, Action, From, comment."""
    rows = []
    for line in status.partition("--\n")[2].splitlines():
        if not line.strip():
            continue
        columns = re.fullmatch(r"(.+?)\s{2,}(ALLOW) (IN|OUT)\s{2,}(.+?)(\s{2,}#.*)?", line.rstrip())
        assert columns, line
        to, _, direction, peer, _ = columns.groups()
        address, _, service = to.rpartition(" ")
        port, _, protocol = service.partition("/")
        # A rule is about the peer: for what goes out that is in the column To.
        near, far = (address, peer) if direction == "IN" else (peer, address)
        assert near in ("", "Anywhere"), line
        cidr = "0.0.0.0/0" if far in ("", "Anywhere") else far
        cidr = cidr if "/" in cidr else f"{cidr}/32"
        rows.append(Row(direction.lower(), protocol, int(port), cidr))
    return rows


def _iptables_rows(sandbox: Sandbox, server: str) -> list[Row]:
    """What the kernel really has."""
    rows = []
    for direction, chain, side in (("in", "input", "-s"), ("out", "output", "-d")):
        for line in sandbox.inside(server, "iptables", "-S", f"ufw-user-{chain}").splitlines():
            words = line.split()
            if words[0] == "-N":
                continue
            said = dict(zip(words[::2], words[1::2], strict=True))
            assert said.pop("-A") == f"ufw-user-{chain}"
            assert said.pop("-j") == "ACCEPT"
            assert said.pop("-m") == said["-p"]
            rows.append(
                Row(
                    direction,
                    said.pop("-p"),
                    int(said.pop("--dport")),
                    said.pop(side, "0.0.0.0/0"),
                )
            )
            assert not said, line
    return rows


@pytest.mark.parametrize(
    ("server", "door"),
    [("master", ("0.0.0.0", 443)), ("dublin", ("0.0.0.0", 9095))],  # noqa: S104
)
def test_nothing_listens_but_what_must(
    sandbox: Sandbox, server: str, door: tuple[str, int]
) -> None:
    found = set()
    for line in sandbox.inside(server, "ss", "-Hltnup").splitlines():
        protocol, _, _, _, local, _, users = line.split(None, 6)
        address, _, port = local.rpartition(":")
        found.add((protocol, address, int(port), *set(re.findall(r'\("([^"]+)"', users))))
    assert found == {
        ("tcp", "0.0.0.0", 22, "sshd"),  # noqa: S104
        ("tcp", "[::]", 22, "sshd"),
        ("tcp", *door, "nginx"),
        ("tcp", "127.0.0.1", 9090, "prometheus"),
        ("tcp", "127.0.0.1", 9100, "node_exporter"),
        ("tcp", "127.0.0.1", 9093, "alertmanager"),
    }


# ---- lock 3: the master's certificate ----------------------------------------------------------


def test_without_a_certificate_the_handshake_fails(
    insider: str, federation: Door, master_client: Client
) -> None:
    bare = master_client.but(certificate="", key="")
    for version, alert in (
        ("1.2", "TLS: SSLV3_ALERT_HANDSHAKE_FAILURE"),
        ("1.3", "TLS: TLSV13_ALERT_CERTIFICATE_REQUIRED"),
    ):
        wanted = Request(door=federation, client=master_client, path=FEDERATE, tls=version)
        with_it, without = ask(insider, [wanted, replace(wanted, client=bare)])
        assert with_it.short == 200
        assert without.short == alert


def test_only_the_masters_own_valid_certificate_is_let_in(
    insider: str, federation: Door, master_client: Client, keys: Keyring
) -> None:
    ours = keys.authority
    good = {
        "the master's": keys.leaf("master-prometheus"),
        # What the forged ones below differ from in one point each.
        "one that our CA signs for the master": issue(MASTER, ours),
    }
    bad = {
        "another CA's for the master": (400, issue(MASTER, forge_authority())),
        "self-signed for the master": (400, issue(MASTER, None)),
        "expired": (400, issue(MASTER, ours, starts=-2 * DAY, ends=-DAY / 24)),
        "not valid yet": (400, issue(MASTER, ours, starts=DAY / 24, ends=DAY)),
        # The master's name, but for servers alone.
        "the master's nginx's": (400, keys.leaf("master-nginx")),
        "the slave's": (403, keys.leaf("slave-dublin-prometheus")),
        "a longer name": (403, issue(f"{MASTER}.example.org", ours)),
        "a shorter name": (403, issue(MASTER.removeprefix("prometheus-"), ours)),
        "the dots stand for themselves": (403, issue(MASTER.replace(".", "x", 1), ours)),
        "the name in a name": (403, issue(f"x,CN={MASTER}", ours)),
        "the name is an alternative only": (403, issue("other.example.com", ours, names=[MASTER])),
    }
    leaves = [*good.values(), *(leaf for _, leaf in bad.values())]
    requests = [
        Request(
            door=federation,
            client=master_client.but(certificate=leaf.certificate, key=leaf.key),
            path=FEDERATE,
            tls=version,
        )
        for leaf in leaves
        for version in ("1.2", "1.3")
    ]
    answers = ask(insider, requests, pause=PACE_SECONDS)
    found = {
        name: (answers[2 * number].short, answers[2 * number + 1].short)
        for number, name in enumerate([*good, *bad])
    }
    expected = dict.fromkeys(good, 200) | {name: status for name, (status, _) in bad.items()}
    assert found == {name: (status, status) for name, status in expected.items()}
    for answer in answers[2 * len(good) :]:
        assert "up{" not in answer.body


# ---- lock 4: the password ----------------------------------------------------------------------


def test_with_the_certificate_alone_nobody_is_let_in(
    sandbox: Sandbox, insider: str, federation: Door, master_client: Client, keys: Keyring
) -> None:
    others = {
        "no password": master_client.but(user="", password=""),
        "an empty one": master_client.but(password=""),
        "a wrong one": master_client.but(password="x" * 48),
        "all but its last letter": master_client.but(password=master_client.password[:-1]),
        "the page's": master_client.but(password=sandbox.outputs["masterPassword"]),
        "an unknown user": master_client.but(user="nobody"),
        "the slave's own user": master_client.but(
            user="local", password=keys.password("slave-dublin-local")
        ),
    }
    requests = [
        Request(door=federation, client=client, path=FEDERATE)
        for client in (master_client, *others.values())
    ]
    first, *answers = ask(insider, requests, pause=PACE_SECONDS)
    assert first.short == 200
    found = {name: answer.short for name, answer in zip(others, answers, strict=True)}
    assert found == dict.fromkeys(others, 401)
    for answer in answers:
        assert "up{" not in answer.body


# ---- lock 5: the rate limits -------------------------------------------------------------------


@pytest.mark.parametrize(("good", "burst", "rate"), [(True, 21, 10), (False, 10, 1)])
def test_a_burst_is_cut_off_and_soon_forgotten_and_nobody_else_notices(
    sandbox: Sandbox,
    insider: str,
    federation: Door,
    master_client: Client,
    good: bool,
    burst: int,
    rate: int,
) -> None:
    right = Request(door=federation, client=master_client, path=FEDERATE)
    guess = replace(right, client=master_client.but(password="x" * 48))
    wanted, other, status = (right, guess, 200) if good else (guess, right, 401)
    began = time.monotonic()
    answers = [answer.short for answer in ask(insider, [wanted] * 80)]
    seconds = time.monotonic() - began
    # Each address has a measure of its own, and at one address who has the password has another
    # than who has not.
    assert ask(sandbox.namespace("master"), [right])[0].short == 200
    assert ask(insider, [other])[0].short == 200 + 401 - status
    assert set(answers) == {status, 429}
    # Guesses of the tests before this one may still count.
    assert answers[: 20 if good else 1] == [status] * (20 if good else 1)
    assert answers.count(status) <= burst + rate * seconds + 1
    # One more is paid for soon.
    assert host.wait_until(lambda: ask(insider, [wanted])[0].short == status, seconds=3, step=1.1)


# Of each door, how many connections one caller may have at once.
MOST = {"dublin": 10, "master": 30}


@pytest.mark.parametrize("server", MOST)
def test_who_has_too_many_connections_is_told_so_and_others_are_served(
    sandbox: Sandbox,
    insider: str,
    federation: Door,
    page: Door,
    master_client: Client,
    page_client: Client,
    keys: Keyring,
    server: str,
) -> None:
    token = keys.client(None).but(token=sandbox.outputs["masterTokens"]["grafana"])
    if server == "dublin":
        namespace, door, client, path = insider, federation, master_client, FEDERATE
        # The master itself, at its own address.
        elsewhere, other = sandbox.namespace("master"), master_client
    else:
        namespace, door, client, path = None, page, page_client, "/api/v1/query?query=up"
        # A program at the same address.
        elsewhere, other = None, token
    pair = base64.b64encode(f"{client.user}:{client.password}".encode()).decode()
    later = PACE_SECONDS * MOST[server] + 0.5
    # A request whose body does not come: nginx waits for it for ten seconds.
    held = Request(
        door=door,
        client=client,
        raw=f"GET {path} HTTP/1.1\r\nHost: {door.name}\r\nAuthorization: Basic {pair}\r\n"
        "Content-Length: 9\r\n\r\n",
        patience=later + 1,
    )
    right = Request(door=door, client=client, path=path)
    guess = replace(right, client=client.but(password="x" * 48))
    crowd = [replace(held, after=PACE_SECONDS * number) for number in range(MOST[server])]
    late = [replace(one, after=later) for one in (right, guess)]
    others = [replace(right, client=other, after=later + number / 4) for number in range(4)]
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, namespace, [*crowd, *late], at_once=len(crowd) + len(late))
        second = pool.submit(ask, elsewhere, others, at_once=len(others))
    *crowded, one_more, stranger = (answer.short for answer in first.result())
    assert crowded == [SILENCE] * MOST[server]
    assert (one_more, stranger) == (429, 401)
    assert [answer.short for answer in second.result()] == [200] * len(others)
    assert ask(namespace, [right])[0].short == 200


# ---- lock 6: the paths -------------------------------------------------------------------------


def test_with_every_key_nothing_is_open_but_federate(
    sandbox: Sandbox, insider: str, federation: Door, master_client: Client
) -> None:
    allowed = [("GET", FEDERATE), ("GET", "/federate?match[]=up&x=%2e%2e/")]
    refused = [
        ("GET", "/"),
        ("GET", "/metrics"),
        ("GET", "/query"),
        ("GET", "/api/v1/query?query=up"),
        ("POST", "/api/v1/query?query=up"),
        ("GET", "/api/v1/status/config"),
        ("GET", "/api/v1/targets"),
        ("GET", "/debug/pprof/heap"),
        ("GET", "/-/ready"),
        ("POST", "/-/reload"),
        ("PUT", "/-/reload"),
        ("POST", "/-/quit"),
        ("POST", "/api/v1/admin/tsdb/snapshot"),
        ("PUT", "/api/v1/admin/tsdb/snapshot"),
        ("POST", "/api/v1/admin/tsdb/delete_series?match[]=nothing"),
        ("POST", "/api/v1/admin/tsdb/clean_tombstones"),
        ("POST", "/api/v1/write"),
        ("POST", FEDERATE),
        ("PUT", FEDERATE),
        ("DELETE", FEDERATE),
        ("PATCH", FEDERATE),
        ("OPTIONS", FEDERATE),
        ("GET", "/federate/"),
        ("GET", "//federate"),
        ("GET", "/./federate"),
        ("GET", "/%66ederate"),
        ("GET", "/Federate"),
        ("GET", "/federate%00"),
        ("GET", "/federate;/../metrics"),
        ("GET", "/federate/../metrics"),
        ("GET", "/federate/../api/v1/query?query=up"),
        ("GET", "/federate/%2e%2e/metrics"),
        ("GET", "/federate%2f..%2fmetrics"),
        ("GET", "/federate%3fx/../metrics"),
        ("GET", "/x/../federate"),
    ]
    started = sandbox.start_times()
    since = time.time()
    requests = [
        Request(door=federation, client=master_client, path=path, method=method)
        for method, path in [*allowed, *refused]
    ]
    answers = ask(insider, requests, pause=PACE_SECONDS)
    found = {
        (request.method, request.path): answer.short
        for request, answer in zip(requests, answers, strict=True)
    }
    assert {key: found[key] for key in allowed} == dict.fromkeys(allowed, 200)
    # 400: nginx takes a null byte for no request at all.
    unlike = {("GET", "/federate%00"): 400}
    assert {key: found[key] for key in refused} == dict.fromkeys(refused, 403) | unlike
    _assert_upstream_saw(sandbox, "dublin", since, insider, requests, answers, len(allowed))
    assert sandbox.start_times() == started


def test_head_on_federate_gets_nothing(
    insider: str, federation: Door, master_client: Client
) -> None:
    head = Request(door=federation, client=master_client, path=FEDERATE, method="HEAD")
    answer, whole = ask(insider, [head, replace(head, method="GET")])
    assert (answer.short, answer.body) == (403, "")
    assert (whole.short, bool(whole.body)) == (200, True)


def _assert_upstream_saw(
    sandbox: Sandbox,
    server: str,
    since: float,
    namespace: str | None,
    requests: Sequence[Request],
    answers: Sequence[Answer],
    first: int,
) -> None:
    """Fails unless Prometheus was asked for the first so many requests, and for no other."""
    address = network.address_of(namespace) if namespace else sandbox.plan.operator_ip
    rows = host.wait_until(
        lambda: (
            found
            if len(found := [r for r in sandbox.accesses(server, since) if r["client"] == address])
            >= len(requests)
            else None
        ),
        seconds=5,
    )
    assert rows, "nginx did not write down every request"
    assert [row["status"] for row in rows] == [answer.status for answer in answers]
    asked = [row["upstream_status"] != "" for row in rows]
    assert asked == [True] * first + [False] * (len(requests) - first)


# ---- lock 7: Prometheus's own TLS and passwords, on loopback -----------------------------------

EVERY_PATH = [
    ("GET", "/"),
    ("GET", "/query"),
    ("GET", "/graph"),
    ("GET", "/assets/index.js"),
    ("GET", "/metrics"),
    ("GET", FEDERATE),
    ("GET", "/api/v1/query?query=up"),
    ("GET", "/api/v1/status/config"),
    ("POST", "/api/v1/admin/tsdb/snapshot"),
    ("POST", "/api/v1/admin/tsdb/delete_series?match[]=nothing"),
    ("POST", "/api/v1/write"),
    ("GET", "/-/healthy"),
    ("GET", "/-/ready"),
    ("POST", "/-/reload"),
    ("POST", "/-/quit"),
    ("GET", "/debug/pprof/heap"),
    ("GET", "/nowhere"),
]
ADMIN = "/api/v1/admin/tsdb/clean_tombstones"
NO_TLS = "Client sent an HTTP request to an HTTPS server"


@pytest.mark.parametrize("server", ["master", "dublin"])
def test_on_loopback_prometheus_answers_nobody_without_password(
    sandbox: Sandbox, keys: Keyring, server: str
) -> None:
    door = Door(address="127.0.0.1", port=9090, name=_fqdn(server))
    local = keys.own_client(server)
    anonymous = local.but(certificate="", key="", user="", password="")
    started = sandbox.start_times()
    requests = [
        *(Request(door=door, client=anonymous, method=m, path=p) for m, p in EVERY_PATH),
        Request(door=door, client=local.but(user="", password=""), path="/metrics"),
        Request(door=door, client=local.but(password="x" * 48), path="/metrics"),
        Request(door=door, client=local.but(user="nobody"), path="/metrics"),
    ]
    answers = ask(sandbox.namespace(server), requests)
    found = {(r.method, r.path): a.short for r, a in zip(requests, answers, strict=True)}
    assert found == {(r.method, r.path): 401 for r in requests}
    assert {answer.body for answer in answers} == {"Unauthorized\n"}
    _assert_wrong_certificates_are_refused(sandbox, server, keys, door, "/metrics")
    plain = Request(door=replace(door, name=""), client=local, path="/metrics")
    with_password = Request(door=door, client=local, path="/metrics")
    # The admin API is on: it is the locks that keep it from everybody else.
    admin = Request(door=door, client=local, method="PUT", path=ADMIN)
    without_tls, known, tidied = ask(sandbox.namespace(server), [plain, with_password, admin])
    assert (without_tls.short, NO_TLS in without_tls.body) == (400, True)
    assert (known.short, "prometheus_build_info" in known.body) == (200, True)
    assert tidied.short == 204
    assert sandbox.start_times() == started


@pytest.mark.parametrize("server", ["master", "dublin"])
def test_on_loopback_alertmanager_answers_nobody_without_password(
    sandbox: Sandbox, keys: Keyring, server: str
) -> None:
    door = Door(address="127.0.0.1", port=9093, name=_fqdn(server))
    local = keys.own_client(server).but(certificate="", key="")
    status = "/alertmanager/api/v2/status"
    paths = [("GET", status), ("GET", "/alertmanager/"), ("POST", "/alertmanager/-/reload")]
    paths += [("GET", "/alertmanager/metrics"), ("GET", "/-/ready"), ("GET", "/nowhere")]
    for client in (local.but(user="", password=""), local.but(password="x" * 48)):
        requests = [Request(door=door, client=client, method=m, path=p) for m, p in paths]
        answers = ask(sandbox.namespace(server), requests)
        assert [answer.short for answer in answers] == [401] * len(paths)
    plain = Request(door=replace(door, name=""), client=local, path=status)
    without_tls, known = ask(
        sandbox.namespace(server), [plain, Request(door=door, client=local, path=status)]
    )
    assert (without_tls.short, NO_TLS in without_tls.body) == (400, True)
    assert (known.short, '"versionInfo"' in known.body) == (200, True)
    _assert_wrong_certificates_are_refused(sandbox, server, keys, door, status)


def _assert_wrong_certificates_are_refused(
    sandbox: Sandbox, server: str, keys: Keyring, door: Door, path: str
) -> None:
    """Who shows one at all must show a good one, whatever his password."""
    local, name, ours = keys.own_client(server), _fqdn(server), keys.authority
    leaves = {
        "good": issue(name, ours),
        "another CA's": issue(name, forge_authority()),
        "expired": issue(name, ours, starts=-2 * DAY, ends=-DAY / 24),
        "for servers alone": keys.leaf(f"{resource(server)}-nginx"),
    }
    requests = [
        Request(door=door, client=local.but(certificate=leaf.certificate, key=leaf.key), path=path)
        for leaf in leaves.values()
    ]
    good, *bad = ask(sandbox.namespace(server), requests)
    assert good.short == 200
    for answer in bad:
        assert (answer.status, answer.why[:5]) == (0, "TLS: "), answer


@pytest.mark.parametrize("server", ["master", "dublin"])
def test_node_exporter_answers_nobody_without_its_hosts_certificate_and_password(
    sandbox: Sandbox, keys: Keyring, server: str
) -> None:
    name, other = resource(server), "slave-dublin" if server == "master" else "master"
    door = Door(address="127.0.0.1", port=9100, name=_fqdn(server))
    local = keys.own_client(server)
    ours = keys.authority
    strangers = {
        "none": Leaf(certificate="", key="", not_after=0),
        "another host's of our CA": keys.leaf(f"{other}-prometheus"),
        "for servers alone": keys.leaf(f"{name}-node-exporter"),
        "another CA's": issue(_fqdn(server), forge_authority()),
        "expired": issue(_fqdn(server), ours, starts=-2 * DAY, ends=-DAY / 24),
        "the name in the subject only": issue(_fqdn(server), ours, names=["other.example.com"]),
    }
    requests = [
        Request(
            door=door,
            client=local.but(certificate=leaf.certificate, key=leaf.key),
            path="/metrics",
            tls=version,
        )
        for leaf in strangers.values()
        for version in ("1.2", "1.3")
    ]
    answers = ask(sandbox.namespace(server), requests)
    found = {name: answers[2 * n : 2 * n + 2] for n, name in enumerate(strangers)}
    for name, both in found.items():
        for answer in both:
            # Refused in the handshake, before HTTP.
            assert (answer.status, answer.why[:5]) == (0, "TLS: "), (name, answer)
    requests = [
        Request(door=door, client=local, path="/metrics"),
        Request(door=door, client=local.but(user="", password=""), path="/metrics"),
        Request(door=door, client=local.but(password="x" * 48), path="/metrics"),
        Request(door=door, client=local.but(user="nobody"), path="/metrics"),
        Request(door=replace(door, name=""), client=local, path="/metrics"),
    ]
    known, *refused, plain = ask(sandbox.namespace(server), requests)
    assert (known.short, "node_exporter_build_info" in known.body) == (200, True)
    assert [answer.short for answer in refused] == [401, 401, 401]
    assert (plain.short, NO_TLS in plain.body) == (400, True)


# ---- the master's page -------------------------------------------------------------------------


def test_the_masters_page_asks_for_a_password(
    sandbox: Sandbox, page: Door, page_client: Client
) -> None:
    paths = ["/api/v1/query?query=up", "/query", "/targets", "/-/ready", "/assets/index.js"]
    clients = [
        page_client.but(user="", password=""),
        page_client.but(password="x" * 48),
        page_client.but(password=sandbox.outputs["federationPasswords"]["dublin"]),
        page_client.but(user="nobody"),
    ]
    requests = [
        *(Request(door=page, client=clients[0], path=path) for path in paths),
        *(Request(door=page, client=client, path=paths[0]) for client in clients[1:]),
        Request(door=page, client=page_client, path=paths[0]),
        Request(door=replace(page, name=""), client=page_client, path=paths[0]),
    ]
    *refused, known, plain = ask(None, requests, pause=PACE_SECONDS)
    assert [answer.short for answer in refused] == [401] * len(refused)
    assert known.short == 200
    # nginx's answer to plain http on a TLS port.
    assert (plain.short, "The plain HTTP request was sent to HTTPS port" in plain.body) == (
        400,
        True,
    )


def test_the_masters_page_lets_people_read_and_nobody_write(
    sandbox: Sandbox, page: Door, page_client: Client, keys: Keyring
) -> None:
    data = [
        ("GET", "/api/v1/query?query=up"),
        ("POST", "/api/v1/query?query=up"),
        ("GET", "/api/v1/targets"),
        ("GET", "/api/v1/label/job/values"),
        ("GET", "/-/ready"),
    ]
    # As Prometheus itself answers them: Debian's builds, which the sandbox may run, have no pages.
    pages = [("GET", "/"), ("GET", "/query"), ("GET", "/targets"), ("GET", "/assets/index.js")]
    allowed = [*data, *pages]
    refused = [
        ("GET", "/federate?match[]=up"),
        ("GET", "/metrics"),
        ("GET", "/config"),
        ("GET", "/flags"),
        ("GET", "/api/v1/status/config"),
        ("GET", "/api/v1/status/flags"),
        ("GET", "/debug/pprof/heap"),
        ("GET", "/debug/pprof/cmdline"),
        ("POST", "/-/reload"),
        ("PUT", "/-/quit"),
        ("POST", "/-/quit"),
        ("POST", "/api/v1/admin/tsdb/snapshot"),
        ("PUT", "/api/v1/admin/tsdb/snapshot?skip_head=true"),
        ("POST", "/api/v1/admin/tsdb/delete_series?match[]=nothing"),
        ("PUT", "/api/v1/admin/tsdb/clean_tombstones"),
        ("POST", "/api/v1/write"),
        ("POST", "/api/v1/read"),
        ("POST", "/api/v1/otlp/v1/metrics"),
        ("PUT", "/api/v1/query?query=up"),
        ("DELETE", "/api/v1/series?match[]=up"),
        ("POST", "/query"),
        ("POST", "/-/ready"),
        ("POST", "/-/%72eload"),
        ("POST", "//-/reload"),
        # nginx itself would read these as paths that are open.
        ("GET", "/%71uery"),
        ("GET", "//query"),
        ("GET", "/x/../api/v1/query?query=up"),
        ("GET", "/query/../federate"),
        ("GET", "/api/v1/query/../status/config"),
        ("GET", "/assets/..%2fmetrics"),
        ("GET", "/api/v1/label/..%2f..%2f..%2fmetrics/values"),
    ]
    started = sandbox.start_times()
    since = time.time()
    requests = [
        Request(door=page, client=page_client, method=method, path=path)
        for method, path in [*allowed, *refused]
    ]
    answers = ask(None, requests, pause=PACE_SECONDS)
    found = {
        (request.method, request.path): answer.short
        for request, answer in zip(requests, answers, strict=True)
    }
    behind = Door(address="127.0.0.1", port=9090, name=MASTER)
    local = keys.own_client("master")
    own = ask(
        sandbox.namespace("master"),
        [Request(door=behind, client=local, method=method, path=path) for method, path in pages],
    )
    assert {key: found[key] for key in data} == dict.fromkeys(data, 200)
    assert [found[key] for key in pages] == [answer.short for answer in own]
    assert {key: found[key] for key in refused} == dict.fromkeys(refused, 403)
    _assert_upstream_saw(sandbox, "master", since, None, requests, answers, len(allowed))
    assert sandbox.start_times() == started
