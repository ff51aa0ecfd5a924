"""The master's door as it is rendered: who is known there, and by what."""

from __future__ import annotations

import contextlib
import json
import re
import tomllib
from collections.abc import Callable, Iterator

import pytest
import yaml

from hostfiles import master
from hostfiles.files import HostFiles
from hostfiles.model import MasterSecrets, MasterServer, OAuth2
from sandbox.releases import Pin, ensure_releases, tool
from settings import RELEASES
from tests.hostfiles.conftest import Authority, Root, ToolImage
from tests.hostfiles.test_nginx import LOCATION, lets_through
from tests.hostfiles.test_real_tools import broken, check

CALLERS = "/etc/nginx/callers.map"
CONFIG = "/etc/oauth2-proxy/oauth2-proxy.cfg"


@pytest.fixture
def oauth2(authority: Authority) -> OAuth2:
    return OAuth2(
        issuer="https://login.example.net:8443",
        client_id="federation",
        allowed_groups=("monitoring",),
        email_domains=(),
        scope="",
        ca=authority.certificate,
    )


@pytest.fixture
def oauth2_master(
    master_server: Callable[..., MasterServer],
    master_secrets: Callable[..., MasterSecrets],
    oauth2: OAuth2,
) -> HostFiles:
    server = master_server(oauth2=oauth2)
    secrets = master_secrets(remote=(), client_secret="C" * 40, cookie_secret="K" * 32)
    return master.host_files(server).with_files(master.secret_files(server, secrets))


def content(host: HostFiles, path: str) -> str:
    return next(file.content for file in host.files if file.path == path)


def test_nginx_knows_callers_by_digests_that_no_two_hosts_share(
    master_server: Callable[..., MasterServer], master_secrets: Callable[..., MasterSecrets]
) -> None:
    found = {}
    for fqdn in ("one.example.com", "two.example.com"):
        host = master.secret_files(master_server(fqdn=fqdn), master_secrets())
        (callers,) = (file for file in host if file.path == CALLERS)
        assert callers.secret
        found[fqdn] = dict(re.findall(r'^"(.+)" "([A-Za-z0-9_-]{22})";$', callers.content, re.M))
        assert set(found[fqdn]) == {"admin/", "/grafana"}
    one, two = found.values()
    assert not set(one.values()) & set(two.values())


def test_a_tokens_own_text_is_in_no_file(whole_master: HostFiles) -> None:
    assert not [file.path for file in whole_master.files if "T" * 48 in file.content]


def test_prometheus_on_a_master_knows_nginx_and_nobody_who_comes_to_it(
    whole_master: HostFiles, whole_slave: HostFiles
) -> None:
    for host, expected in ((whole_master, "nginx"), (whole_slave, "prometheus-admin")):
        users = yaml.safe_load(content(host, "/etc/prometheus/web.yml"))["basic_auth_users"]
        assert list(users) == [expected, "local"]


def test_on_a_master_nobodys_own_authorisation_goes_on(
    whole_master: HostFiles, whole_slave: HostFiles
) -> None:
    config = content(whole_master, "/etc/nginx/federation.conf")
    assert "include upstream.conf;" in config
    assert content(whole_master, "/etc/nginx/upstream.conf").startswith(
        'proxy_set_header Authorization "Basic '
    )
    # A location with headers of its own would inherit none of those.
    assert re.findall(r"^ {8,}proxy_set_header", config, re.MULTILINE) == []
    assert "/etc/nginx/upstream.conf" not in {file.path for file in whole_slave.files}


def test_with_oauth2_every_answer_is_asked_for_and_no_password_is_known(
    oauth2_master: HostFiles,
) -> None:
    config = content(oauth2_master, "/etc/nginx/federation.conf")
    assert "auth_basic" not in config
    assert config.count("auth_request /oauth2/auth;") == 1
    assert config.count("auth_request off;") == 2
    assert content(oauth2_master, "/etc/nginx/users.htpasswd") == ""
    # What goes to oauth2-proxy takes neither nginx's own authorisation along nor the client's.
    own = [body for _, _, body in LOCATION.findall(config) if "http://oauth2_proxy;" in body]
    assert len(own) == 3
    assert all('proxy_set_header Authorization "";' in body for body in own)


def test_oauth2_proxy_is_told_whom_to_let_in_and_holds_no_secret_in_its_configuration(
    oauth2_master: HostFiles,
) -> None:
    text = content(oauth2_master, CONFIG)
    config = tomllib.loads(text)
    assert config["allowed_groups"] == ["monitoring"]
    assert config["oidc_issuer_url"] == "https://login.example.net:8443"
    assert config["redirect_url"] == "https://prometheus-master.example.com/oauth2/callback"
    assert config["http_address"] == "127.0.0.1:4180"
    assert config["request_logging"] is False
    assert not [key for key in config if "insecure" in key or "skip_verify" in key]
    secret = {file.path: file for file in oauth2_master.files if file.secret}
    assert secret["/etc/oauth2-proxy/client.secret"].content == "C" * 40
    assert secret["/etc/oauth2-proxy/cookie.secret"].content == "K" * 32
    for file in oauth2_master.files:
        if not file.secret:
            assert "C" * 40 not in file.content
            assert "K" * 32 not in file.content


def test_without_oauth2_there_is_nothing_of_it(whole_master: HostFiles) -> None:
    assert "oauth2" not in json.dumps([file.path for file in whole_master.files])
    assert "oauth2-proxy.service" not in {unit.name for unit in whole_master.units}
    assert "oauth2-proxy" not in {release.name for release in whole_master.releases}


ALERTMANAGER = [
    ("GET", "/alertmanager/", True),
    ("GET", "/alertmanager/script.js", True),
    ("GET", "/alertmanager/lib/bootstrap-4.6.2-dist/css/bootstrap.min.css", True),
    ("GET", "/alertmanager/api/v2/status", True),
    ("GET", "/alertmanager/api/v2/alerts/groups", True),
    ("GET", "/alertmanager/api/v2/silences", True),
    ("POST", "/alertmanager/api/v2/silences", True),
    ("DELETE", "/alertmanager/api/v2/silence/8f7a-11", True),
    ("POST", "/alertmanager/api/v2/alerts", False),
    ("POST", "/alertmanager/-/reload", False),
    ("GET", "/alertmanager/-/ready", False),
    ("GET", "/alertmanager/metrics", False),
    ("GET", "/alertmanager/debug/pprof/heap", False),
    ("DELETE", "/alertmanager/api/v2/silences", False),
]


@pytest.mark.parametrize(("method", "path", "expected"), ALERTMANAGER)
def test_of_alertmanager_people_get_the_page_and_silences(
    oauth2_master: HostFiles, method: str, path: str, expected: bool
) -> None:
    assert lets_through(oauth2_master, method, path) is expected


def test_without_alertmanager_nothing_of_it_is_let_through(
    master_server: Callable[..., MasterServer], master_secrets: Callable[..., MasterSecrets]
) -> None:
    server = master_server(alerting=None)
    host = master.host_files(server).with_files(master.secret_files(server, master_secrets()))
    for method, path, _ in ALERTMANAGER:
        assert not lets_through(host, method, path)


# ---- the real tools --------------------------------------------------------------------------


@pytest.fixture
def oauth2_root(tool_image: ToolImage, tool_root: Root) -> Root:
    """The tools, with an oauth2-proxy as the sandbox has it."""
    pin = RELEASES["oauth2Proxy"]
    wanted = Pin(name=pin.name, version=pin.version, sha256=pin.sha256, url=pin.url)
    ensure_releases(_quietly, [wanted])
    target = tool_root.upper / "opt/releases/oauth2-proxy-7.15.4/oauth2-proxy"
    target.parent.mkdir(parents=True)
    target.write_bytes(tool("oauth2-proxy").read_bytes())
    target.chmod(0o755)
    return tool_root


@contextlib.contextmanager
def _quietly(_: str) -> Iterator[None]:
    yield


@pytest.mark.machines
@pytest.mark.parametrize(
    "name", ["nginx's federation.conf", "oauth2-proxy.cfg", "oauth2-proxy's unit"]
)
def test_every_check_passes_with_oauth2(
    oauth2_root: Root, oauth2_master: HostFiles, name: str
) -> None:
    done = check(oauth2_root, oauth2_master, name)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.machines
@pytest.mark.parametrize(
    ("name", "path", "old", "new", "words"),
    [
        ("oauth2-proxy.cfg", CONFIG, "allowed_groups", "allowed_grups", "allowed_grups"),
        ("oauth2-proxy.cfg", CONFIG, "client_id", "#client_id", "client-id"),
        ("oauth2-proxy.cfg", CONFIG, '"client.secret"', '"gone.secret"', "gone.secret"),
        (
            "oauth2-proxy.cfg",
            "/etc/oauth2-proxy/cookie.secret",
            "K" * 32,
            "K" * 31,
            "cookie_secret",
        ),
        (
            "oauth2-proxy's unit",
            "/etc/systemd/system/oauth2-proxy.service",
            "Type=exec",
            "Typo=exec",
            "Typo",
        ),
        ("nginx's federation.conf", CALLERS, '"/grafana"', "/grafana }", "callers.map"),
    ],
)
def test_what_is_wrong_at_the_door_is_refused_in_the_tools_own_words(
    oauth2_root: Root,
    oauth2_master: HostFiles,
    name: str,
    path: str,
    old: str,
    new: str,
    words: str,
) -> None:
    done = check(oauth2_root, broken(oauth2_master, path, old, new), name)
    assert done.returncode != 0
    assert words in done.stdout + done.stderr
    for secret in ("C" * 40, "K" * 31):
        assert secret not in done.stdout + done.stderr
