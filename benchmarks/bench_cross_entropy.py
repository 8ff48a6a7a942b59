"""Benchmarks of cross_entropy: see harness.py."""

from __future__ import annotations

from typing import Any

from harness import each_case, measure

from quantlab.bench import Case


@each_case("cross_entropy")
def test_cross_entropy(benchmark: Any, case: Case) -> None:
    measure(benchmark, case)
