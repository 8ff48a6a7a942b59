"""QuantWeight: made from any float array, decoded, multiplied by, measured, shown; and what it refuses."""

from __future__ import annotations

import dataclasses
import itertools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import quantlab as ql
from quantlab import _core
from quantlab.arrays import as_array, as_float32
from quantlab.io.save import checkpoint_nbytes
from quantlab.weight import DoubleQuant

CONFIGS = [
    ql.NF4Config(),
    ql.NF4Config(32, double_quant=True),
    ql.FP4Config(128),
    ql.FP4Config(double_quant=True),
    ql.Int8Config(),
    *(ql.RTNConfig(bits, group, sym) for bits in (2, 3, 4, 8) for group in (-1, 32, 48) for sym in (True, False)),
]
SHAPES = [(1, 1), (3, 7), (5, 32), (17, 100), (33, 257)]
DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


def matrix(shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# ---- round to nearest ------------------------------------------------------------------------------------------------


def rtn_reference(w: np.ndarray, bits: int, group: int, sym: bool):
    """The GPTQ reference's quantizer, group by group: codes (n, k), scales and zeros (n, groups), in float32."""
    n, k = w.shape
    group = k if group == -1 else group
    maxq = np.float32(2**bits - 1)
    codes, groups = np.empty((n, k), np.int64), -(-k // group)
    scales, zeros = np.empty((n, groups), np.float32), np.empty((n, groups), np.float32)
    for g in range(groups):
        columns = slice(g * group, min((g + 1) * group, k))
        x = w[:, columns]
        low, high = np.minimum(x.min(1), 0), np.maximum(x.max(1), 0)
        if sym:
            high = np.maximum(-low, high)
            low = np.where(low < 0, -high, low)
        empty = (low == 0) & (high == 0)
        low, high = np.where(empty, np.float32(-1), low), np.where(empty, np.float32(1), high)
        scale = np.minimum((high - low) / maxq, np.float32(65504)).astype(np.float16).astype(np.float32)
        scale = np.where(scale > 0, scale, np.float32(2.0**-24))
        zero = np.full(n, (maxq + 1) / 2, np.float32) if sym else np.minimum(np.rint(-low / scale), maxq)
        codes[:, columns] = np.clip(np.rint(x / scale[:, None]) + zero[:, None], 0, maxq)
        scales[:, g], zeros[:, g] = scale, zero
    return codes, scales, zeros


def rtn(w: np.ndarray, bits: int, group: int, sym: bool, cut: bool) -> ql.QuantWeight:
    """cut: whether the codes of large weights are cut, which the op does and from_float refuses."""
    config = ql.RTNConfig(bits, group, sym)
    if not cut:
        return ql.QuantWeight.from_float(w, config)
    with pytest.raises(ql.NumericError, match=rf"^w: a group of row \d+ spans {65504 * (2**bits - 1):,} or more"):
        ql.QuantWeight.from_float(w, config, name="w")
    group = w.shape[1] if group == -1 else group
    return ql.QuantWeight("affine", bits, w.shape, group, *_core.quantize_rtn(w, bits, group, sym))


def assert_rtn(w: np.ndarray, bits: int, group: int, sym: bool) -> None:
    codes, scales, zeros = rtn_reference(w, bits, group, sym)
    weight = rtn(w, bits, group, sym, cut=scales.max() == 65504)
    np.testing.assert_array_equal(weight.stored_codes(), codes)
    assert weight.scales.tobytes() == scales.tobytes()
    assert weight.zeros is None if sym else np.array_equal(weight.zeros, zeros)
    size = weight.group
    columns = np.arange(w.shape[1]) // size
    np.testing.assert_array_equal(
        weight.dequantize(), (codes - zeros[:, columns]).astype(np.float32) * scales[:, columns]
    )


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [-1, 1, 32, 48, 64])
def test_rtn_is_the_reference_s_quantizer(isa, bits, group, sym):
    for shape in SHAPES:
        assert_rtn(matrix(shape, bits), bits, group, sym)


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from([-1, 5, 32, 33, 128]),
    st.booleans(),
    st.integers(1, 20),
    st.integers(1, 150),
    st.floats(-9, 9),
    st.integers(0, 2**32 - 1),
)
def test_rtn_on_any_shape_and_scale(bits, group, sym, n, k, exponent, seed):
    rng = np.random.default_rng(seed)
    assert_rtn((rng.standard_normal((n, k)) * 10.0**exponent).astype(np.float32), bits, group, sym)


@pytest.mark.parametrize("sym", [True, False])
def test_rtn_hard_groups(isa, sym):
    rows = matrix((8, 64))
    rows[0] = 0  # a group of zeros
    rows[1] = np.abs(rows[1])  # no negatives: the reference keeps the lower end at 0
    rows[2] = -np.abs(rows[2])
    rows[3] *= 1e-12  # the scale is less than the least float16
    rows[4] *= 1e30  # and more than the greatest
    rows[5] = 0.25
    rows[6, 5] = 1e4
    rows[7] *= np.float32(1e-42)
    for bits in (2, 3, 4, 8):
        assert_rtn(rows, bits, 32, sym)
        weight = rtn(rows, bits, 32, sym, cut=True)
        assert np.isfinite(weight.dequantize()).all() and not weight.dequantize()[0].any()


@pytest.mark.parametrize("config", [ql.NF4Config(), ql.FP4Config(), ql.Int8Config()], ids=lambda c: c.method)
def test_formats_with_float32_scales_take_the_largest_weights(isa, config):
    w = matrix((8, 64))
    w *= np.float32(3.4e38) / np.abs(w).max()
    plain = ql.QuantWeight.from_float(w, config).dequantize()
    small = ql.QuantWeight.from_float(w * np.float32(2.0**-100), config).dequantize()
    np.testing.assert_array_equal(plain, small * np.float32(2.0**100))
    if config.method != "int8":
        nested = dataclasses.replace(config, double_quant=True)
        assert np.isfinite(ql.QuantWeight.from_float(w / 1000, nested).dequantize()).all()
        with pytest.raises(ql.NumericError, match=r"^w: got block scales up to 3\.4e\+38, .* expected smaller weights"):
            ql.QuantWeight.from_float(w, nested, name="w")


@pytest.mark.parametrize("bits", range(2, 9))
def test_rtn_of_every_isa_is_the_scalar_one(isa, bits, rng):
    """Rows that end within a word, within eight codes and within a vector; groups that do; rows longer than what is
    packed at once, many short ones in a task."""
    for n, k in [(1, 1), (1, 9), (3, 31), (2, 33), (700, 129), (2, 1300), (1, 70_001)]:
        w = rng.standard_normal((n, k)).astype(np.float32)
        w[rng.random((n, k)) < 0.1] = -0.0
        for values in (w, np.round(4 * w) / 4, w * np.float32(1e-30), w * np.float32(1e35)):
            for group, sym in itertools.product((1, 7, 32, 129, k), (True, False)):
                found = _core.quantize_rtn(values, bits, group, sym)
                with ql.backend.use(isa="scalar"):
                    expected = _core.quantize_rtn(values, bits, group, sym)
                for part, other in zip(found, expected, strict=True):
                    assert part is other is None or part.tobytes() == other.tobytes(), (n, k, group, sym)


def test_rtn_error_falls_with_bits():
    w = matrix((64, 256))
    errors = [
        np.abs(ql.QuantWeight.from_float(w, ql.RTNConfig(bits, 64, False)).dequantize() - w).mean()
        for bits in (2, 3, 4, 8)
    ]
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 32 * errors[3]


# ---- inputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_from_array_is_zero_copy_and_exact(dtype):
    w = matrix((7, 33)).astype(dtype)
    weight = ql.QuantWeight.from_array(w)
    assert np.shares_memory(weight.codes, w)
    assert weight.shape == (7, 33) and weight.bits == 8 * w.dtype.itemsize and weight.group == 33
    np.testing.assert_array_equal(weight.dequantize(), w.astype(np.float32))
    np.testing.assert_array_equal(weight.dequantize(slice(2, 5)), w[2:5].astype(np.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_and_swapped_arrays(dtype):
    w = matrix((20, 66)).astype(dtype)
    for view in (w.T, w[::2, ::3], w[:, 1:]):
        np.testing.assert_array_equal(ql.QuantWeight.from_array(view).dequantize(), view.astype(np.float32))
        one = ql.QuantWeight.from_float(view, ql.NF4Config())
        assert one.equals(ql.QuantWeight.from_float(np.ascontiguousarray(view), ql.NF4Config()))
    if dtype is not ml_dtypes.bfloat16:
        swapped = w.astype(w.dtype.newbyteorder(">"))
        np.testing.assert_array_equal(ql.QuantWeight.from_array(swapped).dequantize(), w.astype(np.float32))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_float_type_gives_the_codes_of_its_values(config):
    half = matrix((9, 70)).astype(np.float16)
    expected = ql.QuantWeight.from_float(half.astype(np.float32), config)
    for other in (half, half.astype(np.float64), half.tolist()):
        assert ql.QuantWeight.from_float(other, config).equals(expected)


class Capsule:
    """Something with __dlpack__ that is no NumPy array."""

    def __init__(self, array: np.ndarray, device=(1, 0)):
        self.array, self.device = array, device

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.device


class OnCuda:
    __cuda_array_interface__ = {"shape": (4, 4), "typestr": "<f4", "data": (0, False), "version": 3}  # noqa: RUF012


def test_dlpack():
    w = matrix((6, 40))
    assert np.shares_memory(as_array(Capsule(w)), w)
    assert ql.QuantWeight.from_float(Capsule(w), ql.NF4Config()).equals(ql.QuantWeight.from_float(w, ql.NF4Config()))
    np.testing.assert_array_equal(
        ql.linear(Capsule(w), ql.QuantWeight.from_array(w)), ql.linear(w, ql.QuantWeight.from_array(w))
    )


def test_arrays_on_a_device_are_refused():
    for value in (OnCuda(), Capsule(matrix((4, 4)), device=(2, 0))):
        with pytest.raises(ql.CudaError, match="weight: the array lies on"):
            ql.QuantWeight.from_float(value, ql.NF4Config())


@pytest.mark.parity
@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_torch_tensors(name):
    torch = pytest.importorskip("torch")
    tensor = torch.randn(12, 34, generator=torch.Generator().manual_seed(0)).to(getattr(torch, name))
    for view in (tensor, tensor.T, tensor[1:, ::2], tensor[:0]):
        array = as_array(view)
        assert array.shape == tuple(view.shape)
        np.testing.assert_array_equal(array.astype(np.float32), view.float().numpy())
    kept = as_array(tensor.clone())  # the clone is gone, its memory is not
    np.testing.assert_array_equal(kept.astype(np.float32), tensor.float().numpy())
    with pytest.raises(TypeError, match="x: NumPy cannot take this"):
        as_array(torch.nn.Parameter(tensor))


# ---- ql.linear -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_linear(config, isa, rng):
    w = ql.QuantWeight.from_float(matrix((19, 101)), config)
    for shape in ((101,), (3, 101), (2, 5, 101), (0, 101)):
        x = rng.standard_normal(shape).astype(np.float32)
        with ql.backend.use(precise=True):
            y = ql.linear(x, w)
        dense = w.dequantize().astype(np.float64)
        assert y.shape == (*shape[:-1], 19) and y.dtype == np.float32
        error = 2.1 * 2.0**-16 if isa == "amx" else 1e-6  # two bfloat16 parts of x and of w
        bound = error * (np.abs(x.astype(np.float64)) @ np.abs(dense).T)
        assert (np.abs(y - x.astype(np.float64) @ dense.T) <= bound + 1e-30).all()


def test_linear_takes_other_floats():
    w = ql.QuantWeight.from_array(matrix((4, 8)))
    x = matrix((3, 8)).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(ql.linear(x, w), ql.linear(x.astype(np.float32), w))


# ---- sizes, codes, picture -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_stored_codes_give_the_values_back(config):
    weight = ql.QuantWeight.from_float(matrix((11, 37)), config)
    codes = weight.stored_codes()
    np.testing.assert_array_equal(weight.stored_codes(slice(3, 8)), codes[3:8])
    assert codes.shape == (11, 37)
    flat = np.arange(11 * 37).reshape(11, 37) // weight.group
    if weight.format == "int8":
        expected = codes * np.float32(1 / np.float32(127)) * weight.scales[:, None]
    elif weight.format == "affine":
        groups = np.arange(37) // weight.group
        zeros = np.int64(2 ** (weight.bits - 1)) if weight.zeros is None else weight.zeros[:, groups].astype(np.int64)
        expected = (codes.astype(np.int64) - zeros).astype(np.float32) * weight.scales[:, groups]
    else:
        one = _core.Weight(
            weight.format, 4, 16, 1, 1, np.arange(16, dtype=np.uint8)[::2] * 17 + 1, np.ones(16, np.float32)
        )
        scales = weight.scales if weight.double_quant is None else weight.double_quant.scales()
        expected = _core.decode(one, 0, 16)[:, 0][codes] * scales[flat]
    np.testing.assert_array_equal(weight.dequantize(), expected)


def test_sizes():
    n, k = 64, 256
    w = matrix((n, k))
    assert ql.QuantWeight.from_array(w).nbytes == checkpoint_nbytes(ql.QuantWeight.from_array(w)) == 4 * n * k
    assert checkpoint_nbytes(ql.QuantWeight.from_array(w.astype(np.float16))) == 2 * n * k
    int8 = ql.QuantWeight.from_float(w, ql.Int8Config())
    assert (int8.nbytes, checkpoint_nbytes(int8)) == (n * k + 4 * n, n * k + 4 * n + 1)
    affine = ql.QuantWeight.from_float(w, ql.RTNConfig(4, 128, False))
    assert affine.nbytes == n * k // 2 + 2 * n * 5
    assert checkpoint_nbytes(affine) == n * k // 2 + 2 * n // 2 + 2 * n * 2 + 4 * k
    nf4 = ql.QuantWeight.from_float(w, ql.NF4Config())
    state = b'{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [64, 256]}'
    assert nf4.quant_state() == state
    assert nf4.nbytes == n * k // 2 + 4 * n * k // 64
    assert checkpoint_nbytes(nf4) == nf4.nbytes + 64 + len(state)
    nested = ql.QuantWeight.from_float(w, ql.NF4Config(double_quant=True))
    assert b'"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": ' in nested.quant_state()
    assert nested.nbytes == n * k // 2 + 256 + 4 + 1024
    with pytest.raises(ValueError, match="format: got affine"):
        affine.quant_state()


def test_equals():
    w = matrix((8, 64))
    for config in CONFIGS:
        weight = ql.QuantWeight.from_float(w, config)
        assert weight.equals(ql.QuantWeight.from_float(w, config))
        assert not weight.equals(ql.QuantWeight.from_float(w * 2, config))
    assert not ql.QuantWeight.from_array(w).equals(ql.QuantWeight.from_float(w, ql.NF4Config()))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_shown(config):
    weight = ql.QuantWeight.from_float(matrix((8, 64)), config)
    assert repr(weight).startswith("QuantWeight(") and "shape=(8, 64)" in repr(weight) and len(repr(weight)) < 120
    html = weight._repr_html_()
    bars = 32 if weight.format == "int8" else 2**weight.bits
    assert html.count("<rect") == bars and "nan" not in html
    assert ql.QuantWeight.from_array(matrix((8, 64)))._repr_html_().count("<rect") == 32


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [(0, 0), (3, 17), (199, 699)])
def test_nan_and_infinity_are_placed(value, place):
    w = matrix((200, 700))
    w[place] = value
    w[199, 699] = value  # the first one is named, whichever thread finds it
    for config in (ql.NF4Config(), ql.RTNConfig(), ql.Int8Config()):
        with pytest.raises(ql.NumericError, match=rf"^q_proj: {value} at \[{place[0]}, {place[1]}\]"):
            ql.QuantWeight.from_float(w, config, "q_proj")


def test_float64_beyond_float32():
    with pytest.raises(ql.NumericError, match=r"weight: inf at \[0, 1\]"):
        ql.QuantWeight.from_float([[1.0, 1e300]], ql.NF4Config())


BAD_CALLS = [
    (
        lambda w: ql.QuantWeight.from_float(w, ql.GPTQConfig()),
        ValueError,
        "config: GPTQConfig needs the matrix's inputs",
    ),
    (lambda w: ql.QuantWeight.from_float(w, "nf4"), TypeError, "config: got str"),
    (lambda w: ql.QuantWeight.from_float(w[0], ql.NF4Config()), ValueError, r"weight: got shape \(64,\)"),
    (lambda w: ql.QuantWeight.from_float(w[:0], ql.NF4Config()), ValueError, r"weight: got shape \(0, 64\)"),
    (lambda w: ql.QuantWeight.from_float(w + 1j, ql.NF4Config()), TypeError, "weight: got dtype complex64"),
    (lambda w: ql.QuantWeight.from_float("w", ql.NF4Config()), TypeError, "weight: got str"),
    (lambda w: ql.QuantWeight.from_float(None, ql.NF4Config()), TypeError, "weight: got NoneType"),
    (lambda w: ql.QuantWeight.from_array(w.astype(np.float64)), TypeError, "weight: got dtype float64"),
    (lambda w: ql.QuantWeight.from_array(w.reshape(2, 4, 64)), ValueError, r"weight: got shape \(2, 4, 64\)"),
    (lambda w: ql.linear(w[:, :5], ql.QuantWeight.from_array(w)), ValueError, r"x: got shape \(8, 5\)"),
    (lambda w: ql.linear(np.float32(3), ql.QuantWeight.from_array(w)), ValueError, r"x: got shape \(\)"),
    (lambda w: ql.linear(w, w), TypeError, "w: got ndarray, expected a QuantWeight"),
    (lambda w: ql.QuantWeight.from_array(w).dequantize(slice(0, 8, 2)), ValueError, "rows: got step 2"),
    (lambda w: ql.QuantWeight.from_array(w).stored_codes(), ValueError, "format: f32 has no integer codes"),
    (lambda w: ql.QuantWeight("int4", 4, (8, 64), 64, w), ValueError, "format: got 'int4'"),
    (lambda w: ql.QuantWeight("f32", 32, (8, 65), 64, w), ValueError, "codes: 512 elements, expected 520"),
    (lambda w: ql.QuantWeight("nf4", 4, (8, 64), 64, w.view(np.uint8)), ValueError, "scales: missing"),
    (lambda w: ql.QuantWeight("affine", 9, (8, 64), 64, w.view(np.uint32)), ValueError, "bits: got 9"),
    (lambda w: as_float32(w, "x", ndim=1), ValueError, "x: got shape"),
    (lambda w: _core.double_quantize(np.empty(0, np.float32)), ValueError, "scales: got none"),
    (lambda w: _core.quantize_rtn(w, 9, 32, True), ValueError, "bits: got 9"),
    (lambda w: _core.quantize_rtn(w, 4, 0, True), ValueError, "group: got 0"),
    (lambda w: _core.quantize_rtn(w[:, :0].copy(), 4, 32, True), ValueError, r"w: shape is \(8, 0\)"),
    (lambda w: _core.quantize(w, "int8", 60), ValueError, "group: got 60"),
    (lambda w: _core.quantize(w, "nf4", 2**63 - 1), ValueError, "group: got 9223372036854775807 over 512"),
    (
        lambda w: ql.QuantWeight("nf4", 4, (8, 64), 2**63 - 1, np.zeros(256, np.uint8), w[0, :0]),
        ValueError,
        "group: got 9223372036854775807, expected",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD_CALLS, ids=[case[2] for case in BAD_CALLS])
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call(matrix((8, 64)))


def test_double_quant_scales():
    nested = DoubleQuant(
        np.arange(300, dtype=np.uint16).astype(np.uint8), np.array([2.0, 3.0], np.float32),
        np.linspace(-1, 1, 256, dtype=np.float32), 0.5,
    )  # fmt: skip
    scales = nested.scales()
    assert scales.shape == (300,)
    np.testing.assert_allclose(scales[[0, 255, 256]], [-1.5, 2.5, -2.5], rtol=1e-6)
