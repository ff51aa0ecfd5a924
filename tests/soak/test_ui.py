"""The real pages of Prometheus and Alertmanager behind the log-in, in a real browser."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlencode, urlsplit

import pytest
from playwright.sync_api import BrowserContext, ConsoleMessage, Page, Response, expect

from settings import RELEASES
from tests.sandbox.conftest import CORES, Sandbox
from tests.sandbox.people import MASTER, browser_of, provider_for, screenshot
from tests.sandbox.test_5_upgrade import running, setting
from tests.soak import pages
from tests.soak.conftest import own_sandbox

FEDERATED = 'up{job="CoreSystems"}'
RANGE = "5m"
SHOWS = {
    "/alerts": "Watchdog",
    "/targets": "https://prometheus-slave.example.com:9095/federate",
    "/rules": "FederationDown",
    "/service-discovery": "federate",
    "/status": "Build information",
    "/tsdb-status": "TSDB Head Status",
    "/alertmanager-discovery": "https://127.0.0.1:9093",
}
REFUSED = {"/config": "Configuration", "/flags": "Command-line flags"}
QUERIES = 40
# A page tells of what its policy refused, whatever the console makes of that.
REPORT = """addEventListener("securitypolicyviolation", violation => console.error(
    `refused by policy: ${violation.effectiveDirective} ${violation.blockedURI}`));"""


@dataclass(kw_only=True)
class Visit:
    """A tab, what was answered in it, and what it complained of."""

    tab: Page
    answers: list[tuple[str, int]] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, browser: BrowserContext) -> Visit:
        visit = cls(tab=browser.new_page())
        visit.tab.set_viewport_size({"width": 1000, "height": 800})
        visit.tab.add_init_script(REPORT)
        visit.tab.on("console", visit.console)
        visit.tab.on("pageerror", lambda error: visit.complaints.append(f"error: {error}"))
        visit.tab.on("response", visit.response)
        visit.tab.on("request", lambda request: visit.hosts.add(urlsplit(request.url).netloc))
        return visit

    def console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(f"{message.type}: {message.text}")

    def response(self, response: Response) -> None:
        self.answers.append((urlsplit(response.url).path, response.status))

    def open(self, path: str, **parameters: str) -> None:
        self.tab.goto(f"https://{MASTER}{path}?{urlencode(parameters)}")

    def sees(self, text: str) -> None:
        expect(self.tab.get_by_text(text).first).to_be_visible(timeout=20_000)


@pytest.fixture(scope="module")
def with_pages() -> Iterator[Sandbox]:
    """A sandbox whose Prometheus and Alertmanager have their pages; not behind a log-in yet."""
    prometheus = pages.prometheus(RELEASES["prometheus"].version)
    alertmanager = pages.alertmanager()
    with own_sandbox() as sandbox:
        sandbox.set(
            releases={"prometheus": setting(prometheus), "alertmanager": setting(alertmanager)}
        )
        sandbox.up()
        assert running(sandbox, "master", "prometheus") == f"prometheus-{prometheus.version}"
        yield sandbox


@pytest.fixture(scope="module")
def logged_in(
    with_pages: Sandbox, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[BrowserContext]:
    """A browser in which alice has logged in at the provider."""
    sandbox = with_pages
    with provider_for(sandbox) as provider:
        sandbox.set(master=sandbox.get("master") | {"oauth2": provider.setting})
        sandbox.up()
        with browser_of(sandbox, provider, tmp_path_factory.mktemp("browser")) as browser:
            tab = browser.new_page()
            tab.goto(f"https://{MASTER}/")
            assert tab.url.startswith(provider.issuer)
            tab.get_by_role("button", name="alice").click()
            expect(tab).to_have_url(f"https://{MASTER}/query")
            tab.close()
            yield browser


@pytest.fixture
def visit(logged_in: BrowserContext) -> Iterator[Visit]:
    """A tab; whatever a test does in it, all came from the master, and nothing was cut off."""
    visit = Visit.of(logged_in)
    yield visit
    visit.tab.close()
    assert visit.hosts == {MASTER}
    assert 429 not in {status for _, status in visit.answers}


def test_the_query_page_shows_what_was_federated(visit: Visit) -> None:
    query = {"g0.expr": FEDERATED, "g0.range_input": RANGE}
    visit.open("/query", **query, **{"g0.tab": "table"})
    for core in CORES:
        visit.sees(f"{core}.example.internal:9100")
    screenshot(visit.tab, "logged-in-and-federated-data")
    visit.open("/query", **query, **{"g0.tab": "graph"})
    expect(visit.tab.locator(".uplot canvas")).to_be_visible()
    for core in CORES:
        visit.sees(f"{core}.example.internal:9100")
    screenshot(visit.tab, "graph-of-federated-data")
    visit.open("/query", **query, **{"g0.tab": "explain"})
    visit.sees("How to use the Explain view")
    assert visit.complaints == []


def test_the_editor_completes_what_is_typed(visit: Visit) -> None:
    visit.open("/query")
    visit.tab.locator(".cm-content").click()
    visit.tab.keyboard.type("federation_sa")
    expect(visit.tab.locator(".cm-tooltip-autocomplete")).to_be_visible()
    assert visit.complaints == []


@pytest.mark.parametrize("path", SHOWS)
def test_each_page_is_drawn(visit: Visit, path: str) -> None:
    visit.open(path)
    visit.sees(SHOWS[path])
    if path == "/targets":
        screenshot(visit.tab, "targets-of-the-master")
    assert visit.complaints == []


@pytest.mark.parametrize("path", REFUSED)
def test_what_shows_how_the_host_is_made_is_refused_from_within_the_pages_too(
    visit: Visit, path: str
) -> None:
    visit.open(path)
    assert visit.answers == [(path, 403)]
    visit.open("/query")
    visit.tab.get_by_role("button", name="Status").first.click()
    visit.tab.get_by_role("menuitem", name=REFUSED[path]).click()
    visit.sees("Error querying page data")
    visit.sees("Forbidden")
    assert visit.answers[-1] == (f"/api/v1/status{path}", 403)


def test_many_queries_at_once_are_all_answered(
    visit: Visit, results: Callable[[str, Mapping[str, str]], None]
) -> None:
    # A tree asks for each node: for each of these, and for each sum of two of them.
    tree = " + ".join([FEDERATED] * (QUERIES // 2 + 1))
    panels = {f"g{n}.expr": f"{FEDERATED} + {n}" for n in range(QUERIES)}
    seconds: dict[str, float] = {}
    for what, query, answered, times in (
        ("a tree", {"g0.expr": tree, "g0.show_tree": "1"}, f"{len(CORES)} results", QUERIES + 1),
        ("panels", panels, f"Result series: {len(CORES)}", QUERIES),
    ):
        begin = time.monotonic()
        visit.open("/query", **query)
        expect(visit.tab.get_by_text(answered)).to_have_count(times, timeout=60_000)
        seconds[what] = time.monotonic() - begin
    assert visit.complaints == []
    results(
        "Pages of Prometheus and Alertmanager",
        {f"{QUERIES} queries, {what}": f"{took:.1f} s" for what, took in seconds.items()},
    )


def test_alertmanagers_pages_show_alerts_and_silence_them(visit: Visit) -> None:
    tab = visit.tab
    visit.open("/alertmanager/")
    visit.sees('alertname="Watchdog"')
    screenshot(tab, "alerts-of-the-master")
    tab.locator('a[href^="#/silences/new?"]').last.click()
    tab.locator(".form-group", has_text="Creator").locator("input").fill("alice")
    tab.locator("textarea").fill("for a test")
    tab.get_by_role("button", name="Create").click()
    visit.sees("for a test")
    tab.get_by_role("button", name="Expire").click()
    tab.get_by_role("button", name="Confirm").click()
    visit.sees("expired")
    for page, text in (("silences", "No silences found"), ("status", "Version Information")):
        tab.goto(f"https://{MASTER}/alertmanager/#/{page}")
        visit.sees(text)
    assert visit.complaints == []
