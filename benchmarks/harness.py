"""What the bench_<op>.py share: each case of quantlab.bench under pytest-benchmark, with its record as extra_info.

    pytest benchmarks                                              # all ops, some minutes
    pytest benchmarks/bench_linear.py -k nf4 --records nf4.jsonl

The engine, its shapes and its roofs are those of `quantlab bench` (quantlab/bench.py), which has no need of pytest.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest

from quantlab import bench

ROUNDS = 7
records: list[dict[str, Any]] = []  # of this session; conftest.py writes them where --records names a file


@lru_cache
def errors(op: str) -> dict[str, float]:
    return bench.errors(op)


def each_case(op: str) -> Callable[[Callable], Callable]:
    """Parametrizes a benchmark with the cases of an op."""
    return pytest.mark.parametrize("case", bench.cases(op), ids=str)


def measure(benchmark: Any, case: bench.Case) -> None:
    """Times one case; where memory limits it, the caches are flushed before each round."""
    setup = bench.flush_caches if bench.is_cold(case) else None
    benchmark.pedantic(case.run, setup=setup, rounds=ROUNDS, iterations=bench.repeats(case), warmup_rounds=1)
    record = bench.record(case, benchmark.stats.stats.data, errors(case.op).get(case.format))
    benchmark.extra_info.update(record)
    records.append(record)
