"""A run of the TweetEval study as tables and plots see it: its finished cells in order, and the comparisons between
them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from quantlab.experiments.record import RecordError, read_cells, read_json
from quantlab.experiments.statistics import compare

BASES = ("fp32", "fp16", "bf16")  # what the other variants are compared with: the first of these that is there


@dataclass(frozen=True)
class Study:
    """`head` and `variants` hold records of finished cells, the variants in the order of the configuration."""

    path: Path
    config: dict[str, Any]
    head: dict[str, Any] | None
    variants: dict[str, dict[str, Any]]
    unfinished: list[dict[str, Any]]  # failed and cancelled cells

    @cached_property
    def base(self) -> str | None:
        """The name of the variant that the others are compared with, if there is one."""
        return next((name for name in BASES if name in self.variants), None)

    @cached_property
    def comparisons(self) -> dict[str, dict[str, Any]]:
        """The paired comparison of every variant with the base, where both predicted the same examples."""
        if self.base is None:
            return {}
        base, result = self.variants[self.base], {}
        for name, cell in self.variants.items():
            if name != self.base and cell["data"]["sha256"] == base["data"]["sha256"]:
                result[name] = compare(base["truth"], base["predictions"], cell["predictions"])
        return result

    @property
    def any(self) -> dict[str, Any]:
        """One of the variants: for what they all share (data, environment)."""
        return self.variants[self.base] if self.base else next(iter(self.variants.values()))

    def metric(self, name: str, metric: str) -> dict[str, Any] | None:
        """A metric of a variant, or None where it was not measured."""
        return self.variants[name]["metrics"].get(metric)

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
        """The value of a metric of a variant, or None."""
        found = self.metric(name, metric)
        return None if found is None else found["value"]

    def relative(self, name: str, metric: str) -> float | None:
        """A metric of a variant divided by the base's, or None."""
        value, base = self.value(name, metric), self.value(self.base, metric) if self.base else None
        return None if value is None or not base else value / base

    def energy(self, name: str, phase: str) -> dict[str, Any] | None:
        """The energy record of a phase of a variant, or None where nothing was measured."""
        found = self.variants[name]["energy"].get(phase)
        return found if found is not None and found.get("kg") is not None else None

    def peak(self, name: str, phase: str) -> float | None:
        """Peak resident memory of a phase of a variant in bytes, or None."""
        found = self.variants[name]["memory"].get("peak_host", {}).get(phase)
        return None if found is None else found["value"]

    @property
    def model(self) -> str:
        """The model's name for a heading."""
        name = self.config["model"]
        return "SmolLM2-135M-Instruct" if name == "demo" else Path(name).name

    @property
    def task(self) -> str:
        """The task's name for a heading."""
        return "4,200 rated tweets" if self.config["task"] == "demo" else f"TweetEval {self.config['task']}"

    @property
    def majority(self) -> float:
        """Accuracy of always answering the most frequent class."""
        support = [row["support"] for row in self.any["classification"]["classes"]]
        return max(support) / sum(support)

    @property
    def notes(self) -> list[str]:
        """Every note of every cell, once."""
        cells = [self.head] if self.head else []
        return list(dict.fromkeys(note for cell in [*cells, *self.variants.values()] for note in cell["notes"]))


def load_study(run: str | os.PathLike[str]) -> Study:
    """Reads a run directory. Raises RecordError when it is none, is another experiment's, or holds no finished
    variant.
    """
    path = Path(run)
    if not (path / "config.json").exists():
        raise RecordError(
            f"{path}: not a run directory (it has no config.json); `quantlab demo` or `quantlab tweeteval` makes one"
        )
    stored = read_json(path / "config.json")
    if stored.get("experiment") != "tweeteval":
        raise RecordError(f"{path}: a run of {stored.get('experiment')!r}; this report knows runs of 'tweeteval'")
    newest = {cell["name"]: cell for cell in read_cells(path)}  # a later cell of the same name replaces an earlier one
    done = {name: cell for name, cell in newest.items() if cell["status"] == "done"}
    order = [name for name in stored["config"]["variants"] if name in done]
    unfinished = [cell for cell in newest.values() if cell["status"] != "done"]
    if not order:
        failures = (
            "; ".join(f"{cell['name']}: {cell['error']['message']}" for cell in unfinished) or "no cell has been run"
        )
        raise RecordError(f"{path}: no finished variant to report ({failures})")
    return Study(path, stored["config"], done.get("head"), {name: done[name] for name in order}, unfinished)


def title(name: str) -> str:
    """How tables and plots print a variant: "GPTQ 4-bit", "NF4", "fp32"."""
    method, *rest = name.split("-")
    if method in ("gptq", "rtn") and rest:
        return f"{method.upper()} {rest[0]}-bit" + (" recommended" if rest[1:] == ["r"] else "")
    if method in ("nf4", "fp4"):
        return method.upper() + (" double quant" if rest == ["dq"] else "")
    return name
