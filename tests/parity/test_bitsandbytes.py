"""NF4, FP4, double quantization and int8 give the bytes of bitsandbytes' CPU path, on random and on hard tensors."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

import quantlab as ql
from quantlab import _core

pytestmark = pytest.mark.parity

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    functional = pytest.importorskip("bitsandbytes.functional")

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def hard_tensors() -> dict[str, np.ndarray]:
    """float32 tensors that look for trouble: each name is one case."""
    rng = np.random.default_rng(7)
    normal = rng.standard_normal((24, 100)).astype(np.float32)
    outlier = normal.copy()
    outlier[3, 50] = 3e4
    midpoints = np.sort(np.concatenate([nf4_midpoints(), -nf4_midpoints(), [1.0, -1.0]])).astype(np.float32)
    around = np.concatenate(
        [midpoints, np.nextafter(midpoints, np.float32(2)), np.nextafter(midpoints, np.float32(-2))]
    )
    boundary = np.resize(np.clip(around, -1, 1), (8, 96))
    boundary[:, ::32] = 1.0  # every block of 32 has absmax 1
    half_zero = normal.copy()
    half_zero[::2] = 0.0
    signs = np.where(rng.random((5, 64)) < 0.5, np.float32(-0.0), np.float32(0.0))
    return {
        "normal": normal,
        "zeros": np.zeros((7, 33), np.float32),
        "signed zeros": signs,
        "constant": np.full((9, 40), 0.37, np.float32),
        "negative constant": np.full((9, 40), -1.25, np.float32),
        "one outlier": outlier,
        "half zero": half_zero,
        "boundaries": boundary,
        "boundaries scaled": boundary * np.float32(0.0173),
        "denormals": normal * np.float32(1e-40),
        "mixed denormals": normal * np.where(rng.random((24, 1)) < 0.5, 1e-39, 1.0).astype(np.float32),
        "near 1e-38": normal * np.float32(1e-38),
        "tiny": normal * np.float32(1e-30),
        "huge": np.clip(normal, -3, 3) * np.float32(1e38),
        "one element": np.array([[0.5]], np.float32),
        "one zero": np.zeros((1, 1), np.float32),
        "odd size": rng.standard_normal((7, 63)).astype(np.float32),
        "odd and partial": rng.standard_normal((3, 1367)).astype(np.float32),
        "one more than a block": rng.standard_normal((1, 4097)).astype(np.float32),
        "integers": rng.integers(-8, 9, (16, 64)).astype(np.float32),
        "cauchy": rng.standard_cauchy((32, 64)).astype(np.float32),
    }


def nf4_midpoints() -> np.ndarray:
    values = functional.get_4bit_type("nf4", device="cpu").numpy()
    fp4 = np.sort(functional.get_4bit_type("fp4", device="cpu").numpy())
    return np.concatenate([(values[1:] + values[:-1]) / 2, (fp4[1:] + fp4[:-1]) / 2])


def random_tensors(count: int = 100):
    rng = np.random.default_rng(11)
    for i in range(count):
        shape = (int(rng.integers(1, 200)), int(rng.integers(1, 200)))
        scale = np.float32(10.0 ** rng.uniform(-6, 3))
        yield torch.from_numpy(rng.standard_normal(shape).astype(np.float32) * scale).to(DTYPES[i % 3])


def config(kind: str, block_size: int, double_quant: bool = False):
    return (ql.NF4Config if kind == "nf4" else ql.FP4Config)(block_size, double_quant)


def assert_same_4bit(tensor, kind: str, block_size: int, double_quant: bool) -> None:
    expected, state = functional.quantize_4bit(
        tensor, blocksize=block_size, quant_type=kind, compress_statistics=double_quant
    )
    if double_quant and not torch.isfinite(state.offset):  # theirs decodes to NaN, ours is refused
        with pytest.raises(ql.NumericError, match=r"block scales up to .* overflow with double_quant=True"):
            ql.QuantWeight.from_float(tensor, config(kind, block_size, double_quant))
        return
    weight = ql.QuantWeight.from_float(tensor, config(kind, block_size, double_quant))
    np.testing.assert_array_equal(weight.codes, expected.numpy().reshape(-1))
    if not double_quant:
        assert weight.scales.tobytes() == state.absmax.numpy().tobytes()
        return
    nested = weight.double_quant
    assert np.float32(nested.offset) == state.offset.numpy()
    np.testing.assert_array_equal(nested.codes, state.absmax.numpy())
    assert nested.absmax.tobytes() == state.state2.absmax.numpy().tobytes()
    assert nested.map.tobytes() == state.state2.code.numpy().tobytes()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("case", hard_tensors())
def test_4bit_on_hard_tensors(case, kind):
    values = torch.from_numpy(hard_tensors()[case])
    for dtype in DTYPES:
        tensor = values.to(dtype)
        if not torch.isfinite(tensor).all():
            continue  # float16 does not hold it
        for block_size in BLOCK_SIZES:
            assert_same_4bit(tensor, kind, block_size, double_quant=False)
        assert_same_4bit(tensor, kind, 64, double_quant=True)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_4bit_on_random_tensors(kind):
    for i, tensor in enumerate(random_tensors()):
        assert_same_4bit(tensor, kind, BLOCK_SIZES[i % len(BLOCK_SIZES)], double_quant=False)
        assert_same_4bit(tensor, kind, BLOCK_SIZES[i % len(BLOCK_SIZES)], double_quant=True)


@pytest.mark.parametrize("blocks", [1, 2, 5, 7, 8, 31, 255, 256, 257, 4097, 20_000, 32_768, 70_001])
def test_double_quantization_of_many_scales(blocks):
    rng = np.random.default_rng(blocks)
    scales = (np.abs(rng.standard_normal(blocks)) * 0.1 + 0.01).astype(np.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # the order of torch's sum depends on its threads
        offset = torch.from_numpy(scales).mean()
    finally:
        torch.set_num_threads(threads)
    expected, state = functional.quantize_blockwise(torch.from_numpy(scales) - offset, blocksize=256)
    codes, absmax, _, ours = _core.double_quantize(scales)
    assert np.float32(ours) == offset.numpy()
    np.testing.assert_array_equal(codes, expected.numpy())
    assert absmax.tobytes() == state.absmax.numpy().tobytes()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_dequantized_values(kind, double_quant):
    tensor = torch.randn(48, 130, generator=torch.Generator().manual_seed(3))
    codes, state = functional.quantize_4bit(tensor, blocksize=64, quant_type=kind, compress_statistics=double_quant)
    expected = functional.dequantize_4bit(codes, state).numpy()
    ours = ql.QuantWeight.from_float(tensor, config(kind, 64, double_quant)).dequantize()
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("case", hard_tensors())
def test_int8_on_hard_tensors(case):
    values = torch.from_numpy(hard_tensors()[case])
    for dtype in DTYPES:
        tensor = values.to(dtype)
        if torch.isfinite(tensor).all():
            assert_same_int8(tensor)


def test_int8_on_random_tensors():
    for tensor in random_tensors():
        assert_same_int8(tensor)


def assert_same_int8(tensor) -> None:
    codes, absmax, _ = functional.int8_vectorwise_quant(tensor.clone())
    weight = ql.QuantWeight.from_float(tensor, ql.Int8Config())
    assert weight.scales.tobytes() == absmax.numpy().tobytes()
    np.testing.assert_array_equal(weight.codes, codes.numpy())
    expected = functional.int8_vectorwise_dequant(codes, absmax).numpy()
    usable = np.isfinite(expected)  # bitsandbytes multiplies by the scale first, which overflows before ours does
    np.testing.assert_allclose(weight.dequantize()[usable], expected[usable], rtol=3e-7, atol=1e-44)
