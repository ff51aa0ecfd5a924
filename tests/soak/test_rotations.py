"""Every renewal once more, under a scrape every second: what make test does at every two."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.sandbox import test_5_rotation as rotation
from tests.sandbox.conftest import Sandbox
from tests.soak.conftest import timed

RENEWALS = (
    rotation.test_the_federation_password,
    rotation.test_the_password_of_the_page,
    rotation.test_leaf_certificates_of_slave_and_master,
    rotation.test_the_operators_ssh_key,
    rotation.test_the_certificate_authority,
)


def test_renewals_under_a_scrape_every_second(
    fresh: Sandbox, results: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotation, "INTERVAL_SECONDS", 1)
    fresh.set(scrapeInterval="1s")
    fresh.up()
    fresh.wait(f"sum_over_time({rotation.FEDERATE}[10s]) >= 8")
    rows: dict[str, str] = {}
    for renewal in RENEWALS:
        name = renewal.__name__.removeprefix("test_the_").removeprefix("test_").replace("_", " ")
        # Each fails if a scrape between any two of our machines failed, or a service restarted.
        seconds, _ = timed(lambda renewal=renewal: str(renewal(fresh)))
        rows[name] = f"no scrape failed, nothing restarted; {seconds:.0f} s"
    results("Renewals under a scrape every second", rows)
