"""The files of Prometheus, but for its web.yml (hostfiles.web_config).

Paths in prometheus.yml are relative to it, so that a staged tree can be checked where it lies.
https://prometheus.io/docs/prometheus/latest/configuration/configuration/
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import yaml

from hostfiles import alertmanager, rules
from hostfiles.curl import curl_config
from hostfiles.duration import duration, milliseconds
from hostfiles.files import Check, File, Unit, secret_file
from hostfiles.model import (
    Access,
    Credential,
    FederatedSite,
    Job,
    JobSecrets,
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

# https://prometheus.io/docs/prometheus/latest/querying/api/#snapshot
SNAPSHOT = "/api/v1/admin/tsdb/snapshot"
# The newest samples are written out as a block of their own first.
SNAPSHOT_SECONDS = 600

# Notifications are sent by a new client after each reload, so another password needs no other name.
ALERTMANAGER_PASSWORD = "secrets/alertmanager.password"  # noqa: S105 - a path
# Whatever else a site's settings leave out, by this the master knows how it is.
ALWAYS_FEDERATED = 'up{job=~"prometheus|alertmanager"}'

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
        *(
            File(path=f"{FOLDER}/alerts/{name}", content=content)
            for name, content in sorted(rules.contents(server).items())
        ),
        File(path=SERVICE, content=_service(server)),
    )


def secret_files(server: Server, secrets: ServerSecrets) -> tuple[File, ...]:
    """Its key and certificate, the passwords it sends, and how curl comes in by loopback."""
    if secrets.local.user != LOCAL_USER:
        raise ValueError(f"the local user is {secrets.local.user!r}; name it {LOCAL_USER!r}")

    return (
        File(path=f"{FOLDER}/tls/prometheus.crt", content=secrets.prometheus_leaf.certificate),
        secret_file(f"{FOLDER}/tls/prometheus.key", secrets.prometheus_leaf.key, GROUP),
        _curl("ready", server, secrets, path="/-/ready"),
        _curl("reload", server, secrets, path="/-/reload", method="POST"),
        _curl(
            *("snapshot", server, secrets),
            path=SNAPSHOT,
            method="POST",
            max_seconds=SNAPSHOT_SECONDS,
        ),
        _curl("node_exporter", server, secrets, port=9100, path="/"),
        *(
            [secret_file(f"{FOLDER}/{ALERTMANAGER_PASSWORD}", secrets.local.password, GROUP)]
            if server.alerting is not None
            else []
        ),
        # Jobs share passwords.
        *{file.path: file for file in _jobs(server, secrets)}.values(),
        *_federation(server, secrets),
    )


def checks(server: Server) -> tuple[Check, ...]:
    """promtool reads the whole configuration: rules, federate jobs and every file they name.

    And the selectors of each site, which that takes for any text: the slave would answer 400.
    """
    programs = directory(server.prometheus)
    promtool = f"{programs}/promtool"
    sites = server.sites if isinstance(server, MasterServer) else ()
    return (
        # One that does not even start is not to stop the one that serves.
        Check(name="Prometheus", argv=(f"{programs}/prometheus", "--version")),
        Check(
            name="prometheus.yml",
            argv=(promtool, "check", "config", f"{{tree}}{FOLDER}/prometheus.yml"),
        ),
        *(
            Check(
                name=f"match {selector} of site {site.site}",
                # A range may follow a plain selector, and no other expression.
                argv=(promtool, "--experimental", "promql", "format", f"{selector}[1m]"),
            )
            for site in sites
            for selector in site.match
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
        **_alerting(server),
        "rule_files": [
            *(f"alerts/{name}" for name in sorted(rules.names(server))),
            *(f"rules/{name}" for name in sorted(server.rule_files)),
        ],
        # A file for each job, as they name files of secrets by what is in them (password_file).
        "scrape_config_files": [
            "jobs.d/*.yml",
            *(["federate.d/*.yml"] if isinstance(server, MasterServer) else []),
        ],
    }


def _alerting(server: Server) -> dict[str, Any]:
    """https://prometheus.io/docs/prometheus/latest/configuration/configuration/#alertmanager_config."""
    if server.alerting is None:
        return {}
    config = {
        "scheme": "https",
        "path_prefix": alertmanager.PATH,
        "basic_auth": {"username": LOCAL_USER, "password_file": ALERTMANAGER_PASSWORD},
        "tls_config": {
            "ca_file": "tls/ca.pem",
            "server_name": server.fqdn,
            "min_version": "TLS12",
        },
        "static_configs": [{"targets": [f"127.0.0.1:{alertmanager.PORT}"]}],
    }
    return {"alerting": {"alertmanagers": [config]}}


def password_file(name: str, password: str) -> str:
    """Where Prometheus keeps a password that it sends, relative to its folder.

    It reads the file when it makes a job's client and, at a reload, makes a new client only for a
    job whose configuration changed: another password must be another file.
    """
    return f"secrets/{name}-{sha256(password.encode()).hexdigest()[:12]}.password"


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
        "params": {"match[]": [*site.match, ALWAYS_FEDERATED]},
        "honor_labels": True,
        # A slave says its own job and instance, but not that it is another site.
        "metric_relabel_configs": [
            {"target_label": "site", "replacement": site.site},
            # A slave's alert is not the one that the master finds with the same rule.
            {
                "source_labels": ["__name__"],
                "regex": "ALERTS(_FOR_STATE)?",
                "target_label": "evaluated_by",
                "replacement": "slave",
            },
        ],
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


def _jobs(server: Server, secrets: ServerSecrets) -> Iterator[File]:
    """A file for each job of this host, with the files of secrets that it names."""
    local = Access(credential="basic", user=LOCAL_USER, server_name=server.fqdn)
    given = JobSecrets(password=secrets.local.password)
    doors = [("prometheus", PORT, "/metrics"), ("node", 9100, "/metrics")]
    if server.alerting is not None:
        doors.append(("alertmanager", alertmanager.PORT, f"{alertmanager.PATH}/metrics"))
    for name, port, path in doors:
        own = Job(
            name=name,
            targets=(f"127.0.0.1:{port}",),
            labels={"instance": server.fqdn},
            options={} if path == "/metrics" else {"metrics_path": path},
            access=local,
        )
        yield from _job(own, given, secrets.exporter, "local")
    for job in server.jobs:
        slug = _slug(job.name)
        yield from _job(job, secrets.jobs.get(job.name, JobSecrets()), secrets.exporter, slug)


def _slug(name: str) -> str:
    """A job's name as a file's: any text may be one."""
    plain = re.sub(r"[^A-Za-z0-9_.-]", "-", name)
    return plain if plain == name else f"{plain}-{sha256(name.encode()).hexdigest()[:8]}"


def _job(
    job: Job, given: JobSecrets, exporter: Credential | None, secret_name: str
) -> Iterator[File]:
    slug = _slug(job.name)
    access, tls = job.access, f"tls/jobs/{slug}"
    config: dict[str, Any] = {"job_name": job.name, "scheme": access.scheme, **job.options}
    if access.scheme == "https":
        config["tls_config"] = _client_tls(access, tls)
    if access.ca not in (None, "own", "system"):
        yield File(path=f"{FOLDER}/{tls}-ca.pem", content=str(access.ca))
    if access.client not in (None, "own"):
        yield File(path=f"{FOLDER}/{tls}.crt", content=str(access.client))
        yield secret_file(f"{FOLDER}/{tls}.key", given.key, GROUP)
    if access.credential is not None:
        user, password = access.user, given.password
        if access.credential == "own":
            if exporter is None:
                raise ValueError(f"job {job.name!r} sends the exporters' password: there is none")
            user, password, secret_name = exporter.user, exporter.password, "exporters"
        path = password_file(secret_name, password)
        yield secret_file(f"{FOLDER}/{path}", password, GROUP)
        if access.credential == "authorization":
            config["authorization"] = {
                "type": access.authorization_type,
                "credentials_file": f"../{path}",
            }
        else:
            config["basic_auth"] = {"username": user, "password_file": f"../{path}"}
    if job.targets:
        config["static_configs"] = [
            {
                "targets": list(job.targets),
                **({"labels": dict(sorted(job.labels.items()))} if job.labels else {}),
            }
        ]
    config.update(job.discovery)
    if relabel := [*_discovered_labels(job), *job.options.get("relabel_configs", [])]:
        config["relabel_configs"] = relabel
    yield File(path=f"{FOLDER}/jobs.d/{slug}.yml", content=_dump({"scrape_configs": [config]}))


def _client_tls(access: Access, tls: str) -> dict[str, str]:
    """https://prometheus.io/docs/prometheus/latest/configuration/configuration/#tls_config."""
    ca = {"own": "tls/ca.pem", "system": None}.get(str(access.ca), f"{tls}-ca.pem")
    pair = "tls/prometheus" if access.client == "own" else tls
    # Paths are relative to the file in jobs.d/.
    return {
        **({"ca_file": f"../{ca}"} if ca else {}),
        **({"cert_file": f"../{pair}.crt", "key_file": f"../{pair}.key"} if access.client else {}),
        **({"server_name": access.server_name} if access.server_name else {}),
        "min_version": access.min_version,
    }


def _discovered_labels(job: Job) -> list[dict[str, Any]]:
    """What discovered targets are called. An instance's id stays, its address does not."""
    if not (job.labels and job.discovery) and "ec2_sd_configs" not in job.discovery:
        return []
    # static_configs carry the job's labels by themselves; discovered targets need to be told.
    rules: list[dict[str, Any]] = [
        {"target_label": name, "replacement": value} for name, value in sorted(job.labels.items())
    ]
    if "ec2_sd_configs" in job.discovery:
        for source, label in (("instance_id", "instance"), ("tag_Name", "name")):
            rules.append(
                {
                    "source_labels": [f"__meta_ec2_{source}"],
                    "regex": "(.+)",
                    "target_label": label,
                }
            )
    return rules


def _native_histograms(release: Release) -> dict[str, bool]:
    # Before 3.8 the first was a feature flag and the key is an error. It also makes Prometheus ask
    # for protobuf, which is smaller than text. Without the second, a histogram that is exposed in
    # both forms has no `_bucket` any more, and a master that asks for text gets nothing of it.
    if release.version_tuple < (3, 8):
        return {}
    return {"scrape_native_histograms": True, "always_scrape_classic_histograms": True}


def _service(server: Server) -> str:
    memory_max = server.memory_mib - RESERVED_MIB - server.memory_mib // 16
    if server.alerting is not None:
        memory_max -= alertmanager.MEMORY_MIB
    return render(
        "systemd/prometheus.service.j2",
        release_dir=directory(server.prometheus),
        flags=_flags(server),
        memory_max_mib=memory_max,
        go_memory_limit_mib=int(memory_max * GO_MEMORY_SHARE),
        discovers_instances=any("ec2_sd_configs" in job.discovery for job in server.jobs),
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
        # Snapshots for backups. nginx lets nobody come to it.
        "--web.enable-admin-api",
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
    known = secrets if isinstance(secrets, MasterSecrets) else None
    passwords, trusts = (known.site_passwords, known.site_trusts) if known else ({}, {})
    sites = {site.site: site for site in server.sites}
    if set(sites) != set(passwords):
        raise ValueError(f"sites {sorted(sites)} have passwords for {sorted(passwords)}")
    for name, site in sorted(sites.items()):
        path = password_file(f"federate-{name}", passwords[name])
        yield secret_file(f"{FOLDER}/{path}", passwords[name], GROUP)
        job = federate_job(site, path)
        if name in trusts:
            tls, trust = f"tls/federate/{name}", trusts[name]
            job["tls_config"] |= {
                "ca_file": f"../{tls}-ca.pem",
                "cert_file": f"../{tls}.crt",
                "key_file": f"../{tls}.key",
            }
            yield File(path=f"{FOLDER}/{tls}-ca.pem", content=trust.ca_bundle)
            yield File(path=f"{FOLDER}/{tls}.crt", content=trust.leaf.certificate)
            yield secret_file(f"{FOLDER}/{tls}.key", trust.leaf.key, GROUP)
        elif site.public_roots:
            ca = f"tls/federate/{name}-ca.pem"
            job["tls_config"]["ca_file"] = f"../{ca}"
            yield File(path=f"{FOLDER}/{ca}", content=server.ca_bundle + site.public_roots)
        yield File(
            path=f"{FOLDER}/federate.d/{name}.yml",
            content=_dump({"scrape_configs": [job]}),
        )


def certificate_ends(server: Server, secrets: ServerSecrets) -> dict[str, int]:
    """When the certificates that Prometheus reads end, in Unix seconds, by path."""
    ends = {
        "ca.pem": server.ca_not_after,
        "prometheus.crt": secrets.prometheus_leaf.not_after,
    }
    if isinstance(secrets, MasterSecrets):
        for name, trust in secrets.site_trusts.items():
            ends[f"federate/{name}-ca.pem"] = trust.ca_not_after
            ends[f"federate/{name}.crt"] = trust.leaf.not_after
    return {f"{FOLDER}/tls/{path}": end for path, end in ends.items()}


def _curl(
    name: str,
    server: Server,
    secrets: ServerSecrets,
    *,
    path: str,
    port: int = PORT,
    method: str = "GET",
    max_seconds: int | None = None,
) -> File:
    content = curl_config(
        fqdn=server.fqdn,
        port=port,
        path=path,
        user=secrets.local,
        ca=f"{FOLDER}/tls/ca.pem",
        pair=f"{FOLDER}/tls/prometheus",
        method=method,
        max_seconds=max_seconds,
    )
    return secret_file(f"{FOLDER}/secrets/{name}.curl", content, GROUP)


class _Dumper(yaml.SafeDumper):
    """Writes lists indented, as Prometheus's own examples do."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, indentless=False)


def _dump(value: Any) -> str:
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=1000, allow_unicode=True)
