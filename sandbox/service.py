"""A server on the sandbox's internet that goes on when the process that started it ends.

Each has a folder with its process id, certificate and log, and nothing else is remembered of it.
"""

import os
import signal
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from sandbox.host import is_alive, wait_until


def pid(folder: Path) -> int | None:
    """Return the process id, if that process is still the folder's server and not another's."""
    try:
        number = int((folder / "pid").read_text())
        arguments = Path(f"/proc/{number}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return None
    return number if str(folder).encode() in arguments and is_alive(number) else None


def stop(folder: Path) -> None:
    """End the server; does nothing where none runs."""
    if number := pid(folder):
        os.kill(number, signal.SIGKILL)
        wait_until(lambda: not is_alive(number), seconds=5)


def certificate(folder: Path, who: str, names: Sequence[str], address: str) -> Path:
    """Return what the server shows to its clients, signed by itself; its key ends in .key."""
    path = folder / "server.pem"
    if path.exists():
        return path
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, who)])
    now = datetime.now(UTC)
    alternatives = [*map(x509.DNSName, names), x509.IPAddress(IPv4Address(address))]
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=3650))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path.with_suffix(".key").touch(mode=0o600)
    path.with_suffix(".key").write_bytes(private)
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    return path
