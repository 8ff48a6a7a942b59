"""The elementwise ops, SwiGLU, add and embedding, on every ISA against float64."""

from __future__ import annotations

import numpy as np
import pytest
import reference as ref

from quantlab import _core

COUNTS = [*ref.SIZES, 16384 - 1, 16384 + 1, 50_000]  # a task is 16384 elements


@pytest.mark.parametrize("count", COUNTS)
def test_swiglu_matches_float64(isa: str, rng: np.random.Generator, count: int) -> None:
    gate, up = (rng.standard_normal(count, dtype=np.float32) * 5 for _ in range(2))
    out, buffer = ref.guarded(np.zeros(count))
    assert _core.swiglu(gate, up, out) is out
    # exp to two EPS, and four roundings of half an EPS: sum, quotient, two products
    np.testing.assert_allclose(out, ref.swiglu(gate, up), rtol=4 * ref.EPS, atol=0)
    assert ref.guards_intact(buffer)


def test_swiglu_extreme_values(isa: str) -> None:
    gate = np.array([-1e30, -200, -104, -88.8, -87.4, -0.0, 0.0, 1e-30, 88, 200, 1e30, np.nan], np.float32)
    out = _core.swiglu(gate, np.ones_like(gate))
    expected = ref.swiglu(gate, np.ones_like(gate))
    # where exp(-gate) overflows float32 the result is 0 instead of a number below 1e-36
    np.testing.assert_allclose(out, expected, rtol=4 * ref.EPS, atol=1e-36)


@pytest.mark.parametrize("count", COUNTS)
def test_add_is_exactly_rounded(isa: str, rng: np.random.Generator, count: int) -> None:
    x = rng.standard_normal(count, dtype=np.float32)
    y, buffer = ref.guarded(rng.standard_normal(count))
    expected = y + x
    _core.add_into(y, x)
    assert y.tobytes() == expected.tobytes()
    assert ref.guards_intact(buffer)


@pytest.mark.parametrize("format", ref.FORMATS)
@pytest.mark.parametrize("c", [1, 7, 16, 33, 96])
def test_embedding_matches_float64(isa: str, rng: np.random.Generator, format: str, c: int) -> None:
    table = ref.random_weight(rng, format, 40, c)
    ids = rng.integers(0, 40, 300).astype(np.int32)
    out, buffer = ref.guarded(np.zeros((300, c)))
    assert _core.embedding(ids, table.core(), out) is out
    # value times scale: half an EPS for the value, one for the scale of int8 (1 / 127), one for the product
    np.testing.assert_allclose(out, ref.embedding(ids, table), rtol=1.5 * ref.EPS, atol=0)
    assert ref.guards_intact(buffer)


def test_refuses_bad_arguments(rng: np.random.Generator) -> None:
    x = np.zeros(4, np.float32)
    with pytest.raises(ValueError, match="up: its shape is not that of gate"):
        _core.swiglu(x, np.zeros(5, np.float32))
    with pytest.raises(ValueError, match="y: not writeable"):
        _core.add_into(np.broadcast_to(np.float32(0), 4).copy()[:3], x)
    table = ref.random_weight(rng, "f32", 4, 8).core()
    with pytest.raises(ValueError, match="ids: got -1 at position 0, expected 0 to 3"):
        _core.embedding(np.array([-1], np.int32), table)
