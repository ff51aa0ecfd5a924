"""The programs under cloud-init/ that run on a host, and what they set up."""

from __future__ import annotations

from hostfiles import (
    alertmanager,
    backup,
    nginx,
    node_exporter,
    prometheus,
    public_certificate,
    watch,
)
from hostfiles.files import Check, File, Unit, unit_check
from hostfiles.model import Server
from hostfiles.templates import FOLDER, render

NAMES = ("apply-bundle", "first-boot", "install-release", "mount-data", "replace-host-key")

# Of no use before the first bundle, which starts its unit.
MOUNT_DATA = "/usr/local/sbin/mount-data"
SYSUSERS = "/etc/sysusers.d/federation.conf"
DATA_VOLUME = "/etc/systemd/system/data-volume.service"
# Started at boot by systemd's own dependency; nginx, ufw and ssh by their packages.
_WANTED = (
    *("data-volume.service", "prometheus.service", "node_exporter.service"),
    backup.UNIT.name,
    watch.UNIT.name,
)


def files(server: Server) -> tuple[File, ...]:
    """The programs, the system users and the data volume."""
    return (
        *(
            File(path=f"/usr/local/sbin/{name}", content=(FOLDER / name).read_text(), mode=0o755)
            for name in NAMES
        ),
        # https://www.freedesktop.org/software/systemd/man/latest/sysusers.d.html
        File(
            path=SYSUSERS,
            content=(
                '# No home and no shell.\nu prometheus - "Prometheus"\n'
                'u node_exporter - "Prometheus node_exporter"\n'
                'u alertmanager - "Prometheus Alertmanager"\n'
                f'u {watch.USER} - "Watches over the files of this host"\n'
                + (public_certificate.USER if server.acme else "")
            ),
        ),
        File(
            path=DATA_VOLUME,
            content=render("systemd/data-volume.service.j2", volume_id=server.volume_id),
        ),
        File(
            path="/etc/systemd/system/multi-user.target.d/federation.conf",
            content=render(
                "systemd/multi-user.target.conf.j2",
                units=[
                    *_WANTED,
                    *([alertmanager.UNIT.name] if server.alerting else []),
                    *(unit.name for unit in public_certificate.units(server)),
                ],
            ),
        ),
    )


def checks(server: Server) -> tuple[Check, ...]:
    """systemd reads the units, and finds the programs that they start."""
    units = (
        # Not data-volume.service: its program may be in this very bundle, not yet in place.
        *(prometheus.SERVICE, node_exporter.SERVICE, nginx.PACKAGE_SERVICE),
        *(backup.SERVICE, backup.TIMER, watch.SERVICE, watch.TIMER),
        *([alertmanager.SERVICE] if server.alerting else []),
        *((*public_certificate.SERVICES, public_certificate.TIMER) if server.acme else []),
    )
    return (unit_check("systemd units", *units),)


# Reloaded when Prometheus's unit changes: its retention size does when the volume grew.
DATA_VOLUME_UNIT = Unit(
    name="data-volume.service",
    restart_on=(),
    reload_on=(DATA_VOLUME, prometheus.SERVICE, MOUNT_DATA),
    ready=("/usr/bin/mountpoint", "--quiet", "/data"),
)
