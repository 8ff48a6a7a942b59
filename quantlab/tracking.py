"""Weights & Biases, for those who want it: off by default, works offline. The records and metrics.jsonl are always
written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Sink = Callable[[dict[str, Any]], None]


@contextmanager
def event_sink(mode: str, directory: Path, project: str, config: Mapping[str, Any]) -> Iterator[Sink | None]:
    """A function that takes the events of a run, or None with mode "off". "offline" and "online" are Weights &
    Biases' own modes.
    """
    if mode == "off":
        yield None
        return
    try:
        import wandb
    except ImportError as error:
        raise ValueError(f"wandb: mode {mode!r} needs Weights & Biases; pip install 'quantlab-llm[wandb]'") from error
    directory.mkdir(parents=True, exist_ok=True)
    run = wandb.init(project=f"quantlab-{project}", dir=str(directory), config=dict(config), mode=mode)

    def send(event: dict[str, Any]) -> None:
        cell = event.get("name", "run")
        run.log({f"{cell}/{name}": value for name, value in event.items() if isinstance(value, (int, float))})

    try:
        yield send
    finally:
        run.finish()
