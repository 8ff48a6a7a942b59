"""Benchmarks of gptq_panel: see harness.py."""

from __future__ import annotations

from typing import Any

from harness import each_case, measure

from quantlab.bench import Case


@each_case("gptq_panel")
def test_gptq_panel(benchmark: Any, case: Case) -> None:
    measure(benchmark, case)
