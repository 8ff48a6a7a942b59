"""Arrays and weights that stay on a device, with the host (-1) as the device: what their functions check, and copies.
What only a GPU has kernels for is in tests/cuda/test_device_gptq.py."""

from __future__ import annotations

import numpy as np
import pytest

import quantlab as ql
from quantlab import _core

HOST = -1


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.int64, np.uint16])
@pytest.mark.parametrize("shape", [(0,), (7,), (3, 5), (2, 3, 4)])
def test_there_and_back(dtype: type, shape: tuple[int, ...], rng: np.random.Generator) -> None:
    x = (100 * rng.standard_normal(shape)).astype(np.int16).astype(dtype)
    there = _core.device_array(HOST, x)
    assert (there.shape, there.ndim, there.nbytes, len(there)) == (x.shape, x.ndim, x.nbytes, len(x))
    assert there.dtype == ("bfloat16" if dtype is np.uint16 else np.dtype(dtype).name)
    other = there.copy()
    del there
    assert other.numpy().dtype == x.dtype
    np.testing.assert_array_equal(other.numpy(), x)


def test_zeros_and_products(rng: np.random.Generator) -> None:
    y = _core.device_zeros(HOST, 3, 5)
    np.testing.assert_array_equal(y.numpy(), np.zeros((3, 5), np.float32))
    x, w = rng.standard_normal((3, 5), np.float32), rng.standard_normal((5, 5), np.float32)
    for _ in range(2):
        _core.device_product(y, _core.device_array(HOST, x), _core.device_array(HOST, w))
    np.testing.assert_allclose(y.numpy(), 2 * (x.astype(np.float64) @ w), rtol=1e-4, atol=1e-5)


def test_weights(rng: np.random.Generator) -> None:
    w = rng.standard_normal((6, 9), np.float32)
    weight = ql.QuantWeight.from_array(w)
    there = _core.DeviceWeight(HOST, weight.handle)
    np.testing.assert_array_equal(there.floats().numpy(), w)
    ids = np.array([3, 0, 5], np.int32)
    np.testing.assert_array_equal(_core.device_embedding(_core.device_array(HOST, ids), there).numpy(), w[ids])


def test_what_is_refused() -> None:
    floats, halves = _core.device_zeros(HOST, 4, 4), _core.device_array(HOST, np.zeros((4, 4), np.uint16))
    gain = _core.device_array(HOST, np.ones(4, np.float32))
    weight = _core.DeviceWeight(HOST, ql.QuantWeight.from_array(np.ones((4, 4), np.float32)).handle)
    other = _core.device_zeros(HOST, 4, 3)
    for call, error, message in [
        (lambda: _core.device_array(HOST, [1.0]), TypeError, "array: got list"),
        (lambda: _core.device_array(HOST, np.zeros(3, np.float16)), TypeError, "array: dtype float16 has no place"),
        (lambda: _core.device_array(HOST, np.zeros((4, 4), np.float32)[:, ::2]), ValueError, "array: the array must"),
        (lambda: _core.device_array(HOST, np.zeros((1, 1, 1, 1), np.float32)), ValueError, "array: more than 3"),
        (lambda: _core.device_zeros(HOST, -1, 4), ValueError, "shape: got"),
        (lambda: _core.DeviceArray(), TypeError, "cannot create"),
        (lambda: _core.DeviceWeight(HOST, floats), TypeError, "weight: got"),
        (lambda: _core.device_norm(halves, gain, 1e-5), TypeError, "x: got bfloat16, expected float32"),
        (lambda: _core.device_norm(gain, gain, 1e-5), ValueError, "x: got 1 dimensions, expected 2"),
        (lambda: _core.device_norm(other, gain, 1e-5), ValueError, "gain: dimension 0 is 4"),
        (lambda: _core.device_gram(floats, floats, floats, True), TypeError, "a: got float32, expected bfloat16"),
        (lambda: _core.device_gram(other, halves, halves, False), ValueError, "h: dimension 1"),
        (lambda: _core.device_add(floats, halves, floats), TypeError, "w: got"),
        (lambda: _core.device_gate_up(floats, gain, weight, floats, 1e-5), TypeError, "up: got"),
        (lambda: _core.device_gptq_factor(floats, np.zeros(4, np.int32), 1.0, 1.0), ValueError, "order: not a"),
        (lambda: _core.device_norm(floats, gain, 1e-5), ql.CudaError, "norm_fused_forward has no kernel on cpu"),
        (lambda: _core.device_diagonal(floats), ql.CudaError, "gptq has no kernel on cpu"),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            call()
    assert not _core.device_gptq_supports(HOST, 128, 32, False, False)
