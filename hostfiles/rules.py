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
    return {f"{name}.yml": _scaled(name, server) for name in _names(server)}


def scaled_milliseconds(written: int, server: Server) -> int:
    """What a time that is written for samples every 15 s is with this server's intervals."""
    intervals = (server.scrape_interval, server.evaluation_interval)
    return written * max(map(milliseconds, intervals)) // WRITTEN_FOR_MS


def _names(server: Server) -> list[str]:
    names = ["host", "prometheus", "server"]
    if isinstance(server, MasterServer):
        names.append("master")
    if isinstance(server, SlaveServer):
        names.append("slave")
    if server.alerting is not None:
        names.append("alertmanager")
    if server.acme is not None:
        names.append("public-certificate")
    return names


def _scaled(name: str, server: Server) -> str:
    text = (FOLDER / f"{name}.yml").read_text()
    if scaled_milliseconds(WRITTEN_FOR_MS, server) == WRITTEN_FOR_MS:
        return text
    return _SCALED.sub(
        lambda found: duration(scaled_milliseconds(milliseconds(found[0]), server)), text
    )
