"""The tls provider: keys and certificates, made with the cryptography library."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Mapping
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from sandbox.program import Resource
from sandbox.providers import CERT_REQUEST, PRIVATE_KEY, SELF_SIGNED_CERT, Inputs, Outputs, Provider

PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


class TlsProvider(Provider):
    """https://www.pulumi.com/registry/packages/tls/."""

    def create(self, resource: Resource, inputs: Inputs) -> tuple[str, Outputs]:
        """A key, a request or a certificate."""
        if resource.type == PRIVATE_KEY:
            return "key", _private_key(inputs)
        if resource.type == CERT_REQUEST:
            return "request", {"certRequestPem": _request(inputs)}
        if resource.type == SELF_SIGNED_CERT:
            key = _load_key(inputs["privateKeyPem"])
            name = _name(inputs["subject"])
            certificate = _certificate(inputs, name, name, key, key.public_key(), None, [])
        else:
            request = x509.load_pem_x509_csr(inputs["certRequestPem"].encode())
            authority = x509.load_pem_x509_certificate(inputs["caCertPem"].encode())
            certificate = _certificate(
                inputs,
                request.subject,
                authority.subject,
                _load_key(inputs["caPrivateKeyPem"]),
                request.public_key(),
                authority,
                list(request.extensions),
            )
        return f"{certificate.serial_number:x}", {
            "certPem": certificate.public_bytes(serialization.Encoding.PEM).decode(),
            "validityStartTime": _rfc3339(certificate.not_valid_before_utc),
            "validityEndTime": _rfc3339(certificate.not_valid_after_utc),
            "earlyRenewalHours": inputs.get("earlyRenewalHours", 0),
        }

    def update(
        self,
        resource: Resource,
        id_: str,
        inputs: Inputs,
        old: Inputs,
        outputs: Outputs,
    ) -> Outputs:
        """Only when a certificate is renewed early changes in place."""
        return {**outputs, "earlyRenewalHours": inputs.get("earlyRenewalHours", 0)}

    def outdated(self, type_: str, id_: str, outputs: Outputs) -> str:
        """A certificate that ends within its early renewal is made anew by a plain `up`."""
        if "validityEndTime" not in outputs:
            return ""
        end = datetime.datetime.fromisoformat(outputs["validityEndTime"])
        renewal = end - datetime.timedelta(hours=outputs["earlyRenewalHours"])
        return f"ends {end:%Y-%m-%d}" if datetime.datetime.now(datetime.UTC) >= renewal else ""


def _rfc3339(moment: datetime.datetime) -> str:
    return f"{moment:%Y-%m-%dT%H:%M:%SZ}"


def _private_key(inputs: Inputs) -> Outputs:
    if inputs["algorithm"] == "ED25519":
        key: PrivateKey = ed25519.Ed25519PrivateKey.generate()
    elif (inputs["algorithm"], inputs.get("ecdsaCurve")) == ("ECDSA", "P256"):
        key = ec.generate_private_key(ec.SECP256R1())
    else:
        raise NotImplementedError(f"keys of {inputs['algorithm']} {inputs.get('ecdsaCurve', '')}")
    pem = serialization.Encoding.PEM
    bare = serialization.NoEncryption()
    public = key.public_key()
    traditional = (
        serialization.PrivateFormat.PKCS8
        if isinstance(key, ed25519.Ed25519PrivateKey)
        else serialization.PrivateFormat.TraditionalOpenSSL
    )
    openssh = public.public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    return {
        "privateKeyPem": key.private_bytes(pem, traditional, bare).decode(),
        "privateKeyOpenssh": key.private_bytes(
            pem, serialization.PrivateFormat.OpenSSH, bare
        ).decode(),
        "publicKeyOpenssh": openssh.decode() + "\n",
        "publicKeyPem": public.public_bytes(
            pem, serialization.PublicFormat.SubjectPublicKeyInfo
        ).decode(),
    }


def _load_key(pem: str) -> PrivateKey:
    key = serialization.load_pem_private_key(pem.encode(), password=None)
    if not isinstance(key, (ec.EllipticCurvePrivateKey, ed25519.Ed25519PrivateKey)):
        raise NotImplementedError(f"keys of the kind {type(key).__name__}")
    return key


def _name(subject: Mapping[str, Any]) -> x509.Name:
    return x509.Name(
        [
            *(
                [x509.NameAttribute(NameOID.ORGANIZATION_NAME, subject["organization"])]
                if "organization" in subject
                else []
            ),
            x509.NameAttribute(NameOID.COMMON_NAME, subject["commonName"]),
        ]
    )


def _request(inputs: Inputs) -> str:
    key = _load_key(inputs["privateKeyPem"])
    names: list[x509.GeneralName] = [x509.DNSName(name) for name in inputs.get("dnsNames", [])]
    names += [x509.IPAddress(ipaddress.ip_address(ip)) for ip in inputs.get("ipAddresses", [])]
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(_name(inputs["subject"]))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, _hash_for(key))
    )
    return request.public_bytes(serialization.Encoding.PEM).decode()


def _hash_for(key: PrivateKey) -> hashes.SHA256 | None:
    return None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()


def _certificate(
    inputs: Inputs,
    subject: x509.Name,
    issuer: x509.Name,
    issuer_key: PrivateKey,
    public_key: Any,
    authority: x509.Certificate | None,
    extensions: list[x509.Extension],
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    uses = set(inputs["allowedUses"])
    is_ca = inputs.get("isCaCertificate", False)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(hours=inputs["validityPeriodHours"]))
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature="digital_signature" in uses,
                key_cert_sign="cert_signing" in uses,
                crl_sign="crl_signing" in uses,
                content_commitment=False,
                key_encipherment="key_encipherment" in uses,
                data_encipherment=False,
                key_agreement=False,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
    )
    purposes = {
        "server_auth": ExtendedKeyUsageOID.SERVER_AUTH,
        "client_auth": ExtendedKeyUsageOID.CLIENT_AUTH,
    }
    if wanted := [oid for use, oid in purposes.items() if use in uses]:
        builder = builder.add_extension(x509.ExtendedKeyUsage(wanted), critical=False)
    if inputs.get("setSubjectKeyId"):
        builder = builder.add_extension(
            x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False
        )
    if authority is not None:
        identifier = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        builder = builder.add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier),
            critical=False,
        )
    for extension in extensions:
        builder = builder.add_extension(extension.value, critical=extension.critical)
    return builder.sign(issuer_key, _hash_for(issuer_key))
