"""Benchmarks of swiglu_backward: see harness.py."""

from __future__ import annotations

from typing import Any

from harness import each_case, measure

from quantlab.bench import Case


@each_case("swiglu_backward")
def test_swiglu_backward(benchmark: Any, case: Case) -> None:
    measure(benchmark, case)
