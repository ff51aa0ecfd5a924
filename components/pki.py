"""The stack's own certificate authority and the leaf certificates it signs.

Keys are ECDSA P-256 and live in the encrypted state and on their host, nowhere else. This module
does not know what a certificate is used for.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import pulumi
import pulumi_tls as tls
from pulumi import Input, Output, ResourceOptions

from components.generations import numbered
from hostfiles.model import Leaf

ORGANIZATION = "prometheus-federation"

CA_HOURS = 10 * 365 * 24
LEAF_HOURS = 90 * 24
# `pulumi up` makes a new leaf from 30 days before the old one ends.
LEAF_EARLY_RENEWAL_HOURS = 30 * 24


@dataclass(frozen=True, kw_only=True)
class LeafArgs:
    """What a leaf certificate says. The common name is also its first alternative name.

    `generation`, one higher, makes another key and certificate.
    """

    common_name: str
    generation: int
    ip_addresses: Sequence[Input[str]] = ()
    more_names: Sequence[str] = ()
    server: bool = True
    client: bool = False


class CertificateAuthority(pulumi.ComponentResource):
    """A private CA, in several generations: the one that signs, and the one that will be next.

    Hosts trust all from `oldest` to the next one, so that a leaf of another generation is good
    wherever it arrives first. `bundle` is their PEM; `not_after` the Unix time at which the first
    of them ends. `key_pem` and `certificate_pem` are of the one that signs.
    """

    bundle: Output[str]
    not_after: Output[int]

    key_pem: Output[str]
    certificate_pem: Output[str]

    def __init__(
        self, name: str, generation: int, oldest: int, opts: ResourceOptions | None = None
    ) -> None:
        super().__init__("prometheus-federation:index:CertificateAuthority", name, None, opts)
        trusted = {
            number: self._create(numbered(name, number), number)
            for number in range(oldest, generation + 2)
        }
        key, certificate = trusted[generation]
        self.key_pem, self.certificate_pem = key, certificate.cert_pem
        certificates = [certificate for _, certificate in trusted.values()]
        self.bundle = Output.all(*(one.cert_pem for one in certificates)).apply("".join)
        self.not_after = Output.all(*(one.validity_end_time for one in certificates)).apply(
            lambda ends: min(map(_timestamp, ends))
        )
        self.register_outputs({"bundle": self.bundle})

    def _create(self, name: str, number: int) -> tuple[Output[str], tls.SelfSignedCert]:
        child_opts = ResourceOptions(parent=self)
        key = tls.PrivateKey(f"{name}-key", algorithm="ECDSA", ecdsa_curve="P256", opts=child_opts)
        key_pem = Output.secret(key.private_key_pem)
        # Each has a subject of its own, so that nobody needs to try one after the other.
        subject = "Prometheus federation CA" + (f" {number}" if number > 1 else "")
        certificate = tls.SelfSignedCert(
            f"{name}-certificate",
            private_key_pem=key_pem,
            subject=tls.SelfSignedCertSubjectArgs(common_name=subject, organization=ORGANIZATION),
            is_ca_certificate=True,
            set_subject_key_id=True,
            validity_period_hours=CA_HOURS,
            allowed_uses=["cert_signing", "crl_signing"],
            opts=child_opts,
        )
        return key_pem, certificate


class LeafCertificate(pulumi.ComponentResource):
    """A key and its certificate, signed by the authority.

    `leaf` holds both, as a secret.
    """

    leaf: Output[Leaf]

    def __init__(
        self,
        name: str,
        args: LeafArgs,
        authority: CertificateAuthority,
        opts: ResourceOptions | None = None,
    ) -> None:
        super().__init__("prometheus-federation:index:LeafCertificate", name, None, opts)
        child_opts = ResourceOptions(parent=self)
        # The new pair is there before the old one goes.
        name = numbered(name, args.generation)
        names = [args.common_name, *args.more_names]
        addresses = [name for name in names if _is_address(name)]
        key = tls.PrivateKey(f"{name}-key", algorithm="ECDSA", ecdsa_curve="P256", opts=child_opts)
        key_pem = Output.secret(key.private_key_pem)
        request = tls.CertRequest(
            f"{name}-request",
            private_key_pem=key_pem,
            subject=tls.CertRequestSubjectArgs(
                common_name=args.common_name, organization=ORGANIZATION
            ),
            dns_names=[name for name in names if name not in addresses],
            ip_addresses=[*addresses, *args.ip_addresses],
            opts=child_opts,
        )
        certificate = tls.LocallySignedCert(
            f"{name}-certificate",
            cert_request_pem=request.cert_request_pem,
            ca_private_key_pem=authority.key_pem,
            ca_cert_pem=authority.certificate_pem,
            validity_period_hours=LEAF_HOURS,
            early_renewal_hours=LEAF_EARLY_RENEWAL_HOURS,
            set_subject_key_id=True,
            allowed_uses=[
                "digital_signature",
                *(["server_auth"] if args.server else []),
                *(["client_auth"] if args.client else []),
            ],
            opts=child_opts,
        )
        self.leaf = Output.secret(
            Output.all(certificate.cert_pem, key_pem, certificate.validity_end_time).apply(
                lambda known: Leaf(
                    certificate=known[0], key=known[1], not_after=_timestamp(known[2])
                )
            )
        )
        self.register_outputs({})


def _timestamp(rfc3339: str) -> int:
    return int(datetime.fromisoformat(rfc3339).timestamp())


def _is_address(name: str) -> bool:
    try:
        ipaddress.IPv4Address(name)
    except ipaddress.AddressValueError:
        return False
    return True
