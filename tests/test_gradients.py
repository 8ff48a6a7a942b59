"""The gradients of RMSNorm and SwiGLU, dropout, and the small ops of training, on every ISA against float64."""

from __future__ import annotations

import numpy as np
import pytest
import reference as ref

from quantlab import _core

COUNTS = [*ref.SIZES, 16384 - 1, 16384 + 1, 50_000]  # a task is 16384 elements


def norm_case(rng: np.random.Generator, t: int, c: int) -> tuple[np.ndarray, ...]:
    """dy, x, gain, inv_rms; rows of very different sizes."""
    x = rng.standard_normal((t, c), dtype=np.float32) * np.exp(rng.uniform(-3, 3, (t, 1))).astype(np.float32)
    gain, inv_rms = rng.uniform(-2, 2, c).astype(np.float32), np.zeros(t, np.float32)
    _core.rmsnorm(x, gain, 1e-5, None, inv_rms)
    return rng.standard_normal((t, c), dtype=np.float32), x, gain, inv_rms


@pytest.mark.parametrize("t", [1, 3, 70])
@pytest.mark.parametrize("c", [*ref.SIZES, 64, 576, 4097])
def test_rmsnorm_matches_float64(isa: str, rng: np.random.Generator, t: int, c: int) -> None:
    dy, x, gain, inv_rms = norm_case(rng, t, c)
    expected = ref.rmsnorm_backward(dy, x, gain, np.float32(1e-5))
    # inv_rms errs by 3 EPS (test_rmsnorm.py), once in front and twice in the second term; 6 roundings of half an EPS
    wide = x.astype(np.float64)
    along = np.abs(np.mean(dy.astype(np.float64) * gain * wide, -1, keepdims=True)) * inv_rms[:, None] ** 2
    bound = 12 * ref.EPS * inv_rms[:, None] * (np.abs(dy * gain) + np.abs(wide) * along)
    out, buffer = ref.guarded(np.zeros((t, c)))
    assert _core.rmsnorm_backward(dy, x, gain, inv_rms, out) is out
    assert (np.abs(out - expected) <= bound).all() and ref.guards_intact(buffer)
    before = rng.standard_normal((t, c), dtype=np.float32)
    sums = _core.rmsnorm_backward(dy, x, gain, inv_rms, before.copy(), True)
    assert sums.tobytes() == (before + out).tobytes()
    in_place = dy.copy()
    assert _core.rmsnorm_backward(in_place, x, gain, inv_rms, in_place).tobytes() == out.tobytes()


def test_rmsnorm_is_the_derivative(isa: str, rng: np.random.Generator) -> None:
    dy, x, gain, inv_rms = norm_case(rng, 4, 33)
    dx, direction = _core.rmsnorm_backward(dy, x, gain, inv_rms), rng.standard_normal((4, 33))
    expected = ref.slope(lambda x: float((dy * ref.rmsnorm(x, gain, np.float32(1e-5))).sum()), x, direction)
    np.testing.assert_allclose((dx * direction).sum(), expected, rtol=0, atol=1e-5 * np.abs(dx).sum())


@pytest.mark.parametrize("count", COUNTS)
def test_swiglu_matches_float64(isa: str, rng: np.random.Generator, count: int) -> None:
    dy, gate, up = (rng.standard_normal(count, dtype=np.float32) * 5 for _ in range(3))
    (dgate, gate_buffer), (dup, up_buffer) = ref.guarded(np.zeros(count)), ref.guarded(np.zeros(count))
    _core.swiglu_backward(dy, gate, up, dgate, dup)
    expected_gate, expected_up = ref.swiglu_backward(dy, gate, up)
    # as in test_swiglu.py; 1 - sigmoid, up to an EPS off and times gate, is added to a number that it may nearly cancel
    np.testing.assert_allclose(dup, expected_up, rtol=4 * ref.EPS, atol=0)
    sigmoid = expected_up / (dy.astype(np.float64) * gate)
    size = np.abs(dy * up) * sigmoid * (1 + np.abs(gate))
    assert (np.abs(dgate - expected_gate) <= 6 * ref.EPS * size).all()
    assert ref.guards_intact(gate_buffer) and ref.guards_intact(up_buffer)
    for first, second in ((0, 1), (1, 2), (2, 0)):  # over the inputs
        inputs = [dy.copy(), gate.copy(), up.copy()]
        _core.swiglu_backward(*inputs, inputs[first], inputs[second])
        assert inputs[first].tobytes() == dgate.tobytes() and inputs[second].tobytes() == dup.tobytes()


def test_swiglu_extreme_values(isa: str) -> None:
    gate = np.array([-1e30, -200, -104, -88.8, -0.0, 0.0, 88, 200, 1e30], np.float32)
    one = np.ones_like(gate)
    dgate, dup = _core.swiglu_backward(one, gate, one)
    expected_gate, expected_up = ref.swiglu_backward(one, gate, one)
    np.testing.assert_allclose(dgate, expected_gate, rtol=6 * ref.EPS, atol=1e-36)
    np.testing.assert_allclose(dup, expected_up, rtol=6 * ref.EPS, atol=1e-36)


def test_swiglu_is_the_derivative(isa: str, rng: np.random.Generator) -> None:
    dy, gate, up = (rng.standard_normal(200, dtype=np.float32) for _ in range(3))
    dgate, dup = _core.swiglu_backward(dy, gate, up)
    a, b = rng.standard_normal(200), rng.standard_normal(200)
    by_gate = ref.slope(lambda x: float((dy * ref.swiglu(x, up)).sum()), gate, a)
    by_up = ref.slope(lambda x: float((dy * ref.swiglu(gate, x)).sum()), up, b)
    np.testing.assert_allclose([(dgate * a).sum(), (dup * b).sum()], [by_gate, by_up], rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.999])
def test_dropout_is_exactly_its_mask(isa: str, rng: np.random.Generator, count: int, p: float) -> None:
    x, seed, stream = rng.standard_normal(count, dtype=np.float32), 12345678901234567890, 77
    out, buffer = ref.guarded(np.zeros(count))
    assert _core.dropout(x, p, seed, stream, out) is out
    expected = ref.dropout(x, p, seed, stream)
    np.testing.assert_allclose(out, expected, rtol=1.5 * ref.EPS, atol=0)  # 1 - p, its inverse, the product
    assert ((out == 0) == (expected == 0)).all() and ref.guards_intact(buffer)
    in_place = x.copy()
    assert _core.dropout(in_place, p, seed, stream, in_place).tobytes() == out.tobytes()


def test_dropout_drops_its_share_and_no_two_streams_alike() -> None:
    ones = np.ones(1_000_000, np.float32)
    masks = [_core.dropout(ones, 0.25, *place) == 0 for place in ((0, 0), (0, 1), (1, 0), (0, -1))]
    for mask in masks:
        assert abs(mask.mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / mask.size)
    for i, first in enumerate(masks):
        for second in masks[:i]:
            assert abs((first & second).mean() - 0.0625) < 5 * np.sqrt(0.0625 / ones.size)


@pytest.mark.parametrize("count", COUNTS)
def test_scale_and_square_sum(isa: str, rng: np.random.Generator, count: int) -> None:
    x, buffer = ref.guarded(rng.standard_normal(count) * 1e20)  # squares that float32 cannot hold
    assert _core.square_sum(x) == pytest.approx((x.astype(np.float64) ** 2).sum(), rel=1e-12)
    expected = x * np.float32(0.3)
    _core.scale_into(x, 0.3)
    assert x.tobytes() == expected.tobytes() and ref.guards_intact(buffer)


def test_refuses_bad_arguments() -> None:
    x, gain, inverse = np.zeros((2, 4), np.float32), np.zeros(4, np.float32), np.zeros(2, np.float32)
    with pytest.raises(ValueError, match="inv_rms: dimension 0 is 3, expected 2"):
        _core.rmsnorm_backward(x, x, gain, np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="out: missing, accumulate adds to it"):
        _core.rmsnorm_backward(x, x, gain, inverse, None, True)
    with pytest.raises(ValueError, match="up: dimension 0 is 4, expected 2"):
        _core.swiglu_backward(inverse, inverse, gain)
    for p in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=f"p: got {p}, expected 0 <= p < 1"):
            _core.dropout(x, p, 0, 0)
