"""The dashboards as Grafana reads them: whole, and tied to no Grafana."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from hostfiles import grafana
from tests.dashboards import FILES, FOLDER, read

# https://grafana.com/docs/grafana/latest/panels-visualizations/
PANEL_TYPES = {"stat", "timeseries", "table", "state-timeline"}
# https://grafana.com/docs/grafana/latest/dashboards/variables/add-template-variables/
BUILT_IN = {"__rate_interval"}
COLUMNS = 24


def test_there_is_one_for_federation_one_for_hosts_and_one_for_prometheus() -> None:
    assert [path.stem for path in FILES] == [
        "federation-health",
        "federation-host",
        "federation-prometheus",
    ]


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def dashboard(request: pytest.FixtureRequest) -> dict[str, Any]:
    path: Path = request.param
    board = read(path)
    assert board["uid"] == path.stem
    return board


def test_a_dashboard_says_what_it_is_and_has_no_id_of_another_grafana(
    dashboard: dict[str, Any],
) -> None:
    assert dashboard["title"]
    assert dashboard["description"]
    assert "id" not in dashboard
    assert "prometheus-federation" in dashboard["tags"]


def test_panels_are_of_known_kinds_named_and_apart(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    assert {panel["type"] for panel in panels} <= PANEL_TYPES
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        place = panel["gridPos"]
        assert 0 <= place["x"] < place["x"] + place["w"] <= COLUMNS
    for one, other in itertools.combinations([panel["gridPos"] for panel in panels], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert beside or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]


def test_every_query_goes_to_the_chosen_data_source_with_known_variables(
    dashboard: dict[str, Any],
) -> None:
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert "datasource" in variables
    used: set[str] = set()
    for panel in dashboard["panels"]:
        references = [target["refId"] for target in panel["targets"]]
        assert references
        assert len(set(references)) == len(references)
        for target in panel["targets"]:
            assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            used |= set(re.findall(r"\$(\w+)", target["expr"]))
    assert used <= variables | BUILT_IN
    # And none is there for nothing.
    assert variables - {"datasource"} <= used


def test_the_provider_points_to_the_folder_that_the_data_source_s_files_are_in() -> None:
    (provider,) = yaml.safe_load((FOLDER / "provider.yml").read_text())["providers"]
    assert provider["type"] == "file"
    assert provider["options"]["path"] == f"{grafana.FOLDER}/dashboards"


def test_the_data_source_verifies_the_master_and_holds_no_secret() -> None:
    (source,) = yaml.safe_load(
        grafana.data_source(
            url="https://master.example.com",
            server_name="master.example.com",
            scrape_interval="1m30s",
        )
    )["datasources"]
    assert source["type"] == "prometheus"
    assert source["access"] == "proxy"
    options = source["jsonData"]
    assert options["tlsAuthWithCACert"] is True
    assert "tlsSkipVerify" not in options
    assert options["serverName"] == "master.example.com"
    assert options["timeInterval"] == "90s"
    assert set(source["secureJsonData"]) == {"tlsCACert", "httpHeaderValue1"}
    for value in source["secureJsonData"].values():
        assert re.fullmatch(r"\$__file\{/etc/grafana/federation/\w+(\.pem)?\}", value)
