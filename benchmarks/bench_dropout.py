"""Benchmarks of dropout: see harness.py."""

from __future__ import annotations

from typing import Any

from harness import each_case, measure

from quantlab.bench import Case


@each_case("dropout")
def test_dropout(benchmark: Any, case: Case) -> None:
    measure(benchmark, case)
