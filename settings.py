"""The settings of one environment: read once, checked, frozen.

This module is the only reader of `pulumi.Config`. Defaults stand in Pulumi.yaml; here stands what
makes a value acceptable. It knows nothing of AWS resources and makes none.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pulumi
import yaml
from pulumi.runtime import config as runtime_config
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from alerting_settings import AlertingSettings
from door_settings import OAuth2Settings, TokenName
from existing_master_settings import ExistingMasterSettings
from hostfiles.model import Acme, Backup, Challenge, Release, SecurityUpdates
from job_settings import HostAccess, JobSettings, check_jobs
from lets_encrypt_settings import LetsEncryptSettings
from setting_types import (
    Cidr,
    DomainName,
    Duration,
    HostLabel,
    Interval,
    Model,
    Password,
    Region,
    SnapshotId,
    SubnetId,
    matching,
)

NAMESPACE = "prometheus-federation"

# Ports of the documents in seeds/; both are what firewalls, certificates and URLs agree on.
FEDERATION_PORT = 9095
UI_PORT = 443


def _official(name: str, version: str, sha256: str) -> Release:
    # oauth2-proxy has a `v` in the file's name, too.
    owner, tag = (
        ("oauth2-proxy", f"v{version}") if name == "oauth2-proxy" else ("prometheus", version)
    )
    tarball = f"{name}-{tag}.linux-amd64.tar.gz"
    url = f"https://github.com/{owner}/{name}/releases/download/v{version}/{tarball}"
    return Release(name=name, version=version, sha256=sha256, url=url)


# By their keys in the setting `releases`. Sums agreed by two or more independent public records.
RELEASES = {
    "prometheus": _official(
        "prometheus", "3.13.2", "0e8c4d46101bd025ea8265e377d2caabc57f488fc1be1c367f37db69ea41be6f"
    ),
    "nodeExporter": _official(
        "node_exporter",
        "1.12.1",
        "b51d8a76aa2a9156a55d501aca6276fae09e262259a5e4e831d2c2222f084e63",
    ),
    "alertmanager": _official(
        "alertmanager", "0.34.0", "19c75a11d8c03dc4ade7abdbddfb3a8f28c9e7b000d0849cda0cd71dffd74a03"
    ),
    "oauth2Proxy": _official(
        "oauth2-proxy", "7.15.4", "4fbe902189aab713d9c0519b90a645032d4636ecb523dc36f5cc312d8ebef1e2"
    ),
}

# Memory of EC2's families at size `large`, in MiB; each other size is a multiple of it.
# https://docs.aws.amazon.com/ec2/latest/instancetypes/instance-types.html
_MEMORY_OF_LARGE = {"t": 8192, "m": 8192, "c": 4096, "r": 16384}
_SIZE = {"nano": 1 / 16, "micro": 1 / 8, "small": 1 / 4, "medium": 1 / 2, "large": 1}

# Keys, at any depth, whose values no error shows.
_SECRET_KEYS = frozenset(
    "password nextPassword privateKey key credentials clientSecret global receivers".split()
)
# Where an object belongs, a lone text may be the one secret of it.
_OBJECT_EXPECTED = frozenset("model_type model_attributes_type dict_type mapping_type".split())
# `user:password@`, as in an address.
_LOOKS_SECRET = re.compile(r"PRIVATE KEY|[^/@\s]:[^/@\s]*@", re.IGNORECASE)
# What pydantic says of these speaks of Python.
_SAID = dict.fromkeys(_OBJECT_EXPECTED, "is no object; write it as keys with their values") | {
    "tuple_type": "is no list; write it like [a, b]",
    "too_short": "is empty; give it at least one entry",
    "string_too_short": "is empty; write something there",
    "string_type": "is no text; put it in quotes",
}


class SettingsError(pulumi.RunError):
    """One or more settings are wrong. The text names each key, its value and the remedy.

    A RunError ends the program with this text alone, without a stack trace.
    """


def _memory_of(instance_type: str) -> int:
    family, _, size = instance_type.partition(".")
    match = re.fullmatch(r"([tmcr])\d+[a-z-]*", family)
    factor = _SIZE.get(size) or (
        (2.0 if size == "xlarge" else 2.0 * int(size[:-6]))
        if re.fullmatch(r"\d*xlarge", size)
        else None
    )
    if match is None or factor is None or re.fullmatch(r"[a-z]+\d+g[a-z]*", family):
        raise ValueError(
            "is not an x86-64 type of the t, m, c or r families; use one such as t3.micro or "
            "m7i.large"
        )
    return int(_MEMORY_OF_LARGE[match[1]] * factor)


def _instance_type(value: str) -> str:
    _memory_of(value)
    return value


def _none_if_empty(value: Any) -> Any:
    return None if value in ({}, "") else value


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


InstanceType = Annotated[str, AfterValidator(_instance_type)]
Certificates = Literal["ownCa", "letsencrypt"]
Version = Annotated[
    str,
    matching(
        r"\d+\.\d+\.\d+([-+][A-Za-z0-9.]+)?", "is no version; write it like 3.13.2, without a v"
    ),
]
Sha256 = Annotated[
    str,
    matching(r"[0-9a-f]{64}", "is no SHA-256 sum; give its 64 hexadecimal digits, in lower case"),
]


class RotationSettings(Model):
    """Numbers that say how often a secret was renewed on purpose: one more, and it is renewed."""

    password: Annotated[int, Field(ge=1)] = 1
    # The password before this one is accepted still: for clients that change by and by.
    keep_old_password: bool = False
    exporter_password: Annotated[int, Field(ge=1)] = 1
    leaf_certificates: Annotated[int, Field(ge=1)] = 1


class EnvironmentRotation(Model):
    """The same for what all hosts share. `oldest_ca` is the oldest CA that is trusted still."""

    ca: Annotated[int, Field(ge=1)] = 1
    oldest_ca: Annotated[int, Field(ge=1)] | None = None
    ssh_key: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="after")
    def _oldest_is_old(self) -> EnvironmentRotation:
        if self.oldest_ca is not None and self.oldest_ca > self.ca:
            raise ValueError(
                f"trusts CAs from generation {self.oldest_ca} on, and {self.ca} signs; lower "
                "oldestCa to that or leave it out"
            )
        return self


class BackupSettings(Model):
    """How often the data is backed up, and how much of it is kept where.

    `keep` counts EBS snapshots of each data volume, `keep_on_host` and `max_age_days` bound the
    TSDB snapshots on the volume itself. The hours are those that EBS's lifecycle policies take.
    https://docs.aws.amazon.com/dlm/latest/APIReference/API_CreateRule.html
    """

    interval_hours: Literal[1, 2, 3, 4, 6, 8, 12, 24] = 24
    keep: Annotated[int, Field(ge=0, le=1000)] = 7
    keep_on_host: Annotated[int, Field(ge=1, le=100)] = 3
    max_age_days: Annotated[int, Field(ge=1, le=3650)] = 7

    def on_host(self) -> Backup:
        """What the host itself does."""
        return Backup(
            interval_hours=self.interval_hours,
            keep=self.keep_on_host,
            max_age_days=self.max_age_days,
        )


class SecurityUpdateSettings(Model):
    """Whether hosts install the distribution's security updates by themselves.

    `reboot_at` is a time of day in UTC: a host whose update asks for it restarts then. Without it
    none does.
    """

    install: bool = True
    reboot_at: (
        Annotated[
            str,
            matching(
                r"([01]\d|2[0-3]):[0-5]\d", 'is no time of day; write it like "04:00", in quotes'
            ),
        ]
        | None
    ) = None

    @model_validator(mode="after")
    def _nothing_to_reboot_for(self) -> SecurityUpdateSettings:
        if self.reboot_at and not self.install:
            raise ValueError(
                f"restarts hosts at {self.reboot_at} for updates that they do not install; leave "
                "rebootAt out or install away"
            )
        return self

    def on_host(self) -> SecurityUpdates:
        """What the host itself does."""
        return SecurityUpdates(install=self.install, reboot_at=self.reboot_at)


class HostSettings(Model):
    """What a slave and a master may both say of their host.

    `generation`, bumped, makes a new instance beside the old one from today's user-data.
    `restore_from`, the last of it, is the EBS snapshot that the data volume is made from; each
    one more makes a new volume and a new instance.
    """

    host: HostLabel
    certificates: Certificates | None = None
    challenge: Challenge | None = None
    region: Region | None = None
    subnet_id: SubnetId | None = None
    instance_type: InstanceType | None = None
    data_volume_gib: Annotated[int, Field(ge=4, le=16384)] | None = None
    generation: Annotated[int, Field(ge=1)] = 1
    restore_from: Annotated[tuple[SnapshotId, ...], BeforeValidator(_one_or_many)] = ()
    keep_replaced_volumes: bool = True
    jobs: tuple[JobSettings, ...] = ()
    # Where the targets of `jobs` are, for the egress rules; empty: anywhere in the host's own VPC.
    target_cidrs: tuple[Cidr, ...] = ()
    password: Password | None = None
    next_password: Password | None = None
    host_access: HostAccess | None = None
    rotation: RotationSettings = RotationSettings()

    @property
    def own_password(self) -> dict[str, Any]:
        """What is said of the password of the web page (master) or of federation (slave)."""
        return {
            "generation": self.rotation.password,
            "keep_old": self.rotation.keep_old_password,
            "password": self.password,
            "next_password": self.next_password,
        }

    @model_validator(mode="after")
    def _old_password_is_known(self) -> HostSettings:
        if self.password is not None and self.rotation.keep_old_password:
            raise ValueError(
                "cannot keep an old password, as it does not know the one before your own; set "
                "nextPassword first, and then that as password with rotation.password one higher"
            )
        return self

    @property
    def instance_generation(self) -> str:
        """What tells an instance from those before it: another volume needs another instance."""
        restored = "".join(f"-{id_[-8:]}" for id_ in self.restore_from[-1:])
        return f"{self.generation}{restored}"

    @property
    def volumes(self) -> tuple[str | None, ...]:
        """The snapshots that the host's data volumes are made from (None: made empty).

        The last volume is the one in use; the others were it once.
        """
        every = (None, *self.restore_from)
        return every if self.keep_replaced_volumes else every[-1:]

    @property
    def jump_ports(self) -> tuple[int, ...]:
        """The SSH ports of hosts that are reached through this server."""
        if self.host_access is None:
            return ()
        hosts = [host for job in self.jobs for host in job.hosts]
        through = [host for host in hosts if self.host_access.of(host).jump]
        ports = {self.host_access.of(host).port for host in through}
        # Also without any host: the last one that leaves is reached once more.
        return tuple(sorted(ports | ({self.host_access.port} if self.host_access.jump else set())))

    @field_validator("restore_from")
    @classmethod
    def _each_snapshot_once(cls, snapshots: tuple[str, ...]) -> tuple[str, ...]:
        for snapshot, count in Counter(snapshots).items():
            if count > 1:
                raise ValueError(f"names {snapshot} {count} times; take out the earlier ones")
        return snapshots

    @field_validator("jobs")
    @classmethod
    def _sound_jobs(cls, jobs: tuple[JobSettings, ...]) -> tuple[JobSettings, ...]:
        return check_jobs(jobs)

    @model_validator(mode="after")
    def _hosts_are_reachable(self) -> HostSettings:
        if self.host_access is None and any(job.hosts for job in self.jobs):
            raise ValueError(
                "has jobs with hosts, and no hostAccess to reach them; add hostAccess with user "
                "and privateKey, or list the hosts as plain targets"
            )
        return self


class SlaveSettings(HostSettings):
    """One site: its slave Prometheus, what that scrapes, and what the master takes of it."""

    site: HostLabel
    match: Annotated[tuple[str, ...], Field(min_length=1)] = ('{__name__=~".+"}',)
    sample_limit: Annotated[int, Field(ge=1)] = 200_000


class OtherStack(Model):
    """Sites of another stack of this program. They are named, as each is a rule of the firewall.

    `stack` is what a StackReference takes: `dublin-prod`, or with organisation and project.
    https://www.pulumi.com/docs/iac/concepts/stacks/#stackreferences
    """

    stack: Annotated[
        str,
        matching(
            r"([A-Za-z0-9._-]+/){0,2}[A-Za-z0-9._-]+",
            "is no stack; write it like dublin-prod or organisation/project/dublin-prod",
        ),
    ]
    sites: Annotated[tuple[HostLabel, ...], Field(min_length=1)]


class ReleaseSettings(Model):
    """Another release than the pinned one. The sum is of the linux-amd64 tarball."""

    version: Version
    sha256: Sha256
    url: (
        Annotated[
            str,
            matching(
                r"https?://\S+", "is no address; write it like https://mirror.example.com/a.tar.gz"
            ),
        ]
        | None
    ) = None


class PackageSettings(Model):
    """Another version of a distribution's package than the one that it has."""

    # https://www.debian.org/doc/debian-policy/ch-controlfields.html#version
    version: Annotated[
        str,
        matching(
            r"[0-9][A-Za-z0-9.+~:-]*",
            "is no version of a package; write it as apt list --all-versions nginx shows it",
        ),
    ]


class GrafanaSettings(Model):
    """A Grafana on the master. None is pinned: its builds' addresses hold a number of their own.

    Address and sum stand at https://grafana.com/grafana/download (Open Source, Linux binaries).
    """

    version: Version
    sha256: Sha256
    url: Annotated[
        str,
        matching(
            r"https?://\S+\.tar\.gz",
            "is no address of a .tar.gz; copy it from https://grafana.com/grafana/download",
        ),
    ]

    def release(self) -> Release:
        """As the host installs it."""
        return Release(name="grafana", version=self.version, sha256=self.sha256, url=self.url)


class MasterSettings(HostSettings):
    """The master Prometheus of this environment, and what it federates beside its own sites.

    People come in by `oauth2`, or else by one password; programs by the tokens that are named here.
    """

    other_stacks: tuple[OtherStack, ...] = ()
    oauth2: OAuth2Settings | None = None
    tokens: tuple[TokenName, ...] = ()
    grafana: GrafanaSettings | None = None

    @field_validator("other_stacks")
    @classmethod
    def _each_stack_once(cls, stacks: tuple[OtherStack, ...]) -> tuple[OtherStack, ...]:
        for name, count in Counter(other.stack for other in stacks).items():
            if count > 1:
                raise ValueError(f"names the stack {name!r} {count} times; put its sites together")
        return stacks

    @field_validator("tokens")
    @classmethod
    def _each_token_once(cls, tokens: tuple[str, ...]) -> tuple[str, ...]:
        for token, count in Counter(tokens).items():
            if count > 1:
                raise ValueError(f"names {token} {count} times; give each program its own")
        return tokens

    @model_validator(mode="after")
    def _one_way_for_people(self) -> MasterSettings:
        if self.oauth2 is not None and (self.password or self.next_password):
            raise ValueError(
                "has both oauth2 and a password, and with oauth2 nobody comes in by password; "
                "take out password and nextPassword"
            )
        return self


class ReleasesSettings(Model):
    """Releases by program."""

    prometheus: ReleaseSettings | None = None
    node_exporter: ReleaseSettings | None = None
    alertmanager: ReleaseSettings | None = None
    oauth2_proxy: Annotated[ReleaseSettings | None, Field(alias="oauth2Proxy")] = None
    nginx: PackageSettings | None = None


class Settings(Model):
    """An environment. Every field is a key of Pulumi.yaml, where its meaning and default stand."""

    zone: DomainName
    operator_cidrs: Annotated[tuple[Cidr, ...], Field(min_length=1)]
    package_cidrs: tuple[Cidr, ...]
    certificates: Certificates
    lets_encrypt: Annotated[LetsEncryptSettings | None, BeforeValidator(_none_if_empty)]
    os: Literal["debian13", "ubuntu2604"]
    ami_id: Annotated[
        Annotated[
            str, matching(r"ami-[a-z0-9]+", "is no image; write it like ami-0123456789abcdef0")
        ]
        | None,
        BeforeValidator(_none_if_empty),
    ]
    instance_type: InstanceType
    data_volume_gib: Annotated[int, Field(ge=4, le=16384)]
    protect_data: bool
    backup: BackupSettings
    security_updates: SecurityUpdateSettings
    retention_time: Duration
    scrape_interval: Interval
    evaluation_interval: Interval
    rule_files: tuple[str, ...]
    alerting: Annotated[AlertingSettings | None, BeforeValidator(_none_if_empty)]
    tags: Mapping[str, str]
    releases: ReleasesSettings
    rotation: EnvironmentRotation
    slaves: tuple[SlaveSettings, ...]
    master: Annotated[MasterSettings | None, BeforeValidator(_none_if_empty)]
    existing_master: Annotated[ExistingMasterSettings | None, BeforeValidator(_none_if_empty)]

    @field_validator("rule_files")
    @classmethod
    def _readable_rules(cls, paths: tuple[str, ...]) -> tuple[str, ...]:
        for path in paths:
            _check_rule_file(path)
        for name, count in Counter(Path(path).name for path in paths).items():
            if count > 1:
                raise ValueError(f"names {count} files {name!r}; on a host they share one folder")
        return paths

    @field_validator("slaves")
    @classmethod
    def _unique_sites(cls, slaves: tuple[SlaveSettings, ...]) -> tuple[SlaveSettings, ...]:
        for attribute in ("site", "host"):
            for name, count in Counter(getattr(slave, attribute) for slave in slaves).items():
                if count > 1:
                    raise ValueError(
                        f"holds {count} slaves with {attribute} {name!r}; give each its own"
                    )
        return slaves

    @model_validator(mode="after")
    def _a_master(self) -> Settings:
        if not self.slaves and self.master is None:
            raise ValueError("there is neither a slave nor a master; add slaves, master or both")
        if self.master is None and self.existing_master is None:
            raise ValueError(
                "nobody may federate the slaves; add master, or existingMaster with the host and "
                "cidrs of the Prometheus that will"
            )
        if self.master is not None and self.master.host in {slave.host for slave in self.slaves}:
            raise ValueError(f"master and a slave are both named {self.master.host!r}; rename one")
        return self

    @model_validator(mode="after")
    def _an_account(self) -> Settings:
        for server in (*self.slaves, *([self.master] if self.master else [])):
            if self.lets_encrypt is None and self._is_public(server):
                raise ValueError(
                    f"{server.host} has certificates: letsencrypt, and letsEncrypt is not set; add "
                    "it with email and agreeToTerms: true"
                )
        return self

    @model_validator(mode="after")
    def _sites_have_names_of_their_own(self) -> Settings:
        stacks = self.master.other_stacks if self.master else ()
        others = [(site, other.stack) for other in stacks for site in other.sites]
        where = [(slave.site, "slaves") for slave in self.slaves] + others
        for site, count in Counter(site for site, _ in where).items():
            if count > 1:
                found = ", ".join(place for name, place in where if name == site)
                raise ValueError(
                    f"master.otherStacks makes {count} sites named {site!r} ({found}); the master "
                    "knows a site by its name alone, so rename it in one of them"
                )
        return self

    @model_validator(mode="after")
    def _servers_are_nothing_else(self) -> Settings:
        servers = [*self.slaves, *([self.master] if self.master else [])]
        names = {self.fqdn(server) for server in servers}
        if self.existing_master is not None and self.existing_master.host in names:
            raise ValueError(
                f"existingMaster is named {self.existing_master.host!r}, as a server of this "
                "environment is; its certificate must say another name"
            )
        for host in (host for server in servers for job in server.jobs for host in job.hosts):
            if host.host in names:
                raise ValueError(
                    f"{host.host} is a server of this environment and has a node_exporter by "
                    "itself; take it out of the job's hosts"
                )
        return self

    def acme_of(self, host: HostSettings) -> Acme | None:
        """Who signs the certificate that a host shows, if it is not our CA."""
        if self.lets_encrypt is None or not self._is_public(host):
            return None
        return self.lets_encrypt.acme(host.challenge)

    def _is_public(self, host: HostSettings) -> bool:
        return (host.certificates or self.certificates) == "letsencrypt"

    @property
    def public_roots(self) -> str:
        """The PEM of the public roots that masters trust beside our CA; empty if none.

        Those of `letsEncrypt`, whichever hosts use it now: so one that goes back to our CA is
        trusted before and after.
        """
        return self.lets_encrypt.roots if self.lets_encrypt else ""

    def instance_type_of(self, host: HostSettings) -> str:
        """The EC2 instance type of a host."""
        return host.instance_type or self.instance_type

    def memory_mib_of(self, host: HostSettings) -> int:
        """The memory of a host's instance type, in MiB."""
        return _memory_of(self.instance_type_of(host))

    def volume_gib_of(self, host: HostSettings) -> int:
        """The size of a host's data volume, in GiB."""
        return host.data_volume_gib or self.data_volume_gib

    def fqdn(self, host: HostSettings) -> str:
        """A host's name in the zone."""
        return f"{host.host}.{self.zone}"

    def release(
        self, key: Literal["prometheus", "nodeExporter", "alertmanager", "oauth2Proxy"]
    ) -> Release:
        """The release of a program: the pinned one unless the settings name another."""
        pinned = RELEASES[key]
        chosen: ReleaseSettings | None = {
            "prometheus": self.releases.prometheus,
            "nodeExporter": self.releases.node_exporter,
            "alertmanager": self.releases.alertmanager,
            "oauth2Proxy": self.releases.oauth2_proxy,
        }[key]
        if chosen is None:
            return pinned
        official = _official(pinned.name, chosen.version, chosen.sha256)
        return replace(official, url=chosen.url) if chosen.url else official

    def notifications(self) -> tuple[tuple[int, str], ...]:
        """Ports and networks (CIDR) of receivers that firewalls let hosts reach."""
        return self.alerting.destinations() if self.alerting else ()

    @property
    def nginx_version(self) -> str | None:
        """The version of nginx's package; None for the distribution's."""
        return self.releases.nginx.version if self.releases.nginx else None

    def rule_file_contents(self) -> dict[str, str]:
        """The rule files by the name they have on a host."""
        return {Path(path).name: Path(path).read_text() for path in self.rule_files}


class _Rule(BaseModel):
    """https://prometheus.io/docs/prometheus/latest/configuration/recording_rules/."""

    model_config = ConfigDict(extra="forbid")

    record: str | None = None
    alert: str | None = None
    expr: str | int | float
    for_: Annotated[Duration | None, Field(alias="for")] = None
    keep_firing_for: Duration | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_kind(self) -> _Rule:
        if (self.record is None) == (self.alert is None):
            raise ValueError("needs either record or alert")
        return self


class _RuleGroup(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    interval: Duration | None = None
    query_offset: Duration | None = None
    limit: int = 0
    labels: dict[str, str] = Field(default_factory=dict)
    rules: list[_Rule] = Field(default_factory=list)


class _RuleFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    groups: list[_RuleGroup]


def _check_rule_file(path: str) -> None:
    """The shape of a rule file; its PromQL is checked by promtool on the host, before any swap."""
    try:
        _RuleFile.model_validate(yaml.safe_load(Path(path).read_text()))
    except OSError as error:
        raise ValueError(
            f"names {path!r}, which cannot be read ({error.strerror}); paths count from the "
            "project's folder"
        ) from None
    except yaml.YAMLError as error:
        raise ValueError(f"names {path!r}, which is not YAML: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ValueError(
            f"names {path!r}, which is not a rule file: {where}: {first['msg']}; "
            f"`promtool check rules {path}` tells more"
        ) from None


def load() -> Settings:
    """The settings of the current stack.

    Raises SettingsError, which names every wrong key, its value and what to write instead.
    """
    config = pulumi.Config(NAMESPACE)
    known = {str(field.alias) for field in Settings.model_fields.values()}
    if unknown := sorted(_given_keys() - known):
        raise SettingsError(
            "\n".join(
                f"{NAMESPACE}:{key}: there is no such setting; "
                f"the settings are {', '.join(sorted(known))}"
                for key in unknown
            )
        )
    given = {key: _decoded(text) for key in known if (text := config.get(key)) is not None}
    return check(given)


def check(given: Mapping[str, Any]) -> Settings:
    """The settings that a mapping of keys to plain values makes; raises SettingsError."""
    try:
        return Settings.model_validate(given)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        # A list whose items are refused counts as empty: the items are what to tell about.
        refused = [problem["loc"] for problem in problems]
        lines = [
            _explain(problem)
            for problem in problems
            if problem["type"] != "too_short"
            or not any(other[: len(problem["loc"])] == problem["loc"] != other for other in refused)
        ]
        # `from None`: the original holds the whole input, secrets included.
        raise SettingsError("\n".join(lines)) from None


def _given_keys() -> set[str]:
    """Every key of our namespace that the stack sets; pulumi.Config offers no such list."""
    everything = {*runtime_config.CONFIG.get(), *runtime_config.get_config_env()}
    prefix = f"{NAMESPACE}:"
    return {key.removeprefix(prefix) for key in everything if key.startswith(prefix)}


def _decoded(text: str) -> Any:
    """A setting's value: lists, objects, numbers and booleans reach the program as JSON."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return text if isinstance(value, str) else value


def _explain(problem: Any) -> str:
    """One line of one problem: key, value, remedy. A password's value is not shown."""
    location = "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"]
    ).lstrip(".")
    key = f"{NAMESPACE}:{location}" if location else f"{NAMESPACE}"
    message = _SAID.get(problem["type"]) or str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        return f"{key}: there is no such setting; correct its spelling or remove it"
    if problem["type"] == "missing":
        return f"{key}: is missing; set it"
    return f"{key}: {_shown(problem)} {message}".replace(":  ", ": ")


def _shown(problem: Any) -> str:
    """The value of a problem, unless it is a secret or may hold one, or is too much to show."""
    value, keys = problem["input"], set(map(str, problem["loc"]))
    if value is None:
        return "(nothing)"
    if not isinstance(value, (str, int, float)):
        return ""
    # What `rotation` holds are numbers, also of passwords.
    secret = keys & _SECRET_KEYS and "rotation" not in keys
    if secret or problem["type"] in _OBJECT_EXPECTED or _LOOKS_SECRET.search(str(value)):
        return "(not shown)"
    return repr(value)
