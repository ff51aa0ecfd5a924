"""The master's door: who comes in by what, what floods and tricks do to it, and what is written
down of all that. With test_2_locks.py, which is about the locks on 9095."""

from __future__ import annotations

import base64
import json
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from sandbox import host
from tests.sandbox.conftest import Sandbox, no_scrape_lost, silence
from tests.sandbox.keyring import Keyring
from tests.sandbox.probe import Answer, Client, Door, Request, ask

MASTER = "prometheus-master.example.com"
SLAVE = "prometheus-slave.example.com"
QUERY = "/api/v1/query?query=up"
FEDERATE = "/federate?match[]=up"
# Slower than nginx's 10 requests a second.
PACE_SECONDS = 0.11
FLOOD_SECONDS = 60
NOBODY = "nobody-we-know"
FLOOD_CLIENTS = 20


@pytest.fixture(scope="module")
def program(sandbox: Sandbox, keys: Keyring) -> Client:
    return keys.client(None).but(token=sandbox.outputs["masterTokens"]["grafana"])


def accesses(
    sandbox: Sandbox, server: str, since: float, address: str, count: int
) -> list[dict[str, Any]]:
    """What nginx wrote down of one client since a moment, once it is so much."""

    def rows() -> list[dict[str, Any]] | None:
        found = [row for row in sandbox.accesses(server, since) if row["client"] == address]
        return found if len(found) >= count else None

    found = host.wait_until(rows, seconds=5)
    assert found, "nginx did not write down every request"
    return found


# Where each program counts its requests, and those that the host makes itself all the time.
COUNTERS = {
    "prometheus": (9090, "/metrics", "prometheus_http_requests_total{", ("/metrics",)),
    "alertmanager": (
        *(9093, "/alertmanager/metrics", "alertmanager_http_request_duration_seconds_count{"),
        ("/metrics", "/api/v2/alerts"),
    ),
}


def served(
    sandbox: Sandbox, keys: Keyring, server: str, name: str, program: str = "prometheus"
) -> dict[str, float]:
    """How many requests a program itself has counted, by what it took them for."""
    port, path, counter, own = COUNTERS[program]
    door = Door(address="127.0.0.1", port=port, name=name)
    metrics = Request(door=door, client=keys.own_client(server), path=path)
    (answer,) = ask(sandbox.namespace(server), [metrics])
    assert answer.short == 200
    counts: dict[str, float] = {}
    for line in answer.body.splitlines():
        if line.startswith(counter):
            labels, _, value = line.rpartition(" ")
            counts[labels] = float(value)
    assert counts
    handlers = tuple(f'handler="{handler}"' for handler in own)
    return {n: v for n, v in counts.items() if not any(handler in n for handler in handlers)}


# ---- tokens ------------------------------------------------------------------------------------

REFUSED = [
    ("GET", "/federate?match[]=up"),
    ("GET", "/metrics"),
    ("GET", "/config"),
    ("GET", "/api/v1/status/config"),
    ("GET", "/debug/pprof/heap"),
    ("POST", "/-/reload"),
    ("POST", "/-/quit"),
    ("PUT", "/-/quit"),
    ("POST", "/api/v1/admin/tsdb/snapshot"),
    ("POST", "/api/v1/admin/tsdb/delete_series?match[]=nothing"),
    ("PUT", "/api/v1/admin/tsdb/clean_tombstones"),
    ("POST", "/api/v1/write"),
    ("POST", "/api/v1/read"),
    ("DELETE", "/api/v1/series?match[]=up"),
]


def test_a_token_gets_data_and_nothing_that_writes_or_shows_how_the_host_is_made(
    sandbox: Sandbox, keys: Keyring, page: Door, program: Client
) -> None:
    allowed = [
        ("GET", QUERY),
        ("POST", QUERY),
        ("GET", "/api/v1/label/site/values"),
        ("GET", "/-/ready"),
    ]
    before = served(sandbox, keys, "master", MASTER)
    requests = [
        Request(door=page, client=program, method=method, path=path)
        for method, path in [*REFUSED, *allowed]
    ]
    answers = ask(None, requests, pause=PACE_SECONDS)
    found = {(r.method, r.path): a.short for r, a in zip(requests, answers, strict=True)}
    assert found == dict.fromkeys(REFUSED, 403) | dict.fromkeys(allowed, 200)
    assert "dublin" in answers[-2].body, "what was federated"
    after = served(sandbox, keys, "master", MASTER)
    new = {labels: n - before.get(labels, 0) for labels, n in after.items()}
    assert sum(new.values()) == len(allowed), new


def test_only_the_token_itself_is_let_in(
    sandbox: Sandbox, keys: Keyring, page: Door, program: Client
) -> None:
    token, other = (sandbox.outputs["masterTokens"][name] for name in ("grafana", "reports"))
    name, _, secret = token.partition("_")
    wrong = {
        "none": program.but(token=""),
        "a letter less": program.but(token=token[:-1]),
        "another letter": program.but(token=f"{token[:-1]}{'a' if token[-1] != 'a' else 'b'}"),
        "another's name": program.but(token=f"reports_{secret}"),
        "without its name": program.but(token=secret),
        "of nobody": program.but(token=f"nobody_{secret}"),
        "as a password": program.but(user=name, password=token, token=""),
        "in other letters": program.but(token=f"{name}_{secret.swapcase()}"),
    }
    clients = [*wrong.values(), program, program.but(token=other)]
    requests = [Request(door=page, client=client, path=QUERY) for client in clients]
    # Slower than bad log-ins are forgotten.
    *refused, good, another = ask(None, requests, pause=1.05)
    found = {name: answer.short for name, answer in zip(wrong, refused, strict=True)}
    assert found == dict.fromkeys(wrong, 401)
    assert (good.short, another.short) == (200, 200)


def test_a_token_is_revoked_alone(sandbox: Sandbox, page: Door, program: Client) -> None:
    before, master = dict(sandbox.config), sandbox.get("master")
    reports = program.but(token=sandbox.outputs["masterTokens"]["reports"])
    requests = [Request(door=page, client=client, path=QUERY) for client in (reports, program)]
    started = sandbox.start_times()
    try:
        sandbox.set(master=master | {"tokens": ["grafana"]})
        printed = sandbox.up("--no-verify")
        assert "delete RandomPassword master-token-reports-password" in printed
        assert [answer.short for answer in ask(None, requests)] == [401, 200]
    finally:
        sandbox.config = before
        sandbox.up("--no-verify")
    # One of the same name is another token.
    assert sandbox.outputs["masterTokens"]["reports"] != reports.token
    assert [answer.short for answer in ask(None, requests)] == [401, 200]
    assert sandbox.start_times() == started


# ---- Alertmanager ------------------------------------------------------------------------------

ALERTMANAGER = "/alertmanager/api/v2"
SILENCES = f"{ALERTMANAGER}/silences"
LOOKS = [
    *("/alertmanager/", SILENCES),
    *(f"{ALERTMANAGER}/{name}" for name in ("status", "receivers", "alerts", "alerts/groups")),
]
SHUT = [
    ("GET", "/alertmanager"),
    ("GET", "/alertmanager/metrics"),
    ("GET", "/alertmanager/-/ready"),
    ("POST", "/alertmanager/-/reload"),
    ("GET", "/alertmanager/debug/pprof/heap"),
    ("POST", "/alertmanager/"),
    ("POST", f"{ALERTMANAGER}/alerts"),
    ("PUT", SILENCES),
    ("DELETE", SILENCES),
    ("POST", f"{ALERTMANAGER}/silence/0"),
    # What nginx itself would read as something that is open.
    ("GET", "/query/../alertmanager/"),
    ("GET", "/%61lertmanager/"),
    ("GET", "//alertmanager/"),
    ("GET", f"{ALERTMANAGER}/%73ilences"),
    # What Alertmanager might read as something that is shut.
    ("GET", "/alertmanager/assets/../metrics"),
    ("GET", "/alertmanager/assets/..%2fmetrics"),
    ("GET", "/alertmanager/lib/%2e%2e/metrics"),
    ("POST", f"{ALERTMANAGER}/silence/../../../-/reload"),
]


def test_people_silence_alerts_and_programs_look_at_them(
    sandbox: Sandbox, keys: Keyring, page: Door, page_client: Client, program: Client
) -> None:
    inside = Door(address="127.0.0.1", port=9093, name=MASTER)
    own = Request(door=inside, client=keys.own_client("master"), path=LOOKS[0])
    # As Alertmanager itself answers: Debian's build may have no page.
    first = ask(sandbox.namespace("master"), [own])[0].short
    for client in (page_client, program):
        looks = [Request(door=page, client=client, path=path) for path in LOOKS]
        answers = ask(None, looks, pause=PACE_SECONDS)
        assert [answer.short for answer in answers] == [first, *[200] * (len(LOOKS) - 1)]
    wish = Request(
        door=page, client=page_client, method="POST", path=SILENCES, body=silence("by a person")
    )
    (answer,) = ask(None, [wish])
    assert answer.short == 200, answer.body
    made = f"{ALERTMANAGER}/silence/{json.loads(answer.body)['silenceID']}"
    wrong = page_client.but(password="x" * 48)
    refused = {
        "a program": (replace(wish, client=program), 403),
        "a program that would end it": (
            Request(door=page, client=program, method="DELETE", path=made),
            403,
        ),
        "another site's page": (
            replace(
                wish,
                raw=f"POST {SILENCES} HTTP/1.1\r\nHost: {MASTER}\r\nConnection: close\r\n"
                f"Authorization: {_basic(page_client)}\r\nSec-Fetch-Site: cross-site\r\n"
                "Content-Type: application/json\r\n"
                f"Content-Length: {len(wish.body)}\r\n\r\n{wish.body}",
            ),
            403,
        ),
        "nobody": (replace(wish, client=page_client.but(user="")), 401),
        "nobody who looks": (
            Request(door=page, client=page_client.but(user=""), path=LOOKS[0]),
            401,
        ),
        "a bad password": (replace(wish, client=wrong), 401),
        "a bad password that would end it": (
            Request(door=page, client=wrong, method="DELETE", path=made),
            401,
        ),
        "a bad token": (replace(wish, client=program.but(token=f"grafana_{'x' * 48}")), 401),
    }
    answers = ask(None, [request for request, _ in refused.values()], pause=PACE_SECONDS)
    found = {name: answer.short for name, answer in zip(refused, answers, strict=True)}
    assert found == {name: status for name, (_, status) in refused.items()}
    look = Request(door=page, client=program, path=made)
    end = Request(door=page, client=page_client, method="DELETE", path=made)
    still, ended, over = ask(None, [look, end, look], pause=PACE_SECONDS)
    assert json.loads(still.body)["status"]["state"] == "active"
    assert ended.short == 200
    assert json.loads(over.body)["status"]["state"] == "expired"


def test_nothing_else_of_alertmanager_is_reached(
    sandbox: Sandbox, keys: Keyring, page: Door, page_client: Client, program: Client
) -> None:
    before = served(sandbox, keys, "master", MASTER, "alertmanager")
    for client in (page_client, program):
        requests = [Request(door=page, client=client, method=m, path=p) for m, p in SHUT]
        answers = ask(None, requests, pause=PACE_SECONDS)
        found = dict(zip(SHUT, (answer.short for answer in answers), strict=True))
        assert found == dict.fromkeys(SHUT, 403)
    assert served(sandbox, keys, "master", MASTER, "alertmanager") == before
    # What is let through is counted there.
    assert ask(None, [Request(door=page, client=program, path=SILENCES)])[0].short == 200
    assert served(sandbox, keys, "master", MASTER, "alertmanager") != before


# ---- limits ------------------------------------------------------------------------------------


def test_a_page_of_many_requests_is_served_and_a_program_that_asks_too_much_is_told_so(
    page: Door, program: Client, page_client: Client
) -> None:
    asked = Request(door=page, client=page_client, path=QUERY)
    # As a browser does it: six connections, each waiting for its answer.
    browsed = ask(None, [asked] * 40, at_once=6)
    assert [answer.short for answer in browsed] == [200] * 40
    hurried = ask(None, [replace(asked, client=program)] * 60, at_once=60)
    assert {answer.short for answer in hurried} == {200, 429}
    # One's limit is not another's.
    assert ask(None, [asked])[0].short == 200


# ---- tricks ------------------------------------------------------------------------------------

_BODY = "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
TRICKS = {
    "an encoded slash": "GET /query/..%2fmetrics HTTP/1.1",
    "an encoded dot segment": "GET /query/%2e%2e/metrics HTTP/1.1",
    "a dot segment": "GET /query/../metrics HTTP/1.1",
    "a dot segment behind an asset": "GET /assets/../metrics HTTP/1.1",
    "an encoded letter": "POST /-/%72eload HTTP/1.1",
    "twice encoded": "GET /query/%252e%252e/metrics HTTP/1.1",
    "overlong UTF-8": "GET /query/%c0%ae%c0%ae/metrics HTTP/1.1",
    "a doubled slash": "GET //metrics HTTP/1.1",
    "a backslash": "GET /query\\..\\metrics HTTP/1.1",
    "a parameter in the path": "GET /query;/../metrics HTTP/1.1",
    "an encoded question mark": "GET /metrics%3f HTTP/1.1",
    "a null byte": "GET /metrics%00 HTTP/1.1",
    "an encoded line end": "GET /query%0d%0aX:%20y/../metrics HTTP/1.1",
    "another case": "GET /Metrics HTTP/1.1",
    "an absolute address": f"GET https://{MASTER}/metrics HTTP/1.1",
    "an absolute address of loopback": "GET https://127.0.0.1:9090/metrics HTTP/1.1",
    "CONNECT": "CONNECT 127.0.0.1:9090 HTTP/1.1",
    "TRACE": "TRACE /metrics HTTP/1.1",
    "a method of no one's": "RELOAD /-/reload HTTP/1.1",
    "HTTP/2 by its preface": "PRI * HTTP/2.0",
    "another method by a header": "GET /-/reload HTTP/1.1\r\nX-HTTP-Method-Override: POST",
    "another path by a header": "GET /metrics HTTP/1.1\r\nX-Original-URL: /query",
    "another path by another header": "GET /metrics HTTP/1.1\r\nX-Rewrite-URL: /query",
    "two hosts": f"GET /query HTTP/1.1\r\nHost: {MASTER}",
    "two lengths": "POST /api/v1/query HTTP/1.1\r\nContent-Length: 0\r\nContent-Length: 5",
    "a length and chunks": (
        f"POST /api/v1/query HTTP/1.1\r\nContent-Length: {len(_BODY) + 5}\r\n"
        "Transfer-Encoding: chunked"
    ),
    "unknown chunks": "POST /api/v1/query HTTP/1.1\r\nTransfer-Encoding: xchunked",
    "chunks with a blank": "POST /api/v1/query HTTP/1.1\r\nTransfer-Encoding : chunked",
    "chunks twice": (
        "POST /api/v1/query HTTP/1.1\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked"
    ),
    "a folded header": "GET /query HTTP/1.1\r\nX-A: b\r\n\tc: d",
    "64 KB of header": f"GET /query HTTP/1.1\r\nX-Long: {'a' * 65536}",
    "64 KB of path": f"GET /query?{'a' * 65536} HTTP/1.1",
    "a line end in a header's value": "GET /metrics HTTP/1.1\r\nX-A: b\nX-C: d",
}


@pytest.mark.parametrize("server", ["master", "dublin"])
def test_no_trick_reaches_prometheus(
    sandbox: Sandbox,
    keys: Keyring,
    page: Door,
    federation: Door,
    page_client: Client,
    master_client: Client,
    server: str,
) -> None:
    if server == "master":
        namespace, door, client, good = None, page, page_client, "/query"
    else:
        namespace, door, client, good = (
            sandbox.namespace("master"),
            federation,
            master_client,
            "/federate",
        )
    # Everything else about them is right.
    head = f"Host: {door.name}\r\nAuthorization: {_basic(client)}\r\nConnection: close\r\n"
    tricks = {
        name: f"{line.replace('/query', good).replace(MASTER, door.name)}\r\n{head}\r\n"
        for name, line in TRICKS.items()
    }
    requests = [
        # With the end of a chunked body, and a request behind it.
        Request(door=door, client=client, raw=f"{trick}0\r\n\r\n{_BODY}")
        for trick in tricks.values()
    ]
    control = Request(door=door, client=client, path="/-/ready" if server == "master" else FEDERATE)
    before = served(sandbox, keys, server, door.name)
    answers = ask(namespace, requests, at_once=4, pause=4 * PACE_SECONDS)
    after = served(sandbox, keys, server, door.name)
    found = dict(zip(TRICKS, answers, strict=True))
    for name, answer in found.items():
        assert answer.short in (400, 403, 405, 414, 501) or answer.status == 0, (name, answer)
        assert answer.body.count("HTTP/1.1 ") <= 1, (name, "something smuggled was answered")
    # The master's own scrapes go on.
    scrape = "" if server == "master" else 'handler="/federate"'
    new = {
        labels: n - before.get(labels, 0)
        for labels, n in after.items()
        if n != before.get(labels, 0) and not (scrape and scrape in labels)
    }
    assert new == {}
    # What is let through is counted there.
    (answer,) = ask(namespace, [control])
    assert answer.short == 200
    assert served(sandbox, keys, server, door.name) != after


def _basic(client: Client) -> str:
    pair = f"{client.user}:{client.password}".encode()
    return f"Basic {base64.b64encode(pair).decode()}"


# ---- what is written down ----------------------------------------------------------------------


def test_each_kind_of_access_is_written_down_and_no_secret_with_it(
    sandbox: Sandbox,
    page: Door,
    federation: Door,
    page_client: Client,
    program: Client,
    master_client: Client,
) -> None:
    query = "/api/v1/query?query=canary_in_the_query"
    password, token = "canary-password-" + "x" * 32, "canarytoken_" + "x" * 48
    kinds = {
        "a person": (Request(door=page, client=page_client, path=query), 200),
        "a bad password": (
            Request(door=page, client=page_client.but(password=password), path=query),
            401,
        ),
        "nobody": (
            Request(door=page, client=page_client.but(user="", password=""), path=query),
            401,
        ),
        "a program": (Request(door=page, client=program, path=query), 200),
        "a bad token": (Request(door=page, client=program.but(token=token), path=query), 401),
        "a refused path": (Request(door=page, client=page_client, path="/metrics?canary"), 403),
        "a refused method": (Request(door=page, client=program, method="PUT", path=query), 403),
    }
    since = time.time()
    answers = ask(None, [request for request, _ in kinds.values()], pause=PACE_SECONDS)
    assert [answer.short for answer in answers] == [status for _, status in kinds.values()]
    found = accesses(sandbox, "master", since, sandbox.plan.operator_ip, len(kinds))[-len(kinds) :]
    rows = dict(zip(kinds, found, strict=True))
    for name, row in rows.items():
        request, status = kinds[name]
        assert row["status"] == status
        assert row["site"] == "master"
        assert row["method"] == request.method
        assert row["path"] == request.path.partition("?")[0]
        assert abs(row["bytes"]) > 0
        assert row["seconds"] < 5
        assert row["time"].startswith("20")
    users = {name: (row["user"], row["token"]) for name, row in rows.items()}
    assert users == {
        "a person": ("prometheus-admin", ""),
        "a bad password": ("prometheus-admin", ""),
        "nobody": ("", ""),
        "a program": ("", "grafana"),
        "a bad token": ("", ""),
        "a refused path": ("prometheus-admin", ""),
        "a refused method": ("", "grafana"),
    }
    inside = sandbox.namespace("master")
    since = time.time()
    good = Request(door=federation, client=master_client, path=FEDERATE)
    other = master_client.but(user="canary-user", password=password)
    bad, burst = replace(good, client=other), replace(good, client=other)
    ask(inside, [good, bad, *[burst] * 20])
    address = sandbox.public_ip("master")
    slave = accesses(sandbox, "dublin", since, address, 22)
    told = {(row["user"], row["status"], row["path"], row["site"]) for row in slave}
    assert {
        ("prometheus-admin", 200, "/federate", "dublin"),
        ("canary-user", 401, "/federate", "dublin"),
        ("canary-user", 429, "/federate", "dublin"),
    } <= told
    assert all(MASTER in row["certificate"] for row in slave)
    # No journal of either server has a query, a token or a password.
    for server in ("master", "dublin"):
        journal = sandbox.script(
            server, f"journalctl --all --output=export --since=@{since - 60:.0f}"
        )
        for canary in (
            "canary_in_the_query",
            password,
            token,
            "canarytoken",
            program.token,
            "match[]",
        ):
            assert canary not in journal, (server, canary)


def test_no_answer_tells_which_nginx_it_is_and_all_ask_the_browser_to_be_strict(
    page: Door, page_client: Client
) -> None:
    head = f"Host: {MASTER}\r\nAuthorization: {_basic(page_client)}\r\nConnection: close\r\n\r\n"
    lines = ("GET /-/ready HTTP/1.1", "GET /metrics HTTP/1.1", "GET / HTTP/0.1")
    requests = [Request(door=page, client=page_client, raw=f"{line}\r\n{head}") for line in lines]
    for answer in ask(None, requests):
        assert "nginx/" not in answer.body
        assert "Debian" not in answer.body
    ready, refused, _ = ask(None, requests)
    for answer in (ready, refused):
        for header in (
            "Strict-Transport-Security: max-age=",
            "Content-Security-Policy: default-src 'none'",
            "X-Content-Type-Options: nosniff",
            "X-Frame-Options: DENY",
            "Referrer-Policy: no-referrer",
        ):
            assert header in answer.body


# ---- a flood, last: it uses up what strangers may try ------------------------------------------


def flood(namespace: str | None, guesses: Sequence[Request]) -> list[Answer]:
    """Bad log-ins, 20 clients at once and 20 in a second, for a minute."""
    wanted = FLOOD_CLIENTS * FLOOD_SECONDS
    requests = [guesses[number % len(guesses)] for number in range(wanted)]
    return ask(namespace, requests, at_once=FLOOD_CLIENTS, pause=1)


def test_a_flood_of_bad_log_ins_hinders_nobody_and_tells_nothing_of_users(
    sandbox: Sandbox, page: Door, federation: Door, page_client: Client, master_client: Client
) -> None:
    since = time.time()
    inside = sandbox.namespace("master")
    doors: dict[str, tuple[str | None, Request]] = {
        # From the operator's address, and from the master's own with its certificate.
        "443": (None, Request(door=page, client=page_client, path=QUERY)),
        "9095": (inside, Request(door=federation, client=master_client, path=FEDERATE)),
    }
    servers = {"443": "master", "9095": "dublin"}
    addresses = {"443": sandbox.plan.operator_ip, "9095": sandbox.public_ip("master")}
    # An odd number of guesses in turn: each client tries each.
    guesses = {
        name: [
            replace(good, client=good.client.but(password="x" * 48)),
            replace(good, client=good.client.but(user=NOBODY, password="x" * 48)),
            replace(good, client=good.client.but(password="y" * 48)),
        ]
        for name, (_, good) in doors.items()
    }
    with ThreadPoolExecutor(2 * len(doors)) as pool:
        floods = {
            name: pool.submit(flood, namespace, guesses[name])
            for name, (namespace, _) in doors.items()
        }
        # Each on a new connection, as one that was never there before.
        ordinary = {
            name: pool.submit(ask, namespace, [good] * (4 * FLOOD_SECONDS - 20), pause=0.22)
            for name, (namespace, good) in doors.items()
        }
    for name in doors:
        answers = ordinary[name].result()
        assert {answer.short for answer in answers} == {200}, name
        seconds = sorted(answer.seconds for answer in answers)
        p99 = seconds[int(len(seconds) * 0.99)]
        assert p99 < 0.1, (name, seconds[-10:])
        bad = floods[name].result()
        statuses = [answer.short for answer in bad]
        assert set(statuses) == {401, 429}, name
        assert statuses.count(401) <= 10 + 1.1 * FLOOD_SECONDS + 10, name
        # A user that there is, and one that there is not: neither costs nginx a millisecond, and
        # the hash of a password two.
        rows = accesses(sandbox, servers[name], since, addresses[name], len(bad))
        for user in (doors[name][1].client.user, NOBODY):
            times = [row["seconds"] for row in rows if (row["user"], row["status"]) == (user, 401)]
            assert len(times) > 10, (name, user)
            assert statistics.median(times) < 0.001, (name, user, times)
    no_scrape_lost(sandbox, 'up{job="federate",site="dublin"}', since, 15)
