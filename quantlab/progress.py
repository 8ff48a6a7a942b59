"""One progress bar for everything that takes more than two seconds: rate and time left; off a terminal, a plain line
now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

QUIET_SECONDS = 2.0
FIRST_LINE, LINES_APART = 10.0, 60.0  # seconds: plain lines come after 10, 20, 40, 80, then every minute


class Progress:
    """Counts `total` units, silent in the first two seconds; in ten where standard error is no terminal or notebook."""

    def __init__(self, total: int, description: str, unit: str, enabled: bool):
        self.total, self.description, self.unit = total, description, unit
        self.done = 0
        self._enabled, self._live = enabled, sys.stderr.isatty() or "ipykernel" in sys.modules
        self._started, self._next_line = time.monotonic(), FIRST_LINE
        self._bar: RichProgress | None = None

    def advance(self, units: int = 1, note: str = "") -> None:
        """Counts `units` more; `note` (a loss, a layer's name) is shown beside the bar."""
        self.done += units
        elapsed = time.monotonic() - self._started
        if self._enabled and self._live and elapsed > QUIET_SECONDS:
            self._show(note)
        elif self._enabled and not self._live and elapsed > self._next_line:
            self._next_line = elapsed + min(elapsed, LINES_APART)
            rate = self.done / elapsed
            speed = f"{rate:.3g} {self.unit}/s, {(self.total - self.done) / rate:.0f} s left"
            print(f"{self.description}: {self.done} of {self.total}, {speed}", file=sys.stderr, flush=True)

    def _show(self, note: str) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._bar = RichProgress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._bar.add_task(self.description, total=self.total, rate="", note="")
        rate = self.done / (time.monotonic() - self._started)
        self._bar.update(self._bar.task_ids[0], completed=self.done, rate=f"{rate:.4g} {self.unit}/s", note=note)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


@contextmanager
def progress(total: int, description: str, unit: str = "it", enabled: bool = True) -> Iterator[Progress]:
    """`with progress(len(layers), "GPTQ", "layer") as bar: … bar.advance(note=name)`."""
    bar = Progress(total, description, unit, enabled)
    try:
        yield bar
    finally:
        bar.close()
