"""nginx, before the Prometheus of a slave (for its master) or of the master (for people, programs).

Its configuration is a main one of its own; the package's files stay as they are.
https://nginx.org/en/docs/
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from hashlib import md5
from typing import cast

from hostfiles import public_certificate
from hostfiles.duration import milliseconds
from hostfiles.files import Check, File, Unit, secret_file
from hostfiles.grafana import PORT as GRAFANA_PORT
from hostfiles.model import (
    Credential,
    MasterSecrets,
    MasterServer,
    Server,
    ServerSecrets,
    SlaveServer,
)
from hostfiles.oauth2_proxy import PORT as OAUTH2_PORT
from hostfiles.templates import render

FOLDER = "/etc/nginx"
CONFIG = f"{FOLDER}/federation.conf"
DROP_IN = "/etc/systemd/system/nginx.service.d/federation.conf"
# What installs the version that settings name (nginx_package.py).
PACKAGE_SERVICE = "/etc/systemd/system/nginx-package.service"
GROUP = "www-data"

# OpenSSL's names of the six suites of Mozilla's intermediate profile (guideline 6.0); hybrids of
# TLS 1.3's own key exchange first. https://ssl-config.mozilla.org/
TLS_CIPHERS = (
    "ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256:"
    "ECDHE-ECDSA-AES256-GCM-SHA384:ECDHE-RSA-AES256-GCM-SHA384:"
    "ECDHE-ECDSA-CHACHA20-POLY1305:ECDHE-RSA-CHACHA20-POLY1305"
)
# A question mark before a group passes over it where OpenSSL is older than 3.5.
TLS_CURVES = "?X25519MLKEM768:X25519:prime256v1:secp384r1"

# Longer than any usual scrape interval; grows with the configured one.
KEEPALIVE_MIN_SECONDS = 75


def files(server: Server) -> tuple[File, ...]:
    """The configuration and how systemd starts nginx with it."""
    port = _port(server)
    return (
        File(path=CONFIG, content=_configuration(server)),
        File(path=f"{FOLDER}/tls/ca.pem", content=server.ca_bundle),
        File(path=f"{FOLDER}/nobody.htpasswd", content="# Nobody has a password here.\n"),
        File(
            path=DROP_IN,
            content=render(
                "systemd/nginx.conf.j2",
                capabilities="CAP_NET_BIND_SERVICE" if port < 1024 else "",
            ),
        ),
        *public_certificate.files(server, port),
    )


def secret_files(server: Server, secrets: ServerSecrets) -> tuple[File, ...]:
    """Its key and certificate, digests and cheap hashes of those who may come in, and on a master
    what it says itself to what is behind it."""
    leaf = secrets.nginx_leaf
    master = secrets if isinstance(secrets, MasterSecrets) else None
    tokens = master.tokens if master else {}
    shown = {
        **{f"{user.user}/": _basic(user) for user in secrets.remote},
        **{f"/{name}": token for name, token in tokens.items()},
    }
    callers = (f'"{who}" "{_digest(server, text)}";\n' for who, text in sorted(shown.items()))
    return (
        File(path=f"{FOLDER}/tls/server.crt", content=leaf.certificate),
        secret_file(f"{FOLDER}/tls/server.key", leaf.key, GROUP),
        secret_file(f"{FOLDER}/users.htpasswd", _htpasswd(secrets.remote), GROUP),
        secret_file(f"{FOLDER}/callers.map", "".join(callers), GROUP),
        *(
            [
                secret_file(
                    f"{FOLDER}/upstream.conf",
                    f'proxy_set_header Authorization "Basic {_basic(master.nginx)}";\n',
                    GROUP,
                )
            ]
            if master
            else []
        ),
    )


def upstream_users(secrets: ServerSecrets) -> tuple[Credential, ...]:
    """As whom nginx comes to what is behind it: on a master as itself, on a slave as its client."""
    return (secrets.nginx,) if isinstance(secrets, MasterSecrets) else secrets.remote


CHECKS = (
    Check(
        name="nginx's federation.conf",
        argv=(
            "/usr/sbin/nginx",
            "-t",
            "-q",
            # A check shall not touch the pid file of the one that runs. It runs as root and gives
            # the folders of answers that are taken slowly to `user`: nginx's own must write there.
            "-g",
            f"user {GROUP}; pid /run/nginx-check.pid;",
            "-c",
            f"{{tree}}{CONFIG}",
        ),
    ),
)


def unit(server: Server) -> Unit:
    """nginx answers when it answers HTTP, be it with 401 or 403."""
    port = _port(server)
    tls = "/etc/prometheus/tls"
    return Unit(
        name="nginx.service",
        restart_on=(DROP_IN, PACKAGE_SERVICE),
        reload_on=(f"{FOLDER}/",),
        ready=(
            *("/usr/bin/curl", "--silent", "--show-error", "--max-time", "5"),
            *("--output", "/dev/null"),
            *("--cacert", public_certificate.TRUSTED if server.acme else f"{tls}/ca.pem"),
            *("--cert", f"{tls}/prometheus.crt", "--key", f"{tls}/prometheus.key"),
            *("--connect-to", f"{server.fqdn}:{port}:127.0.0.1:{port}"),
            f"https://{server.fqdn}:{port}/",
        ),
    )


def _configuration(server: Server) -> str:
    common = {
        "fqdn": server.fqdn,
        "port": _port(server),
        "tls_ciphers": TLS_CIPHERS,
        "tls_curves": TLS_CURVES,
        "public_certificate": public_certificate.INCLUDE if server.acme else "",
        "keepalive_seconds": max(
            KEEPALIVE_MIN_SECONDS, 2 * milliseconds(server.scrape_interval) // 1000
        ),
    }
    if isinstance(server, SlaveServer):
        return render(
            "nginx/slave.conf.j2",
            **common,
            site=server.site,
            master_names=server.master_names,
            oauth2=False,
            max_body="1k",
            read_timeout="15s",
        )
    # _port has refused any other.
    master = cast(MasterServer, server)
    return render(
        "nginx/master.conf.j2",
        **common,
        site="master",
        oauth2=master.oauth2 is not None,
        oauth2_port=OAUTH2_PORT,
        alertmanager=master.alerting is not None,
        grafana_port=GRAFANA_PORT if master.grafana else None,
        max_body="64k",
        # Prometheus gives up a query after two minutes.
        read_timeout="125s",
    )


def _port(server: Server) -> int:
    if isinstance(server, SlaveServer):
        return server.federation_port
    if isinstance(server, MasterServer):
        return server.ui_port
    raise TypeError(f"{type(server).__name__} is neither a slave nor a master")


def _basic(user: Credential) -> str:
    """What a client shows of a user. https://datatracker.ietf.org/doc/html/rfc7617."""
    return base64.b64encode(f"{user.user}:{user.password}".encode()).decode()


def _digest(server: Server, shown: str) -> str:
    """What nginx knows of a password or token: it can compute no other digest than MD5.

    What is hashed has at least 24 characters, so that MD5's weakness (two texts of one's own choice
    with one digest) is of no use; and this digest alone opens nothing to a user: it only tells
    whose password is worth hashing.
    https://nginx.org/en/docs/http/ngx_http_secure_link_module.html#secure_link_md5
    """
    digest = md5(f"{server.fqdn} {shown}".encode(), usedforsecurity=False).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def _htpasswd(users: Iterable[Credential]) -> str:
    """https://nginx.org/en/docs/http/ngx_http_auth_basic_module.html#auth_basic_user_file."""
    return "".join(f"{user.user}:{user.cheap_hash}\n" for user in users)
