"""The alerting rules of the folder rules/: which server has which, and how long they wait.

They are written for samples every 15 s: durations in seconds and minutes count samples, and grow
and shrink with the settings' intervals; those in hours and days are real time.
https://prometheus.io/docs/prometheus/latest/configuration/alerting_rules/
"""

from __future__ import annotations

import re
from pathlib import Path

from hostfiles.duration import duration, milliseconds
from hostfiles.model import MasterServer, Server, SlaveServer

FOLDER = Path(__file__).parent.parent / "rules"
WRITTEN_FOR_MS = 15_000
# After `for:`, and a range in PromQL.
_SCALED = re.compile(r"(?<=\bfor: )\d+[sm]$|(?<=\[)\d+[sm](?=\])", re.MULTILINE)


def contents(server: Server) -> dict[str, str]:
    """The rule files of a server, by name."""
    return {name: _scaled(name, server) for name in names(server)}


def scaled_milliseconds(written: int, server: Server) -> int:
    """What a time that is written for samples every 15 s is with this server's intervals."""
    intervals = (server.scrape_interval, server.evaluation_interval)
    return written * max(map(milliseconds, intervals)) // WRITTEN_FOR_MS


def names(server: Server) -> list[str]:
    """Which files of the folder a server has."""
    chosen = ["host", "prometheus", "server"]
    if isinstance(server, MasterServer):
        chosen.append("master")
    if isinstance(server, SlaveServer):
        chosen.append("slave")
    if server.alerting is not None:
        chosen.append("alertmanager")
    if server.acme is not None:
        chosen.append("public-certificate")
    return [f"{name}.yml" for name in chosen]


def _scaled(name: str, server: Server) -> str:
    text = (FOLDER / name).read_text()
    if scaled_milliseconds(WRITTEN_FOR_MS, server) == WRITTEN_FOR_MS:
        return text
    return _SCALED.sub(
        lambda found: duration(scaled_milliseconds(milliseconds(found[0]), server)), text
    )
