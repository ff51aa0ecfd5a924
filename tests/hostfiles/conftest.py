"""Throwaway servers and secrets, and a Debian 13 in whose root the real tools run."""

from __future__ import annotations

import datetime
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bcrypt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from hostfiles import firewall, master, slave
from hostfiles.alertmanager import SECRETS_FOLDER
from hostfiles.files import HostFiles
from hostfiles.model import (
    Alerting,
    Backup,
    Credential,
    FederatedSite,
    Job,
    Leaf,
    MasterSecrets,
    MasterServer,
    Release,
    ServerSecrets,
    SlaveServer,
)

SLAVE = "prometheus-slave.example.com"
MASTER = "prometheus-master.example.com"
# Fixed, so that two renderings in one test differ by nothing but what the test changed.
SALT = b"abcdefghijklmnopqrstuu"
CORE = Job(
    name="CoreSystems",
    targets=("core01.example.internal:9100", "core02.example.internal:9100"),
    labels={"group": "CoreSystems Monitoring"},
)


HOOK = f"{SECRETS_FOLDER}/receivers-0-webhook_configs-0-url"


def alerting(version: str) -> Alerting:
    """One receiver, with a secret address."""
    receiver = {"name": "team", "webhook_configs": [{"url_file": HOOK}]}
    config = {"route": {"receiver": "team"}, "receivers": [receiver]}
    return Alerting(config=config, release=release("alertmanager", version))


class Authority:
    """A CA of its own for the test run."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name("test CA")
        self.certificate = _pem(self._sign(self._name, self._key, ca=True))

    def leaf(self, common_name: str) -> Leaf:
        key = ec.generate_private_key(ec.SECP256R1())
        private = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.TraditionalOpenSSL,
            serialization.NoEncryption(),
        )
        certificate = self._sign(_name(common_name), key, dns=common_name)
        end = int(certificate.not_valid_after_utc.timestamp())
        return Leaf(certificate=_pem(certificate), key=private.decode(), not_after=end)

    def _sign(
        self, subject: x509.Name, key: Any, *, ca: bool = False, dns: str = ""
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if dns:
            usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
            builder = builder.add_extension(
                x509.SubjectAlternativeName([x509.DNSName(dns)]), critical=False
            ).add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        return builder.sign(self._key, hashes.SHA256())


def _name(common_name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "prometheus-federation"),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        ]
    )


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def credential(user: str, password: str) -> Credential:
    def hashed(cost: int) -> str:
        return bcrypt.hashpw(password.encode(), b"$2b$%02d$%b" % (cost, SALT)).decode()

    return Credential(user=user, password=password, strong_hash=hashed(4), cheap_hash=hashed(5))


def release(name: str, version: str) -> Release:
    return Release(
        name=name,
        version=version,
        url=f"https://releases.example.net/{name}-{version}.linux-amd64.tar.gz",
        sha256="0" * 64,
    )


@pytest.fixture(scope="session")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="session")
def prometheus_version() -> str:
    return "3.13.2"


@pytest.fixture(scope="session")
def alertmanager_version() -> str:
    return "0.34.0"


@pytest.fixture
def slave_server(
    authority: Authority, prometheus_version: str, alertmanager_version: str
) -> Callable[..., SlaveServer]:
    def make(**changed: Any) -> SlaveServer:
        jobs = changed.get("jobs", (CORE,))
        values: dict[str, Any] = {
            "fqdn": SLAVE,
            "memory_mib": 1024,
            "volume_id": "vol-0abc",
            "volume_gib": 20,
            "ca_bundle": authority.certificate,
            "ca_not_after": 2_000_000_000,
            "operator_keys": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERIT\n",
            "rules": firewall.slave_rules(
                operator_cidrs=["203.0.113.1/32"],
                master_cidrs=[],
                masters={"master": "198.51.100.7/32"},
                federation_port=9095,
                package_cidrs=["0.0.0.0/0"],
                vpc_cidr="10.0.0.0/16",
                jobs=jobs,
            ),
            "prometheus": release("prometheus", prometheus_version),
            "node_exporter": release("node_exporter", "1.12.1"),
            "jobs": jobs,
            "external_labels": {"site": "dublin"},
            "scrape_interval": "15s",
            "evaluation_interval": "15s",
            "retention_time": "30d",
            "rule_files": {},
            "backup": Backup(interval_hours=24, keep=3, max_age_days=7),
            "alerting": alerting(alertmanager_version),
            "site": "dublin",
            "master_names": (MASTER,),
            "federation_port": 9095,
        }
        return SlaveServer(**{**values, **changed})

    return make


@pytest.fixture
def site() -> FederatedSite:
    return FederatedSite(
        site="dublin",
        host=SLAVE,
        port=9095,
        user="prometheus-admin",
        match=('{__name__=~".+"}',),
        scrape_interval="15s",
        sample_limit=200_000,
    )


@pytest.fixture
def master_server(
    authority: Authority, site: FederatedSite, prometheus_version: str, alertmanager_version: str
) -> Callable[..., MasterServer]:
    def make(**changed: Any) -> MasterServer:
        sites = changed.get("sites", (site,))
        values: dict[str, Any] = {
            "fqdn": MASTER,
            "memory_mib": 1024,
            "volume_id": "vol-0abd",
            "volume_gib": 20,
            "ca_bundle": authority.certificate,
            "ca_not_after": 2_000_000_000,
            "operator_keys": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERIT\n",
            "rules": firewall.master_rules(
                operator_cidrs=["203.0.113.1/32"],
                ui_port=443,
                package_cidrs=["0.0.0.0/0"],
                vpc_cidr="10.1.0.0/16",
                slaves={one.site: ("198.51.100.8/32", one.port) for one in sites},
                jobs=(),
            ),
            "prometheus": release("prometheus", prometheus_version),
            "node_exporter": release("node_exporter", "1.12.1"),
            "jobs": (),
            "external_labels": {},
            "scrape_interval": "15s",
            "evaluation_interval": "15s",
            "retention_time": "30d",
            "rule_files": {},
            "backup": Backup(interval_hours=24, keep=3, max_age_days=7),
            "alerting": alerting(alertmanager_version),
            "sites": sites,
            "ui_port": 443,
            "oauth2_proxy": release("oauth2-proxy", "7.15.4"),
        }
        return MasterServer(**{**values, **changed})

    return make


@pytest.fixture(scope="session")
def leaves(authority: Authority) -> dict[str, Leaf]:
    return {name: authority.leaf(name) for name in (SLAVE, MASTER)}


@pytest.fixture
def slave_secrets(leaves: dict[str, Leaf]) -> Callable[..., ServerSecrets]:
    def make(**changed: Any) -> ServerSecrets:
        leaf = leaves[SLAVE]
        values: dict[str, Any] = {
            "prometheus_leaf": leaf,
            "nginx_leaf": leaf,
            "node_exporter_leaf": leaf,
            "alertmanager_leaf": leaf,
            "alerting": {HOOK: "https://hooks.example.net/WWWWWWWW"},
            "remote": (credential("prometheus-admin", "R" * 48),),
            "local": credential("local", "L" * 48),
            "exporter": credential("prometheus-1", "E" * 48),
        }
        return ServerSecrets(**{**values, **changed})

    return make


@pytest.fixture
def master_secrets(leaves: dict[str, Leaf]) -> Callable[..., MasterSecrets]:
    def make(**changed: Any) -> MasterSecrets:
        leaf = leaves[MASTER]
        values: dict[str, Any] = {
            "prometheus_leaf": leaf,
            "nginx_leaf": leaf,
            "node_exporter_leaf": leaf,
            "alertmanager_leaf": leaf,
            "alerting": {HOOK: "https://hooks.example.net/WWWWWWWW"},
            "remote": (credential("admin", "U" * 48),),
            "local": credential("local", "L" * 48),
            "site_passwords": {"dublin": "R" * 48},
            "nginx": credential("nginx", "N" * 48),
            "tokens": {"grafana": f"grafana_{'T' * 48}"},
        }
        return MasterSecrets(**{**values, **changed})

    return make


@pytest.fixture
def whole_slave(
    slave_server: Callable[..., SlaveServer], slave_secrets: Callable[..., ServerSecrets]
) -> HostFiles:
    server = slave_server()
    return slave.host_files(server).with_files(slave.secret_files(server, slave_secrets()))


@pytest.fixture
def whole_master(
    master_server: Callable[..., MasterServer], master_secrets: Callable[..., MasterSecrets]
) -> HostFiles:
    server = master_server()
    return master.host_files(server).with_files(master.secret_files(server, master_secrets()))


@pytest.fixture(scope="session")
def ssh_key() -> tuple[str, str]:
    key = ed25519.Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    return private.decode(), public.decode()


# ---- the real tools --------------------------------------------------------------------------

# $1 lower directories, $2 upper, $3 work, $4 where to mount; then a command. All mounts are of a
# namespace that goes with the command, so a killed test run leaves none.
_IN_ROOT = """
set -eu
lower=$1 upper=$2 work=$3 root=$4
shift 4
mount -t overlay overlay -o "lowerdir=$lower,upperdir=$upper,workdir=$work" "$root"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount -t sysfs sysfs "$root/sys"
mkdir -p "$root/run/lock" "$root/run/sshd"
exec chroot "$root" /usr/bin/env -i PATH="/stub:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin" "$@"
"""


@dataclass(frozen=True, kw_only=True)
class Root:
    """A Debian 13 that keeps what is written to it, in a folder of the test's."""

    layers: tuple[Path, ...]
    folder: Path

    @property
    def upper(self) -> Path:
        return self.folder / "upper"

    def write(self, path: str, content: str, mode: int = 0o644) -> None:
        file = self.upper / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
        file.chmod(mode)

    def run(self, argv: Sequence[str], stdin: str = "") -> subprocess.CompletedProcess[str]:
        for name in ("upper", "work", "root"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        lower = ":".join(map(str, self.layers))
        command = ["unshare", "--mount", "--net", "--propagation=private", "sh", "-c", _IN_ROOT]
        command += ["sh", lower, *(str(self.folder / n) for n in ("upper", "work", "root")), *argv]
        return subprocess.run(
            command, input=stdin, capture_output=True, text=True, timeout=120, check=False
        )


@dataclass(frozen=True, kw_only=True)
class ToolImage:
    """Layers of a Debian 13 with everything that a check calls, and the Prometheus in it."""

    layers: tuple[Path, ...]
    prometheus_version: str
    alertmanager_version: str


@pytest.fixture(scope="session")
def tool_image(tmp_path_factory: pytest.TempPathFactory) -> ToolImage:
    """The sandbox's base image with nginx, ufw, the pinned release and a host key."""
    from sandbox.image import ensure_image
    from sandbox.progress import silent
    from sandbox.releases import Pin, ensure_releases, tool
    from settings import RELEASES

    image = ensure_image(silent, installed_packages=("nginx", "ufw"))
    pins = [
        Pin(name=pin.name, version=pin.version, sha256=pin.sha256, url=pin.url)
        for key, pin in RELEASES.items()
        if key != "oauth2Proxy"
    ]
    found = ensure_releases(silent, pins)
    layer = tmp_path_factory.mktemp("layer")
    version = found["prometheus"].version
    for program, folder in {
        "prometheus": f"prometheus-{version}",
        "promtool": f"prometheus-{version}",
        "node_exporter": "node_exporter-1.12.1",
        "alertmanager": f"alertmanager-{found['alertmanager'].version}",
        "amtool": f"alertmanager-{found['alertmanager'].version}",
    }.items():
        target = layer / "opt/releases" / folder / program
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(tool(program).read_bytes())
        target.chmod(0o755)
    root = Root(layers=image.layers, folder=tmp_path_factory.mktemp("prepare"))
    made = root.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "/root/key"])
    assert made.returncode == 0, made.stderr
    key = (root.upper / "root/key").read_text()
    (layer / "etc/ssh").mkdir(parents=True)
    (layer / "etc/ssh/ssh_host_ed25519_key").write_text(key)
    (layer / "etc/ssh/ssh_host_ed25519_key").chmod(0o600)
    return ToolImage(
        layers=(layer, *image.layers),
        prometheus_version=version,
        alertmanager_version=found["alertmanager"].version,
    )


@pytest.fixture
def tool_root(tool_image: ToolImage, tmp_path: Path) -> Root:
    return Root(layers=tool_image.layers, folder=tmp_path / "tools")
