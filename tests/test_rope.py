"""Rotary embedding on every ISA against float64."""

from __future__ import annotations

import numpy as np
import pytest
import reference as ref

from quantlab import _core


def tables(positions: int, half: int) -> tuple[np.ndarray, np.ndarray]:
    angles = np.arange(positions)[:, None] * 10000.0 ** (-np.arange(half) / half)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


@pytest.mark.parametrize("heads", [1, 3, 9])
@pytest.mark.parametrize("half", [*ref.SIZES, 32, 64])
def test_matches_float64(isa: str, rng: np.random.Generator, heads: int, half: int) -> None:
    t = 37
    x = rng.standard_normal((t, heads, 2 * half), dtype=np.float32)
    cos, sin = tables(100, half)
    positions = rng.integers(0, 100, t).astype(np.int32)
    out, buffer = ref.guarded(np.zeros(x.shape))
    assert _core.rope(x, cos, sin, positions, out) is out
    # two products and their sum: three roundings, each of half an EPS of at most |a| + |b|
    low, high = np.split(np.abs(x).astype(np.float64), 2, -1)
    bound = 1.5 * ref.EPS * np.concatenate([low + high, low + high], -1)
    assert (np.abs(out - ref.rope(x, cos, sin, positions)) <= bound).all()
    assert ref.guards_intact(buffer)


def test_in_place_and_inverse(isa: str, rng: np.random.Generator) -> None:
    """Turning back by the same angles gives x again, to the rounding of two turns."""
    x = rng.standard_normal((20, 2, 64), dtype=np.float32)
    cos, sin = tables(20, 32)
    positions = np.arange(20, dtype=np.int32)
    turned = x.copy()
    assert _core.rope(turned, cos, sin, positions, turned) is turned
    assert turned.tobytes() == _core.rope(x, cos, sin, positions).tobytes()
    back = _core.rope(turned, cos, -sin, positions)
    np.testing.assert_allclose(back, x, atol=4 * ref.EPS * np.abs(x).max())


def test_refuses_bad_arguments() -> None:
    x, (cos, sin) = np.zeros((2, 1, 8), np.float32), tables(4, 4)
    with pytest.raises(ValueError, match="positions: got 4 at position 1, expected 0 to 3"):
        _core.rope(x, cos, sin, np.array([0, 4], np.int32))
    with pytest.raises(ValueError, match="positions: got 0 at position 0, expected 0 to -1"):
        _core.rope(x, cos[:0], sin[:0], np.zeros(2, np.int32))
    with pytest.raises(ValueError, match="x: head size is 6, expected twice that of cos, 4"):
        _core.rope(np.zeros((2, 1, 6), np.float32), cos, sin, np.zeros(2, np.int32))
