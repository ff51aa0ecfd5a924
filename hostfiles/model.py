"""The typed values that the renderers take.

Public values and secrets are separate types. What goes into user-data is rendered from the public
ones alone, so it cannot hold a secret: it was never given one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# https://letsencrypt.org/docs/challenge-types/
Challenge = Literal["http-01", "dns-01"]


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
    of an ingress rule and the destination of an egress rule. `first_boot`: a first boot needs it.
    """

    name: str
    direction: Literal["ingress", "egress"]
    protocol: Literal["tcp", "udp"]
    port: int
    cidr: str
    description: str
    first_boot: bool = False


@dataclass(frozen=True, kw_only=True)
class Acme:
    """An account with an authority that signs over ACME. `server` is its directory's URL.

    `challenge` is how the host shows that its name is its own: `http-01` on its port 80, `dns-01`
    by a record in its zone. `roots` (PEM) are what the authority's certificates chain to;
    `private`: its server's own does, too.
    """

    email: str
    server: str
    port: int
    challenge: Challenge
    roots: str
    private: bool


@dataclass(frozen=True, kw_only=True)
class Access:
    """How a job comes in at its targets. `own` is what this stack gives its own hosts.

    `ca` and `client` are `own`, a PEM text, or None (`ca` may be `system`: the public roots).
    `credential` says which: the exporters' password, or one that settings gave.
    """

    scheme: Literal["https", "http"] = "https"
    ca: str | None = "own"
    client: str | None = "own"
    credential: Literal["own", "basic", "authorization"] | None = "own"
    user: str = ""
    authorization_type: str = ""
    server_name: str | None = None
    min_version: str = "TLS12"


@dataclass(frozen=True, kw_only=True)
class Job:
    """A scrape job: its targets and labels, and any other key of Prometheus's own scrape_config.

    `addresses` are those of targets whose name is not one; `discovery` holds Prometheus's own
    `…_sd_configs`, and `discovered_ports` where their targets listen.
    https://prometheus.io/docs/prometheus/latest/configuration/configuration/#scrape_config
    """

    name: str
    targets: tuple[str, ...] = ()
    addresses: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    discovery: Mapping[str, Any] = field(default_factory=dict)
    discovered_ports: tuple[int, ...] = ()
    access: Access = field(default_factory=Access)


@dataclass(frozen=True, kw_only=True)
class JobSecrets:
    """What settings gave a job: the key of its client certificate, and a password or token."""

    key: str = field(default="", repr=False)
    password: str = field(default="", repr=False)


@dataclass(frozen=True, kw_only=True)
class FederatedSite:
    """A slave as its master sees it (the password is in MasterSecrets, by site).

    Its certificate is good if it is of our CA or chains to one of `public_roots` (PEM).
    """

    site: str
    host: str
    port: int
    user: str
    match: tuple[str, ...]
    scrape_interval: str
    sample_limit: int
    public_roots: str = ""


@dataclass(frozen=True, kw_only=True)
class Backup:
    """TSDB snapshots on the data volume: how often, and which of them are kept."""

    interval_hours: int
    keep: int
    max_age_days: int


@dataclass(frozen=True, kw_only=True)
class Alerting:
    """Notifications: Alertmanager's configuration, which names its secrets by their files."""

    config: Mapping[str, Any]
    release: Release


@dataclass(frozen=True, kw_only=True)
class SecurityUpdates:
    """Whether a host installs them by itself, and when (`04:00`) it may restart for one."""

    install: bool = True
    reboot_at: str | None = None


@dataclass(frozen=True, kw_only=True)
class Server:
    """What slave and master share, and nobody needs to keep secret.

    `ca_bundle` is the PEM of every CA certificate that is trusted, `ca_not_after` the end of the
    first that ends, in Unix seconds. `operator_keys` are the public SSH keys that may log in, a
    line for each. `memory_mib` is the instance
    type's memory; `volume_gib` the data volume's size; `volume_id` its EBS id (`vol-…`).
    `jump_ports` are the SSH ports of hosts that are reached through this server. `nginx_version` is
    that of the distribution's package, or None: whichever the distribution has. Without `alerting`
    rules are evaluated, and nobody is told. `acme` is who signs what nginx shows, if it is not our
    CA.
    """

    fqdn: str
    memory_mib: int
    volume_id: str
    volume_gib: int
    ca_bundle: str
    ca_not_after: int
    operator_keys: str
    rules: tuple[Rule, ...]
    prometheus: Release
    node_exporter: Release
    jobs: tuple[Job, ...]
    external_labels: Mapping[str, str]
    scrape_interval: str
    evaluation_interval: str
    retention_time: str
    rule_files: Mapping[str, str]
    backup: Backup
    jump_ports: tuple[int, ...] = ()
    alerting: Alerting | None = None
    nginx_version: str | None = None
    security_updates: SecurityUpdates = SecurityUpdates()
    acme: Acme | None = None


@dataclass(frozen=True, kw_only=True)
class SlaveServer(Server):
    """A slave: `master_names` are the subject names that a master's client certificate may have."""

    site: str
    master_names: tuple[str, ...]
    federation_port: int


@dataclass(frozen=True, kw_only=True)
class OAuth2:
    """The provider at which people log in, and who of them may come in.

    `ca` verifies the provider: a PEM text, or `system`. An empty `scope` is oauth2-proxy's own.
    """

    issuer: str
    client_id: str
    allowed_groups: tuple[str, ...]
    email_domains: tuple[str, ...]
    scope: str
    ca: str


@dataclass(frozen=True, kw_only=True)
class MasterServer(Server):
    """A master and the sites that it federates.

    With `oauth2` people log in there, by the release `oauth2_proxy`; without it by a password.
    `grafana`: the release of one beside it.
    """

    sites: tuple[FederatedSite, ...]
    ui_port: int
    oauth2: OAuth2 | None = None
    oauth2_proxy: Release
    grafana: Release | None = None


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """A leaf certificate and its private key, PEM. `not_after`, its end, is in Unix seconds."""

    certificate: str
    not_after: int
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
    is this host's own user for loopback: self-scrape, node_exporter, reload and readiness.
    `exporter` is what it sends to monitored hosts, `jobs` what settings gave, by job; `alerting`
    the secrets of notifications, by the paths of their files."""

    prometheus_leaf: Leaf
    nginx_leaf: Leaf
    node_exporter_leaf: Leaf
    remote: tuple[Credential, ...]
    local: Credential
    exporter: Credential | None = None
    jobs: Mapping[str, JobSecrets] = field(default_factory=dict)
    alertmanager_leaf: Leaf | None = None
    alerting: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, kw_only=True)
class SiteTrust:
    """What a site of another stack is known by, and the certificate that it lets in.

    `ca_bundle` is the PEM of every CA that its stack trusts, `ca_not_after` the end of the first
    that ends, in Unix seconds; `leaf` is signed by one of them.
    """

    ca_bundle: str
    ca_not_after: int
    leaf: Leaf


@dataclass(frozen=True, kw_only=True)
class MasterSecrets(ServerSecrets):
    """The password by which the master comes in at each site, and what its door needs.

    A site that `site_trusts` does not know is of this stack, and trusts the same CA. `nginx` is as
    whom nginx comes to what is behind it, whoever came to nginx. `tokens` are those of programs, by
    name; `client_secret` and `cookie_secret` are oauth2-proxy's; by `grafana_key` the master's
    Grafana encrypts its database.
    """

    site_passwords: Mapping[str, str] = field(repr=False)
    site_trusts: Mapping[str, SiteTrust] = field(default_factory=dict)
    nginx: Credential
    tokens: Mapping[str, str] = field(repr=False)
    client_secret: str = field(default="", repr=False)
    cookie_secret: str = field(default="", repr=False)
    grafana_key: str = field(default="", repr=False)


@dataclass(frozen=True, kw_only=True)
class MonitoredHost:
    """A host that is not ours and gets a node_exporter. `host` is a name or an IPv4 address.

    `owner` names stack and server, as two must not manage one host. `scraper` is the name in the
    client certificate of the Prometheus that scrapes it; `sources` are the networks it comes from.
    """

    host: str
    address: str | None
    owner: str
    scraper: str
    sources: tuple[str, ...]
    ca_bundle: str
    ca_not_after: int
    node_exporter: Release


@dataclass(frozen=True, kw_only=True)
class MonitoredHostSecrets:
    """`users` are the passwords of today and of the next rotation."""

    leaf: Leaf
    users: tuple[Credential, ...]


@dataclass(frozen=True, kw_only=True)
class ExistingMaster:
    """A Prometheus that is not ours and gets federate jobs. `owner` is the stack.

    `run_as` is its user, `url` where its host asks it, and `api_ca` (PEM, else the public ones)
    what that is verified against. `reload`: a signal to `unit`, or a request to `url`.
    """

    owner: str
    config_file: str
    run_as: str
    promtool: str
    url: str
    api_ca: str
    reload: Literal["signal", "http"]
    unit: str
    ca_bundle: str
    sites: tuple[FederatedSite, ...]


@dataclass(frozen=True, kw_only=True)
class ExistingMasterSecrets:
    """Its client certificate, each site's password, and the user and password of its API."""

    leaf: Leaf
    site_passwords: Mapping[str, str] = field(repr=False)
    api_user: str = ""
    api_password: str = field(default="", repr=False)
