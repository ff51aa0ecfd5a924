"""The typed values that the renderers take.

Public values and secrets are separate types. What goes into user-data is rendered from the public
ones alone, so it cannot hold a secret: it was never given one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Release:
    """A pinned tarball `<name>-<version>.linux-amd64.tar.gz`, refused if its sha256 differs."""

    name: str
    version: str
    url: str
    sha256: str

    @property
    def version_tuple(self) -> tuple[int, ...]:
        """`(3, 13, 2)` of `3.13.2`; what follows a `-` or `+` is left out."""
        numbers = self.version.split("+")[0].split("-")[0]
        return tuple(int(part) for part in numbers.split("."))


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One line of the firewall table; it becomes a security group rule and a ufw rule.

    `name` is stable and unique within a host: it names the Pulumi resource. `cidr` is the source
    of an ingress rule and the destination of an egress rule.
    """

    name: str
    direction: Literal["ingress", "egress"]
    protocol: Literal["tcp", "udp"]
    port: int
    cidr: str
    description: str


@dataclass(frozen=True, kw_only=True)
class Job:
    """A scrape job: its targets and labels, and any other key of Prometheus's own scrape_config.

    https://prometheus.io/docs/prometheus/latest/configuration/configuration/#scrape_config
    """

    name: str
    targets: tuple[str, ...]
    labels: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class FederatedSite:
    """A slave as its master sees it (the password is in MasterSecrets, by site)."""

    site: str
    host: str
    port: int
    user: str
    match: tuple[str, ...]
    scrape_interval: str
    sample_limit: int


@dataclass(frozen=True, kw_only=True)
class Server:
    """What slave and master share, and nobody needs to keep secret.

    `ca_bundle` is the PEM of every CA certificate that is trusted. `memory_mib` is the instance
    type's memory; `volume_gib` the data volume's size; `volume_id` its EBS id (`vol-…`).
    """

    fqdn: str
    memory_mib: int
    volume_id: str
    volume_gib: int
    ca_bundle: str
    rules: tuple[Rule, ...]
    prometheus: Release
    node_exporter: Release
    jobs: tuple[Job, ...]
    external_labels: Mapping[str, str]
    scrape_interval: str
    evaluation_interval: str
    retention_time: str
    rule_files: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class SlaveServer(Server):
    """A slave: `master_name` is the subject name that the master's client certificate must have."""

    site: str
    master_name: str
    federation_port: int


@dataclass(frozen=True, kw_only=True)
class MasterServer(Server):
    """A master and the sites that it federates."""

    sites: tuple[FederatedSite, ...]
    ui_port: int


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """A leaf certificate and its private key, PEM."""

    certificate: str
    key: str = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Credential:
    """A user's password with the hashes that guard it.

    `strong_hash` (bcrypt 12) stands in web.yml, where results are cached; `cheap_hash` (bcrypt 5)
    in nginx's file, where every request pays for it and the password is 48 random characters.
    """

    user: str
    password: str = field(repr=False)
    strong_hash: str = field(repr=False)
    cheap_hash: str = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class ServerSecrets:
    """`remote` are who may come in through nginx (several while a password is rotated); `local`
    is this host's own user for loopback: self-scrape, node_exporter, reload and readiness."""

    prometheus_leaf: Leaf
    nginx_leaf: Leaf
    node_exporter_leaf: Leaf
    remote: tuple[Credential, ...]
    local: Credential


@dataclass(frozen=True, kw_only=True)
class MasterSecrets(ServerSecrets):
    """The password by which the master comes in at each site."""

    site_passwords: Mapping[str, str] = field(repr=False)
