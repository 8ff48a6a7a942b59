"""RMSNorm on every ISA against float64, and against the scalar reference."""

from __future__ import annotations

import numpy as np
import pytest
import reference as ref

from quantlab import _core

# Per output: the float64 sum is exact here; rounding it to float32, adding eps, the root, the quotient and two products
# are six roundings of half an EPS each, of which the first two count half through the root.
BOUND = 3 * ref.EPS


@pytest.mark.parametrize("t", [1, 3, 70])
@pytest.mark.parametrize("c", [*ref.SIZES, 64, 576, 4097])
def test_matches_float64(isa: str, rng: np.random.Generator, t: int, c: int) -> None:
    x = rng.standard_normal((t, c), dtype=np.float32) * np.exp(rng.uniform(-3, 3, (t, 1))).astype(np.float32)
    gain = rng.uniform(-2, 2, c).astype(np.float32)
    out, buffer = ref.guarded(np.zeros((t, c)))
    inv_rms, inv_rms_buffer = ref.guarded(np.zeros(t))
    assert _core.rmsnorm(x, gain, 1e-5, out, inv_rms) is out
    expected_inv_rms = 1 / np.sqrt(np.mean(x.astype(np.float64) ** 2, -1) + np.float32(1e-5))
    np.testing.assert_allclose(inv_rms, expected_inv_rms, rtol=BOUND, atol=0)
    np.testing.assert_allclose(out, ref.rmsnorm(x, gain, np.float32(1e-5)), rtol=BOUND, atol=0)
    assert ref.guards_intact(buffer) and ref.guards_intact(inv_rms_buffer)


def test_extreme_values(isa: str) -> None:
    """Squares that float32 cannot hold, zeros, and NaN only in its own row."""
    x = np.zeros((4, 33), np.float32)
    x[0] = 1e18
    x[1] = 1e-25
    x[3, 32] = np.nan
    out = _core.rmsnorm(x, np.ones(33, np.float32), 1e-6)
    np.testing.assert_allclose(out[:3], ref.rmsnorm(x[:3], np.ones(33), np.float32(1e-6)), rtol=BOUND)
    assert np.isnan(out[3]).all()


def test_row_does_not_depend_on_its_batch(isa: str, rng: np.random.Generator) -> None:
    x, gain = rng.standard_normal((50, 131), dtype=np.float32), rng.standard_normal(131, dtype=np.float32)
    together = _core.rmsnorm(x, gain, 1e-5)
    alone = np.concatenate([_core.rmsnorm(x[i : i + 1], gain, 1e-5) for i in range(len(x))])
    assert together.tobytes() == alone.tobytes()


def test_refuses_bad_arguments() -> None:
    x = np.zeros((2, 4), np.float32)
    with pytest.raises(ValueError, match="gain: dimension 0 is 3, expected 4"):
        _core.rmsnorm(x, np.zeros(3, np.float32), 1e-5)
    with pytest.raises(TypeError, match="x: got dtype float64, expected float32"):
        _core.rmsnorm(x.astype(np.float64), np.zeros(4, np.float32), 1e-5)
    with pytest.raises(ValueError, match="out: dimension 0 is 1, expected 2"):
        _core.rmsnorm(x, np.zeros(4, np.float32), 1e-5, np.zeros((1, 4), np.float32))
