"""Ten quiet minutes raise no alert."""

from __future__ import annotations

import time
from collections.abc import Callable

from sandbox import host
from tests.sandbox.conftest import Sandbox
from tests.sandbox.notified import OF_THIS_MACHINE

QUIET_SECONDS = 600
SERVERS = ("dublin", "master")


def alerts(sandbox: Sandbox, server: str, seconds: float) -> set[str]:
    """What fired on a server in the last seconds, by its own Prometheus."""
    fired = f'ALERTS{{alertstate="firing",evaluated_by=""}}[{int(seconds)}s]'
    query = f"count by (alertname) (last_over_time({fired}))"
    found = sandbox.own_api(server, "query", query=query)["result"]
    return {row["metric"]["alertname"] for row in found} - {OF_THIS_MACHINE}


def test_ten_quiet_minutes_at_the_usual_intervals_raise_nothing(
    fresh: Sandbox, results: Callable[..., None]
) -> None:
    fresh.up()
    since = time.time()
    host.wait_until(lambda: time.time() > since + QUIET_SECONDS, seconds=QUIET_SECONDS + 60)
    found = {server: alerts(fresh, server, time.time() - since) for server in SERVERS}
    results(
        "Alerts of ten quiet minutes",
        {server: ", ".join(sorted(names)) for server, names in found.items()},
    )
    assert found == {server: {"Watchdog"} for server in SERVERS}
