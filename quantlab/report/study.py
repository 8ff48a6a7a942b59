"""A run of the TweetEval study as tables and plots see it: its finished cells in order, and the comparisons between
them.
"""

from __future__ import annotations

import os
from functools import cached_property
from typing import Any

from quantlab.experiments.statistics import compare

from .records import Records, nothing_finished, read_run

BASES = ("fp32", "fp16", "bf16")  # what the other variants are compared with: the first of these that is there


class Study(Records):
    """The finished cells: the head, and the variants."""

    @cached_property
    def head(self) -> dict[str, Any] | None:
        return self.cells.get("head")

    @cached_property
    def variants(self) -> dict[str, dict[str, Any]]:
        """In the order of the configuration."""
        return {name: self.cells[name] for name in self.config["variants"] if name in self.cells}

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

    def relative(self, name: str, metric: str) -> float | None:
        """A metric of a variant divided by the base's, or None."""
        value, base = self.value(name, metric), self.value(self.base, metric) if self.base else None
        return None if value is None or not base else value / base

    @property
    def task(self) -> str:
        """The task's name for a heading."""
        return "4,200 rated tweets" if self.config["task"] == "demo" else f"TweetEval {self.config['task']}"

    @property
    def majority(self) -> float:
        """Accuracy of always answering the most frequent class."""
        support = [row["support"] for row in self.any["classification"]["classes"]]
        return max(support) / sum(support)


def load_study(run: str | os.PathLike[str]) -> Study:
    """Reads a run directory. Raises RecordError when it is none, is another experiment's, or holds no finished
    variant.
    """
    found = read_run(run, "tweeteval")
    study = Study(**found)
    if not study.variants:
        raise nothing_finished(found, "variant")
    return study
