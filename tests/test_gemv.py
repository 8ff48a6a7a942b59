"""Products with few rows: packed weights, every format and ISA, against float64 and the scalar reference."""

from __future__ import annotations

import numpy as np
import pytest
import reference as ref

import quantlab as ql
from quantlab import _core

VECTOR = [isa for isa, state in _core.isa_info().items() if state["usable"] and isa != "scalar"]
ROWS = (1, 2, 3, 4)
TILE_ROWS = (5, 6, 10, 11, 15, 16)  # on tiles: around what one, two and three tiles of limbs hold
CASES = {
    **{format: {"format": format} for format in ("f32", "f16", "bf16", "int8")},
    **{f"{format}-perm": {"format": format, "perm": True} for format in ("f32", "bf16", "int8")},
    **{f"affine{bits}": {"format": "affine", "bits": bits, "group": 32} for bits in range(2, 9)},
    **{f"affine{bits}-g{group}": {"format": "affine", "bits": bits, "group": group, "zeros": True}
       for bits in range(2, 9) for group in (64, 128)},
    **{f"affine{bits}-ragged": {"format": "affine", "bits": bits, "group": 27, "zeros": True, "perm": True}
       for bits in (2, 3, 4, 5, 8)},
    **{f"affine{bits}-tiny": {"format": "affine", "bits": bits, "group": 3, "zeros": True} for bits in (2, 3, 4, 8)},
    **{f"affine{bits}-row": {"format": "affine", "bits": bits, "group": 1 << 20} for bits in (2, 3, 4, 8)},
    **{f"{format}-{group}": {"format": format, "group": group} for format in ("nf4", "fp4") for group in (32, 64)},
    **{f"{format}-crossing": {"format": format, "group": 34, "perm": True} for format in ("nf4", "fp4")},
    **{f"{format}-double": {"format": format, "group": 32, "double": True} for format in ("nf4", "fp4")},
}  # fmt: skip
SHAPES = [(n, k) for n, k in zip(ref.SIZES, reversed(ref.SIZES), strict=True)] + [
    (1, 300),
    (67, 513),
    (130, 96),
    (193, 256),
    (65, 640),
    (67, 8),  # an adapter
]


def rows_of(stored: ref.StoredWeight) -> tuple[int, ...]:
    """Rows of x for which this ISA has a kernel of decode; some for the scalar reference, which has none."""
    return ROWS + tuple(m for m in TILE_ROWS if m <= ref.gemv_rows(stored))


def has_bytes(stored: ref.StoredWeight) -> bool:
    return stored.format == "int8" or (stored.format == "affine" and stored.bits > 4)


def in_vectors(stored: ref.StoredWeight) -> int:
    """Rows of x up to which this ISA's products add in one order; more are on tiles, where it has a kernel for them."""
    if not has_bytes(stored) or ref.gemv_rows(stored) <= 4:
        return 4
    return 2 if stored.format == "int8" else 1


def make(rng: np.random.Generator, case: str, n: int, k: int) -> ref.StoredWeight:
    return ref.random_weight(rng, **CASES[case], n=n, k=k) if "group" not in CASES[case] else _grouped(rng, case, n, k)


def _grouped(rng: np.random.Generator, case: str, n: int, k: int) -> ref.StoredWeight:
    arguments = dict(CASES[case])
    if arguments["format"] == "affine":
        arguments["group"] = min(arguments["group"], k)
    return ref.random_weight(rng, n=n, k=k, **arguments)


def magnitude(w: ref.StoredWeight) -> np.ndarray:
    """What an element's product may be made of: the code and the zero are both taken from the middle of the codes,
    2 and 3 bits in parts, bit by bit at worst; float64 (n, k), columns in the order of W."""
    if w.format != "affine":
        return np.abs(ref.decode(w))
    codes, middle = ref.unpack(w.codes, w.bits, w.k), 2 ** (w.bits - 1)
    zeros = np.zeros((w.n, w.k))
    if w.zeros is not None:
        zeros = np.repeat(w.zeros.astype(np.int64), w.group, 1)[:, : w.k] - middle
    bit_by_bit = (codes & 1) + 2 - (codes & 2) + (2 if w.bits == 3 else 0)
    parts = bit_by_bit if w.bits < 4 else np.abs(codes - middle)
    stored = (parts + np.abs(zeros)) * np.repeat(ref._f64(w.scales), w.group, 1)[:, : w.k]
    if w.perm is None:
        return stored
    values = np.empty_like(stored)
    values[:, w.perm] = stored
    return values


def bound(w: ref.StoredWeight, x: np.ndarray, rows: int = 4) -> np.ndarray:
    """A priori, of a product with `rows` rows: half an EPS of the parts' sum for each addition on the longest path, and
    up to 8 roundings beside; with VNNI an element of x may be rounded as the largest of its group is, and on tiles more
    than four rows meet nf4 and fp4 as integers of 16 bits."""
    size, parts = np.abs(x).astype(np.float64), magnitude(w)
    limit = (w.k + 8) * ref.EPS / 2 * (size @ parts.T)
    if _core.isa_selected() in ("avx512_vnni", "avx512_bf16", "amx"):
        limit += ref.EPS * size.max(1, keepdims=True) * parts.sum(1)
        if looked_up(w) and rows > 4:
            absmax = np.repeat(np.abs(ref.block_scales(w)), w.group)[: w.n * w.k].reshape(w.n, w.k)
            limit += 128 / (127 << 16) * size.max(1, keepdims=True) * parts.sum(1)
            limit += 0.5 / 32767 * (size + ref.EPS) @ (absmax if w.perm is None else absmax[:, np.argsort(w.perm)]).T
    return limit


def looked_up(w: ref.StoredWeight) -> bool:
    return w.format in ("nf4", "fp4")


@pytest.mark.parametrize("case", CASES)
def test_matches_float64(isa: str, rng: np.random.Generator, case: str) -> None:
    for n, k in SHAPES:
        stored = make(rng, case, n, k)
        weight, x = stored.core(), rng.standard_normal((16, k), dtype=np.float32)
        exact = ref.linear(x, stored)
        for m in rows_of(stored):
            limit = bound(stored, x, m)
            out, buffer = ref.guarded(np.full((m, n), np.nan))
            assert _core.linear(x[:m], weight, out) is out
            assert (np.abs(out - exact[:m]) <= limit[:m]).all(), (n, k, m)
            assert ref.guards_intact(buffer)


@pytest.mark.parametrize("case", CASES)
def test_adds_to_what_is_there(isa: str, rng: np.random.Generator, case: str) -> None:
    stored = make(rng, case, 67, 160)
    weight, x = stored.core(), rng.standard_normal((16, 160), dtype=np.float32)
    before = rng.standard_normal((16, 67), dtype=np.float32)
    for m in rows_of(stored):
        out, buffer = ref.guarded(before[:m])
        _core.linear(x[:m], weight, out, True)
        limit = bound(stored, x[:m], m) + (stored.k + 8) * ref.EPS / 2 * np.abs(before[:m])
        assert (np.abs(out - (before[:m] + ref.linear(x[:m], stored))) <= limit).all()
        assert ref.guards_intact(buffer)


@pytest.mark.parametrize("case", CASES)
def test_error_is_at_most_twice_the_scalar_error(rng: np.random.Generator, case: str) -> None:
    """Root mean square over the product; the scalar reference is the naive sum."""
    stored = make(rng, case, 257, 576)
    weight, x = stored.core(), rng.standard_normal((16, 576), dtype=np.float32)
    exact = ref.linear(x, stored)
    with ql.backend.use(isa="scalar"):
        naive = np.sqrt(np.mean((_core.linear(x, weight) - exact) ** 2))
    for isa in VECTOR:
        with ql.backend.use(isa=isa):
            for m in {4, 4 if looked_up(stored) else max(rows_of(stored))}:  # more rows: float32's only by bound()
                assert np.sqrt(np.mean((_core.linear(x[:m], weight) - exact[:m]) ** 2)) <= 2 * naive, (isa, m)


@pytest.mark.parametrize("case", CASES)
def test_same_bits_for_every_m_and_number_of_threads(isa: str, rng: np.random.Generator, case: str) -> None:
    stored = make(rng, case, 333, 160)
    weight, x = stored.core(), rng.standard_normal((16, 160), dtype=np.float32)
    in_another_order = looked_up(stored) or has_bytes(stored)  # on tiles
    with ql.backend.use(threads=1):
        alone = np.concatenate([_core.linear(x[r : r + 1], weight) for r in range(16)])
        on_tiles = _core.linear(x[: max(rows_of(stored))], weight) if in_another_order else alone
    for threads in (1, 2, 3, 7):
        with ql.backend.use(threads=threads):
            for m in rows_of(stored):
                expected = (alone if m <= in_vectors(stored) else on_tiles)[:m]
                assert _core.linear(x[:m], weight).tobytes() == expected.tobytes(), (threads, m)


def test_weights_are_packed_once_and_reported(rng: np.random.Generator) -> None:
    if _core.gemv_rows() == 0:
        pytest.skip("packed weights are for vector kernels")
    x = rng.standard_normal((_core.gemv_rows() + 1, 256), dtype=np.float32)
    in_panels = (ql.RTNConfig(4, 64), ql.NF4Config(), ql.RTNConfig(3, 32), ql.RTNConfig(2, 32))
    for config in (*in_panels, ql.RTNConfig(8, 64), ql.Int8Config()):
        weight = ql.QuantWeight.from_float(rng.standard_normal((128, 256), dtype=np.float32), config)
        nbytes = weight.nbytes
        ql.linear(x, weight)
        assert weight.handle.packed_nbytes == 0  # too many rows for a decode step
        ql.linear(x[:1], weight)
        packed = weight.handle.packed_nbytes
        assert weight.nbytes == nbytes and (packed > 0) == (config in in_panels)
        assert packed <= 1.02 * nbytes
        ql.linear(x[:2], weight)
        assert weight.handle.packed_nbytes == packed


def test_nan_stays_in_its_row(isa: str, rng: np.random.Generator) -> None:
    for case in ("f32", "affine4", "affine3", "affine2-g64", "affine8-g64", "nf4-64", "int8"):
        stored = make(rng, case, 40, 64)
        for m in rows_of(stored)[2:]:
            x = rng.standard_normal((m, 64), dtype=np.float32)
            x[2, 63] = np.nan
            y = _core.linear(x, stored.core())
            assert np.isnan(y[2]).all() and np.isfinite(np.delete(y, 2, 0)).all(), (case, m)


@pytest.mark.parametrize(("format", "k", "bits"), [("affine", 60_001, 4), ("int8", 66_001, 8)])
def test_weights_too_wide_for_a_kernel(isa: str, rng: np.random.Generator, format: str, k: int, bits: int) -> None:
    """Too many columns for the sums of bytes of int8, which other kernels compute, and as many with 4 bits."""
    stored = ref.random_weight(rng, format, 3, k, group=64, bits=bits, perm=True)
    x = rng.standard_normal((4, k), dtype=np.float32)
    assert (np.abs(_core.linear(x, stored.core()) - ref.linear(x, stored)) <= bound(stored, x)).all()


@pytest.mark.parametrize(("case", "k"), [("affine4", 18_432), ("affine8", 18_432), ("affine4", 28_672)])
def test_the_kernel_does_not_depend_on_m(isa: str, rng: np.random.Generator, case: str, k: int) -> None:
    """Nor does the memory that it works in, wide as the matrix may be."""
    if isa == "scalar":
        pytest.skip("the specification, too slow at this size")
    stored, x = make(rng, case, 33, k), rng.standard_normal((16, k), dtype=np.float32)
    w = stored.core()
    every = rows_of(stored)
    for rows in ([m for m in every if m <= in_vectors(stored)], [m for m in every if m > in_vectors(stored)]):
        whole = _core.linear(x[: max(rows, default=0)], w)
        for m in rows:
            assert _core.linear(x[:m].copy(), w).tobytes() == whole[:m].tobytes(), m


@pytest.mark.parametrize("case", ["int8", "affine4", "affine8"])
def test_small_activations_are_not_zero(isa: str, rng: np.random.Generator, case: str) -> None:
    """A power of two changes no rounding, down to where a product of the scales of x and of W is denormal."""
    w, x = make(rng, case, 17, 64), rng.standard_normal((2, 64), dtype=np.float32)
    for power in (-63, -64, -65, -80):
        found = _core.linear(x * np.float32(2.0**power), w.core()).astype(np.float64) / 2.0**power
        assert (np.abs(found - ref.linear(x, w)) <= bound(w, x)).all(), power
