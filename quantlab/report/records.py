"""The records of a run as reports see them: its finished cells, whatever the study, and what did not finish."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantlab.experiments.record import RecordError, read_cells, read_config, read_json

NOTHING: dict[str, Any] = {"metrics": {}, "energy": {}, "memory": {}}
ALONE = 0.7  # share of the processors' time below which a phase was not alone on the machine
FALLBACK = "#8c6bb1"
# one family of hues a method, darker for more bits; readable on light and dark grounds
COLOURS: Mapping[str, str] = {
    "fp32": "#7b828c", "fp16": "#949ba5", "bf16": "#a7adb6",
    "gptq-8": "#1f5fa8", "gptq-4": "#3d8bd4", "gptq-3": "#72b1e8", "gptq-2": "#a5cdf0",
    "gptq-8-r": "#0f7364", "gptq-4-r": "#1d9a85", "gptq-3-r": "#4fbfa8", "gptq-2-r": "#8ad8c7",
    "nf4": "#d1603d", "nf4-dq": "#e0825f", "fp4": "#b8873a", "fp4-dq": "#cfa55f", "int8": "#8c5fb0",
    "rtn-8": "#9c4468", "rtn-4": "#c25c86", "rtn-3": "#d988a9", "rtn-2": "#e8b2c9",
}  # fmt: skip


@dataclass(frozen=True)
class Records:
    """`cells` holds records of finished cells by name; a study says how its rows are called and coloured."""

    path: Path
    config: dict[str, Any]
    cells: dict[str, dict[str, Any]]
    unfinished: list[dict[str, Any]]  # failed and cancelled cells

    def title(self, name: str) -> str:
        """How tables and plots print a row's name."""
        return title(name)

    def colour(self, name: str) -> str:
        return COLOURS.get(name, FALLBACK)

    def record(self, name: str) -> dict[str, Any]:
        """The record of a cell; an empty one where it is not finished."""
        return self.cells.get(name, NOTHING)

    def metric(self, name: str, metric: str) -> dict[str, Any] | None:
        """A metric of a cell, or None where it was not measured."""
        return self.record(name)["metrics"].get(metric)

    def need(self, name: str, metric: str) -> dict[str, Any]:
        """A metric that every record has. Raises RecordError for a record without it."""
        found = self.metric(name, metric)
        if found is None:
            raise RecordError(f"{self.path}: the record of {name} has no metric {metric!r}")
        return found

    def amount(self, name: str, metric: str) -> float:
        """The value of a metric that every record has."""
        return float(self.need(name, metric)["value"])

    def value(self, name: str, metric: str) -> float | None:
        """The value of a metric of a cell, or None."""
        found = self.metric(name, metric)
        return None if found is None else found["value"]

    def energy(self, name: str, phase: str) -> dict[str, Any] | None:
        """The energy record of a phase of a cell, or None where nothing was measured."""
        found = self.record(name)["energy"].get(phase)
        return found if found is not None and found.get("kg") is not None else None

    @property
    def on_device(self) -> bool:
        """Whether the models of the study ran on a CUDA device."""
        return self.config.get("device", "cpu") != "cpu"

    @property
    def any(self) -> dict[str, Any]:
        """A record that stands for all in what they share (data, environment): each study says which."""
        raise NotImplementedError

    @property
    def machine(self) -> str:
        """The name of what computed: the device's, or the processor's."""
        env = self.any["env"]
        return str(env["gpu"] if self.on_device else env["cpu"])

    @property
    def machine_line(self) -> str:
        """`machine`, and how much of a processor was used."""
        env = self.any["env"]
        return self.machine if self.on_device else f"{self.machine}, {env['threads']} threads ({env['isa']})"

    @property
    def peak_name(self) -> str:
        """What `peak` is, for a column's head."""
        return "Peak on the device" if self.on_device else "Peak RSS"

    @property
    def peak_note(self) -> str:
        """What `peak` is, for a caption: the beginning of a sentence."""
        return f"{self.peak_name}: of " + ("all its memory in use" if self.on_device else "the whole process")

    def peak(self, name: str, phase: str) -> float | None:
        """Peak memory of a phase of a cell where the model ran, in bytes, or None: resident memory of the process, or
        the device's."""
        kind = "peak_device" if self.on_device else "peak_host"
        found = self.record(name)["memory"].get(kind, {}).get(phase)
        return None if found is None else found["value"]

    def share(self, name: str, phase: str) -> float:
        """The share of the processors' time that a phase got, of all threads; 1 where it was not measured or the model
        ran on a device."""
        record = NOTHING if self.on_device else self.record(name)
        found = record.get("timings", {}).get(phase, {})
        return found["cpu_s"] / (found["mean"] * record["env"]["threads"]) if found.get("cpu_s") else 1.0

    def crowded(self, cells: Sequence[str], phase: str) -> str:
        """A sentence about the cells beside which the machine did other work; empty where there are none."""
        shares = {name: self.share(name, phase) for name in cells}
        low = [f"{self.title(name)} ({100 * share:.0f} %)" for name, share in shares.items() if share < ALONE]
        text = f" The machine did other work too, so that these times are too long: {', '.join(low)} of the processors."
        return text if low else ""

    @property
    def model(self) -> str:
        """The model's name for a heading."""
        name = self.config["model"]
        return "SmolLM2-135M-Instruct" if name == "demo" else Path(name).name

    @property
    def notes(self) -> list[str]:
        """Every note of every cell, once."""
        return list(dict.fromkeys(note for cell in self.cells.values() for note in cell["notes"]))


class NoRun(RecordError):
    """A directory that is not one of a run."""


def experiment_of(run: str | os.PathLike[str]) -> str:
    """The experiment that a run directory holds; NoRun where it is none, RecordError where it is damaged."""
    path = Path(run) / "config.json"
    experiment = read_json(path).get("experiment") if path.exists() else None
    if experiment is None:
        raise NoRun(
            f"{run}: not a run directory (it has no config.json of one); `quantlab demo`, `quantlab tweeteval` or "
            "`quantlab lima` makes one"
        )
    return str(experiment)


def read_run(run: str | os.PathLike[str], experiment: str) -> dict[str, Any]:
    """What `Records` takes, of a run directory; RecordError where it is none, or another experiment's."""
    path, found = Path(run), experiment_of(run)
    if found != experiment:
        raise RecordError(f"{path}: a run of {found!r}; this report knows runs of {experiment!r}")
    newest = {cell["name"]: cell for cell in read_cells(path)}  # a later cell of the same name replaces an earlier one
    done = {name: cell for name, cell in newest.items() if cell["status"] == "done"}
    unfinished = [cell for cell in newest.values() if cell["status"] != "done"]
    return {"path": path, "config": read_config(path), "cells": done, "unfinished": unfinished}


def error_of(cell: Mapping[str, Any]) -> str:
    """Why a cell did not finish, on one line."""
    error = cell.get("error") or {}
    if cell["status"] == "cancelled":
        return "interrupted"
    return f"{error.get('type', 'unknown')}: {error.get('message', '')}"


def nothing_finished(found: Mapping[str, Any], what: str) -> RecordError:
    """The error of a run without what a report is about."""
    failures = "; ".join(f"{cell['name']}: {error_of(cell)}" for cell in found["unfinished"])
    done = f"done so far: {', '.join(found['cells'])}" if found["cells"] else "no cell has been run"
    return RecordError(f"{found['path']}: no finished {what} to report ({failures or done})")


def title(name: str) -> str:
    """How tables and plots print a variant: "GPTQ 4-bit", "NF4", "fp32"."""
    method, *rest = name.split("-")
    if method in ("gptq", "rtn") and rest:
        return f"{method.upper()} {rest[0]}-bit" + (" recommended" if rest[1:] == ["r"] else "")
    if method in ("nf4", "fp4"):
        return method.upper() + (" double quant" if rest == ["dq"] else "")
    return name
