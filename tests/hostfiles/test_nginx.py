"""Which requests the master's nginx lets through to Prometheus."""

from __future__ import annotations

import re

import pytest

from hostfiles.files import HostFiles

# What the web UI of Prometheus 3.13.2 asks of its server: seen in a browser, page by page, and
# read in its source where a page asks only while Prometheus starts or when a stream ends.
# https://github.com/prometheus/prometheus/tree/v3.13.2/web/ui/mantine-ui/src
PAGES = [
    "/",
    "/graph",
    "/query",
    "/alerts",
    "/targets",
    "/rules",
    "/service-discovery",
    "/status",
    "/tsdb-status",
    "/alertmanager-discovery",
]
READS = [
    "/-/ready",
    "/api/v1/alertmanagers",
    "/api/v1/format_query",
    "/api/v1/label/__name__/values",
    "/api/v1/metadata",
    "/api/v1/notifications",
    "/api/v1/notifications/live",
    "/api/v1/parse_query",
    "/api/v1/query",
    "/api/v1/query_range",
    "/api/v1/rules",
    "/api/v1/scrape_pools",
    "/api/v1/series",
    "/api/v1/status/buildinfo",
    "/api/v1/status/runtimeinfo",
    "/api/v1/status/tsdb",
    "/api/v1/status/walreplay",
    "/api/v1/targets",
    "/api/v1/targets/relabel_steps",
    "/assets/codicon-B_nZgZYP.ttf",
    "/assets/index-AJC8xPli.js",
    "/assets/index-BvKf2n0L.css",
    "/assets/third-party-licenses.txt",
    "/favicon.svg",
]
# The editor completes what is typed with these.
POSTS = ["/api/v1/labels", "/api/v1/series"]

SHUT = [
    ("GET", "/config"),
    ("GET", "/flags"),
    ("GET", "/api/v1/status/config"),
    ("GET", "/api/v1/status/flags"),
    ("GET", "/api/v1/status/self_metrics"),
    ("GET", "/federate"),
    ("GET", "/metrics"),
    ("GET", "/debug/pprof/heap"),
    ("GET", "/consoles/index.html"),
    ("POST", "/-/reload"),
    ("POST", "/-/quit"),
    ("POST", "/api/v1/admin/tsdb/clean_tombstones"),
    ("POST", "/api/v1/admin/tsdb/delete_series"),
    ("POST", "/api/v1/admin/tsdb/snapshot"),
    ("PUT", "/api/v1/admin/tsdb/snapshot"),
    ("POST", "/api/v1/otlp/v1/metrics"),
    ("POST", "/api/v1/read"),
    ("POST", "/api/v1/write"),
    ("POST", "/api/v1/targets"),
    ("POST", "/query"),
    ("DELETE", "/api/v1/series"),
    ("PUT", "/api/v1/query"),
]

LOCATION = re.compile(r"^ {8}location (=|~)? ?(\S+) \{\n(.*?)^ {8}\}", re.MULTILINE | re.DOTALL)


def lets_through(host: HostFiles, method: str, path: str) -> bool:
    """What nginx would do: an exact location first, then the first expression, then the rest.

    https://nginx.org/en/docs/http/ngx_http_core_module.html#location
    """
    config = next(f.content for f in host.files if f.path == "/etc/nginx/federation.conf")
    locations = LOCATION.findall(config)
    assert len(locations) == config.count("location ")
    bodies = {kind: body for kind, name, body in locations if name == path or not kind}
    for kind, expression, body in locations:
        if kind == "~" and re.search(expression, path):
            bodies.setdefault("~", body)
    body = bodies.get("=") or bodies.get("~") or bodies[""]
    allowed = re.search(r"limit_except ([A-Z ]+) \{", body)
    return "proxy_pass" in body and allowed is not None and method in allowed[1].split()


@pytest.mark.parametrize("path", [*PAGES, *READS])
def test_the_web_ui_gets_what_it_asks_for(whole_master: HostFiles, path: str) -> None:
    assert lets_through(whole_master, "GET", path)


@pytest.mark.parametrize("path", POSTS)
def test_the_editor_may_post_its_questions(whole_master: HostFiles, path: str) -> None:
    assert lets_through(whole_master, "POST", path)


@pytest.mark.parametrize(("method", "path"), SHUT)
def test_nothing_that_writes_or_shows_how_the_host_is_made(
    whole_master: HostFiles, method: str, path: str
) -> None:
    assert not lets_through(whole_master, method, path)
