"""A run of the LIMA study as tables and plots see it: baselines, what they were tuned over, and paired differences."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from quantlab.experiments.statistics import mean_loss

from .records import COLOURS, FALLBACK, Records, nothing_finished, read_run, title

PARTS = ("fp16", "bnb", "gptq")
ARROW = "\u2192"
BASELINE_COLOURS: Mapping[str, str] = {
    "fp16": "#7b828c", "fp16-fp16": "#a7adb6", "bnb": "#e0825f", "bnb-bnb": "#d1603d", "gptq": "#72b1e8",
    "gptq-gptq": "#3d8bd4", "bnb-gptq": "#1d9a85", "gptq-bnb": "#b8873a", "fp16-bnb": "#c25c86", "fp16-gptq": "#8c5fb0",
}  # fmt: skip
CELL_TITLES = {"base": "{} before tuning", "tune": "tuning over {}", "merge": "merging of {}", "infer": "inference {}"}
Loss = tuple[float, list[float] | None]  # nats a token, and the 95 % interval


class Lima(Records):
    """The finished cells. Rows are baselines: "bnb-gptq" is tuned over bnb, inferred in gptq; "fp16" untuned."""

    @cached_property
    def baselines(self) -> list[str]:
        """In the order of the configuration."""
        return [name for name in self.config["baselines"] if f"infer-{name}" in self.cells]

    @cached_property
    def tuned(self) -> list[str]:
        """The parts that an adapter was trained over."""
        return [part for part in PARTS if f"tune-{part}" in self.cells]

    def title(self, name: str) -> str:
        """ "NF4 → GPTQ 4-bit" of "bnb-gptq", "bf16, untuned" of "fp16", "tuning over NF4" of the cell "tune-bnb"."""
        kind, _, rest = name.partition("-")
        if kind in CELL_TITLES:
            return CELL_TITLES[kind].format(self.title(rest) if kind == "infer" else self.part_title(rest))
        if rest:
            return f"{self.part_title(kind)} {ARROW} {self.part_title(rest)}"
        return f"{self.part_title(kind)}, untuned"

    def part_title(self, part: str) -> str:
        """What a part stands for in this run."""
        return title(self.config[part]).removesuffix(" recommended")

    def colour(self, name: str) -> str:
        name = name.removeprefix("tune-")
        return BASELINE_COLOURS.get(name, COLOURS.get(name, FALLBACK))

    @property
    def any(self) -> dict[str, Any]:
        """One of the inference cells: for what they all share (data, environment)."""
        return self.cells[f"infer-{self.baselines[0]}"]

    @property
    def batches(self) -> list[int]:
        return sorted(self.config["batches"])

    # ---- losses of the same held-out conversations ---------------------------------------------------------------

    def loss(self, cell: str, kind: str = "final") -> Loss | None:
        """The held-out loss of a cell, or None where it was not measured."""
        rows = self.rows(cell, kind)
        if rows is None:
            return None
        mean, _, ends = mean_loss(rows["sums"], rows["tokens"])
        return mean, ends

    def difference(self, cell: str, base: str, kind: str = "final") -> Loss | None:
        """The held-out loss of a cell less that of another, conversation by conversation."""
        rows, other = self.rows(cell, kind), self.rows(base, "final")
        if rows is None or other is None or rows["tokens"] != other["tokens"]:
            return None
        mean, _, ends = mean_loss(np.subtract(rows["sums"], other["sums"]), rows["tokens"])
        return mean, ends

    def rows(self, cell: str, kind: str) -> dict[str, list[float]] | None:
        """Sums of losses and counts of target tokens, conversation by conversation."""
        return self.record(cell).get("held_out", {}).get(kind)

    def before(self, baseline: str) -> str:
        """The cell of what a baseline infers with, untuned."""
        return f"base-{baseline.rpartition('-')[2]}"

    def quantization_time(self, baseline: str) -> float | None:
        """Seconds of the quantization that inference rests on: of the merged model, or of the base."""
        own = self.value(f"infer-{baseline}", "quantization_time")
        return self.value(self.before(baseline), "quantization_time") if own is None else own

    def answers(self) -> dict[str, dict[str, str]]:
        """{question: {row: answer}}: of the untuned base first, then of every baseline."""
        found: dict[str, dict[str, str]] = {}
        for name in self.baselines:
            for item in self.cells[f"infer-{name}"].get("answers", []):
                found.setdefault(item["question"], {})[name] = item["answer"]
        return found


def load_lima(run: str | os.PathLike[str]) -> Lima:
    """Reads a run directory. Raises RecordError when it is none, is another experiment's, or holds no finished
    baseline.
    """
    found = read_run(run, "lima")
    study = Lima(**found)
    if not study.baselines:
        raise nothing_finished(found, "baseline")
    return study
