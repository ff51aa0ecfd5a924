"""The keys and passwords of a sandbox, as only its state has them, and forged ones beside them."""

from __future__ import annotations

import datetime
import ipaddress
import re
from collections.abc import Mapping, Sequence
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from hostfiles.model import Leaf
from sandbox import providers
from sandbox.program import plain
from sandbox.state import State
from tests.sandbox.probe import Client

ORGANIZATION = "prometheus-federation"
CA_NAME = "Prometheus federation CA"
DAY = datetime.timedelta(days=1)


class Keyring:
    """What the state holds, by the names of the program's resources."""

    def __init__(self, state: State) -> None:
        self._outputs: Mapping[tuple[str, str], Mapping[str, Any]] = {
            (record.type, record.name): plain(record.outputs)
            for record in state.records.values()
            if record.custom
        }

    @property
    def authority(self) -> Leaf:
        """The stack's own CA with its key: the one that signs, which is the oldest there is."""
        name = self._newest(providers.SELF_SIGNED_CERT, "ca", "-certificate", oldest=True)
        certificate = self._outputs[providers.SELF_SIGNED_CERT, f"{name}-certificate"]["certPem"]
        return Leaf(certificate=certificate, key=self.private_key(f"{name}-key"), not_after=0)

    def _newest(self, type_: str, name: str, end: str, *, oldest: bool = False) -> str:
        """The name with the number of its generation, as resources have it from the second on."""
        found = {
            int(match[1] or 1): made.removesuffix(end)
            for kind, made in self._outputs
            if kind == type_
            and (match := re.fullmatch(rf"{re.escape(name)}(?:-(\d+))?{end}", made))
        }
        assert found, f"no {name}{end}"
        return found[min(found) if oldest else max(found)]

    def leaf(self, name: str) -> Leaf:
        """A leaf, such as `master-prometheus`."""
        name = self._newest(providers.LOCALLY_SIGNED_CERT, name, "-certificate")
        certificate = self._outputs[providers.LOCALLY_SIGNED_CERT, f"{name}-certificate"]
        return Leaf(
            certificate=certificate["certPem"], key=self.private_key(f"{name}-key"), not_after=0
        )

    def private_key(self, name: str) -> str:
        """A private key, PEM."""
        return self._outputs[providers.PRIVATE_KEY, name]["privateKeyPem"]

    def ssh_key(self, name: str) -> tuple[str, str]:
        """A private key in OpenSSH's format, and its public key."""
        key = self._outputs[providers.PRIVATE_KEY, name]
        return key["privateKeyOpenssh"], key["publicKeyOpenssh"].strip()

    def password(self, name: str) -> str:
        """A password, such as `master-local`."""
        return self._outputs[providers.RANDOM_PASSWORD, f"{name}-password"]["result"]

    def client(self, leaf: Leaf | None, user: str = "", password: str = "") -> Client:
        """Somebody who trusts the stack's CA."""
        certificate, key = (leaf.certificate, leaf.key) if leaf else ("", "")
        kinds = self._outputs.items()
        ca = "".join(made["certPem"] for (k, _), made in kinds if k == providers.SELF_SIGNED_CERT)
        return Client(certificate=certificate, key=key, user=user, password=password, ca=ca)

    def own_client(self, server: str) -> Client:
        """A server's Prometheus towards itself and its node_exporter."""
        name = resource(server)
        return self.client(self.leaf(f"{name}-prometheus"), "local", self.password(f"{name}-local"))

    def exporter_client(self, site: str) -> Client:
        """A site's Prometheus towards the hosts that it monitors."""
        name = resource(site)
        password = self.password(f"{name}-exporters")
        return self.client(self.leaf(f"{name}-prometheus"), "prometheus", password)


def resource(server: str) -> str:
    """What the program calls a server of ours, `master` or a site."""
    return server if server == "master" else f"slave-{server}"


def forge_authority() -> Leaf:
    """A CA with the name of ours and a key of its own."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(CA_NAME)
    return _signed(
        _builder(name, name, key, -DAY, DAY)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False),
        key,
        key,
    )


def issue(
    common_name: str,
    authority: Leaf | None,
    *,
    names: Sequence[str] = (),
    address: str = "",
    starts: datetime.timedelta = -DAY,
    ends: datetime.timedelta = DAY,
) -> Leaf:
    """A leaf for servers and clients, by an authority or (None) self-signed.

    `starts` and `ends` are counted from now; `names` are the common name unless given.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _name(common_name)
    issuer, signer = subject, key
    if authority is not None:
        certificate = x509.load_pem_x509_certificate(authority.certificate.encode())
        loaded = serialization.load_pem_private_key(authority.key.encode(), password=None)
        assert isinstance(loaded, ec.EllipticCurvePrivateKey)
        issuer, signer = certificate.subject, loaded
    alternatives: list[x509.GeneralName] = [x509.DNSName(n) for n in names or (common_name,)]
    if address:
        alternatives.append(x509.IPAddress(ipaddress.ip_address(address)))
    uses = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    return _signed(
        _builder(subject, issuer, key, starts, ends)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False),
        key,
        signer,
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, ORGANIZATION),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        ]
    )


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    starts: datetime.timedelta,
    ends: datetime.timedelta,
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + starts)
        .not_valid_after(now + ends)
    )


def _signed(
    builder: x509.CertificateBuilder,
    key: ec.EllipticCurvePrivateKey,
    signer: ec.EllipticCurvePrivateKey,
) -> Leaf:
    pem = builder.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )
    return Leaf(certificate=pem.decode(), key=private.decode(), not_after=0)
