"""TLS and passwords of Prometheus and node_exporter, which share one format and library.

https://prometheus.io/docs/prometheus/latest/configuration/https/
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import yaml

from hostfiles.model import Credential

# Go's names of the six suites of Mozilla's intermediate profile; TLS 1.3 has its own and they
# cannot be configured.
CIPHER_SUITES = [
    "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256",
    "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384",
    "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384",
    "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256",
    "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256",
]


def web_config(
    *,
    certificate: str,
    key: str,
    ca: str,
    users: Iterable[Credential],
    allowed_client_sans: Iterable[str] = (),
) -> str:
    """A web config file. Paths are relative to it.

    With `allowed_client_sans` a client needs a certificate with one of these names; without them
    a client may come without one, but not with a bad one.
    """
    sans = list(allowed_client_sans)
    tls: dict[str, Any] = {
        "cert_file": certificate,
        "key_file": key,
        "client_ca_file": ca,
        "client_auth_type": "RequireAndVerifyClientCert" if sans else "VerifyClientCertIfGiven",
        **({"client_allowed_sans": sans} if sans else {}),
        "min_version": "TLS12",
        "cipher_suites": CIPHER_SUITES,
    }
    hashes: dict[str, str] = {}
    for user in users:
        if user.user in hashes:
            raise ValueError(f"there are two users {user.user!r}; a rotation needs two names")
        hashes[user.user] = user.strong_hash
    return yaml.safe_dump(
        {"tls_server_config": tls, "basic_auth_users": hashes}, sort_keys=False, width=1000
    )
