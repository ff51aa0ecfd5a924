"""Backups on the host: a timer that has Prometheus take a snapshot of its database.

https://prometheus.io/docs/prometheus/latest/querying/api/#snapshot
"""

from __future__ import annotations

from hostfiles import certificates
from hostfiles.files import File, Unit
from hostfiles.model import Server
from hostfiles.templates import FOLDER, render

PROGRAM = "/usr/local/sbin/backup-data"
RESTORE = "/usr/local/sbin/restore-data"
SERVICE = "/etc/systemd/system/prometheus-backup.service"
TIMER = "/etc/systemd/system/prometheus-backup.timer"
# Holds Prometheus back while its database is half of one.
RESTORING = "/etc/systemd/system/prometheus.service.d/restore.conf"
# All that is not needed before the first bundle.
PATHS = (PROGRAM, RESTORE, SERVICE, TIMER, RESTORING)
# Of the textfile that tells of the last backup. Also in prometheus.service, which makes it.
METRICS = "/var/lib/prometheus-backup"
INTERVAL_METRIC = "federation_backup_interval_seconds"


def files(server: Server) -> tuple[File, ...]:
    """The programs, the service and its timer."""
    hours = range(0, 24, server.backup.interval_hours)
    return (
        *(
            File(path=path, content=(FOLDER / path.rpartition("/")[2]).read_text(), mode=0o755)
            for path in (PROGRAM, RESTORE)
        ),
        File(
            path=SERVICE,
            content=render(
                "systemd/prometheus-backup.service.j2",
                keep=server.backup.keep,
                max_age_days=server.backup.max_age_days,
            ),
        ),
        File(path=RESTORING, content=(FOLDER / "systemd/prometheus-restore.conf").read_text()),
        # So that an alert knows how old a backup may be.
        File(
            path=f"{certificates.FOLDER}/backup.prom",
            content=(
                f"# HELP {INTERVAL_METRIC} How often a backup is made.\n"
                f"# TYPE {INTERVAL_METRIC} gauge\n"
                f"{INTERVAL_METRIC} {server.backup.interval_hours * 3600}\n"
            ),
        ),
        File(
            path=TIMER,
            content=render(
                "systemd/prometheus-backup.timer.j2", hours=",".join(f"{hour:02}" for hour in hours)
            ),
        ),
    )


UNIT = Unit(name="prometheus-backup.timer", restart_on=(TIMER,))
