"""Prometheus durations such as `1m30s`.

https://prometheus.io/docs/prometheus/latest/configuration/configuration/#configuration-file
"""

from __future__ import annotations

import re

_UNITS = {"y": 365 * 86400_000, "w": 7 * 86400_000, "d": 86400_000, "h": 3600_000, "m": 60_000}
_UNITS |= {"s": 1000, "ms": 1}


def milliseconds(duration: str) -> int:
    """Milliseconds of a duration; ValueError if it is none."""
    # Each unit once at most, the longest first.
    match = re.fullmatch("".join(rf"(?:(\d+){unit})?" for unit in _UNITS), duration)
    if match is None or not duration:
        raise ValueError(f"{duration!r} is not a Prometheus duration")
    numbers = zip(match.groups(), _UNITS.values(), strict=True)
    return sum(int(number) * factor for number, factor in numbers if number)


def duration(milliseconds: int) -> str:
    """The shortest duration of one unit: `90s` of 90,000, `1500ms` of 1,500."""
    return f"{milliseconds // 1000}s" if milliseconds % 1000 == 0 else f"{milliseconds}ms"
