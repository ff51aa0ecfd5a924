"""What we set of the operating system itself: its journal and its security updates.

sshd and ufw have modules of their own.
"""

from __future__ import annotations

from hostfiles.files import Check, File, Unit
from hostfiles.model import SecurityUpdates
from hostfiles.templates import render

# https://www.freedesktop.org/software/systemd/man/latest/journald.conf.html
JOURNALD = "/etc/systemd/journald.conf.d/federation.conf"
# Read after the package's own 20auto-upgrades and 50unattended-upgrades.
# https://manpages.debian.org/trixie/apt/apt.conf.5.en.html
UPDATES = "/etc/apt/apt.conf.d/60federation"
UPDATES_DROP_IN = "/etc/systemd/system/apt-daily-upgrade.service.d/federation.conf"
UPDATES_TIMER = "apt-daily-upgrade.timer"
PATHS = (JOURNALD, UPDATES, UPDATES_DROP_IN)


def files(updates: SecurityUpdates) -> tuple[File, ...]:
    """A file for each."""
    return (
        File(path=JOURNALD, content=render("system/journald.conf.j2")),
        File(
            path=UPDATES,
            content=render(
                "system/apt.conf.j2", install=updates.install, reboot_at=updates.reboot_at
            ),
        ),
        File(path=UPDATES_DROP_IN, content=render("systemd/apt-daily-upgrade.conf.j2")),
    )


CHECKS = (
    Check(
        name="apt's configuration",
        argv=("/usr/bin/apt-config", "--config-file", f"{{tree}}{UPDATES}", "dump"),
    ),
)


def units(updates: SecurityUpdates) -> tuple[Unit, ...]:
    """What reads them. The first boot has installed unattended-upgrades."""
    wanted = ("/usr/bin/unattended-upgrade", "--help") if updates.install else ()
    return (
        Unit(name="systemd-journald.service", restart_on=(JOURNALD,)),
        Unit(name=UPDATES_TIMER, ready=wanted),
    )
