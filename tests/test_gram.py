"""gram_forward, h += a^T b, on every ISA against float64."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import reference as ref

from quantlab import _core, backend

SHAPES = [(t, ka, kb) for t, ka, kb in zip(ref.SIZES, reversed(ref.SIZES), ref.SIZES[3:] + ref.SIZES[:3], strict=True)]
SHAPES += [(300, 65, 200), (5, 130, 33), (257, 14, 193), (2100, 40, 70), (900, 600, 35)]
SHAPES += [(300, 8, 200), (70, 130, 8), (65, 5, 33), (129, 16, 17), (64, 300, 13)]  # of a LoRA: to 16 columns


def bound(t: int, h, a, b, isa: str) -> np.ndarray:
    """A priori: half an EPS for each addition and product on the path, times the sum of the magnitudes; on tiles three
    products, and what high and low bfloat16 parts leave out, which is nothing where both fit one bfloat16: 2^-16 of
    each operand, and as much in the product of the low parts."""
    split = 3 * 2.0**-16 if isa == "amx" else 0.0
    additions = 3 * t if isa == "amx" else t
    magnitude = np.abs(a.T).astype(np.float64) @ np.abs(b)
    return (additions + 3) * ref.EPS / 2 * (np.abs(h) + magnitude) + split * magnitude


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(isa: str, rng: np.random.Generator, shape: tuple[int, int, int]) -> None:
    t, ka, kb = shape
    a, b = rng.standard_normal((t, ka), dtype=np.float32), rng.standard_normal((t, kb), dtype=np.float32)
    before = rng.standard_normal((ka, kb), dtype=np.float32)
    h, buffer = ref.guarded(before)
    _core.gram_into(h, a, b, False)
    assert (np.abs(h - ref.gram(before, a, b, False)) <= bound(t, before, a, b, isa)).all()
    assert ref.guards_intact(buffer)


@pytest.mark.parametrize("k", [*ref.SIZES, 100, 193, 400])
def test_lower_writes_only_the_lower_triangle(isa: str, rng: np.random.Generator, k: int) -> None:
    a = rng.standard_normal((70, k), dtype=np.float32)
    before = rng.standard_normal((k, k), dtype=np.float32)
    h, buffer = ref.guarded(before)
    _core.gram_into(h, a, a, True)
    upper = np.triu_indices(k, 1)
    assert h[upper].tobytes() == before[upper].tobytes()
    assert (np.abs(h - ref.gram(before, a, a, True)) <= bound(70, before, a, a, isa)).all()
    assert ref.guards_intact(buffer)
    full = before.copy()
    _core.gram_into(full, a, a, False)
    assert np.tril(full).tobytes() == np.tril(h).tobytes()


@pytest.mark.parametrize(("t", "k"), [(1, 1), (33, 31), (70, 17), (700, 193), (2100, 65), (40, 2070)])
def test_with_itself_as_with_a_copy(isa: str, rng: np.random.Generator, t: int, k: int) -> None:
    """Where both operands are one array, it may be packed once."""
    if isa == "scalar" and t * k > 10_000:
        pytest.skip("the specification, too slow at this size")
    a = rng.standard_normal((t, k), dtype=np.float32)
    own, other = np.zeros((k, k), np.float32), np.zeros((k, k), np.float32)
    _core.gram_into(own, a, a, True)
    _core.gram_into(other, a, a.copy(), True)
    np.testing.assert_array_equal(own, other)


def test_error_beside_float32(isa: str, rng: np.random.Generator) -> None:
    """Root mean square, over that of the result."""
    x = rng.standard_normal((1500, 130), dtype=np.float32)
    h, exact = np.zeros((130, 130), np.float32), x.T.astype(np.float64) @ x
    _core.gram_into(h, x, x, False)
    rms = np.sqrt(np.mean((h - exact) ** 2) / np.mean(exact**2))
    assert rms <= (2.0**-18 if isa == "amx" else 2.0**-20)


@pytest.mark.skipif(not _core.isa_info()["amx"]["usable"], reason="needs AMX")
def test_bfloat16_products_are_exact_on_tiles(rng: np.random.Generator) -> None:
    """Values that are bfloat16, as a bfloat16 model's are, have no low part: only float32 sums round."""
    x = rng.standard_normal((700, 90)).astype(ml_dtypes.bfloat16).astype(np.float32)
    h = np.zeros((90, 90), np.float32)
    with backend.use(isa="amx"):
        _core.gram_into(h, x, x, False)
    assert (np.abs(h - x.T.astype(np.float64) @ x) <= 700 * ref.EPS / 2 * (np.abs(x.T) @ np.abs(x))).all()


def test_result_does_not_depend_on_threads(isa: str, rng: np.random.Generator) -> None:
    a = rng.standard_normal((300, 231), dtype=np.float32)
    threads, results = _core.threads(), set()
    try:
        for count in (1, 2, 5):
            _core.set_threads(count)
            h = np.zeros((231, 231), np.float32)
            _core.gram_into(h, a, a, True)
            results.add(h.tobytes())
    finally:
        _core.set_threads(threads)
    assert len(results) == 1


def test_no_tokens(isa: str) -> None:
    h = np.ones((3, 4), np.float32)
    _core.gram_into(h, np.zeros((0, 3), np.float32), np.zeros((0, 4), np.float32), False)
    assert (h == 1).all()


def test_refuses_bad_arguments() -> None:
    h, a, b = np.zeros((3, 4), np.float32), np.zeros((2, 3), np.float32), np.zeros((2, 4), np.float32)
    with pytest.raises(ValueError, match="b: dimension 0 is 3, expected 2"):
        _core.gram_into(h, a, np.zeros((3, 4), np.float32), False)
    with pytest.raises(ValueError, match="a: dimension 1 is 3, expected 4"):
        _core.gram_into(h, a, b, True)
    h.flags.writeable = False
    with pytest.raises(ValueError, match="h: not writeable"):
        _core.gram_into(h, a, b, False)
