"""The settings of a scrape job: what it scrapes, and how it proves itself there.

A job speaks Prometheus's own language (snake_case keys of scrape_config) but for `hosts`, which
are ours. A job that says nothing of its access has the safe one: TLS of this stack's CA, a client
certificate and a password.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from cryptography import x509
from pydantic import AfterValidator, ConfigDict, Field, SecretStr, model_validator

from hostfiles.model import Access, Job, JobSecrets
from setting_types import (
    Address,
    Duration,
    HostKey,
    HostName,
    Interval,
    LabelName,
    Model,
    PrivateKey,
    Region,
    Target,
    UserName,
    interval,
    matching,
)

EXPORTER_PORT = 9100
SSH_PORT = 22

# Where a server looks for target files. On the data volume: it outlives the instance.
TARGET_FILES = "/data/targets"

# Keys of scrape_config that a job may carry as they are. Left out: what has a field of its own
# below, what this program sets itself, and what would switch a check off.
# https://prometheus.io/docs/prometheus/latest/configuration/configuration/#scrape_config
JOB_OPTIONS = frozenset(
    "scrape_interval scrape_timeout scrape_protocols fallback_scrape_protocol metrics_path params "
    "honor_labels honor_timestamps track_timestamps_staleness follow_redirects enable_http2 "
    "enable_compression relabel_configs metric_relabel_configs sample_limit label_limit "
    "label_name_length_limit label_value_length_limit target_limit body_size_limit "
    "scrape_classic_histograms always_scrape_classic_histograms scrape_native_histograms "
    "native_histogram_bucket_limit native_histogram_min_bucket_factor keep_dropped_targets "
    "metric_name_validation_scheme".split()
)


def certificates(value: str) -> str:
    """The same PEM text, or `system`; ValueError if it is no certificate."""
    if value == "system":
        return value
    try:
        x509.load_pem_x509_certificates(value.encode())
    except ValueError:
        raise ValueError(
            "is no certificate; give the text itself (-----BEGIN CERTIFICATE-----), not a path"
        ) from None
    return value.strip() + "\n"


class _PrometheusModel(Model):
    """Keys as Prometheus writes them."""

    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=None)


class HostAccess(Model):
    """How monitored hosts are reached over SSH. `jump`: through the server that scrapes them.

    The user must be root or have sudo without a password. `timeout` is what one host may take,
    with all attempts to reach it.
    """

    user: UserName
    private_key: PrivateKey
    port: Annotated[int, Field(ge=1, le=65535)] = SSH_PORT
    jump: bool = True
    timeout: Duration = "5m"

    def of(self, host: MonitoredHost) -> HostAccess:
        """The same for one host, with what that says itself."""
        own = {key: getattr(host, key) for key in ("user", "port", "jump")}
        return self.model_copy(
            update={key: value for key, value in own.items() if value is not None}
        )


class MonitoredHost(Model):
    """A host that gets a node_exporter of ours. `address` is its own IPv4 address.

    With it, the certificate names it, node_exporter listens there alone, and firewall rules are
    for this one address. `host_key` is compared at every connection.
    """

    host: HostName
    host_key: HostKey
    address: Address | None = None
    user: UserName | None = None
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    jump: bool | None = None

    @property
    def target(self) -> str:
        """As it stands in the scrape job, and in the label `instance`."""
        return f"{self.host}:{EXPORTER_PORT}"


class TlsSettings(_PrometheusModel):
    """https://prometheus.io/docs/prometheus/latest/configuration/configuration/#tls_config.

    Texts, not files: they reach the server with the rest of its configuration. `ca: system` means
    the public certificate authorities.
    """

    ca: Annotated[str, AfterValidator(certificates)] | None = None
    cert: Annotated[str, AfterValidator(certificates)] | None = None
    key: PrivateKey | None = None
    server_name: str | None = None
    min_version: Literal["TLS12", "TLS13"] = "TLS12"

    @model_validator(mode="after")
    def _pair(self) -> TlsSettings:
        if (self.cert is None) != (self.key is None):
            raise ValueError("needs cert and key, or neither of them")
        return self


class BasicAuthSettings(_PrometheusModel):
    """The user and password that a plain target asks for."""

    username: Annotated[str, Field(min_length=1)]
    password: SecretStr


class AuthorizationSettings(_PrometheusModel):
    """The header that a plain target asks for, such as a bearer token."""

    type: str = "Bearer"
    credentials: SecretStr


class FileDiscovery(_PrometheusModel):
    """https://prometheus.io/docs/prometheus/latest/configuration/configuration/#file_sd_config.

    `ports` (ours) are those of the targets, for the firewall.
    """

    files: Annotated[
        tuple[
            Annotated[
                str,
                matching(
                    rf"{TARGET_FILES}/[A-Za-z0-9_.*-]+\.(json|ya?ml)",
                    f"is no target file; write it like {TARGET_FILES}/hosts.yml",
                ),
            ],
            ...,
        ],
        Field(min_length=1),
    ]
    refresh_interval: Interval = "5m"
    ports: tuple[Annotated[int, Field(ge=1, le=65535)], ...] = (EXPORTER_PORT,)


class Ec2Filter(_PrometheusModel):
    """https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_Filter.html."""

    name: str
    values: Annotated[tuple[str, ...], Field(min_length=1)]


class Ec2Discovery(_PrometheusModel):
    """https://prometheus.io/docs/prometheus/latest/configuration/configuration/#ec2_sd_config.

    The server gets an instance profile that may describe the instances of this region.
    """

    region: Region
    port: Annotated[int, Field(ge=1, le=65535)] = EXPORTER_PORT
    refresh_interval: Interval = "60s"
    filters: Annotated[tuple[Ec2Filter, ...], Field(min_length=1)]


class JobSettings(_PrometheusModel):
    """A scrape job. What is not a field here is a key of Prometheus's own, by its own name."""

    model_config = ConfigDict(frozen=True, extra="allow", alias_generator=None)

    name: Annotated[str, Field(min_length=1, max_length=200)]
    hosts: tuple[MonitoredHost, ...] = ()
    targets: tuple[Target, ...] = ()
    labels: Mapping[LabelName, str] = Field(default_factory=dict)
    file_sd_configs: tuple[FileDiscovery, ...] = ()
    ec2_sd_configs: tuple[Ec2Discovery, ...] = ()
    scheme: Literal["https", "http"] = "https"
    tls_config: TlsSettings | None = None
    basic_auth: BasicAuthSettings | None = None
    authorization: AuthorizationSettings | None = None

    @model_validator(mode="after")
    def _known_options(self) -> JobSettings:
        for key in self._options:
            if key not in JOB_OPTIONS:
                ours = sorted({*type(self).model_fields, *JOB_OPTIONS})
                raise ValueError(
                    f"holds the key {key!r}, which a job may not have; it takes {', '.join(ours)}"
                )
        for key in sorted({"scrape_interval", "scrape_timeout"} & self._options.keys()):
            value = self._options[key]
            try:
                interval(str(value))
            except ValueError as error:
                raise ValueError(f"has the {key} {value!r}, which {error}") from None
        if not (self.hosts or self.targets or self.file_sd_configs or self.ec2_sd_configs):
            raise ValueError(
                "scrapes nothing; give it hosts, targets, file_sd_configs or ec2_sd_configs"
            )
        return self

    @model_validator(mode="after")
    def _safe_access(self) -> JobSettings:
        access = {"scheme", "tls_config", "basic_auth", "authorization"} & self.model_fields_set
        if self.hosts and access:
            raise ValueError(
                f"has hosts, whose access is the program's own, and {min(access)}; give plain "
                "targets with another access a job of their own"
            )
        if self.scheme == "http" and len(access) > 1:
            raise ValueError(
                f"would send {max(access - {'scheme'})} over plain http, readable by anyone on the "
                "way; use scheme https, or leave it out"
            )
        if self.basic_auth and self.authorization:
            raise ValueError("has basic_auth and authorization; a request carries one of them")
        return self

    @property
    def _options(self) -> Mapping[str, Any]:
        return self.model_extra or {}

    @property
    def access(self) -> Access:
        """How the job proves itself, and whom it trusts."""
        if self.scheme == "http":
            return Access(scheme="http", ca=None, client=None, credential=None)
        tls = self.tls_config or TlsSettings()
        ours = tls.ca is None
        credential = "own" if ours else None
        if self.basic_auth:
            credential = "basic"
        elif self.authorization:
            credential = "authorization"
        return Access(
            scheme="https",
            ca=tls.ca or "own",
            client=tls.cert or ("own" if ours else None),
            credential=credential,
            user=self.basic_auth.username if self.basic_auth else "",
            authorization_type=self.authorization.type if self.authorization else "",
            server_name=tls.server_name,
            min_version=tls.min_version,
        )

    def job(self) -> Job:
        """The same job as the renderers take it, without its secrets."""
        return Job(
            name=self.name,
            targets=(*(host.target for host in self.hosts), *self.targets),
            addresses={host.target: host.address for host in self.hosts if host.address},
            labels=dict(self.labels),
            options=dict(self._options),
            discovery={
                key: [entry.model_dump(exclude={"ports"}) for entry in entries]
                for key, entries in (
                    ("file_sd_configs", self.file_sd_configs),
                    ("ec2_sd_configs", self.ec2_sd_configs),
                )
                if entries
            },
            discovered_ports=tuple(
                sorted(
                    {
                        *(port for entry in self.file_sd_configs for port in entry.ports),
                        *(entry.port for entry in self.ec2_sd_configs),
                    }
                )
            ),
            access=self.access,
        )

    def secrets(self) -> JobSecrets:
        """The secrets that settings gave it."""
        key = self.tls_config.key if self.tls_config else None
        given = self.basic_auth.password if self.basic_auth else None
        if self.authorization:
            given = self.authorization.credentials
        return JobSecrets(
            key=key.get_secret_value() if key else "",
            password=given.get_secret_value() if given else "",
        )


def check_jobs(jobs: tuple[JobSettings, ...]) -> tuple[JobSettings, ...]:
    """The jobs of one server; ValueError if two are alike or take a name of ours."""
    reserved = {"prometheus", "node", "federate"}
    for name, count in Counter(job.name for job in jobs).items():
        if count > 1:
            raise ValueError(f"holds {count} jobs named {name!r}; give each its own name")
        if name in reserved or name.startswith("federate-"):
            raise ValueError(
                f"holds a job named {name!r}, which is the program's own; name it otherwise "
                f"(reserved: {', '.join(sorted(reserved))}, and federate-…)"
            )
    for host, count in Counter(host.host for job in jobs for host in job.hosts).items():
        if count > 1:
            raise ValueError(
                f"lists the host {host!r} {count} times; a host has one node_exporter, so list it "
                "in one job"
            )
    return jobs
