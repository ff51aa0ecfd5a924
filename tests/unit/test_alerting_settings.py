"""Notifications: Alertmanager's own language in, secrets out of it, and nothing unsafe."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

import settings
from hostfiles.alertmanager import SECRETS_FOLDER
from sandbox import providers
from settings import RELEASES, Settings, SettingsError, check
from tests.unit.conftest import NAMESPACE, run_program
from tests.unit.test_settings import environment

CANARY = "canary"
SECRETS = "receivers-0"
ALERTING: dict[str, Any] = {
    "global": {
        "smtp_smarthost": "mail.example.net:587",
        "smtp_from": "alerts@example.com",
        "smtp_auth_username": "alerts",
        "smtp_auth_password": f"{CANARY}-smtp",
    },
    "route": {"receiver": "team", "routes": [{"matchers": ['severity="critical"']}]},
    "receivers": [
        {
            "name": "team",
            "email_configs": [{"to": "team@example.com"}],
            "webhook_configs": [
                {
                    "url": f"https://198.51.100.77:8443/{CANARY}-hook",
                    "http_config": {"basic_auth": {"username": "u", "password": f"{CANARY}-web"}},
                }
            ],
            "pagerduty_configs": [{"routing_key": f"{CANARY}-pager"}],
            "slack_configs": [{"api_url": f"https://hooks.slack.com/{CANARY}", "channel": "#x"}],
        }
    ],
    "cidrs": {"mail.example.net": ["203.0.113.0/28"]},
}


def with_alerting(change: Callable[[dict[str, Any]], Any] = lambda _: None) -> Settings:
    given = environment() | {"alerting": copy.deepcopy(ALERTING)}
    change(given["alerting"])
    return check(given)


def test_secrets_become_files_and_the_rest_stays_as_it_is() -> None:
    chosen = with_alerting().alerting
    assert chosen is not None
    public = chosen.alerting(RELEASES["alertmanager"]).config
    assert CANARY not in str(public)
    assert CANARY not in str(chosen)
    assert public["route"] == ALERTING["route"]
    assert public["global"]["smtp_auth_password_file"] == (
        f"{SECRETS_FOLDER}/global-smtp_auth_password"
    )
    receiver = public["receivers"][0]
    assert receiver["slack_configs"][0]["channel"] == "#x"
    auth = receiver["webhook_configs"][0]["http_config"]["basic_auth"]
    assert auth == {
        "username": "u",
        "password_file": f"{SECRETS_FOLDER}/{SECRETS}-webhook_configs-0-http_config-basic_auth-"
        "password",
    }
    assert {path.removeprefix(f"{SECRETS_FOLDER}/"): v for path, v in chosen.secrets().items()} == {
        "global-smtp_auth_password": f"{CANARY}-smtp",
        f"{SECRETS}-webhook_configs-0-url": f"https://198.51.100.77:8443/{CANARY}-hook",
        f"{SECRETS}-webhook_configs-0-http_config-basic_auth-password": f"{CANARY}-web",
        f"{SECRETS}-pagerduty_configs-0-routing_key": f"{CANARY}-pager",
        f"{SECRETS}-slack_configs-0-api_url": f"https://hooks.slack.com/{CANARY}",
    }


def test_firewalls_open_to_receivers_alone() -> None:
    chosen = with_alerting()
    assert chosen.notifications() == ((587, "203.0.113.0/28"), (8443, "198.51.100.77/32"))
    assert check(environment()).notifications() == ()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a.pop("cidrs"), "cidrs: {mail.example.net: [<network>]}"),
        (lambda a: a["cidrs"].update({"x.example.net": ["203.0.113.0/28"]}), "no notification"),
        (lambda a: a["cidrs"].update({"mail.example.net": []}), "give it at least one entry"),
        (lambda a: a.update(recievers=[]), "there is no such setting"),
        (lambda a: a.pop("route"), "is missing"),
        (lambda a: a.update(receivers=[]), "give it at least one entry"),
        (lambda a: a["global"].update(smtp_smarthost="mail.example.net"), "has no port"),
        (lambda a: a["global"].update(smtp_require_tls=False), "send mail in clear"),
        (
            lambda a: a["receivers"][0]["webhook_configs"][0].update(url=f"http://h/{CANARY}"),
            "could read what is sent over http",
        ),
        (
            lambda a: a["receivers"][0]["webhook_configs"][0].update(url="https://{{ .x }}/"),
            "no https address with a plain host",
        ),
        (
            lambda a: a["receivers"][0]["webhook_configs"][0].update(url_file="/etc/shadow"),
            "names a file in receivers[0].webhook_configs[0].url_file",
        ),
        (
            lambda a: a["global"].update(
                http_config={"tls_config": {"insecure_skip_verify": True}}
            ),
            "would trust anyone",
        ),
        (
            lambda a: a["receivers"][0].update(
                sns_configs=[{"sigv4": {"secret_key": f"{CANARY}-aws"}}]
            ),
            "holds a secret in receivers[0].sns_configs[0].sigv4.secret_key",
        ),
        (
            lambda a: a["receivers"][0].update(new_configs=[{"token": f"{CANARY}-new"}]),
            "holds a secret in receivers[0].new_configs[0].token",
        ),
        (lambda a: a.update(receivers=f"https://{CANARY}"), "alerting.receivers"),
    ],
)
def test_what_is_unsafe_or_unreachable_is_refused_without_showing_secrets(
    change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        with_alerting(change)
    assert words in str(caught.value)
    assert f"{NAMESPACE}:alerting" in str(caught.value)
    assert CANARY not in str(caught.value)


def test_the_program_delivers_them_as_secrets_and_opens_both_firewalls() -> None:
    made = run_program(alerting=ALERTING).recorder
    for host in ("master", "slave-dublin"):
        opened = {
            (rule.inputs["fromPort"], rule.inputs["cidrIpv4"])
            for rule in made.of_type(providers.EGRESS_RULE)
            if rule.name.startswith(host) and rule.inputs["description"] == "Notifications"
        }
        assert opened == {(587, "203.0.113.0/28"), (8443, "198.51.100.77/32")}
    names = {resource.name for resource in made.resources}
    assert {"master-alertmanager-certificate", "slave-dublin-alertmanager-certificate"} <= names
    before = run_program().recorder
    assert not [resource for resource in before.resources if "alertmanager" in resource.name]
    rules = before.of_type(providers.EGRESS_RULE)
    assert not [rule for rule in rules if rule.inputs["description"] == "Notifications"]


def test_another_release_of_it_may_be_chosen() -> None:
    own = {"version": "0.35.1", "sha256": "0" * 64}
    chosen = check(environment() | {"releases": {"alertmanager": own}})
    assert chosen.release("alertmanager").version == "0.35.1"
    assert settings.RELEASES["alertmanager"].version == "0.34.0"
