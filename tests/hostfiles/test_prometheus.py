"""What the configuration of Prometheus says."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from hostfiles import prometheus, slave
from hostfiles.files import HostFiles
from hostfiles.model import FederatedSite, Job, MasterServer, ServerSecrets, SlaveServer
from job_settings import JobSettings
from tests.hostfiles.conftest import CORE, SLAVE, Authority, credential, release


def content(host: HostFiles, path: str) -> str:
    return next(file.content for file in host.files if file.path == path)


def scrape_configs(host: HostFiles) -> dict[str, Any]:
    folder = f"{prometheus.FOLDER}/jobs.d/"
    files = [yaml.safe_load(f.content) for f in host.files if f.path.startswith(folder)]
    return {job["job_name"]: job for file in files for job in file["scrape_configs"]}


def jobs_of(server: SlaveServer, secrets: ServerSecrets) -> dict[str, Any]:
    return scrape_configs(slave.host_files(server).with_files(slave.secret_files(server, secrets)))


def flags(server: SlaveServer | MasterServer) -> str:
    return next(f.content for f in prometheus.files(server) if f.path == prometheus.SERVICE)


def test_a_job_has_its_targets_and_labels_on_all_of_them(whole_slave: HostFiles) -> None:
    job = scrape_configs(whole_slave)["CoreSystems"]
    assert job["static_configs"] == [
        {"targets": list(CORE.targets), "labels": {"group": "CoreSystems Monitoring"}}
    ]


def test_a_jobs_options_keep_prometheus_names(
    slave_server: Callable[..., SlaveServer], slave_secrets: Callable[..., ServerSecrets]
) -> None:
    options = {"scrape_interval": "30s", "params": {"module": ["http"]}}
    server = slave_server(jobs=(Job(name="x", targets=("h:1",), options=options),))
    job = jobs_of(server, slave_secrets())["x"]
    assert {key: job[key] for key in options} == options


def test_a_job_that_says_nothing_of_its_access_has_mutual_tls_and_a_password(
    whole_slave: HostFiles,
) -> None:
    job = scrape_configs(whole_slave)["CoreSystems"]
    assert job["scheme"] == "https"
    assert job["tls_config"] == {
        "ca_file": "../tls/ca.pem",
        "cert_file": "../tls/prometheus.crt",
        "key_file": "../tls/prometheus.key",
        "min_version": "TLS12",
    }
    assert job["basic_auth"]["username"] == "prometheus-1"
    password = content(whole_slave, f"/etc/prometheus/{job['basic_auth']['password_file'][3:]}")
    assert password == "E" * 48


ACCESS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain http": ({"scheme": "http"}, {}),
    "another CA": (
        {"tls_config": {"ca": "CA", "server_name": "nas.example.net"}},
        {
            "tls_config": {
                "ca_file": "../tls/jobs/x-ca.pem",
                "server_name": "nas.example.net",
                "min_version": "TLS12",
            }
        },
    ),
    "the public CAs and a token": (
        {"tls_config": {"ca": "system"}, "authorization": {"credentials": "token"}},
        {
            "tls_config": {"min_version": "TLS12"},
            "authorization": {"type": "Bearer", "credentials_file": "token"},
        },
    ),
    "our CA and another password": (
        {"basic_auth": {"username": "scraper", "password": "theirs"}},
        {
            "tls_config": {
                "ca_file": "../tls/ca.pem",
                "cert_file": "../tls/prometheus.crt",
                "key_file": "../tls/prometheus.key",
                "min_version": "TLS12",
            },
            "basic_auth": {"username": "scraper", "password_file": "theirs"},
        },
    ),
    "another CA and a client certificate of its own": (
        {"tls_config": {"ca": "CA", "cert": "CA", "key": "KEY", "min_version": "TLS13"}},
        {
            "tls_config": {
                "ca_file": "../tls/jobs/x-ca.pem",
                "cert_file": "../tls/jobs/x.crt",
                "key_file": "../tls/jobs/x.key",
                "min_version": "TLS13",
            }
        },
    ),
}


@pytest.mark.parametrize("access", ACCESS)
def test_a_plain_target_is_reached_as_the_settings_say_and_sent_nothing_else(
    slave_server: Callable[..., SlaveServer],
    slave_secrets: Callable[..., ServerSecrets],
    authority: Authority,
    access: str,
) -> None:
    given, expected = copy.deepcopy(ACCESS[access])
    texts = {"CA": authority.certificate, "KEY": authority.leaf("x.example.net").key}
    for name, value in given.get("tls_config", {}).items():
        given["tls_config"][name] = texts.get(value, value)
    chosen = JobSettings.model_validate({"name": "x", "targets": ["nas:9100"], **given})
    server = slave_server(jobs=(chosen.job(),))
    secrets = slave_secrets(jobs={"x": chosen.secrets()})
    host = slave.host_files(server).with_files(slave.secret_files(server, secrets))
    job = scrape_configs(host)["x"]
    # What a file of a secret holds, in place of its name.
    for auth, key in (("basic_auth", "password_file"), ("authorization", "credentials_file")):
        if auth in job:
            job[auth][key] = content(host, f"/etc/prometheus/{job[auth][key][3:]}")
    expected |= {"job_name": "x", "scheme": given.get("scheme", "https")}
    assert job == expected | {"static_configs": [{"targets": ["nas:9100"]}]}
    secret = {file.path for file in host.files if file.secret}
    assert "/etc/prometheus/tls/jobs/x.key" not in {f.path for f in host.files} - secret


def test_discovered_instances_are_named_by_their_id_and_labelled_like_the_others(
    slave_server: Callable[..., SlaveServer], slave_secrets: Callable[..., ServerSecrets]
) -> None:
    by_tag = {"region": "eu-west-1", "filters": [{"name": "tag:monitor", "values": ["yes"]}]}
    own = {"target_label": "rack", "replacement": "7"}
    chosen = JobSettings.model_validate(
        {
            "name": "x",
            "ec2_sd_configs": [by_tag],
            "labels": {"group": "web"},
            "relabel_configs": [own],
        }
    )
    job = jobs_of(slave_server(jobs=(chosen.job(),)), slave_secrets())["x"]
    (discovery,) = job["ec2_sd_configs"]
    assert discovery["port"] == 9100
    assert "static_configs" not in job
    labels = [rule["target_label"] for rule in job["relabel_configs"]]
    assert labels == ["group", "instance", "name", "rack"]
    assert job["basic_auth"]["username"] == "prometheus-1"


def test_any_text_may_be_a_jobs_name(
    slave_server: Callable[..., SlaveServer], slave_secrets: Callable[..., ServerSecrets]
) -> None:
    names = ["../../etc/passwd", "a b", "a-b", "Überwachung"]
    jobs = tuple(Job(name=name, targets=("h:1",)) for name in names)
    server = slave_server(jobs=jobs)
    files = prometheus.secret_files(server, slave_secrets())
    paths = [f.path for f in files if "/jobs.d/" in f.path]
    assert len(paths) == len(set(paths)) == len(names) + 3
    assert all(path.count("/") == 4 for path in paths)


def test_own_targets_are_scraped_over_verified_tls_under_the_hosts_name(
    whole_slave: HostFiles,
) -> None:
    jobs = scrape_configs(whole_slave)
    for name, port in (("prometheus", 9090), ("node", 9100)):
        job = jobs[name]
        assert job["scheme"] == "https"
        assert job["tls_config"]["ca_file"] == "../tls/ca.pem"
        assert job["tls_config"]["server_name"] == SLAVE
        assert job["static_configs"] == [
            {"targets": [f"127.0.0.1:{port}"], "labels": {"instance": SLAVE}}
        ]
    assert jobs["node"]["tls_config"]["cert_file"] == "../tls/prometheus.crt"


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
    assert job["params"] == {"match[]": ['{__name__=~".+"}', prometheus.ALWAYS_FEDERATED]}
    assert job["track_timestamps_staleness"] is True
    assert job["tls_config"]["server_name"] == SLAVE


def test_an_alert_of_a_slave_is_not_the_masters_own(site: FederatedSite) -> None:
    told_apart = prometheus.federate_job(site, "secrets/p")["metric_relabel_configs"][1]
    assert re.fullmatch(told_apart["regex"], "ALERTS")
    assert re.fullmatch(told_apart["regex"], "ALERTS_FOR_STATE")
    assert (told_apart["target_label"], told_apart["replacement"]) == ("evaluated_by", "slave")


def test_the_body_limit_holds_as_many_series_as_the_sample_limit(site: FederatedSite) -> None:
    job = prometheus.federate_job(dataclasses.replace(site, sample_limit=200_000), "secrets/p")
    assert job["sample_limit"] == 200_000
    assert job["body_size_limit"] == "33MB"
    assert 33 * 2**20 >= 200_000 * 168 > 32 * 2**20


def test_a_slave_cannot_pass_its_series_off_as_another_sites(site: FederatedSite) -> None:
    job = prometheus.federate_job(site, "secrets/p")
    # honor_labels lets it choose any label; this comes after it and wins.
    assert job["metric_relabel_configs"][0] == {"target_label": "site", "replacement": site.site}


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
    # Never one without the other: who asks for `_bucket` would find nothing.
    for key in ("scrape_native_histograms", "always_scrape_classic_histograms"):
        assert (key in known) is present


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
    unit = flags(slave_server(memory_mib=1024, alerting=None))
    assert "MemoryMax=704M" in unit
    assert "GOMEMLIMIT=563MiB" in unit


def test_retention_stays_under_the_volumes_size(slave_server: Callable[..., SlaveServer]) -> None:
    assert "--storage.tsdb.retention.size=16384MB" in flags(slave_server(volume_gib=20))


def test_prometheus_listens_on_loopback_alone(
    slave_server: Callable[..., SlaveServer], master_server: Callable[..., MasterServer]
) -> None:
    for server in (slave_server(), master_server()):
        assert "--web.listen-address=127.0.0.1:9090" in flags(server)
        # On loopback, for backups; test_nginx.py and test_2_locks.py keep others from it.
        assert "--web.enable-admin-api" in flags(server)


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
