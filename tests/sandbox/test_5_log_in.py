"""People log in at a provider of OpenID Connect, in a real browser; programs keep their tokens."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from playwright.sync_api import BrowserContext, sync_playwright

from sandbox import host, network, providers
from sandbox.program import plain
from sandbox.progress import silent
from settings import RELEASES
from tests.sandbox.conftest import ROOT, Sandbox
from tests.sandbox.keyring import Keyring, forge_authority, issue
from tests.sandbox.probe import OPEN, Door, Request, ask, knock

MASTER = "prometheus-master.example.com"
QUERY = "/api/v1/query?query=up%7Bsite%3D%22dublin%22%7D"
CHROMIUM = Path("/usr/bin/chromium")
PROVIDER = Path(__file__).with_name("provider.py")
PROVIDER_PORT = 8443
SCREENSHOTS = ROOT / "docs" / "screenshots"
CLIENT_SECRET = "canary-of-the-client-secret-at-the-provider"
PEOPLE = {
    "alice": {"email": "alice@example.com", "email_verified": True, "groups": ["monitoring"]},
    "mallory": {"email": "mallory@example.com", "email_verified": True, "groups": ["sales"]},
}


@dataclass(frozen=True, kw_only=True)
class Provider:
    """Where people log in, the certificate that it shows, and whose that is."""

    address: str
    certificate: str
    ca: str

    @property
    def issuer(self) -> str:
        return f"https://{self.address}:{PROVIDER_PORT}"


@pytest.fixture(scope="module")
def provider(sandbox: Sandbox) -> Iterator[Provider]:
    """A provider on the internet, with a CA of its own."""
    name = "provider"
    namespace = sandbox.stranger(name)
    address = network.address_of(namespace)
    authority = forge_authority()
    leaf = issue("login.example.net", authority, address=address)
    order = {
        "address": address,
        "port": PROVIDER_PORT,
        "certificate": leaf.certificate,
        "key": leaf.key,
        "people": PEOPLE,
    }
    argv = ["nsenter", f"--net=/run/netns/{namespace}", sys.executable, str(PROVIDER)]
    running = subprocess.Popen(argv, stdin=subprocess.PIPE, text=True)
    assert running.stdin
    try:
        running.stdin.write(f"{json.dumps(order)}\n")
        running.stdin.flush()
        door = (address, PROVIDER_PORT)
        assert host.wait_until(lambda: knock(namespace, [door])[door] == OPEN, seconds=20)
        yield Provider(address=address, certificate=leaf.certificate, ca=authority.certificate)
    finally:
        running.stdin.close()
        running.wait(10)
        network.remove_stranger(sandbox.plan, name)


@pytest.fixture(scope="module")
def with_people(sandbox: Sandbox, provider: Provider) -> Iterator[Sandbox]:
    """The shared sandbox, with log-ins at the provider; its settings are put back at the end."""
    before = dict(sandbox.config)
    oauth2 = {
        "issuer": provider.issuer,
        "clientId": "federation",
        "clientSecret": CLIENT_SECRET,
        "allowedGroups": ["monitoring"],
        "ca": provider.ca,
        "cidrs": [f"{provider.address}/32"],
    }
    sandbox.set(master=sandbox.get("master") | {"oauth2": oauth2})
    sandbox.up()
    yield sandbox
    sandbox.config = before
    sandbox.up("--no-verify")


@pytest.fixture
def browser(
    with_people: Sandbox, provider: Provider, keys: Keyring, tmp_path: Path
) -> Iterator[BrowserContext]:
    """A browser that knows nobody yet. It takes the two servers' own certificates and no other."""
    host.install(silent, {"chromium": str(CHROMIUM)})
    pins = [_pin(keys.leaf("master-nginx").certificate), _pin(provider.certificate)]
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path / "profile",
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                f"--host-resolver-rules=MAP {MASTER} {with_people.public_ip('master')}",
                f"--ignore-certificate-errors-spki-list={','.join(pins)}",
            ],
        )
        yield context
        context.close()


def _pin(certificate: str) -> str:
    key = x509.load_pem_x509_certificate(certificate.encode()).public_key()
    spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return base64.b64encode(hashlib.sha256(spki).digest()).decode()


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


def test_a_person_of_the_group_logs_in_and_sees_what_was_federated(
    with_people: Sandbox, provider: Provider, browser: BrowserContext
) -> None:
    since = time.time()
    tab = browser.new_page()
    wanted = f"https://{MASTER}/query?g0.expr=up&g0.tab=1"
    tab.goto(wanted)
    assert tab.url.startswith(provider.issuer)
    _screenshot(browser, "log-in-at-the-provider")
    tab.get_by_role("button", name="alice").click()
    # Back at the page that was asked for, with its query.
    assert tab.url == wanted, tab.inner_text("body")[:500]
    tab.goto(f"https://{MASTER}{QUERY}")
    federated = json.loads(tab.inner_text("body"))["data"]["result"]
    assert {row["metric"]["instance"] for row in federated if row["metric"]["job"] == "CoreSystems"}
    _screenshot(browser, "logged-in-and-federated-data")
    (cookie,) = (c for c in browser.cookies() if c.get("name") == "__Host-federation")
    assert cookie.get("httpOnly")
    assert cookie.get("secure")
    assert cookie.get("sameSite") == "Lax"
    rows = with_people.accesses("master", since)
    told = {(row["user"], row["path"], row["status"]) for row in rows}
    assert ("alice@example.com", "/api/v1/query", 200) in told
    assert ("", "/oauth2/callback", 302) in told
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
    _screenshot(browser, "refused-without-the-group")
    refused = tab.goto(f"https://{MASTER}{QUERY}")
    assert refused is not None
    assert refused.status == 401


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


def _screenshot(browser: BrowserContext, name: str) -> None:
    """One for the docs, where there is none: a test run changes no file of the repository."""
    path = SCREENSHOTS / f"{name}.png"
    if not path.exists():
        tab = browser.pages[-1]
        tab.set_viewport_size({"width": 1000, "height": 600})
        tab.screenshot(path=path)
