"""Benchmarks of quantize: see harness.py."""

from __future__ import annotations

from typing import Any

from harness import each_case, measure

from quantlab.bench import Case


@each_case("quantize")
def test_quantize(benchmark: Any, case: Case) -> None:
    measure(benchmark, case)
