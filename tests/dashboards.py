"""The dashboards of this repository, as their tests read them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "dashboards"
FILES = sorted(FOLDER.glob("*.json"))


@dataclass(frozen=True, kw_only=True)
class Query:
    """One query of a panel."""

    dashboard: str
    panel: str
    expression: str

    def __str__(self) -> str:
        return f"{self.dashboard}: {self.panel}: {self.expression}"


def read(path: Path) -> dict[str, Any]:
    """A dashboard as data."""
    return json.loads(path.read_text())


def queries() -> Iterator[Query]:
    """Every query of every panel."""
    for path in FILES:
        for panel in read(path)["panels"]:
            for target in panel["targets"]:
                yield Query(dashboard=path.stem, panel=panel["title"], expression=target["expr"])
