"""What all tests share."""

from __future__ import annotations

import signal


def pytest_configure() -> None:
    """Ended by tests/run, a pipeline or a person, a session still takes its sandbox down."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
