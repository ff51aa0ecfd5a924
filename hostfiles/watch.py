"""What a server tells of itself, as metrics: by a timer, for node_exporter's textfile collector.

Whether its files are still those of the last delivery (apply-bundle --check), and how many
requests nginx refused (count-refusals).
"""

from __future__ import annotations

from hostfiles import rules
from hostfiles.files import File, Unit
from hostfiles.model import Server
from hostfiles.templates import FOLDER, render

USER = "federation-watch"
PROGRAM = "/usr/local/sbin/count-refusals"
SERVICE = "/etc/systemd/system/federation-watch.service"
TIMER = "/etc/systemd/system/federation-watch.timer"
PATHS = (PROGRAM, SERVICE, TIMER)
# Also in federation-watch.service, which makes it.
METRICS = "/var/lib/federation-watch"


def files(server: Server) -> tuple[File, ...]:
    """The program, the service and its timer."""
    return (
        File(path=PROGRAM, content=(FOLDER / "count-refusals").read_text(), mode=0o755),
        File(path=SERVICE, content=render("systemd/federation-watch.service.j2")),
        File(
            path=TIMER,
            content=render(
                "systemd/federation-watch.timer.j2",
                seconds=rules.scaled_milliseconds(60_000, server) / 1000,
            ),
        ),
    )


UNIT = Unit(name="federation-watch.timer", restart_on=(TIMER,))
