"""The benchmark engine at a tiny size: it runs, and its records are complete. Speed is not tested."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import reference as ref

from quantlab import _core, bench
from quantlab.bench_cases import WEIGHTS


@pytest.fixture(autouse=True)
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(bench, "FLUSH_BYTES", 1 << 20)
    bench._roofs.cache_clear()
    bench._flush_buffer.cache_clear()
    yield
    bench._roofs.cache_clear()
    bench._flush_buffer.cache_clear()


def test_every_op_gives_complete_records(tmp_path: Path) -> None:
    records = bench.run(models=bench.TINY, rounds=2, show_progress=False)
    assert {one["op"] for one in records} == set(bench.OPS)
    assert {one["format"] for one in records if one["op"] == "linear"} == set(WEIGHTS)
    for one in records:
        assert 0 < one["p10_s"] <= one["median_s"] <= one["p90_s"]
        assert one["gb_per_s"] > 0 and one["roof_percent"] > 0
        assert one["variant"] in _core.isa_info()
        assert one["error"] <= (2.0**-7 if one["variant"] in ref.ROUNDING else 1e-6)
    path = tmp_path / "bench.jsonl"
    bench.write_jsonl(records, path)
    assert [json.loads(line) for line in path.read_text().splitlines()] == records
    assert list(tmp_path.iterdir()) == [path]


def test_unknown_op() -> None:
    with pytest.raises(ValueError, match="op: got 'conv', expected one of embedding, rmsnorm"):
        bench.run(["conv"])


def test_every_op_of_the_core_has_cases() -> None:
    """But those that only a larger call of the core reaches."""
    slots = {name.removesuffix("_forward") for name in _core.op_table()}
    parts = {
        "feedback",
        "scatter_rows",
        "gather_rows",
        "advance",
        "gptq_steps",
        "gptq_error",
        "gptq_power",
        "scale",
        "square_sum",
    }
    assert slots - parts == set(bench.OPS)


def test_roofs(isa: str) -> None:
    x = np.arange(100_003, dtype=np.float32)
    assert _core.roof_fma(2, 100) > 0
    _core.roof_read(x)
    out = np.zeros(len(x) + 1, np.float32)[1:]  # not on a vector's boundary
    assert _core.roof_copy(out, x) is out and (out == x).all()
    assert _core.roof_copy(None, x[:5]).tolist() == [0, 1, 2, 3, 4]
