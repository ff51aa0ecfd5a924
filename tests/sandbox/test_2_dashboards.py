"""Every panel of every dashboard has something to show, and a Grafana of the user's gets it."""

from __future__ import annotations

import json
import ssl
from typing import Any
from urllib.parse import urlencode

import httpx
import pytest
import yaml

from hostfiles import grafana
from sandbox.host import wait_until
from tests.dashboards import FILES, queries, read
from tests.sandbox.conftest import CORES, Sandbox
from tests.sandbox.keyring import Keyring
from tests.sandbox.probe import Door, Request, ask

MASTER = "prometheus-master.example.com"
SLAVE = "prometheus-slave.example.com"
CORE_INSTANCES = [f"{core}.example.internal:9100" for core in CORES]
# What a person would choose at the top of each page, one after the other.
CHOICES: dict[str, list[dict[str, str]]] = {
    "federation-health": [{"site": ".+"}, {"site": "dublin"}],
    "federation-host": [{"instance": name} for name in (MASTER, SLAVE, *CORE_INSTANCES)],
    "federation-prometheus": [{"instance": MASTER}, {"instance": SLAVE}],
}
# Their disk is an overlay in the sandbox, which node_exporter leaves out.
WITHOUT_DISKS = set(CORE_INSTANCES)
# Four scrapes of 15 s, as Grafana computes it.
RATE_INTERVAL = "1m"
# A counter's rate needs two samples; the first come when the servers have just started.
SECONDS = 90


def filled_in(expression: str, choice: dict[str, str]) -> str:
    """A query with its variables replaced, as Grafana does it."""
    for name, value in {"__rate_interval": RATE_INTERVAL, **choice}.items():
        expression = expression.replace(f"${name}", value)
    assert "$" not in expression
    return expression


def answers(sandbox: Sandbox, keys: Keyring, path: str, questions: list[dict[str, str]]) -> Any:
    """What the master's Prometheus answers to each, asked on its loopback: there is no limit."""
    requests = [
        Request(
            door=Door(address="127.0.0.1", port=9090, name=MASTER),
            client=keys.own_client("master"),
            path=f"/api/v1/{path}?{urlencode(question)}",
        )
        for question in questions
    ]
    answered = ask(sandbox.namespace("master"), requests, at_once=4)
    for question, answer in zip(questions, answered, strict=True):
        assert answer.status == 200, (question, answer.short, answer.body)
    return [json.loads(answer.body)["data"] for answer in answered]


@pytest.mark.parametrize("dashboard", [path.stem for path in FILES])
def test_every_panel_has_data(sandbox: Sandbox, keys: Keyring, dashboard: str) -> None:
    for server in ("master", "dublin"):
        # The first one is made at midnight.
        sandbox.inside(server, "systemctl", "start", "prometheus-backup.service")
    wanted = {
        f"{query} with {choice}": {"query": filled_in(query.expression, choice)}
        for query in queries()
        if query.dashboard == dashboard
        for choice in CHOICES[dashboard]
        if not ("node_filesystem" in query.expression and choice["instance"] in WITHOUT_DISKS)
    }
    empty: list[str] = []

    def all_have_data() -> bool:
        found = answers(sandbox, keys, "query", list(wanted.values()))
        empty[:] = [told for told, data in zip(wanted, found, strict=True) if not data["result"]]
        return not empty

    assert wait_until(all_have_data, seconds=SECONDS, step=5), "\n".join(empty)


@pytest.mark.parametrize("dashboard", [path.stem for path in FILES])
def test_the_choices_of_a_dashboard_are_what_there_is(
    sandbox: Sandbox, keys: Keyring, dashboard: str
) -> None:
    offered: dict[str, set[str]] = {}
    for variable in read(next(p for p in FILES if p.stem == dashboard))["templating"]["list"]:
        if variable["type"] == "query":
            text = variable["query"]["query"]
            selector, label = text.removeprefix("label_values(").removesuffix(")").rsplit(", ", 1)
            (series,) = answers(sandbox, keys, "series", [{"match[]": selector}])
            offered[variable["name"]] = {one[label] for one in series if label in one}
    chosen = [choice for choice in CHOICES[dashboard] if ".+" not in choice.values()]
    assert offered == {
        name: {choice[name] for choice in chosen} for name in {key for c in chosen for key in c}
    }


# What Grafana's data source asks of a Prometheus, beside its queries.
# https://github.com/grafana/grafana/tree/main/packages/grafana-prometheus
READS = ["labels", "label/job/values", "series?match[]=up", "metadata", "rules", "status/buildinfo"]


def test_the_data_source_of_the_outputs_works(sandbox: Sandbox) -> None:
    outputs = sandbox.outputs
    (source,) = yaml.safe_load(outputs["grafanaDataSource"])["datasources"]
    # What the operator puts there.
    files = {
        grafana.CA: outputs["caCertificate"],
        grafana.AUTHORIZATION: f"Bearer {outputs['masterTokens']['grafana']}",
    }
    secure = {
        key: files[value.removeprefix("$__file{").removesuffix("}")]
        for key, value in source["secureJsonData"].items()
    }
    name = source["jsonData"]["serverName"]
    assert source["url"] == f"https://{name}"
    # As Go's TLS client does with a server name: the certificate is checked against it.
    with httpx.Client(
        base_url=f"https://{sandbox.public_ip('master')}/api/v1/",
        headers={
            "Host": name,
            source["jsonData"]["httpHeaderName1"]: secure["httpHeaderValue1"],
        },
        verify=ssl.create_default_context(cadata=secure["tlsCACert"]),
        trust_env=False,
    ) as client:
        extensions = {"sni_hostname": name}
        for path in READS:
            answer = client.get(path, extensions=extensions)
            assert (path, answer.status_code) == (path, 200)
        assert source["jsonData"]["httpMethod"] == "POST"
        for path in ("query", "query_range"):
            form = {"query": "up", "start": "0", "end": "60", "step": "60", "time": "0"}
            assert client.post(path, data=form, extensions=extensions).status_code == 200
        assert client.post("admin/tsdb/snapshot", extensions=extensions).status_code == 403
