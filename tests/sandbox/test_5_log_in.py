"""People log in at a provider of OpenID Connect, in a real browser; programs keep their tokens."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext

from sandbox import providers
from sandbox.program import plain
from settings import RELEASES
from tests.sandbox.conftest import Sandbox, silence
from tests.sandbox.keyring import Keyring
from tests.sandbox.people import (
    CLIENT_SECRET,
    MASTER,
    Provider,
    browser_of,
    provider_for,
    screenshot,
)
from tests.sandbox.probe import Door, Request, ask

QUERY = "/api/v1/query?query=up%7Bsite%3D%22dublin%22%7D"
SILENCES = "/alertmanager/api/v2/silences"
# As Alertmanager's own page does it.
SILENCE_IN_THE_PAGE = """async ([path, body]) => (await fetch(path, {
    method: "POST", headers: {"Content-Type": "application/json"}, body})).status"""


@pytest.fixture(scope="module")
def provider(sandbox: Sandbox) -> Iterator[Provider]:
    with provider_for(sandbox) as running:
        yield running


@pytest.fixture(scope="module")
def with_people(sandbox: Sandbox, provider: Provider) -> Iterator[Sandbox]:
    """The shared sandbox, with log-ins at the provider; its settings are put back at the end."""
    before = dict(sandbox.config)
    sandbox.set(master=sandbox.get("master") | {"oauth2": provider.setting})
    # So that an alert need not wait for a minute.
    sandbox.set(scrapeInterval="2s", evaluationInterval="2s")
    sandbox.up()
    yield sandbox
    sandbox.config = before
    sandbox.up("--no-verify")


@pytest.fixture
def browser(with_people: Sandbox, provider: Provider, tmp_path: Path) -> Iterator[BrowserContext]:
    with browser_of(with_people, provider, tmp_path / "profile") as running:
        yield running


def answer_to(page: Door, keys: Keyring, path: str, *headers: str) -> str:
    """All that comes back, with its headers."""
    lines = [f"GET {path} HTTP/1.1", f"Host: {MASTER}", "Connection: close", *headers, "", ""]
    request = Request(door=page, client=keys.client(None), raw="\r\n".join(lines))
    return ask(None, [request])[0].body


def test_who_is_not_logged_in_is_sent_to_the_provider_and_gets_no_data(
    with_people: Sandbox, provider: Provider, page: Door, keys: Keyring
) -> None:
    sent = answer_to(page, keys, "/query?g0.expr=up&g0.tab=1")
    assert sent.startswith("HTTP/1.1 302 ")
    where = re.search(r"^Location: (.+)\r$", sent, re.MULTILINE)
    assert where is not None
    assert where[1].startswith(f"{provider.issuer}/oauth2/authorize?")
    assert "code_challenge_method=S256" in where[1]
    assert f"redirect_uri=https%3A%2F%2F{MASTER}%2Foauth2%2Fcallback" in where[1]
    assert CLIENT_SECRET not in sent
    # The address that a notification has, too.
    sent = answer_to(page, keys, "/alertmanager/")
    assert f"Location: {provider.issuer}/oauth2/authorize?" in sent
    pair = base64.b64encode(b"prometheus-admin:" + b"x" * 48).decode()
    for headers in (
        [],
        ["Cookie: __Host-federation=forged"],
        ["X-Auth-Request-Email: alice@example.com", "X-Forwarded-User: alice"],
        ["X-Forwarded-Uri: /oauth2/callback", "X-Original-URL: /ping"],
        ["User-Agent: kube-probe/1.0"],
        [f"Authorization: Basic {pair}"],
        ["Authorization: Bearer grafana_wrong"],
    ):
        assert answer_to(page, keys, QUERY, *headers).startswith("HTTP/1.1 401 "), headers
    # Nothing of oauth2-proxy but what a log-in needs.
    for path in ("/oauth2/auth", "/oauth2/userinfo", "/oauth2/start", "/ping", "/ready"):
        refused = answer_to(page, keys, path)
        assert re.match(r"HTTP/1\.1 40[134] ", refused), (path, refused[:100])


def test_programs_come_in_by_their_tokens_all_the_same(
    with_people: Sandbox, page: Door, keys: Keyring
) -> None:
    token = with_people.outputs["masterTokens"]["grafana"]
    found = answer_to(page, keys, QUERY, f"Authorization: Bearer {token}")
    assert found.startswith("HTTP/1.1 200 ")
    assert '"site":"dublin"' in found
    program = keys.client(None).but(token=token)
    wish = Request(door=page, method="POST", path=SILENCES, body=silence("by nobody we know"))
    looks, silences, unknown = ask(
        None,
        [
            Request(door=page, client=program, path=SILENCES),
            replace(wish, client=program),
            replace(wish, client=keys.client(None)),
        ],
    )
    assert (looks.short, silences.short, unknown.short) == (200, 403, 401)


def test_a_person_of_the_group_logs_in_and_sees_what_was_federated(
    with_people: Sandbox, provider: Provider, browser: BrowserContext
) -> None:
    since = time.time()
    tab = browser.new_page()
    wanted = f"https://{MASTER}/query?g0.expr=up&g0.tab=1"
    tab.goto(wanted)
    assert tab.url.startswith(provider.issuer)
    screenshot(tab, "log-in-at-the-provider")
    tab.get_by_role("button", name="alice").click()
    # Back at the page that was asked for, with its query.
    assert tab.url == wanted, tab.inner_text("body")[:500]
    tab.goto(f"https://{MASTER}{QUERY}")
    federated = json.loads(tab.inner_text("body"))["data"]["result"]
    assert {row["metric"]["instance"] for row in federated if row["metric"]["job"] == "CoreSystems"}
    silenced = tab.evaluate(SILENCE_IN_THE_PAGE, [SILENCES, silence("by alice")])
    assert silenced == 200
    (cookie,) = (c for c in browser.cookies() if c.get("name") == "__Host-federation")
    assert cookie.get("httpOnly")
    assert cookie.get("secure")
    assert cookie.get("sameSite") == "Lax"
    rows = with_people.accesses("master", since)
    told = {(row["user"], row["path"], row["status"]) for row in rows}
    assert ("alice@example.com", "/api/v1/query", 200) in told
    assert ("", "/oauth2/callback", 302) in told
    assert ("alice@example.com", SILENCES, 200) in told
    # Neither the code of the log-in nor the cookie stand in any journal.
    journal = with_people.script("master", f"journalctl --all --output=export --since=@{since:.0f}")
    for secret in ("code=", "state=", cookie.get("value", "?")):
        assert secret not in journal


def test_a_person_of_no_such_group_is_refused(
    with_people: Sandbox, browser: BrowserContext
) -> None:
    tab = browser.new_page()
    tab.goto(f"https://{MASTER}/query")
    with tab.expect_response(re.compile(r"/oauth2/callback\?")) as answer:
        tab.get_by_role("button", name="mallory").click()
    assert answer.value.status == 403
    assert RELEASES["oauth2Proxy"].version not in tab.inner_text("body")
    screenshot(tab, "refused-without-the-group")
    refused = tab.goto(f"https://{MASTER}{QUERY}")
    assert refused is not None
    assert refused.status == 401


def test_an_oauth2_proxy_that_is_stopped_is_told(
    with_people: Sandbox, page: Door, keys: Keyring
) -> None:
    alert = 'ALERTS{alertname="ServiceDown",name="oauth2-proxy.service",alertstate="firing"}'
    with_people.script("master", "systemctl stop oauth2-proxy")
    try:
        # Nobody is let in for that.
        assert answer_to(page, keys, QUERY).startswith("HTTP/1.1 500 ")
        with_people.wait(alert)
    finally:
        with_people.script("master", "systemctl start oauth2-proxy")
    with_people.wait(f"absent({alert})")
    assert answer_to(page, keys, QUERY).startswith("HTTP/1.1 401 ")


def test_what_oauth2_proxy_knows_is_in_its_own_files_alone(with_people: Sandbox) -> None:
    records = with_people.state.records.values()
    (cookie,) = (
        plain(record.outputs["result"])
        for record in records
        if record.type == providers.RANDOM_PASSWORD and record.name == "master-cookie-password"
    )
    grep = "grep --recursive --text --fixed-strings --files-with-matches --no-messages --file=-"
    found = with_people.inside(
        "master",
        *(*grep.split(), "/etc", "/opt", "/var", "/run", "/tmp", "/root", "/home"),  # noqa: S108
        stdin=f"{CLIENT_SECRET}\n{cookie}\n",
        check=False,
    )
    trees = {re.sub(r"^/opt/federation/trees/[0-9a-f.]+", "", path) for path in found.splitlines()}
    assert trees == {"/etc/oauth2-proxy/client.secret", "/etc/oauth2-proxy/cookie.secret"}
    told = with_people.inside("master", "journalctl", "--all", "--output=export").encode()
    # Processes of the machines are processes of this one.
    for part in ("cmdline", "environ"):
        for path in Path("/proc").glob(f"[0-9]*/{part}"):
            with contextlib.suppress(OSError):
                told += path.read_bytes()
    assert b"oauth2-proxy.cfg" in told
    assert not [secret for secret in (CLIENT_SECRET, cookie) if secret.encode() in told]
    stat = "stat --dereference --format='%U:%G %a' /etc/oauth2-proxy/*.secret"
    assert with_people.script("master", stat).split("\n")[:2] == ["root:oauth2-proxy 640"] * 2


def test_oauth2_proxy_is_hardened_and_listens_on_loopback_alone(with_people: Sandbox) -> None:
    unit = "oauth2-proxy.service"
    told = with_people.inside("master", "systemd-analyze", "security", "--no-pager", unit)
    exposure = re.search(r"Overall exposure level for \S+: ([0-9.]+)", told)
    assert exposure is not None, told
    assert float(exposure[1]) <= 2.0
    sockets = with_people.script("master", "ss -Hltnp | grep oauth2-proxy").split()
    assert sockets[3] == "127.0.0.1:4180"
