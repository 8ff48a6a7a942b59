"""AdamW on every ISA against float64."""

from __future__ import annotations

import numpy as np
import pytest
import reference as ref

from quantlab import _core

OPTIONS = (2e-4, 0.9, 0.999, 1e-8, 0.01)  # lr, beta1, beta2, eps, weight_decay


def state(rng: np.random.Generator, count: int) -> list[np.ndarray]:
    """w, m, v, g in the middle of a training; the buffers of w, m, v have guards."""
    w, m, g = (rng.standard_normal(count) for _ in range(3))
    return [w, m * 0.1, m**2 * 0.02, g]


@pytest.mark.parametrize("count", [*ref.SIZES, 16384 + 1, 50_000])
@pytest.mark.parametrize("max_norm", [0.0, 1.0, 1e9])
@pytest.mark.parametrize("step", [1, 1000])
def test_matches_float64(isa: str, rng: np.random.Generator, count: int, max_norm: float, step: int) -> None:
    arrays = state(rng, count)
    (w, m, v), buffers = zip(*(ref.guarded(a) for a in arrays[:3]), strict=True)
    g = arrays[3].astype(np.float32)
    before = [a.copy() for a in (w, m, v)]
    norm = _core.adamw(w, m, v, g, *OPTIONS, step, max_norm)
    assert norm == pytest.approx(np.linalg.norm(g.astype(np.float64)), rel=1e-12)
    expected = ref.adamw(*before, g, *OPTIONS, step, max_norm)
    # m: three products and a sum, whose terms may cancel; v: four products and a sum
    np.testing.assert_allclose(m, expected[1], rtol=0, atol=2 * ref.EPS * (np.abs(before[1]) + np.abs(g)).max())
    np.testing.assert_allclose(v, expected[2], rtol=4 * ref.EPS, atol=0)
    # w: its decay and its own rounding; the step, whose m errs as above and all else by some EPS
    moved = np.abs(expected[0] - before[0] * (1 - OPTIONS[0] * OPTIONS[4]))
    size = (
        OPTIONS[0]
        * np.abs(before[1]).max()
        / np.sqrt(expected[2] / (1 - OPTIONS[2] ** step))
        / (1 - OPTIONS[1] ** step)
    )
    assert (np.abs(w - expected[0]) <= ref.EPS * (1.5 * np.abs(expected[0]) + 6 * moved + 8 * size)).all()
    assert all(ref.guards_intact(buffer) for buffer in buffers)


def test_many_steps_find_a_minimum(isa: str, rng: np.random.Generator) -> None:
    target = rng.standard_normal(50).astype(np.float32)
    w, m, v = (np.zeros(50, np.float32) for _ in range(3))
    for step in range(1, 1001):
        lr = 0.05 * (1 - step / 1001)
        _core.adamw(w, m, v, w - target, lr, 0.9, 0.999, 1e-8, 0.0, step, 1.0)
    np.testing.assert_allclose(w, target, atol=1e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nothing_changes_where_the_norm_is_not_finite(isa: str, rng: np.random.Generator, bad: float) -> None:
    arrays = [a.astype(np.float32) for a in state(rng, 100)]
    arrays[3][57] = bad
    before = [a.tobytes() for a in arrays]
    assert not np.isfinite(_core.adamw(*arrays, *OPTIONS, 1, 1.0))
    assert [a.tobytes() for a in arrays] == before


def test_refuses_bad_arguments(rng: np.random.Generator) -> None:
    w, m, v, g = (a.astype(np.float32) for a in state(rng, 5))
    with pytest.raises(ValueError, match="g: dimension 0 is 4, expected 5"):
        _core.adamw(w, m, v, g[:4], *OPTIONS, 1, 1.0)
    with pytest.raises(ValueError, match="step: got 0, expected 1 or more"):
        _core.adamw(w, m, v, g, *OPTIONS, 0, 1.0)
    w.flags.writeable = False
    with pytest.raises(ValueError, match="w: not writeable"):
        _core.adamw(w, m, v, g, *OPTIONS, 1, 1.0)
