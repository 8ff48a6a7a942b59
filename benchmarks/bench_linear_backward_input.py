"""Benchmarks of linear_backward_input: see harness.py."""

from __future__ import annotations

from typing import Any

from harness import each_case, measure

from quantlab.bench import Case


@each_case("linear_backward_input")
def test_linear_backward_input(benchmark: Any, case: Case) -> None:
    measure(benchmark, case)
