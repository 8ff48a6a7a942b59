"""The folder of a training run: metrics.jsonl, and checkpoints that it goes on from with the same losses to the bit.

checkpoint-N, after N steps: the adapter in peft's layout, optimizer.safetensors (AdamW's moments, float32, as long as
the adapter's vector), state.json (step, log, and the settings that made it). The order of the data, the learning rate
and the dropout follow from the step and the seed, so there is no other state. A checkpoint is written beside its place
and renamed: it is there whole or not at all.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from quantlab.config import other_parts
from quantlab.io import peft
from quantlab.io.files import output_directory, read_json, write_bytes
from quantlab.io.safetensors import LazyTensor, SafetensorsFile, write_safetensors
from quantlab.lora import Adapter, read_adapter

STATE, OPTIMIZER, METRICS = "state.json", "optimizer.safetensors", "metrics.jsonl"
NAME = re.compile(r"checkpoint-([0-9]{1,12})")


@dataclass
class TrainingState:
    """All that changes from step to step: the adapter (its `parameters`), AdamW's moments, and what was logged."""

    adapter: Adapter
    mean: np.ndarray = field(init=False)
    square: np.ndarray = field(init=False)
    step: int = 0  # finished ones
    log: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # of the steps since the last entry of the log

    def __post_init__(self) -> None:
        self.mean, self.square = np.zeros_like(self.adapter.parameters), np.zeros_like(self.adapter.parameters)


def checkpoints_in(folder: Path) -> list[Path]:
    """The finished checkpoints of an output_dir, by step; none where it is not there."""
    found = [path for path in folder.glob("checkpoint-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


class RunFolder:
    """An output_dir. settings: what a run that goes on must share with the one before, in JSON's types."""

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any]):
        self.path = output_directory(path, "output_dir", "the run")
        self.settings = json.loads(json.dumps(dict(settings)))
        self.path.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps other runs out of the folder; ValueError where one is in it."""
        handle = os.open(self.path, os.O_RDONLY)
        try:
            with suppress(OSError):  # of a file system without locks
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    told = f"another run is writing to {self.path}: wait for it, or name another directory"
                    raise ValueError(f"output_dir: {told}") from None
            yield
        finally:
            os.close(handle)

    def begin(self, state: TrainingState) -> None:
        """A new log, or that of the state which the run goes on from."""
        if state.step == 0 and checkpoints_in(self.path):
            raise ValueError(
                f"output_dir: {self.path} holds checkpoints of another run: go on with it by resume_from_checkpoint, "
                "or name another directory"
            )
        if state.log:
            write_bytes(self.path / METRICS, b"".join(_line(entry) for entry in state.log))
        else:  # not an empty one: a run that is interrupted at once leaves nothing
            (self.path / METRICS).unlink(missing_ok=True)

    def log(self, entry: Mapping[str, Any]) -> None:
        with open(self.path / METRICS, "ab") as file:
            file.write(_line(entry))

    def save(self, state: TrainingState) -> Path:
        """Writes checkpoint-N of a state."""
        target = self.path / f"checkpoint-{state.step}"
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=self.path))
        try:
            adapter = state.adapter
            parts = (adapter.config, dict(adapter.items()), adapter.score)
            peft.write_adapter(staging, *parts, base_format=adapter.base_format)
            moments = {"mean": LazyTensor.of(state.mean), "square": LazyTensor.of(state.square)}
            write_safetensors(staging / OPTIMIZER, moments)
            content = {"step": state.step, "settings": self.settings, "losses": state.losses, "log": state.log}
            write_bytes(staging / STATE, json.dumps(content, indent=1).encode())
            if target.exists():
                shutil.rmtree(target)
            os.rename(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return target

    def load(self, which: Literal[True] | str | os.PathLike[str], state: TrainingState) -> None:
        """Fills a state from a checkpoint's directory; True: the last one here."""
        if which is True:
            found = checkpoints_in(self.path)
            if not found:
                raise FileNotFoundError(f"resume_from_checkpoint: {self.path} holds no checkpoint")
            which = found[-1]
        load_state(Path(which), self.settings, state)


def load_state(path: Path, settings: Mapping[str, Any], state: TrainingState) -> None:
    """Fills a state, whose adapter has the right modules, from a checkpoint's directory. ValueError where it is damaged
    or comes from other settings, naming them."""
    if not (path / STATE).is_file():
        raise FileNotFoundError(f"resume_from_checkpoint: {path} holds no {STATE}")
    content = read_json(path / STATE)
    other = other_parts(content.get("settings"), json.loads(json.dumps(dict(settings))))
    if other:
        raise ValueError(
            f"resume_from_checkpoint: {path} is of a run with another {other}: use the same to go on with it"
        )
    try:
        adapter, moments = read_adapter(path), SafetensorsFile(path / OPTIMIZER)
        for module in state.adapter:
            for into, stored in zip(state.adapter[module], adapter[module], strict=True):
                _fill(into, stored)
        if state.adapter.score is not None:
            _fill(state.adapter.score, adapter.score)
        _fill(state.mean, moments.array("mean"))
        _fill(state.square, moments.array("square"))
        state.step, state.log, state.losses = int(content["step"]), list(content["log"]), list(content["losses"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"resume_from_checkpoint: {path} is damaged: {error}") from None


def _fill(into: np.ndarray, stored: np.ndarray | None) -> None:
    if stored is None or stored.shape != into.shape:
        found = "nothing" if stored is None else f"shape {stored.shape}"
        raise ValueError(f"found {found}, expected shape {into.shape}")
    into[...] = stored


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"
