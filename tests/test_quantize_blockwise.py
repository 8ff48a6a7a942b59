"""NF4, FP4 and int8 quantization: golden vectors, the layout of the codes, the error that is normal, every ISA."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import quantlab as ql
from quantlab import _core

GOLDEN = Path(__file__).parent / "golden" / "blockwise.npz"  # written by make_blockwise.py beside it
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

# mean |W - Q| and mean |W - Q| / |W| of a normal 1024 x 1024 matrix as bitsandbytes' own tests list them, and seven of
# their standard deviations (NF4; the FP4 limits take the same relative margin)
NF4_ERROR = {
    32: (0.067746, 0.189726), 64: (0.072798, 0.203339), 128: (0.076831, 0.215237), 256: (0.080337, 0.226105),
    512: (0.083547, 0.236079), 1024: (0.086610, 0.245370), 2048: (0.089592, 0.254163), 4096: (0.092547, 0.262473),
}  # fmt: skip
FP4_ERROR = {
    32: (0.088925, 0.242443), 64: (0.096543, 0.260125), 128: (0.102969, 0.275817), 256: (0.108684, 0.289831),
    512: (0.114115, 0.302881), 1024: (0.119333, 0.315), 2048: (0.124556, 0.326607), 4096: (0.129536, 0.337169),
}  # fmt: skip
MARGIN = 1.03


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def normal() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((1024, 1024)).astype(np.float32)


def config(kind: str, block_size: int, double_quant: bool = False):
    return (ql.NF4Config if kind == "nf4" else ql.FP4Config)(block_size, double_quant)


def test_golden_vectors(golden, isa):
    names = sorted({key.split(".")[0] for key in golden})
    for name in names:
        x = golden[f"{name}.x"]
        for kind in ("nf4", "fp4"):
            for block_size in (32, 64, 4096):
                weight = ql.QuantWeight.from_float(x, config(kind, block_size))
                np.testing.assert_array_equal(weight.codes, golden[f"{name}.{kind}.{block_size}.codes"])
                assert weight.scales.tobytes() == golden[f"{name}.{kind}.{block_size}.scales"].tobytes()
            nested = ql.QuantWeight.from_float(x, config(kind, 32, double_quant=True)).double_quant
            np.testing.assert_array_equal(nested.codes, golden[f"{name}.{kind}.double.codes"])
            assert nested.absmax.tobytes() == golden[f"{name}.{kind}.double.absmax"].tobytes()
            assert np.float32(nested.offset) == golden[f"{name}.{kind}.double.offset"]
        weight = ql.QuantWeight.from_float(x, ql.Int8Config())
        np.testing.assert_array_equal(weight.codes, golden[f"{name}.int8.codes"])
        assert weight.scales.tobytes() == golden[f"{name}.int8.scales"].tobytes()


def test_nf4_known_block(isa):
    x = np.array([[-1, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1]], np.float32)
    codes, scales = _core.quantize(x, "nf4", 64)
    assert codes.tobytes() == bytes.fromhex("0247acef") and scales.tolist() == [1.0]


def test_zero_block_keeps_zero(isa):
    for kind, code in (("nf4", 0x77), ("fp4", 0x00)):
        weight = ql.QuantWeight.from_float(np.zeros((4, 32), np.float32), config(kind, 32))
        assert set(weight.codes.tolist()) == {code} and not weight.dequantize().any()
    weight = ql.QuantWeight.from_float(np.zeros((4, 32), np.float32), ql.Int8Config())
    assert not weight.codes.any() and not weight.scales.any() and not weight.dequantize().any()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_error_is_the_format_s_own(normal, kind, block_size):
    absolute, relative = (NF4_ERROR if kind == "nf4" else FP4_ERROR)[block_size]
    error = np.abs(ql.QuantWeight.from_float(normal, config(kind, block_size)).dequantize() - normal)
    assert error.mean() < absolute * MARGIN
    assert (error / (np.abs(normal) + 1e-8)).mean() < relative * MARGIN


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_double_quantization_costs_little(normal, kind):
    plain = ql.QuantWeight.from_float(normal, config(kind, 64))
    nested = ql.QuantWeight.from_float(normal, config(kind, 64, double_quant=True))
    np.testing.assert_array_equal(plain.codes, nested.codes)
    np.testing.assert_allclose(nested.double_quant.scales(), plain.scales, rtol=0.02)
    assert np.abs(nested.dequantize() - normal).mean() < (0.0755 if kind == "nf4" else 0.0975)
    assert nested.nbytes < plain.nbytes - 2.9 * plain.scales.size  # 8 bits and a little instead of 32


def test_int8_error_is_half_a_step(normal):
    weight = ql.QuantWeight.from_float(normal, ql.Int8Config())
    step = np.abs(normal).max(1, keepdims=True) / 127
    assert (np.abs(weight.dequantize() - normal) <= step * 0.50001).all()
    np.testing.assert_array_equal(weight.scales, np.abs(normal).max(1))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["nf4", "fp4"]),
    st.integers(1, 70),
    st.integers(1, 300),
    st.sampled_from([32, 64, 256]),
    st.integers(-40, 30),
    st.integers(0, 2**32 - 1),
)
def test_every_element_takes_the_nearest_value(kind, n, k, block_size, exponent, seed):
    x = (np.random.default_rng(seed).standard_normal((n, k)) * 2.0**exponent).astype(np.float32)
    weight = ql.QuantWeight.from_float(x, config(kind, block_size))
    scales = np.repeat(weight.scales.astype(np.float64), block_size)[: x.size].reshape(x.shape)
    values = _core.decode(grid_of(kind), 0, 1)[0, :16].astype(np.float64)
    nearest = np.abs(x[..., None] - values * scales[..., None]).min(-1)
    chosen = np.abs(weight.dequantize().astype(np.float64) - x)
    assert (chosen <= nearest + 1e-6 * scales).all()


def grid_of(kind: str) -> _core.Weight:
    """One row holding all 16 codes with scale 1."""
    codes = np.array([i << 4 | (i + 1) for i in range(0, 16, 2)], np.uint8)
    return _core.Weight(kind, 4, 1, 16, 32, codes, np.ones(1, np.float32))


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 8191, 8192, 8193, 70_001])
def test_isa_gives_the_scalar_bytes(format, count, isa, rng):
    x = (rng.standard_normal(count) * np.exp(rng.uniform(-20, 20, count))).astype(np.float32)
    for group in (32, 64, 4096) if format != "int8" else (count,):
        fast = _core.quantize(x, format, group)
        _core.isa_select("scalar")
        slow = _core.quantize(x, format, group)
        _core.isa_select(isa)
        assert fast[0].tobytes() == slow[0].tobytes() and fast[1].tobytes() == slow[1].tobytes()


@pytest.mark.parametrize("k", [1, 7, 16, 33, 257])
def test_isa_gives_the_scalar_int8_rows(k, isa, rng):
    x = (rng.standard_normal((200, k)) * np.exp(rng.uniform(-90, 80, (200, 1)))).astype(np.float32)
    ties = 2.0 * rng.integers(-127, 127, (100, k)) + 1  # half-way between two codes where the row's absmax is 254
    ties[:, 0] = 254
    x[:100] = ties * rng.uniform(0.5, 1, (100, 1))
    fast = _core.quantize(x, "int8", k)
    _core.isa_select("scalar")
    slow = _core.quantize(x, "int8", k)
    assert fast[0].tobytes() == slow[0].tobytes() and fast[1].tobytes() == slow[1].tobytes()


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
def test_threads_do_not_matter(format, rng):
    x = rng.standard_normal((64, 1000)).astype(np.float32)
    before, results = _core.threads(), []
    try:
        for threads in (1, 2, 5):
            _core.set_threads(threads)
            results.append([part.tobytes() for part in _core.quantize(x, format, 1000 if format == "int8" else 64)])
    finally:
        _core.set_threads(before)
    assert results[0] == results[1] == results[2]
