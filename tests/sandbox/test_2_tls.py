"""TLS of every listener: what it speaks, which holes it has, and whose certificate it shows."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from hostfiles.model import Leaf
from sandbox import host, network
from sandbox.plan import NETNS_DIR
from tests.sandbox.conftest import CORES, NAMED, Sandbox
from tests.sandbox.keyring import Keyring, forge_authority, issue, resource
from tests.sandbox.probe import OPEN, Door, knock
from tests.sandbox.scanner import scan

MASTER = "prometheus-master.example.com"
SLAVE = "prometheus-slave.example.com"

# Mozilla's intermediate profile has six suites of TLS 1.2; three of them are for RSA certificates,
# and all of ours are ECDSA.
SUITES = {
    "tls_1_2": {
        "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256",
        "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384",
        "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256",
    },
    "tls_1_3": {
        "TLS_AES_128_GCM_SHA256",
        "TLS_AES_256_GCM_SHA384",
        "TLS_CHACHA20_POLY1305_SHA256",
    },
}
# Beside X25519MLKEM768, which sslyze does not know.
CURVES = {"X25519", "secp256r1", "secp384r1"}
# A listener with all that ours must not have.
CARELESS = Path(__file__).with_name("careless.py")
# Go's own list: naming one would take the hybrid away.
MORE_CURVES_OF_GO = {"secp521r1"}


@dataclass(frozen=True, kw_only=True)
class Listener:
    """A TLS listener of ours, and how a client with all that it asks for gets to it."""

    namespace: str | None
    door: Door
    folder: Path
    # Whether its certificate is for its address too.
    by_address: bool = True

    def connect(self, *more: str) -> subprocess.CompletedProcess[str]:
        """`openssl s_client`, which ends as soon as it is connected."""
        where = ["nsenter", f"--net={NETNS_DIR / self.namespace}"] if self.namespace else []
        argv = [*where, "openssl", "s_client", "-brief"]
        argv += ["-connect", f"{self.door.address}:{self.door.port}"]
        argv += ["-servername", self.door.name, "-CAfile", str(self.folder / "ca")]
        argv += ["-cert", str(self.folder / "certificate"), "-key", str(self.folder / "key")]
        return subprocess.run(
            [*argv, *more],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env={"PATH": "/usr/bin:/bin", "OPENSSL_CONF": "/dev/null"},
            timeout=20,
            check=False,
        )


LISTENERS = {
    "9095 of the slave": ("dublin", 9095),
    "443 of the master": ("master", 443),
    "Prometheus of the slave": ("dublin", 9090),
    "Prometheus of the master": ("master", 9090),
    "Alertmanager of the slave": ("dublin", 9093),
    "Alertmanager of the master": ("master", 9093),
    "node_exporter of the slave": ("dublin", 9100),
    "node_exporter of the master": ("master", 9100),
    **{f"node_exporter of {core}": (core, 9100) for core in CORES},
}


@pytest.fixture(scope="module", params=LISTENERS)
def listener(
    request: pytest.FixtureRequest,
    sandbox: Sandbox,
    keys: Keyring,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Listener]:
    """One of LISTENERS, with the client certificate that it asks for."""
    server, port = LISTENERS[request.param]
    monitored = server in CORES
    # Who comes in there, and where from.
    client = "dublin" if monitored else "master" if port == 9095 else server
    if monitored:
        address = sandbox.private_ip(server)
    else:
        address = sandbox.public_ip(server) if port in (443, 9095) else "127.0.0.1"
    name = {"master": MASTER, "dublin": SLAVE}.get(server, f"{server}.example.internal")
    folder = tmp_path_factory.mktemp("listener")
    leaf = keys.leaf(f"{resource(client)}-prometheus")
    files = _files(folder, leaf, keys.authority.certificate)
    yield Listener(
        namespace=None if port == 443 else sandbox.namespace(client),
        door=Door(address=address, port=port, name=name),
        folder=folder,
        by_address=server not in NAMED,
    )
    for file in files:
        file.unlink()


def _files(folder: Path, leaf: Leaf, ca: str) -> list[Path]:
    contents = {"certificate": leaf.certificate, "key": leaf.key, "ca": ca}
    for name, content in contents.items():
        (folder / name).touch(mode=0o600)
        (folder / name).write_text(content)
    return [folder / name for name in contents]


def test_no_listener_speaks_old_tls_or_has_a_known_hole(listener: Listener, tmp_path: Path) -> None:
    folder, door = listener.folder, listener.door
    report = tmp_path / "report.json"
    found = scan(listener.namespace, door, folder / "certificate", folder / "key", report)
    assert found.suites == SUITES
    assert found.curves == CURVES | (set() if door.port in (443, 9095) else MORE_CURVES_OF_GO)
    assert found.findings == []


@pytest.fixture
def careless(sandbox: Sandbox, keys: Keyring, tmp_path: Path) -> Iterator[Listener]:
    """A listener that speaks all that openssl still can, somewhere on the internet."""
    name = "careless"
    namespace = sandbox.stranger(name)
    leaf = issue(SLAVE, keys.authority)
    files = _files(tmp_path, leaf, keys.authority.certificate)
    argv = ["nsenter", f"--net={NETNS_DIR / namespace}", sys.executable, str(CARELESS)]
    argv += [str(tmp_path / "certificate"), str(tmp_path / "key"), "4433"]
    process = subprocess.Popen(
        argv,
        stderr=subprocess.DEVNULL,
        env={"PATH": "/usr/bin:/bin", "OPENSSL_CONF": "/dev/null"},
    )
    try:
        door = Door(address="127.0.0.1", port=4433, name=SLAVE)
        where = (door.address, door.port)
        assert host.wait_until(
            lambda: knock(namespace, [where], seconds=1)[where] == OPEN, seconds=5
        )
        yield Listener(namespace=namespace, door=door, folder=tmp_path)
    finally:
        process.kill()
        process.wait()
        network.remove_stranger(sandbox.plan, name)
        for file in files:
            file.unlink()


def test_the_scan_would_see_old_tls_weak_suites_and_holes(careless: Listener) -> None:
    folder = careless.folder
    report = folder / "report.json"
    found = scan(careless.namespace, careless.door, folder / "certificate", folder / "key", report)
    assert set(found.suites) >= {"tls_1_0", "tls_1_1", "tls_1_2", "tls_1_3"}
    assert "TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA" in found.suites["tls_1_0"]
    assert SUITES["tls_1_2"] < found.suites["tls_1_2"]
    assert found.curves > CURVES
    assert "renegotiation by the client" in found.findings


def test_each_listeners_certificate_verifies_with_its_names_and_no_other(
    listener: Listener, keys: Keyring, tmp_path: Path
) -> None:
    strict = ["-verify_return_error", "-verify", "1"]
    by_name = listener.connect(*strict, "-verify_hostname", listener.door.name)
    assert "Verification: OK" in by_name.stderr, by_name
    assert f"Verified peername: {listener.door.name}" in by_name.stderr
    by_address = listener.connect(*strict, "-verify_ip", listener.door.address)
    assert ("Verification: OK" in by_address.stderr) == listener.by_address, by_address
    assert ("IP address mismatch" in by_address.stderr) != listener.by_address, by_address
    wrong = listener.connect(*strict, "-verify_hostname", "other.example.com")
    assert "hostname mismatch" in wrong.stderr.lower(), wrong
    assert wrong.returncode != 0
    other = tmp_path / "ca"
    other.write_text(forge_authority().certificate)
    # The last one counts.
    forged = listener.connect(
        *strict, "-verify_hostname", listener.door.name, "-CAfile", str(other)
    )
    assert "certificate verify failed" in forged.stderr, forged
    assert forged.returncode != 0
