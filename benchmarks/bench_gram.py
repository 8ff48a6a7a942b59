"""Benchmarks of gram: see harness.py."""

from __future__ import annotations

from typing import Any

from harness import each_case, measure

from quantlab.bench import Case


@each_case("gram")
def test_gram(benchmark: Any, case: Case) -> None:
    measure(benchmark, case)
