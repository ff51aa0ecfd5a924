"""Rendered files, and broken ones, through the programs that will read them on a host."""

from __future__ import annotations

import dataclasses
import gzip
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from hostfiles import cloud_init, master, slave
from hostfiles.files import HostFiles
from hostfiles.model import (
    FederatedSite,
    Leaf,
    MasterSecrets,
    MasterServer,
    ServerSecrets,
    SiteTrust,
    SlaveServer,
)
from job_settings import JobSettings
from tests.hostfiles.conftest import MASTER, Authority, Root, ToolImage, credential

pytestmark = pytest.mark.machines


@pytest.fixture(scope="session")
def prometheus_version(tool_image: ToolImage) -> str:
    return tool_image.prometheus_version


@pytest.fixture(scope="session")
def alertmanager_version(tool_image: ToolImage) -> str:
    return tool_image.alertmanager_version


def check(root: Root, host: HostFiles, name: str) -> subprocess.CompletedProcess[str]:
    """Runs the check of that name on the host's files, staged at /tree."""
    for file in host.files:
        root.write(f"/tree{file.path}", file.content, file.mode)
    (validator,) = (check for check in host.checks if check.name == name)
    users = root.run(["systemd-sysusers", "/tree/etc/sysusers.d/federation.conf"])
    assert users.returncode == 0, users.stderr
    return root.run([word.replace("{tree}", "/tree") for word in validator.argv])


def broken(host: HostFiles, path: str, old: str, new: str) -> HostFiles:
    """The same host with one word in one file replaced."""
    (file,) = (file for file in host.files if file.path == path)
    assert old in file.content
    others = tuple(other for other in host.files if other.path != path)
    changed = dataclasses.replace(file, content=file.content.replace(old, new))
    return dataclasses.replace(host, files=(*others, changed))


CHECKS = [
    "Prometheus",
    "node_exporter",
    "prometheus.yml",
    "web.yml",
    "node_exporter's config.yml",
    "nginx's federation.conf",
    "ufw's user.rules",
    "ufw's user6.rules",
    "sshd's drop-in",
    "apt's configuration",
    "systemd units",
    "Alertmanager",
    "alertmanager.yml",
    "Alertmanager's web.yml",
]


@pytest.mark.parametrize("name", CHECKS)
def test_every_check_passes_on_a_slave(tool_root: Root, whole_slave: HostFiles, name: str) -> None:
    done = check(tool_root, whole_slave, name)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", CHECKS)
def test_every_check_passes_on_a_master(
    tool_root: Root, whole_master: HostFiles, name: str
) -> None:
    done = check(tool_root, whole_master, name)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("selector", "words"),
    [
        ('{__name__=~".+"}', ""),
        ("up", ""),
        ('node_cpu_seconds_total{job="node",mode!="idle"}', ""),
        ('{job="node"', "unexpected character"),
        ('{job=~"("}', "missing closing )"),
        ('{job=~".*"}', "at least one non-empty matcher"),
        ("sum(up)", "only allowed for vector selectors"),
        ("up or down", "must contain only scalar and instant vector types"),
    ],
)
def test_promtool_takes_selectors_and_nothing_else_for_a_sites_match(
    tool_root: Root,
    master_server: Callable[..., MasterServer],
    site: FederatedSite,
    selector: str,
    words: str,
) -> None:
    server = master_server(sites=(dataclasses.replace(site, match=(selector,)),))
    done = check(tool_root, master.host_files(server), f"match {selector} of site {site.site}")
    assert (done.returncode == 0) == (words == "")
    assert words in done.stdout + done.stderr


def test_promtool_takes_a_site_of_another_stack_and_misses_its_key(
    tool_root: Root,
    master_server: Callable[..., MasterServer],
    master_secrets: Callable[..., MasterSecrets],
    leaves: dict[str, Leaf],
) -> None:
    server, leaf = master_server(), leaves[MASTER]
    trust = SiteTrust(ca_bundle=server.ca_bundle, ca_not_after=1, leaf=leaf)
    secret = master.secret_files(server, master_secrets(site_trusts={"dublin": trust}))
    done = check(tool_root, master.host_files(server).with_files(secret), "prometheus.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    key = "/etc/prometheus/tls/federate/dublin.key"
    assert tool_root.run(["rm", f"/tree{key}"]).returncode == 0
    without = tuple(file for file in secret if file.path != key)
    done = check(tool_root, master.host_files(server).with_files(without), "prometheus.yml")
    assert done.returncode != 0
    assert key in done.stdout + done.stderr


def test_no_check_is_left_out_here(whole_slave: HostFiles, whole_master: HostFiles) -> None:
    assert sorted(check.name for check in whole_slave.checks) == sorted(CHECKS)
    match = 'match {__name__=~".+"} of site dublin'
    assert sorted(check.name for check in whole_master.checks) == sorted([*CHECKS, match])


@pytest.mark.parametrize(
    ("name", "path", "old", "new", "words"),
    [
        (
            "prometheus.yml",
            "/etc/prometheus/prometheus.yml",
            "scrape_interval: 15s",
            "scrape_interval: 15parsecs",
            "parsecs",
        ),
        (
            "prometheus.yml",
            "/etc/prometheus/jobs.d/CoreSystems.yml",
            "tls/prometheus.crt",
            "tls/nobody.crt",
            "nobody.crt",
        ),
        ("web.yml", "/etc/prometheus/web.yml", "TLS12", "TLS99", "TLS99"),
        ("web.yml", "/etc/prometheus/web.yml", "_GCM_SHA256", "_GCM_SHA1", "unknown cipher"),
        ("web.yml", "/etc/prometheus/web.yml", "cert_file", "certfile", "certfile"),
        (
            "node_exporter's config.yml",
            "/etc/node_exporter/config.yml",
            "RequireAndVerifyClientCert",
            "TrustEverybody",
            "TrustEverybody",
        ),
        (
            "nginx's federation.conf",
            "/etc/nginx/federation.conf",
            "proxy_buffering",
            "proxy_bufering",
            "proxy_bufering",
        ),
        (
            "nginx's federation.conf",
            "/etc/nginx/federation.conf",
            "ssl_ecdh_curve ?X25519MLKEM768:X25519",
            "ssl_ecdh_curve X25519MLKEM769:X25519",
            "curve",
        ),
        (
            "nginx's federation.conf",
            "/etc/nginx/tls/server.key",
            "BEGIN EC PRIVATE KEY",
            "BEGIN EC PUBLIC KEY",
            "server.key",
        ),
        ("ufw's user.rules", "/etc/ufw/user.rules", "198.51.100.7", "198.51.100.777", "777"),
        ("ufw's user6.rules", "/etc/ufw/user6.rules", "*filter", "*filters", "filters"),
        (
            "sshd's drop-in",
            "/etc/ssh/sshd_config.d/10-federation.conf",
            "MaxAuthTries",
            "MaxAuthTry",
            "MaxAuthTry",
        ),
        (
            "sshd's drop-in",
            "/etc/ssh/sshd_config.d/10-federation.conf",
            "PubkeyAcceptedAlgorithms ssh-ed25519",
            "PubkeyAcceptedAlgorithms ssh-dsa",
            "ssh-dsa",
        ),
        (
            "apt's configuration",
            "/etc/apt/apt.conf.d/60federation",
            "Origins-Pattern {",
            "Origins-Pattern { {",
            "60federation",
        ),
        (
            "systemd units",
            "/etc/systemd/system/prometheus.service",
            "/promtool",
            "/promtoll",
            "promtoll",
        ),
        (
            "systemd units",
            "/etc/systemd/system/node_exporter.service",
            "Type=exec",
            "Typo=exec",
            "Typo",
        ),
        (
            "systemd units",
            "/etc/systemd/system/prometheus-backup.service",
            "Type=oneshot",
            "Typo=oneshot",
            "Typo",
        ),
        (
            "systemd units",
            "/etc/systemd/system/prometheus-backup.timer",
            "OnCalendar=*-*-* 00:",
            "OnCalendar=*-*-* 24:",
            "calendar specification",
        ),
        (
            "systemd units",
            "/etc/systemd/system/federation-watch.service",
            "Type=oneshot",
            "Typo=oneshot",
            "Typo",
        ),
        (
            "alertmanager.yml",
            "/etc/alertmanager/alertmanager.yml",
            "receiver: team",
            "x: y",
            "field x not",
        ),
        ("Alertmanager's web.yml", "/etc/alertmanager/web.yml", "TLS12", "TLS99", "TLS99"),
        (
            "prometheus.yml",
            "/etc/prometheus/alerts/server.yml",
            "expr: vector(1)",
            "expr: vector(1",
            "unclosed left parenthesis",
        ),
    ],
)
def test_what_is_wrong_is_refused_in_the_tools_own_words(
    tool_root: Root, whole_slave: HostFiles, name: str, path: str, old: str, new: str, words: str
) -> None:
    done = check(tool_root, broken(whole_slave, path, old, new), name)
    assert done.returncode != 0
    assert words in done.stdout + done.stderr


def test_a_rule_file_is_checked_with_the_configuration(
    tool_root: Root,
    slave_server: Callable[..., SlaveServer],
    slave_secrets: Callable[..., ServerSecrets],
) -> None:
    def with_rules(text: str) -> HostFiles:
        server = slave_server(rule_files={"own.yml": text})
        return slave.host_files(server).with_files(slave.secret_files(server, slave_secrets()))

    rule = "groups: [{{name: g, rules: [{{record: 'a:b', expr: '{}'}}]}}]\n"
    good = check(tool_root, with_rules(rule.format("sum(up)")), "prometheus.yml")
    assert good.returncode == 0, good.stdout + good.stderr
    bad = check(tool_root, with_rules(rule.format("sum(up")), "prometheus.yml")
    assert bad.returncode != 0
    assert "unclosed left parenthesis" in bad.stdout + bad.stderr


def test_a_federate_file_is_checked_with_the_configuration(
    tool_root: Root, whole_master: HostFiles
) -> None:
    path = "/etc/prometheus/federate.d/dublin.yml"
    done = check(
        tool_root,
        broken(whole_master, path, "body_size_limit: 33MB", "body_size_limit: much"),
        "prometheus.yml",
    )
    assert done.returncode != 0
    assert "much" in done.stdout + done.stderr


def test_odd_jobs_pass_promtool(
    tool_root: Root,
    master_server: Callable[..., MasterServer],
    master_secrets: Callable[..., MasterSecrets],
    authority: Authority,
) -> None:
    theirs = {"ca": authority.certificate, "server_name": "nas", "min_version": "TLS13"}
    leaf = authority.leaf("client.example.net")
    tagged = {"region": "eu-west-1", "filters": [{"name": "tag:monitor", "values": ["yes"]}]}
    given: list[dict[str, Any]] = [
        {"name": "no labels", "targets": ["192.0.2.1:80"]},
        {"name": "ünï", "targets": ["h:1"], "labels": {"a": "b: c", "d": "'\"#"}},
        {"name": "o", "targets": ["h:1"], "scheme": "http", "sample_limit": 5},
        {"name": "public", "targets": ["h:1"], "tls_config": {"ca": "system"}},
        {"name": "theirs", "targets": ["h:1"], "tls_config": theirs},
        {
            "name": "client",
            "targets": ["h:1"],
            "tls_config": {**theirs, "cert": leaf.certificate, "key": leaf.key},
            "basic_auth": {"username": "a", "password": "b"},
        },
        {"name": "token", "targets": ["h:1"], "authorization": {"credentials": "t"}},
        {"name": "ec2", "ec2_sd_configs": [tagged], "labels": {"group": "x"}},
        {"name": "file", "file_sd_configs": [{"files": ["/data/targets/*.yml"]}]},
    ]
    chosen = [JobSettings.model_validate(job) for job in given]
    server = master_server(
        jobs=tuple(job.job() for job in chosen), external_labels={"z": "1", "a": "yes"}
    )
    secrets = master_secrets(
        exporter=credential("prometheus-1", "E" * 48),
        jobs={job.name: job.secrets() for job in chosen},
    )
    host = master.host_files(server).with_files(master.secret_files(server, secrets))
    done = check(tool_root, host, "prometheus.yml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_ufw_itself_reads_the_table(tool_root: Root, whole_slave: HostFiles) -> None:
    for file in whole_slave.files:
        if file.path.startswith("/etc/ufw/"):
            tool_root.write(file.path, file.content, file.mode)
    script = "/usr/lib/ufw/ufw-init start quiet && ufw status verbose"
    done = tool_root.run(["sh", "-c", script])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "deny (incoming), deny (outgoing)" in done.stdout
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "9095/tcp ALLOW IN 198.51.100.7 # Federation by the master" in lines
    assert "22/tcp ALLOW IN 203.0.113.1 # SSH for operators" in lines
    assert "10.0.0.0/16 9100/tcp ALLOW OUT Anywhere # Scrape targets" in lines
    assert len([line for line in lines if "ALLOW IN" in line]) == 2


def test_ufw_reload_swaps_the_rules_and_nothing_else(
    tool_root: Root, whole_slave: HostFiles
) -> None:
    for file in whole_slave.files:
        if file.path.startswith("/etc/ufw/"):
            tool_root.write(file.path, file.content, file.mode)
    script = """
    /usr/lib/ufw/ufw-init start quiet
    iptables-save | grep -v '^#' | sed 's/\\[.*\\]//' >/before
    iptables-restore --noflush /etc/ufw/user.rules
    iptables-save | grep -v '^#' | sed 's/\\[.*\\]//' >/after
    cmp /before /after && grep -q 9095 /after
    sed 's/198.51.100.7/198.51.100.9/' /etc/ufw/user.rules >/new
    iptables-restore --noflush /new
    iptables-save | grep 9095
    """
    done = tool_root.run(["sh", "-eu", "-c", script])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("198.51.100.9") == 1
    assert "198.51.100.7" not in done.stdout


def test_cloud_init_knows_every_key_of_user_data(
    tool_root: Root, slave_server: Callable[..., SlaveServer], ssh_key: tuple[str, str]
) -> None:
    data = cloud_init.user_data(
        slave.host_files(slave_server()),
        first_contact_key=ssh_key[0],
        first_contact_public=ssh_key[1],
    )
    text = gzip.decompress(data).decode()
    tool_root.write("/user-data", text)
    done = tool_root.run(["cloud-init", "schema", "--config-file", "/user-data"])
    assert done.returncode == 0, done.stdout + done.stderr
    tool_root.write("/user-data", text.replace("write_files:", "write_filez:"))
    done = tool_root.run(["cloud-init", "schema", "--config-file", "/user-data"])
    assert done.returncode != 0
    assert "write_filez" in done.stdout + done.stderr
