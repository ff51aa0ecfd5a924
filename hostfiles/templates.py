"""The templates under cloud-init/, rendered so that a missing value is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

FOLDER = Path(__file__).parent.parent / "cloud-init"

_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(FOLDER),
    undefined=jinja2.StrictUndefined,
    autoescape=False,  # noqa: S701 - configuration files, not HTML
    keep_trailing_newline=True,
    trim_blocks=False,
)


def render(template: str, **values: Any) -> str:
    """The template of that path under cloud-init/ with the values filled in."""
    return _ENVIRONMENT.get_template(template).render(**values)
