"""One progress bar for everything that takes more than two seconds: rate and time left, silent off a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

QUIET_SECONDS = 2.0


class Progress:
    """Counts `total` units. Silent in the first two seconds, and where the output is no terminal or notebook."""

    def __init__(self, total: int, description: str, unit: str, enabled: bool):
        self.total, self.description, self.unit = total, description, unit
        self.done = self._skipped = 0
        self._enabled = enabled and (sys.stderr.isatty() or "ipykernel" in sys.modules)
        self._started = time.monotonic()
        self._bar: RichProgress | None = None

    def advance(self, units: int = 1, note: str = "") -> None:
        """Counts `units` more; `note` (a loss, a layer's name) is shown beside the bar."""
        self.done += units
        if self._enabled and time.monotonic() - self._started > QUIET_SECONDS:
            self._show(note)

    def skip(self, units: int) -> None:
        """Counts `units` that an earlier run has done: they say nothing of the rate."""
        self.done += units
        self._skipped += units

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
        rate = (self.done - self._skipped) / (time.monotonic() - self._started)
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
