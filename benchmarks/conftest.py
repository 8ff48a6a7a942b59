"""`pytest benchmarks --records FILE` writes one JSON line a case."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # harness.py


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--records", type=Path, help="write the records of the benchmarks to this JSON lines file")


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--records")
    if path is not None:
        import harness

        from quantlab import bench

        bench.write_jsonl(harness.records, path)
