"""Benchmarks of sample: see harness.py."""

from __future__ import annotations

from typing import Any

from harness import each_case, measure

from quantlab.bench import Case


@each_case("sample")
def test_sample(benchmark: Any, case: Case) -> None:
    measure(benchmark, case)
