"""Every renewal once more, under a scrape every second: make test, on a busy machine, has fewer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.sandbox import test_5_monitored_hosts as monitored
from tests.sandbox import test_5_rotation as rotation
from tests.sandbox.conftest import Sandbox
from tests.soak.conftest import timed


def test_renewals_under_a_scrape_every_second(
    fresh: Sandbox,
    results: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(rotation, "INTERVAL_SECONDS", 1)
    monkeypatch.setattr(monitored, "INTERVAL_SECONDS", 2)
    fresh.set(scrapeInterval="1s")
    fresh.up()
    fresh.wait(f"sum_over_time({rotation.FEDERATE}[10s]) >= 8")
    renewals: dict[str, Callable[[], None]] = {
        "federation password": lambda: rotation.test_the_federation_password(fresh),
        "password of the page": lambda: rotation.test_the_password_of_the_page(fresh),
        "leaf certificates": lambda: rotation.test_leaf_certificates_of_slave_and_master(fresh),
        "operators' SSH key": lambda: rotation.test_the_operators_ssh_key(fresh, tmp_path),
        "CA": lambda: rotation.test_the_certificate_authority(fresh),
    }
    rows: dict[str, str] = {}
    for name, renewal in renewals.items():
        # Each fails if a scrape between any two of our machines failed, or a service restarted.
        seconds, _ = timed(lambda renewal=renewal: str(renewal()))
        rows[name] = f"no scrape failed, nothing restarted; {seconds:.0f} s"
    # Four machines hash a new password at once, which two cores cannot within a second.
    monitored.change_job(fresh, scrape_interval="2s")
    fresh.up()
    fresh.wait('sum_over_time(up{job="CoreSystems"}[10s]) >= 4')
    seconds, _ = timed(
        lambda: str(
            monitored.test_password_and_certificates_are_renewed_without_a_failed_scrape(fresh)
        )
    )
    rows["exporters' password and certificates, every 2 s"] = (
        f"no scrape failed, nothing restarted; {seconds:.0f} s"
    )
    results("Renewals under a scrape every second", rows)
