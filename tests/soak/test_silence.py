"""A delivery whose packets are lost in silence: after how long `up` tells, as patient as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.sandbox.conftest import Sandbox
from tests.sandbox.test_6_interrupted import Step, leaves_and_exporter_password, silenced

LIMIT_SECONDS = 90


def test_silence_in_the_middle_of_a_delivery(
    fresh: Sandbox, results: Callable[..., None], tmp_path: Path
) -> None:
    fresh.set(scrapeInterval="2s")
    fresh.up()
    rows: dict[str, str] = {}
    for name, way in (("dublin", "directly"), ("core01", "through its slave")):
        step = Step("swap", host=name)
        seconds = silenced(fresh, leaves_and_exporter_password, step, tmp_path)
        rows[f"`up` told of it, to a host that it reaches {way}"] = f"{seconds:.0f} s"
        assert seconds < LIMIT_SECONDS
    rows["the next `up`"] = "finished; what services read was whole all the while"
    results("Silence in the middle of a delivery", rows)
