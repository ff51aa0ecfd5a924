"""The files of Prometheus, but for its web.yml (hostfiles.web_config).

Paths in prometheus.yml are relative to it, so that a staged tree can be checked where it lies.
https://prometheus.io/docs/prometheus/latest/configuration/configuration/
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import yaml

from hostfiles.duration import duration, milliseconds
from hostfiles.files import Check, File, Unit
from hostfiles.model import (
    FederatedSite,
    Job,
    MasterSecrets,
    MasterServer,
    Release,
    Server,
    ServerSecrets,
    SlaveServer,
)
from hostfiles.releases import directory
from hostfiles.templates import render

FOLDER = "/etc/prometheus"
PORT = 9090
GROUP = "prometheus"
# The user of Credential `local`: prometheus.yml names it, and prometheus.yml is not secret.
LOCAL_USER = "local"

# A federated series is this long as text, uncompressed.
BYTES_PER_SERIES = 168
# Beyond this a federated answer is too old to wait for.
FEDERATE_TIMEOUT_MS = 14_000
# Prometheus looks back this far for a series' last sample unless told otherwise.
LOOKBACK_MIN_MS = 60_000
# Of a server's memory, what is left to the kernel, sshd, nginx and node_exporter: this much and
# a sixteenth of all.
RESERVED_MIB = 256
# Go collects harder from here on, so that it does not reach MemoryMax.
GO_MEMORY_SHARE = 0.8
# Beyond its retention size Prometheus still writes its write-ahead log and compacts.
RETENTION_SHARE = 0.8

SERVICE = "/etc/systemd/system/prometheus.service"


def files(server: Server) -> tuple[File, ...]:
    """What is not secret: prometheus.yml, rules and CA."""
    return (
        File(path=f"{FOLDER}/prometheus.yml", content=_dump(configuration(server))),
        File(path=f"{FOLDER}/tls/ca.pem", content=server.ca_bundle),
        *(
            File(path=f"{FOLDER}/rules/{name}", content=content)
            for name, content in sorted(server.rule_files.items())
        ),
        File(path=SERVICE, content=_service(server)),
    )


def secret_files(server: Server, secrets: ServerSecrets) -> tuple[File, ...]:
    """Its key and certificate, the passwords it sends, and how curl comes in by loopback."""
    if secrets.local.user != LOCAL_USER:
        raise ValueError(f"the local user is {secrets.local.user!r}; name it {LOCAL_USER!r}")

    def secret(path: str, content: str) -> File:
        return File(path=f"{FOLDER}/{path}", content=content, group=GROUP, mode=0o640, secret=True)

    return (
        File(path=f"{FOLDER}/tls/prometheus.crt", content=secrets.prometheus_leaf.certificate),
        secret("tls/prometheus.key", secrets.prometheus_leaf.key),
        secret("secrets/local.password", secrets.local.password),
        secret("secrets/ready.curl", _curl(server, secrets, PORT, "/-/ready")),
        secret("secrets/reload.curl", _curl(server, secrets, PORT, "/-/reload", method="POST")),
        secret("secrets/node_exporter.curl", _curl(server, secrets, 9100, "/")),
        *_federation(server, secrets),
    )


def checks(server: Server) -> tuple[Check, ...]:
    """promtool reads the whole configuration: rules, federate jobs and every file they name."""
    return (
        Check(
            name="prometheus.yml",
            argv=(
                f"{directory(server.prometheus)}/promtool",
                "check",
                "config",
                f"{{tree}}{FOLDER}/prometheus.yml",
            ),
        ),
    )


UNIT = Unit(
    name="prometheus.service",
    restart_on=(SERVICE,),
    reload_on=(f"{FOLDER}/",),
    ready=("/usr/bin/curl", "--config", f"{FOLDER}/secrets/ready.curl"),
    # A large write-ahead log is replayed first.
    ready_seconds=180,
)


def configuration(server: Server) -> dict[str, Any]:
    """prometheus.yml as data."""
    return {
        "global": {
            "scrape_interval": server.scrape_interval,
            "evaluation_interval": server.evaluation_interval,
            **_native_histograms(server.prometheus),
            "external_labels": dict(sorted(server.external_labels.items())),
        },
        "rule_files": [f"rules/{name}" for name in sorted(server.rule_files)],
        "scrape_configs": [
            _own_job("prometheus", PORT, server.fqdn),
            # node_exporter asks for a certificate with this host's name; Prometheus's is one.
            _own_job(
                "node",
                9100,
                server.fqdn,
                cert_file="tls/prometheus.crt",
                key_file="tls/prometheus.key",
            ),
            *(_job(job) for job in server.jobs),
        ],
        **(
            {"scrape_config_files": ["federate.d/*.yml"]}
            if isinstance(server, MasterServer)
            else {}
        ),
    }


def federate_password_file(site: str, password: str) -> str:
    """Where a master keeps a site's password, relative to its folder.

    Prometheus reads the file when it makes the job's client and, at a reload, makes a new client
    only for a job whose configuration changed: another password must be another file.
    """
    return f"secrets/federate-{site}-{sha256(password.encode()).hexdigest()[:12]}.password"


def federate_job(site: FederatedSite, password_file: str) -> dict[str, Any]:
    """The scrape job by which the master takes a site's series.

    https://prometheus.io/docs/prometheus/latest/federation/
    """
    interval = milliseconds(site.scrape_interval)
    return {
        "job_name": f"federate-{site.site}",
        "scrape_interval": site.scrape_interval,
        # Prometheus refuses a time-out that is longer than the interval.
        "scrape_timeout": duration(min(FEDERATE_TIMEOUT_MS, interval * 14 // 15)),
        "scheme": "https",
        "metrics_path": "/federate",
        "params": {"match[]": list(site.match)},
        "honor_labels": True,
        # A slave says its own job and instance, but not that it is another site.
        "metric_relabel_configs": [{"target_label": "site", "replacement": site.site}],
        "honor_timestamps": True,
        # Federated samples carry timestamps: without this, a dead site's last values live on.
        "track_timestamps_staleness": True,
        "sample_limit": site.sample_limit,
        # The answer in memory is bounded before its samples are counted; the two agree.
        "body_size_limit": f"{math.ceil(site.sample_limit * BYTES_PER_SERIES / 2**20)}MB",
        # Paths are relative to the file in federate.d/.
        "basic_auth": {
            "username": site.user,
            "password_file": f"../{password_file}",
        },
        "tls_config": {
            "ca_file": "../tls/ca.pem",
            "cert_file": "../tls/prometheus.crt",
            "key_file": "../tls/prometheus.key",
            "server_name": site.host,
            "min_version": "TLS12",
        },
        # One job label for all sites, so that one alert covers them.
        "static_configs": [
            {
                "targets": [f"{site.host}:{site.port}"],
                "labels": {"job": "federate", "site": site.site},
            }
        ],
    }


def _own_job(name: str, port: int, fqdn: str, **more_tls: str) -> dict[str, Any]:
    return {
        "job_name": name,
        "scheme": "https",
        "basic_auth": {"username": LOCAL_USER, "password_file": "secrets/local.password"},
        "tls_config": {"ca_file": "tls/ca.pem", "server_name": fqdn, **more_tls},
        "static_configs": [{"targets": [f"127.0.0.1:{port}"], "labels": {"instance": fqdn}}],
    }


def _job(job: Job) -> dict[str, Any]:
    return {
        "job_name": job.name,
        **job.options,
        "static_configs": [
            {
                "targets": list(job.targets),
                **({"labels": dict(sorted(job.labels.items()))} if job.labels else {}),
            }
        ],
    }


def _native_histograms(release: Release) -> dict[str, bool]:
    # Before 3.8 this was a feature flag and the key is an error. It also makes Prometheus ask for
    # protobuf, which is smaller than text.
    return {"scrape_native_histograms": True} if release.version_tuple >= (3, 8) else {}


def _service(server: Server) -> str:
    memory_max = server.memory_mib - RESERVED_MIB - server.memory_mib // 16
    return render(
        "systemd/prometheus.service.j2",
        release_dir=directory(server.prometheus),
        flags=_flags(server),
        memory_max_mib=memory_max,
        go_memory_limit_mib=int(memory_max * GO_MEMORY_SHARE),
    )


def _flags(server: Server) -> list[str]:
    """https://prometheus.io/docs/prometheus/latest/command-line/prometheus/."""
    port = server.federation_port if isinstance(server, SlaveServer) else None
    if isinstance(server, MasterServer) and server.ui_port != 443:
        port = server.ui_port
    flags = [
        f"--config.file={FOLDER}/prometheus.yml",
        f"--web.config.file={FOLDER}/web.yml",
        f"--web.listen-address=127.0.0.1:{PORT}",
        f"--web.external-url=https://{server.fqdn}{f':{port}' if port else ''}/",
        "--web.enable-lifecycle",
        "--storage.tsdb.path=/data",
        f"--storage.tsdb.retention.time={server.retention_time}",
        f"--storage.tsdb.retention.size={int(server.volume_gib * RETENTION_SHARE * 1024)}MB",
    ]
    if isinstance(server, SlaveServer):
        # /federate looks back this far: a series that ended is gone sooner, the answer is smaller.
        flags.append(f"--query.lookback-delta={duration(_lookback(server))}")
    return flags


def _lookback(server: SlaveServer) -> int:
    intervals = [server.scrape_interval, server.evaluation_interval]
    intervals += [str(job.options["scrape_interval"]) for job in server.jobs if _has_interval(job)]
    return max(LOOKBACK_MIN_MS, 2 * max(milliseconds(interval) for interval in intervals))


def _has_interval(job: Job) -> bool:
    return "scrape_interval" in job.options


def _federation(server: Server, secrets: ServerSecrets) -> Iterator[File]:
    """A master's federate jobs, a file for each site, and the passwords they send."""
    if not isinstance(server, MasterServer):
        return
    passwords = secrets.site_passwords if isinstance(secrets, MasterSecrets) else {}
    sites = {site.site: site for site in server.sites}
    if set(sites) != set(passwords):
        raise ValueError(f"sites {sorted(sites)} have passwords for {sorted(passwords)}")
    for name, site in sorted(sites.items()):
        password_file = federate_password_file(name, passwords[name])
        yield File(
            path=f"{FOLDER}/{password_file}",
            content=passwords[name],
            group=GROUP,
            mode=0o640,
            secret=True,
        )
        yield File(
            path=f"{FOLDER}/federate.d/{name}.yml",
            content=_dump({"scrape_configs": [federate_job(site, password_file)]}),
        )


def _curl(server: Server, secrets: ServerSecrets, port: int, path: str, method: str = "GET") -> str:
    """A config file for curl, as a password on a command line could be read by anyone.

    https://curl.se/docs/manpage.html#-K
    """
    lines = {
        "url": f"https://{server.fqdn}:{port}{path}",
        "connect-to": f"{server.fqdn}:{port}:127.0.0.1:{port}",
        "request": method,
        "user": f"{secrets.local.user}:{secrets.local.password}",
        "cacert": f"{FOLDER}/tls/ca.pem",
        "cert": f"{FOLDER}/tls/prometheus.crt",
        "key": f"{FOLDER}/tls/prometheus.key",
        "max-time": "60" if method == "POST" else "5",
    }
    return "".join(
        [
            *(f'{name} = "{value}"\n' for name, value in lines.items()),
            "silent\nshow-error\nfail-with-body\n",
            # What a GET answers is of no interest, what a refused POST answers is the reason.
            "" if method == "POST" else 'output = "/dev/null"\n',
        ]
    )


class _Dumper(yaml.SafeDumper):
    """Writes lists indented, as Prometheus's own examples do."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, indentless=False)


def _dump(value: Any) -> str:
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=1000, allow_unicode=True)
