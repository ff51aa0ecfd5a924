"""What the configuration of Prometheus says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from hostfiles import prometheus
from hostfiles.files import HostFiles
from hostfiles.model import FederatedSite, Job, MasterServer, ServerSecrets, SlaveServer
from tests.hostfiles.conftest import CORE, SLAVE, credential, release


def content(host: HostFiles, path: str) -> str:
    return next(file.content for file in host.files if file.path == path)


def scrape_configs(host: HostFiles) -> dict[str, Any]:
    config = yaml.safe_load(content(host, "/etc/prometheus/prometheus.yml"))
    return {job["job_name"]: job for job in config["scrape_configs"]}


def flags(server: SlaveServer | MasterServer) -> str:
    return next(f.content for f in prometheus.files(server) if f.path == prometheus.SERVICE)


def test_a_job_has_its_targets_and_labels_on_all_of_them(whole_slave: HostFiles) -> None:
    job = scrape_configs(whole_slave)["CoreSystems"]
    assert job["static_configs"] == [
        {"targets": list(CORE.targets), "labels": {"group": "CoreSystems Monitoring"}}
    ]


def test_a_jobs_options_keep_prometheus_names(slave_server: Callable[..., SlaveServer]) -> None:
    options = {"scheme": "https", "scrape_interval": "30s", "params": {"module": ["http"]}}
    server = slave_server(jobs=(Job(name="x", targets=("h:1",), options=options),))
    (job,) = (j for j in prometheus.configuration(server)["scrape_configs"] if j["job_name"] == "x")
    assert {key: job[key] for key in options} == options


def test_own_targets_are_scraped_over_verified_tls_under_the_hosts_name(
    whole_slave: HostFiles,
) -> None:
    jobs = scrape_configs(whole_slave)
    for name, port in (("prometheus", 9090), ("node", 9100)):
        job = jobs[name]
        assert job["scheme"] == "https"
        assert job["tls_config"]["ca_file"] == "tls/ca.pem"
        assert job["tls_config"]["server_name"] == SLAVE
        assert job["static_configs"] == [
            {"targets": [f"127.0.0.1:{port}"], "labels": {"instance": SLAVE}}
        ]
    assert jobs["node"]["tls_config"]["cert_file"] == "tls/prometheus.crt"


def test_nothing_anywhere_skips_verification(
    whole_slave: HostFiles, whole_master: HostFiles
) -> None:
    for file in (*whole_slave.files, *whole_master.files):
        assert "insecure_skip_verify" not in file.content, file.path
        assert "insecure\n" not in file.content, file.path


def test_the_federate_job_is_named_federate_for_every_site(site: FederatedSite) -> None:
    job = prometheus.federate_job(site, "secrets/p")
    assert job["job_name"] == "federate-dublin"
    assert job["static_configs"] == [
        {"targets": [f"{SLAVE}:9095"], "labels": {"job": "federate", "site": "dublin"}}
    ]
    assert job["honor_labels"] is True
    assert job["metrics_path"] == "/federate"
    assert job["params"] == {"match[]": ['{__name__=~".+"}']}
    assert job["track_timestamps_staleness"] is True
    assert job["tls_config"]["server_name"] == SLAVE


def test_the_body_limit_holds_as_many_series_as_the_sample_limit(site: FederatedSite) -> None:
    job = prometheus.federate_job(dataclasses.replace(site, sample_limit=200_000), "secrets/p")
    assert job["sample_limit"] == 200_000
    assert job["body_size_limit"] == "33MB"
    assert 33 * 2**20 >= 200_000 * 168 > 32 * 2**20


def test_a_slave_cannot_pass_its_series_off_as_another_sites(site: FederatedSite) -> None:
    job = prometheus.federate_job(site, "secrets/p")
    # honor_labels lets it choose any label; this comes after it and wins.
    assert job["metric_relabel_configs"] == [{"target_label": "site", "replacement": site.site}]


@pytest.mark.parametrize(
    ("interval", "timeout"), [("15s", "14s"), ("1m", "14s"), ("5s", "4666ms"), ("1s", "933ms")]
)
def test_the_federate_timeout_is_below_the_interval(
    site: FederatedSite, interval: str, timeout: str
) -> None:
    job = prometheus.federate_job(dataclasses.replace(site, scrape_interval=interval), "secrets/p")
    assert job["scrape_timeout"] == timeout


@pytest.mark.parametrize(("version", "present"), [("3.7.9", False), ("3.8.0", True)])
def test_native_histograms_wait_for_the_version_that_knows_them(
    slave_server: Callable[..., SlaveServer], version: str, present: bool
) -> None:
    server = slave_server(prometheus=release("prometheus", version))
    known = prometheus.configuration(server)["global"]
    assert ("scrape_native_histograms" in known) is present


@pytest.mark.parametrize(
    ("interval", "lookback"), [(None, "60s"), ("30s", "60s"), ("45s", "90s"), ("1m30s", "180s")]
)
def test_the_slave_looks_back_twice_its_longest_interval_and_at_least_a_minute(
    slave_server: Callable[..., SlaveServer], interval: str | None, lookback: str
) -> None:
    options = {} if interval is None else {"scrape_interval": interval}
    server = slave_server(jobs=(Job(name="x", targets=("h:1",), options=options),))
    assert f"--query.lookback-delta={lookback}" in flags(server)


def test_the_master_keeps_prometheus_own_lookback(
    master_server: Callable[..., MasterServer],
) -> None:
    assert "lookback" not in flags(master_server())


def test_the_unit_leaves_memory_to_the_rest_of_the_host(
    slave_server: Callable[..., SlaveServer],
) -> None:
    unit = flags(slave_server(memory_mib=1024))
    assert "MemoryMax=704M" in unit
    assert "GOMEMLIMIT=563MiB" in unit


def test_retention_stays_under_the_volumes_size(slave_server: Callable[..., SlaveServer]) -> None:
    assert "--storage.tsdb.retention.size=16384MB" in flags(slave_server(volume_gib=20))


def test_prometheus_listens_on_loopback_alone(
    slave_server: Callable[..., SlaveServer], master_server: Callable[..., MasterServer]
) -> None:
    for server in (slave_server(), master_server()):
        assert "--web.listen-address=127.0.0.1:9090" in flags(server)
        assert "--web.enable-admin-api" not in flags(server)


def test_each_site_has_a_file_of_its_own(
    master_server: Callable[..., MasterServer],
    master_secrets: Callable[..., ServerSecrets],
    site: FederatedSite,
) -> None:
    sites = tuple(dataclasses.replace(site, site=name) for name in ("oslo", "dublin"))
    secrets = master_secrets(site_passwords={"oslo": "O" * 48, "dublin": "D" * 48})
    files = prometheus.secret_files(master_server(sites=sites), secrets)
    paths = [file.path for file in files]
    assert "/etc/prometheus/federate.d/dublin.yml" in paths
    assert "/etc/prometheus/federate.d/oslo.yml" in paths


def test_another_password_changes_the_job_so_that_prometheus_takes_it(
    master_server: Callable[..., MasterServer], master_secrets: Callable[..., ServerSecrets]
) -> None:
    def job(password: str) -> str:
        secrets = master_secrets(site_passwords={"dublin": password})
        files = prometheus.secret_files(master_server(), secrets)
        return next(f.content for f in files if f.path.endswith("federate.d/dublin.yml"))

    assert job("D" * 48) == job("D" * 48)
    assert job("D" * 48) != job("E" * 48)
    assert "DDDD" not in job("D" * 48)


def test_a_site_without_password_is_an_error(
    master_server: Callable[..., MasterServer],
    master_secrets: Callable[..., ServerSecrets],
) -> None:
    with pytest.raises(ValueError, match="dublin"):
        prometheus.secret_files(master_server(), master_secrets(site_passwords={}))


def test_a_local_user_of_another_name_is_an_error(
    slave_server: Callable[..., SlaveServer], slave_secrets: Callable[..., ServerSecrets]
) -> None:
    with pytest.raises(ValueError, match="'someone'"):
        prometheus.secret_files(slave_server(), slave_secrets(local=credential("someone", "x")))
