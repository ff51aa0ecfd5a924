"""Tells what is being done, and how long each step took.

On a terminal the steps under way are shown with a clock; elsewhere (a pipeline's log) a line is
written when a step ends, and every ten seconds one for those that still run.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import Progress as Bars
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

_HEARTBEAT_SECONDS = 10.0


def silent(text: str) -> contextlib.AbstractContextManager[None]:
    """A Progress that shows nothing."""
    return contextlib.nullcontext()


class Steps:
    """A Progress that may be used from several threads; use it as a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started = time.monotonic()
        self._bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._running: dict[int, tuple[str, float]] = {}
        self._done = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Steps:
        self._bars.start()
        if not self._console.is_terminal:
            self._heart.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._bars.stop()

    @property
    def seconds(self) -> float:
        """Seconds since the first step."""
        return time.monotonic() - self._started

    @contextlib.contextmanager
    def __call__(self, text: str) -> Iterator[None]:
        """A step: `with steps("boot core01"): …`."""
        started = time.monotonic()
        task = self._bars.add_task(text, total=None)
        self._running[task] = (text, started)
        try:
            yield
        except BaseException:
            self._say(f"{text}: failed", started, style="red")
            raise
        else:
            self._say(text, started)
        finally:
            del self._running[task]
            self._bars.remove_task(task)

    def _say(self, text: str, started: float, style: str = "") -> None:
        line = f"{self.seconds:6.1f} s  {text} ({time.monotonic() - started:.1f} s)"
        self._console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)

    def _beat(self) -> None:
        while not self._done.wait(_HEARTBEAT_SECONDS):
            for text, started in list(self._running.values()):
                if time.monotonic() - started >= _HEARTBEAT_SECONDS:
                    self._say(f"still: {text}", started, style="dim")
