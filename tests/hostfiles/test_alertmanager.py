"""Alertmanager's files, and how Prometheus comes to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import yaml

from hostfiles import alertmanager, master, prometheus, slave
from hostfiles.files import HostFiles
from hostfiles.model import MasterServer, ServerSecrets, SlaveServer
from tests.hostfiles.conftest import SLAVE


def by_path(host: HostFiles) -> dict[str, str]:
    return {file.path: file.content for file in host.files}


def test_without_the_setting_there_is_none_and_rules_are_evaluated_all_the_same(
    slave_server: Callable[..., SlaveServer], slave_secrets: Callable[..., ServerSecrets]
) -> None:
    server = slave_server(alerting=None)
    host = slave.host_files(server).with_files(slave.secret_files(server, slave_secrets()))
    assert not [path for path in by_path(host) if "alertmanager" in path]
    assert not [unit for unit in host.units if "alertmanager" in unit.name]
    config = prometheus.configuration(server)
    assert "alerting" not in config
    assert "alerts/server.yml" in config["rule_files"]


def test_it_listens_on_loopback_and_asks_for_the_password(whole_slave: HostFiles) -> None:
    files = by_path(whole_slave)
    assert "--web.listen-address=127.0.0.1:9093 " in files[alertmanager.SERVICE]
    assert "--cluster.listen-address= " in files[alertmanager.SERVICE]
    web = yaml.safe_load(files["/etc/alertmanager/web.yml"])
    assert list(web["basic_auth_users"]) == ["local"]
    assert web["tls_server_config"]["client_auth_type"] == "VerifyClientCertIfGiven"


def test_people_find_the_masters_behind_its_own_door(whole_master: HostFiles) -> None:
    unit = by_path(whole_master)[alertmanager.SERVICE]
    assert "--web.external-url=https://prometheus-master.example.com/alertmanager/ " in unit


def test_prometheus_notifies_it_and_scrapes_it_over_verified_tls(whole_slave: HostFiles) -> None:
    files = by_path(whole_slave)
    (told,) = yaml.safe_load(files["/etc/prometheus/prometheus.yml"])["alerting"]["alertmanagers"]
    assert told["scheme"] == "https"
    assert told["static_configs"] == [{"targets": ["127.0.0.1:9093"]}]
    assert told["tls_config"]["server_name"] == SLAVE
    assert told["tls_config"]["ca_file"] == "tls/ca.pem"
    assert files[f"/etc/prometheus/{told['basic_auth']['password_file']}"] == "L" * 48
    (job,) = yaml.safe_load(files["/etc/prometheus/jobs.d/alertmanager.yml"])["scrape_configs"]
    assert job["metrics_path"] == "/alertmanager/metrics"
    assert job["tls_config"]["server_name"] == SLAVE


def test_its_secrets_are_files_that_its_configuration_names(whole_slave: HostFiles) -> None:
    config = yaml.safe_load(by_path(whole_slave)[alertmanager.CONFIG])
    path = config["receivers"][0]["webhook_configs"][0]["url_file"]
    (file,) = (file for file in whole_slave.files if file.path == path)
    assert (file.secret, file.group, file.mode) == (True, "alertmanager", 0o640)
    assert file.content == "https://hooks.example.net/WWWWWWWW"


def test_its_memory_is_taken_from_prometheus(slave_server: Callable[..., SlaveServer]) -> None:
    def limit(**changed: Any) -> int:
        files = by_path(slave.host_files(slave_server(**changed)))
        (line,) = (
            line for line in files[prometheus.SERVICE].splitlines() if line.startswith("MemoryMax")
        )
        return int(line.removeprefix("MemoryMax=").removesuffix("M"))

    assert limit(alerting=None) - limit() == alertmanager.MEMORY_MIB


def test_a_server_without_its_certificate_is_an_error(
    master_server: Callable[..., MasterServer], master_secrets: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match="no certificate for it"):
        master.secret_files(master_server(), master_secrets(alertmanager_leaf=None))
