"""What slave and master have in common, put together."""

from __future__ import annotations

from hostfiles import (
    alertmanager,
    backup,
    certificates,
    firewall,
    nginx,
    nginx_package,
    node_exporter,
    programs,
    prometheus,
    public_certificate,
    sshd,
    system,
    watch,
)
from hostfiles.files import Check, File, HostFiles, secret_file
from hostfiles.model import Server, ServerSecrets
from hostfiles.releases import directory
from hostfiles.web_config import web_config

# e2fsprogs is part of every cloud image, but not of every image.
# node_exporter asks systemd through dbus.
PACKAGES = ("curl", "dbus", "e2fsprogs", "nginx", "ufw", "unattended-upgrades")


def host_files(server: Server) -> HostFiles:
    """All that is not secret: what a host is at the end of its first boot."""
    return HostFiles(
        files=(
            *programs.files(server),
            *prometheus.files(server),
            *alertmanager.files(server),
            *backup.files(server),
            *watch.files(server),
            *node_exporter.files(server),
            *nginx.files(server),
            *nginx_package.files(server),
            *firewall.files(server.rules),
            *sshd.files(server),
            *system.files(server.security_updates),
        ),
        checks=(
            *prometheus.checks(server),
            _web_config_check(server),
            *alertmanager.checks(server),
            *node_exporter.checks(server),
            *nginx.CHECKS,
            *nginx_package.checks(server),
            *firewall.CHECKS,
            *sshd.CHECKS,
            *system.CHECKS,
            *programs.checks(server),
        ),
        # The firewall first: nothing starts to listen before it stands.
        units=(
            firewall.UNIT,
            sshd.UNIT,
            *system.units(server.security_updates),
            programs.DATA_VOLUME_UNIT,
            *([alertmanager.UNIT] if server.alerting else []),
            prometheus.UNIT,
            node_exporter.UNIT,
            nginx_package.UNIT,
            *public_certificate.units(server),
            nginx.unit(server),
            backup.UNIT,
            watch.UNIT,
        ),
        releases=(
            server.prometheus,
            server.node_exporter,
            *([server.alerting.release] if server.alerting else []),
        ),
        packages=PACKAGES,
        first_boot=firewall.first_boot_files(server.rules),
    )


def secret_files(server: Server, secrets: ServerSecrets) -> tuple[File, ...]:
    """Keys, passwords and hashes, with the certificates that belong to the keys."""
    return (
        *prometheus.secret_files(server, secrets),
        secret_file(
            f"{prometheus.FOLDER}/web.yml",
            web_config(
                certificate="tls/prometheus.crt",
                key="tls/prometheus.key",
                ca="tls/ca.pem",
                users=[*nginx.upstream_users(secrets), secrets.local],
            ),
            prometheus.GROUP,
        ),
        *node_exporter.secret_files(server, secrets),
        *nginx.secret_files(server, secrets),
        *alertmanager.secret_files(server, secrets),
        certificates.metrics(
            {
                **prometheus.certificate_ends(server, secrets),
                **alertmanager.certificate_ends(secrets),
                f"{nginx.FOLDER}/tls/server.crt": secrets.nginx_leaf.not_after,
                node_exporter.CERTIFICATE: secrets.node_exporter_leaf.not_after,
            }
        ),
    )


def _web_config_check(server: Server) -> Check:
    return Check(
        name="web.yml",
        argv=(
            f"{directory(server.prometheus)}/promtool",
            "check",
            "web-config",
            f"{{tree}}{prometheus.FOLDER}/web.yml",
        ),
    )
