"""Who may come in at the master's door, as settings say it and as the program makes it."""

from __future__ import annotations

import base64
import gzip
from typing import Any

import pytest

from sandbox import providers
from sandbox.program import Secret, plain
from settings import SettingsError, check
from tests.unit.conftest import run_program
from tests.unit.test_program import bundle_files, strings
from tests.unit.test_settings import PUBLIC, environment

SECRET = "canary-client-secret"
OAUTH2 = {
    "issuer": "https://login.example.net",
    "clientId": "federation",
    "clientSecret": SECRET,
    "allowedGroups": ["monitoring"],
}


def with_oauth2(**change: Any) -> dict[str, Any]:
    given = environment()
    given["master"]["oauth2"] = {k: v for k, v in (OAUTH2 | change).items() if v is not None}
    return given


def test_a_provider_is_a_name_a_secret_and_a_group() -> None:
    master = check(with_oauth2(ca=PUBLIC)).master
    assert master is not None
    assert master.oauth2 is not None
    assert master.oauth2.port == 443
    assert master.oauth2.public().allowed_groups == ("monitoring",)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"issuer": "http://login.example.net"}, r"issuer: .*is not an https address"),
        ({"issuer": "https://login.example.net?x=1"}, r"issuer: .*is not an https address"),
        ({"clientSecret": " "}, r"clientSecret: \(not shown\) is empty"),
        ({"allowedGroups": None}, r"would let in everybody .*name allowedGroups"),
        ({"emailDomains": ["*"]}, r"emailDomains\[0\]: '\*' is not a domain name"),
        ({"issuer": "https://login.example.net:8443"}, r"port 8443, .*name the networks"),
        ({"cidrs": ["203.0.113.7/33"]}, r"cidrs\[0\]: .*is not an IPv4 network"),
        ({"ca": "/etc/ca.pem"}, r"ca: .*is no certificate"),
        ({"groups": ["x"]}, r"groups: there is no such setting"),
    ],
)
def test_a_broken_provider_is_refused_by_name(change: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words) as refused:
        check(with_oauth2(**change))
    assert SECRET not in str(refused.value)


def test_people_come_in_by_one_way_only() -> None:
    given = with_oauth2()
    given["master"]["password"] = "x" * 30
    with pytest.raises(SettingsError, match="has both oauth2 and a password"):
        check(given)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["grafana", "grafana"], "names grafana 2 times"),
        (["Grafana"], r"tokens\[0\]: 'Grafana'"),
        (["a_b"], r"tokens\[0\]: 'a_b'"),
    ],
)
def test_a_broken_list_of_tokens_is_refused(tokens: list[str], words: str) -> None:
    given = environment()
    given["master"]["tokens"] = tokens
    with pytest.raises(SettingsError, match=words):
        check(given)


def test_each_token_is_of_its_own_and_names_its_program() -> None:
    found = run_program(master={"host": "prometheus-master", "tokens": ["grafana", "ci"]})
    assert isinstance(found.outputs["masterTokens"], Secret)
    tokens = plain(found.outputs["masterTokens"])
    assert {name: token.partition("_")[0] for name, token in tokens.items()} == {
        "grafana": "grafana",
        "ci": "ci",
    }
    assert all(len(token.partition("_")[2]) == 48 for token in tokens.values())
    callers = bundle_files(found, "master")["/etc/nginx/callers.map"]
    assert callers["secret"]
    assert callers["content"].count("\n") == 4, "two users and two tokens"
    fewer = run_program(master={"host": "prometheus-master", "tokens": ["ci"]})
    assert plain(fewer.outputs["masterTokens"]) == {"ci": tokens["ci"]}, "the other one stays"
    assert '"/grafana"' not in bundle_files(fewer, "master")["/etc/nginx/callers.map"]["content"]


def test_with_a_provider_there_is_no_password_and_its_secrets_are_in_the_bundle_alone() -> None:
    oauth2 = {**OAUTH2, "issuer": "https://login.example.net:8443", "cidrs": ["192.0.2.7/32"]}
    found = run_program(master={"host": "prometheus-master", "oauth2": oauth2})
    assert not {"masterPassword", "masterNextPassword"} & found.outputs.keys()
    assert "user" not in found.outputs["master"]
    files = bundle_files(found, "master")
    assert files["/etc/oauth2-proxy/client.secret"]["content"] == SECRET
    assert files["/etc/oauth2-proxy/cookie.secret"]["content"]
    cookie = found.recorder.one(providers.RANDOM_PASSWORD, "master-cookie-password")
    assert cookie.inputs["length"] == 32, "as oauth2-proxy wants it"
    for resource in found.recorder.resources:
        for text, secret in strings(resource.inputs):
            assert secret or SECRET not in text, resource.urn
    instance = found.recorder.one(providers.INSTANCE, "master-1")
    user_data = gzip.decompress(base64.b64decode(plain(instance.inputs["userDataBase64"])))
    assert SECRET.encode() not in user_data
    egress = {
        (rule.inputs["fromPort"], rule.inputs["cidrIpv4"])
        for rule in found.recorder.of_type(providers.EGRESS_RULE)
        if rule.name.startswith("master-")
    }
    assert (8443, "192.0.2.7/32") in egress


def test_the_password_of_the_page_goes_no_further_than_nginx() -> None:
    found = run_program()
    web = bundle_files(found, "master")["/etc/prometheus/web.yml"]["content"]
    assert "prometheus-admin" not in web
    assert "nginx:" in web
