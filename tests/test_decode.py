"""decode_forward: every format against float64; every ISA bit for bit against scalar."""

from __future__ import annotations

import numpy as np
import pytest
import reference as ref

from quantlab import _core

GROUPS = (1, 7, 32, 33, 128, 4096)
SHAPES = [(3, k) for k in ref.SIZES] + [(1, 200), (5, 129), (9, 576), (7, 1001)]
# Roundings of half an EPS: the scale (up to three with double quantization, of terms no larger than 3 times it), the
# value of an int8 code (two), the product.
BOUND = 5 * ref.EPS


def scalar_decode(weight: _core.Weight, first: int, last: int) -> np.ndarray:
    before = "cuda" if _core.device_selected() >= 0 else _core.isa_selected()
    ref.select("scalar")
    try:
        return _core.decode(weight, first, last)
    finally:
        ref.select(before)


def check(stored: ref.StoredWeight) -> None:
    weight, n = stored.core(), stored.n
    out, buffer = ref.guarded(np.full((n, stored.k), np.nan))
    assert _core.decode(weight, 0, n, out) is out
    assert ref.guards_intact(buffer)
    np.testing.assert_allclose(out, ref.decode(stored), rtol=BOUND, atol=0)
    assert out.tobytes() == scalar_decode(weight, 0, n).tobytes()
    assert _core.decode(weight, n // 2, n).tobytes() == out[n // 2 :].tobytes()


@pytest.mark.parametrize("format", ["f32", "f16", "bf16", "int8"])
@pytest.mark.parametrize("perm", [False, True])
def test_plain_formats(isa: str, rng: np.random.Generator, format: str, perm: bool) -> None:
    for n, k in SHAPES:
        check(ref.random_weight(rng, format, n, k, perm=perm))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("zeros", [False, True])
def test_affine(isa: str, rng: np.random.Generator, bits: int, zeros: bool) -> None:
    for n, k in SHAPES:
        for group in {*(group for group in GROUPS if group < k), k}:
            check(ref.random_weight(rng, "affine", n, k, group=group, bits=bits, zeros=zeros, perm=group == 7))


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_blocks_of_the_flat_tensor(isa: str, rng: np.random.Generator, format: str, double: bool) -> None:
    for n, k in SHAPES:
        for group in GROUPS:
            check(ref.random_weight(rng, format, n, k, group=group, double=double, perm=group == 32))


def test_every_float16(isa: str) -> None:
    """All 65,536, in a row of odd length; a NaN is any NaN."""
    codes = np.concatenate([np.arange(65536), [1]]).astype(np.uint16).reshape(1, -1)
    weight = _core.Weight("f16", 16, 1, codes.size, codes.size, codes)
    np.testing.assert_array_equal(_core.decode(weight, 0, 1), codes.view(np.float16).astype(np.float32))


def test_formats_are_those_of_the_table() -> None:
    assert set(_core.op_table()["decode_forward"]) == set(ref.FORMATS)


def test_refuses_rows_outside() -> None:
    weight = _core.Weight("f32", 32, 2, 3, 3, np.zeros((2, 3), np.float32))
    with pytest.raises(ValueError, match="rows: got 1 to 3, expected 0 to 2"):
        _core.decode(weight, 1, 3)


def test_embedding_refuses_reordered_columns() -> None:
    """A row of an act-order weight holds its columns in another order than W."""
    perm = np.array([2, 1, 0], np.int32)
    weight = _core.Weight("f32", 32, 2, 3, 3, np.zeros((2, 3), np.float32), None, None, perm)
    with pytest.raises(ValueError, match="table: its columns are reordered"):
        _core.embedding(np.zeros(1, np.int32), weight)
    with pytest.raises(ValueError, match="embed: its columns are reordered"):
        _core.Llama(1, 1, 2, 1, 1e-5, weight, np.ones(3, np.float32), ())
