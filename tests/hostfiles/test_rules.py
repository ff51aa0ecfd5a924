"""The alerting rules: who has which, how long they wait, and that each fires and clears."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from hostfiles import master, node_exporter, prometheus, rules
from hostfiles.model import Acme, MasterServer, OAuth2, SlaveServer
from tests.hostfiles.conftest import Authority, ToolImage, release

TESTS = Path(__file__).parents[1] / "rules"
FILES = sorted(rules.FOLDER.glob("*.yml"))


def flat(text: str) -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]


def alerts(path: Path) -> list[dict[str, Any]]:
    return flat(path.read_text())


def test_servers_load_what_they_can_know(
    slave_server: Callable[..., SlaveServer], master_server: Callable[..., MasterServer]
) -> None:
    both = {"host.yml", "prometheus.yml", "server.yml"}
    assert set(rules.contents(slave_server(alerting=None))) == {*both, "slave.yml"}
    assert set(rules.contents(master_server(alerting=None))) == {*both, "master.yml"}
    assert set(rules.contents(master_server())) == {*both, "master.yml", "alertmanager.yml"}
    server = slave_server(alerting=None, rule_files={"own.yml": ""})
    assert prometheus.configuration(server)["rule_files"] == [
        *("alerts/host.yml", "alerts/prometheus.yml", "alerts/server.yml", "alerts/slave.yml"),
        "rules/own.yml",
    ]


def test_at_the_usual_intervals_rules_are_as_they_are_written(
    slave_server: Callable[..., SlaveServer],
) -> None:
    for name, text in rules.contents(slave_server()).items():
        assert text == (rules.FOLDER / name).read_text()


def test_minutes_follow_the_longer_interval_and_hours_do_not(
    slave_server: Callable[..., SlaveServer],
) -> None:
    quick = rules.contents(slave_server(scrape_interval="1s", evaluation_interval="2s"))
    assert (
        'expr: increase(prometheus_rule_evaluation_failures_total{site=""}[40s])'
        in (quick["prometheus.yml"])
    )
    waits = {a["alert"]: a.get("for") for text in quick.values() for a in flat(text)}
    assert waits["TargetDown"] == "16s"
    assert waits["HostDiskFilling"] == "1h"
    assert "[3h]" in quick["prometheus.yml"]
    slow = rules.contents(slave_server(scrape_interval="1m", evaluation_interval="15s"))
    assert {a["alert"]: a.get("for") for a in flat(slow["prometheus.yml"])}["TargetDown"] == "480s"


# The distribution's own, and what runs at deliveries and tells by failing them.
UNWATCHED = {"systemd-journald.service", "nginx-package.service"}


def test_each_unit_that_a_server_has_is_watched(
    master_server: Callable[..., MasterServer], authority: Authority
) -> None:
    ca = authority.certificate
    server = master_server(
        grafana=release("grafana", "12.1.0"),
        oauth2=OAuth2(
            issuer="https://login.example.net",
            client_id="federation",
            allowed_groups=("monitoring",),
            email_domains=(),
            scope="",
            ca="system",
        ),
        acme=Acme(
            email="",
            server="https://acme.example.net",
            port=443,
            challenge="http-01",
            roots=ca,
            private=True,
        ),
    )
    host = master.host_files(server)
    service = next(file for file in host.files if file.path == node_exporter.SERVICE)
    found = re.search(r"--collector.systemd.unit-include=(\S+)", service.content)
    assert found
    names = {unit.name for unit in host.units}
    assert {"oauth2-proxy.service", "grafana.service", "nginx.service"} < names
    assert {name for name in names if not re.fullmatch(found[1], name)} == UNWATCHED


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_alert_says_what_it_is_and_is_shown_to_fire_for_the_fault_alone(path: Path) -> None:
    tests = yaml.safe_load((TESTS / f"{path.stem}.test.yml").read_text())["tests"]
    names = sorted(alert["alert"] for alert in alerts(path))
    assert sorted(test["name"] for test in tests) == names
    for alert in alerts(path):
        assert alert["labels"]["severity"] in {"critical", "warning", "none"}
        assert set(alert["annotations"]) == {"summary", "description"}
        (test,) = (test for test in tests if test["name"] == alert["alert"])
        if alert["alert"] == "Watchdog":
            continue
        told = [bool(step.get("exp_samples")) for step in test["promql_expr_test"]]
        assert told in ([False, True, False], [True, False]), alert["alert"]
        for step in test["promql_expr_test"]:
            for sample in step.get("exp_samples", []):
                named = re.search('instance="[a-z ]*bad[a-z ]*"', sample["labels"])
                assert named or alert["alert"] == "PrometheusNotIngesting", "it has nothing to name"
        others = "".join(series["series"] for series in test["input_series"])
        assert 'instance="good"' in others


@pytest.mark.machines
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_promtool_sees_each_alert_fire_and_clear(tool_image: ToolImage, path: Path) -> None:
    from sandbox.releases import tool

    argv = [tool("promtool"), "test", "rules", TESTS / f"{path.stem}.test.yml"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
