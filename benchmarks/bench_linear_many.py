"""Benchmarks of linear_many: see harness.py."""

from __future__ import annotations

from typing import Any

from harness import each_case, measure

from quantlab.bench import Case


@each_case("linear_many")
def test_linear_many(benchmark: Any, case: Case) -> None:
    measure(benchmark, case)
