"""nginx, before the Prometheus of a slave (for its master) or of the master (for people).

Its configuration is a main one of its own; the package's files stay as they are.
https://nginx.org/en/docs/
"""

from __future__ import annotations

from collections.abc import Iterable

from hostfiles import public_certificate
from hostfiles.duration import milliseconds
from hostfiles.files import Check, File, Unit
from hostfiles.model import Credential, MasterServer, Server, ServerSecrets, SlaveServer
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
        File(
            path=DROP_IN,
            content=render(
                "systemd/nginx.conf.j2",
                capabilities="CAP_NET_BIND_SERVICE" if port < 1024 else "",
            ),
        ),
        *public_certificate.files(server, port),
    )


def secret_files(secrets: ServerSecrets) -> tuple[File, ...]:
    """Its key and certificate, and the cheap hashes of those who may come in."""
    leaf = secrets.nginx_leaf
    return (
        File(path=f"{FOLDER}/tls/server.crt", content=leaf.certificate),
        File(
            path=f"{FOLDER}/tls/server.key",
            content=leaf.key,
            group=GROUP,
            mode=0o640,
            secret=True,
        ),
        File(
            path=f"{FOLDER}/users.htpasswd",
            content=_htpasswd(secrets.remote),
            group=GROUP,
            mode=0o640,
            secret=True,
        ),
    )


CHECKS = (
    Check(
        name="nginx's federation.conf",
        argv=(
            "/usr/sbin/nginx",
            "-t",
            "-q",
            # A check shall not touch the pid file of the one that runs.
            "-g",
            "pid /run/nginx-check.pid;",
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
        "users_file": "users.htpasswd",
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
            max_body="1k",
            read_timeout="15s",
        )
    return render(
        "nginx/master.conf.j2",
        **common,
        site="master",
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


def _htpasswd(users: Iterable[Credential]) -> str:
    """https://nginx.org/en/docs/http/ngx_http_auth_basic_module.html#auth_basic_user_file."""
    return "".join(f"{user.user}:{user.cheap_hash}\n" for user in users)
