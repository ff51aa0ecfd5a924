"""A public certificate authority on the sandbox's internet: pebble, Let's Encrypt's test server.

It is asked at ACME_HOST as the real one is, and comes to the hosts' port 80 as the real one does.
It forgets everything and has another root each time it starts. https://github.com/letsencrypt/pebble
"""

import json
import os
import signal
import ssl
import subprocess
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from sandbox import releases
from sandbox.host import Progress, SandboxError, is_alive, run, wait_until
from sandbox.plan import NETNS_DIR, Plan

ACME_HOST = "acme.example.net"
_MANAGEMENT_PORT = 15000
_LIFETIME_SECONDS = 90 * 24 * 3600
# Validation at once and every time; and no nonce is refused: what pebble does otherwise by chance.
_CALM = {"PEBBLE_VA_NOSLEEP": "1", "PEBBLE_AUTHZREUSE": "0", "PEBBLE_WFE_NONCEREJECT": "0"}


def ensure(plan: Plan, progress: Progress) -> None:
    """Start the server where it does not run. The networks must exist (world.ensure_networks)."""
    if _pid(plan) is None:
        program = releases.debian_tool(progress, "pebble")
        with progress("Starting the sandbox's ACME server"):
            start(plan, program)


def roots(plan: Plan) -> str:
    """Return the PEM that its certificates, and its own as a server, chain to."""
    return (_folder(plan) / "roots.pem").read_text()


def start(plan: Plan, program: Path, **faults: str) -> None:
    """Start the server; one that runs is ended first.

    faults: pebble's own environment variables, such as PEBBLE_WFE_NONCEREJECT.
    """
    stop(plan)
    folder = _folder(plan)
    folder.mkdir(parents=True, exist_ok=True)
    certificate = _own_certificate(plan)
    settings = {
        "listenAddress": f"{plan.acme_ip}:443",
        "managementListenAddress": f"{plan.acme_ip}:{_MANAGEMENT_PORT}",
        "certificate": str(certificate),
        "privateKey": str(certificate.with_suffix(".key")),
        "httpPort": 80,
        "tlsPort": 443,
        "keyAlgorithm": "ecdsa",
        "profiles": {
            "default": {"description": "90 days", "validityPeriod": _LIFETIME_SECONDS},
        },
    }
    (folder / "config.json").write_text(json.dumps({"pebble": settings}))
    where = ["nsenter", f"--net={NETNS_DIR / plan.inet_netns}"]
    run([*where, "ip", "address", "replace", f"{plan.acme_ip}/32", "dev", "lo"])
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [
                *(*where, str(program), "-config", str(folder / "config.json")),
                *("-dnsserver", f"{plan.inet_ip}:53"),
            ],
            env={**_CALM, **faults},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    (folder / "pid").write_text(str(process.pid))
    trust = ssl.create_default_context(cadata=certificate.read_text())
    url = f"https://{plan.acme_ip}:{_MANAGEMENT_PORT}/roots/0"

    def root() -> str | None:
        if process.poll() is not None:
            raise SandboxError(f"The ACME server ended: {(folder / 'log').read_text()[-500:]}")
        try:
            return httpx.get(url, verify=trust, trust_env=False).text
        except httpx.TransportError:
            return None

    issuer = wait_until(root, seconds=20)
    if issuer is None:
        raise SandboxError("The ACME server does not answer.", f"Look into {folder / 'log'}.")
    (folder / "roots.pem").write_text(certificate.read_text() + issuer)


def stop(plan: Plan) -> None:
    """End the server; does nothing where none runs."""
    if pid := _pid(plan):
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not is_alive(pid), seconds=5)


def _folder(plan: Plan) -> Path:
    return plan.state_dir / "acme"


def _pid(plan: Plan) -> int | None:
    """Return the process id, if that process is still our server and not another's."""
    try:
        pid = int((_folder(plan) / "pid").read_text())
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return None
    return pid if str(_folder(plan)).encode() in arguments and is_alive(pid) else None


def _own_certificate(plan: Plan) -> Path:
    """Return what the server shows to its clients, signed by itself; its key ends in .key."""
    path = _folder(plan) / "server.pem"
    if path.exists():
        return path
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "the sandbox's ACME server")])
    now = datetime.now(UTC)
    addresses = [x509.DNSName(ACME_HOST), x509.IPAddress(IPv4Address(plan.acme_ip))]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=3650))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectAlternativeName(addresses), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path.with_suffix(".key").touch(mode=0o600)
    path.with_suffix(".key").write_bytes(private)
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return path
