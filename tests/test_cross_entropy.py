"""Softmax cross-entropy on every ISA against float64."""

from __future__ import annotations

import numpy as np
import pytest
import reference as ref

from quantlab import _core


def loss_bound(logits: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """exp errs by two EPS, and by the rounding of its argument, logit - maximum; the mean of both moves the log."""
    depth = (logits.max(-1) - logits.min(-1)).astype(np.float64)
    return ref.EPS * (2 + depth / 2 + np.abs(expected) / 2)


@pytest.mark.parametrize("v", [*ref.SIZES, 1000, 49153])
def test_matches_float64(isa: str, rng: np.random.Generator, v: int) -> None:
    t = 5
    logits = rng.standard_normal((t, v), dtype=np.float32) * 4
    targets = rng.integers(0, v, t).astype(np.int32)
    targets[2] = ref.IGNORED
    expected, gradient = ref.cross_entropy(logits, targets)
    loss, dlogits = _core.cross_entropy(logits, targets, True)
    bound = loss_bound(logits, expected)
    at_target = np.arange(v) == targets[:, None]
    assert (np.abs(loss - expected) <= bound).all()
    assert loss[2] == 0 and not dlogits[2].any()
    assert loss.tobytes() == _core.cross_entropy(logits, targets).tobytes()
    # a probability errs by exp's error and by that of the sum; at the target one more rounding of a number up to 1
    assert (np.abs(dlogits - gradient) <= 2 * bound[:, None] * (np.abs(gradient) + at_target) + 1e-37).all()


def test_extreme_logits(isa: str) -> None:
    """Large offsets cancel; logits of minus infinity (masked words) have probability 0."""
    logits = np.full((2, 40), 1e4, np.float32)
    logits[1, 1:] = -np.inf
    loss, dlogits = _core.cross_entropy(logits, np.zeros(2, np.int32), True)
    np.testing.assert_allclose(loss, [np.log(40), 0], atol=4 * ref.EPS)
    np.testing.assert_allclose(dlogits[1], np.zeros(40), atol=ref.EPS)


def test_gradient_is_the_derivative(isa: str, rng: np.random.Generator) -> None:
    logits, step = rng.standard_normal((1, 19), dtype=np.float32), np.float32(2**-7)
    targets = np.array([4], np.int32)
    _, dlogits = _core.cross_entropy(logits, targets, True)
    shifted = np.repeat(logits, 38, 0) + np.concatenate([np.eye(19), -np.eye(19)]).astype(np.float32) * step
    loss = _core.cross_entropy(shifted, np.repeat(targets, 38)).astype(np.float64)
    numeric = (loss[:19] - loss[19:]) / (2 * step)
    np.testing.assert_allclose(dlogits[0], numeric, atol=step**2 + 16 * ref.EPS / step)


def test_refuses_targets_out_of_range() -> None:
    with pytest.raises(ValueError, match="targets: got 3 at position 1, expected 0 to 2"):
        _core.cross_entropy(np.zeros((2, 3), np.float32), np.array([0, 3], np.int32))
    with pytest.raises(ValueError, match="logits: got no classes"):
        _core.cross_entropy(np.zeros((1, 0), np.float32), np.array([-100], np.int32))
