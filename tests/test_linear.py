"""linear_forward and linear_backward_input: every format and ISA against float64 and scalar, in any batch."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import reference as ref

from quantlab import QuantWeight, _core, backend

# name -> arguments of random_weight; "ragged": the last group of a row is shorter, blocks of nf4 and fp4 cross rows
CASES = {
    **{format: {"format": format} for format in ("f32", "f16", "bf16", "int8")},
    **{f"{format}-perm": {"format": format, "perm": True} for format in ("f32", "int8")},
    **{f"affine{bits}": {"format": "affine", "bits": bits, "group": 32} for bits in range(2, 9)},
    **{
        f"affine{bits}-ragged": {"format": "affine", "bits": bits, "group": 7, "zeros": True, "perm": True}
        for bits in (2, 3, 4, 8)
    },
    **{f"affine{bits}-row": {"format": "affine", "bits": bits, "group": 1 << 20, "zeros": True} for bits in (3, 4)},
    **{f"{format}": {"format": format, "group": 64} for format in ("nf4", "fp4")},
    **{f"{format}-crossing": {"format": format, "group": 34, "perm": True} for format in ("nf4", "fp4")},
    **{f"{format}-double": {"format": format, "group": 32, "double": True} for format in ("nf4", "fp4")},
}  # fmt: skip
BF16_ROUNDING = 2.0**-8  # relative: half a unit of the 8 bits of a bfloat16
SHAPES = [(n, k) for n, k in zip(ref.SIZES, reversed(ref.SIZES), strict=True)] + [
    (1, 300),
    (67, 513),
    (201, 96),
    (385, 259),
    (35, 1100),
]
LOW_RANK = [
    (r, k) for r in (1, 2, 4, 8, 9, 16, 17) for k in (1, 7, 33, 300)
]  # of a LoRA; to 16 by kernels of their own


def make(rng: np.random.Generator, case: str, n: int, k: int) -> ref.StoredWeight:
    arguments = dict(CASES[case])
    if "group" in arguments and arguments["format"] == "affine":
        arguments["group"] = min(arguments["group"], k)
    return ref.random_weight(rng, arguments.pop("format"), n, k, **arguments)


def bound(a: np.ndarray, w: np.ndarray, isa: str, case: str, before: np.ndarray | float = 0.0) -> np.ndarray:
    """Of a @ w, a priori. The sum of |a w| times half an EPS for each addition on the longest path to the sum (the
    vector kernels sum blocks of 512, of 1,024 in pairs, the tiles blocks of 32, the scalar reference all terms in a
    row), for the product and up to 5 roundings of w; in pairs and on tiles also what the roundings of a and w to
    bfloat16 leave out, or to limbs: half a unit of the largest of its row or column, and the products of low limbs."""
    terms = len(w) + 1
    magnitude = np.abs(a) @ np.abs(w) + np.abs(before)
    additions = terms if isa == "scalar" else min(terms, 512) + terms // 512
    left_out: np.ndarray | float = 0.0
    if isa == "amx" and on_limbs(w, case):
        row, column = np.abs(a).max(axis=1, keepdims=True), np.abs(w).max(axis=0)
        unit = 1 / (127 << 16)
        left_out = unit / 2 * (row * np.abs(w).sum(axis=0) + np.abs(a).sum(axis=1, keepdims=True) * column)
        left_out += 1.01 * 2.0**23 * unit**2 * terms * row * column
    elif is_rounded(isa, case):
        block = 32 if isa == "amx" else 1024
        additions = min(terms, block) + terms // block
        left_out = (2 * BF16_ROUNDING + BF16_ROUNDING**2) * magnitude
    return (additions + 6) * ref.EPS / 2 * magnitude + left_out


def on_limbs(w: np.ndarray, case: str) -> bool:
    """float32 matrices with a short side, those of adapters, are left to the vector kernels."""
    return min(w.shape) >= 64 and not _core.precise() if case.startswith("f32") else _core.precise()


def is_rounded(isa: str, case: str) -> bool:
    """Whether operands are rounded to bfloat16."""
    return not case.startswith("f32") and (isa == "amx" or (isa == "avx512_bf16" and not _core.precise()))


def bf16(a: np.ndarray) -> np.ndarray:
    return a.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def test_cases_cover_the_registry() -> None:
    table = _core.op_table()
    assert {case["format"] for case in CASES.values()} == set(table["linear_forward"]) == set(ref.FORMATS)


@pytest.mark.parametrize("case", CASES)
def test_matches_float64(isa: str, rng: np.random.Generator, case: str) -> None:
    for n, k in SHAPES:
        stored = make(rng, case, n, k)
        weight, values = stored.core(), ref.decode(stored)
        for op, w, terms in ((_core.linear, values.T, k), (_core.linear_backward_input, values, n)):
            a = rng.standard_normal((31, terms), dtype=np.float32)
            exact, limit = a.astype(np.float64) @ w, bound(a, w, isa, case)
            few = ref.gemv_rows(stored) if op is _core.linear else 0  # test_gemv.py
            for m in (m for m in (1, 2, 5, 17, 31) if m > few):
                out, buffer = ref.guarded(np.full((m, w.shape[1]), np.nan))
                assert op(a[:m], weight, out) is out
                assert (np.abs(out - exact[:m]) <= limit[:m]).all(), (op.__name__, n, k, m)
                assert ref.guards_intact(buffer)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("m", [9, 63, 64, 65, 130])
def test_low_rank(isa: str, rng: np.random.Generator, m: int, accumulate: bool) -> None:
    """x A^T with A (r, k), and dy B with B (k, r): the reduction is the long side of both."""
    for r, k in LOW_RANK:
        a, x = rng.standard_normal((r, k), dtype=np.float32), rng.standard_normal((m, k), dtype=np.float32)
        before = rng.standard_normal((m, r), dtype=np.float32)
        exact = x.astype(np.float64) @ a.T + accumulate * before
        limit = bound(x, a.T, isa, "f32", before)
        for op, codes in ((_core.linear, a), (_core.linear_backward_input, np.ascontiguousarray(a.T))):
            weight = ref.StoredWeight("f32", 32, *codes.shape, codes.shape[1], codes).core()
            out, buffer = ref.guarded(before)
            assert op(x, weight, out, accumulate) is out
            assert (np.abs(out - exact) <= limit).all(), (op.__name__, r, k)
            assert ref.guards_intact(buffer)


@pytest.mark.parametrize("case", ["f32", "affine4-ragged", "nf4-crossing"])
def test_error_is_at_most_twice_the_scalar_error(isa: str, rng: np.random.Generator, case: str) -> None:
    """Root mean square over the matrix; the scalar reference is the naive sum, or that of rounded operands."""
    stored = make(rng, case, 193, 577)
    weight, values = stored.core(), ref.decode(stored)
    x, dy = rng.standard_normal((70, 577), dtype=np.float32), rng.standard_normal((70, 193), dtype=np.float32)
    for op, a, w in ((_core.linear, x, values.T), (_core.linear_backward_input, dy, values)):
        exact = a.astype(np.float64) @ w
        error = np.sqrt(np.mean((op(a, weight) - exact) ** 2))
        if is_rounded(isa, case):
            naive = np.sqrt(np.mean((bf16(a) @ bf16(w) - exact) ** 2))
        else:
            _core.isa_select("scalar")
            naive = np.sqrt(np.mean((op(a, weight) - exact) ** 2))
            _core.isa_select(isa)
        assert error <= 2 * naive


@pytest.mark.parametrize("rows", [9, 18])
@pytest.mark.parametrize("case", ["f32", "f16", "bf16", "int8-perm", "affine3-ragged", "nf4-crossing"])
def test_accumulates(isa: str, rng: np.random.Generator, case: str, rows: int) -> None:
    """out += product: the sum of blocks starts from `out`, so only the last bits may differ from adding afterwards."""
    stored = make(rng, case, 67, 513)
    weight = stored.core()
    for op, size, other in ((_core.linear, 513, 67), (_core.linear_backward_input, 67, 513)):
        a = rng.standard_normal((rows, size), dtype=np.float32)
        before = rng.standard_normal((rows, other), dtype=np.float32)
        out, buffer = ref.guarded(before)
        op(a, weight, out, True)
        w = ref.decode(stored).T if size == 513 else ref.decode(stored)
        exact = before.astype(np.float64) + a.astype(np.float64) @ w
        assert (np.abs(out - exact) <= bound(a, w, isa, case, before)).all()
        assert ref.guards_intact(buffer)


@pytest.mark.parametrize("case", ["f32", "bf16", "int8-perm", "affine4", "affine3-ragged", "nf4", "fp4-crossing"])
def test_row_does_not_depend_on_its_batch(isa: str, rng: np.random.Generator, case: str) -> None:
    """In any batch; those of a few rows of x have kernels of their own (test_gemv.py)."""
    stored = make(rng, case, 67, 513)
    weight = stored.core()
    for op, size in ((_core.linear, 513), (_core.linear_backward_input, 67)):
        a = rng.standard_normal((301, size), dtype=np.float32)
        together, few = op(a, weight), ref.gemv_rows(stored) if op is _core.linear else 0
        for first, last in ((0, few + 1), (300 - few, 301), (5, few + 9), (100, few + 109), (17, 147)):
            assert op(np.ascontiguousarray(a[first:last]), weight).tobytes() == together[first:last].tobytes()


@pytest.mark.parametrize("case", [case for case in CASES if "perm" not in CASES[case]])
@pytest.mark.parametrize(("n", "k"), [(201, 640), (64, 1536), (35, 1100)])
def test_has_the_bits_of_its_decoded_weight(isa: str, rng: np.random.Generator, case: str, n: int, k: int) -> None:
    """However codes become floats: from rows, or from what products with few rows have packed."""
    if isa == "amx":
        pytest.skip("quantized and float32 weights have kernels of their own")
    stored = make(rng, case, n, k)
    weight, x = stored.core(), rng.standard_normal((130, k), dtype=np.float32)
    decoded = ref.StoredWeight("f32", 32, n, k, k, _core.decode(weight, 0, n))
    if is_rounded(isa, case):  # float32 weights are not
        decoded = ref.StoredWeight("bf16", 16, n, k, k, decoded.codes.astype(ml_dtypes.bfloat16).view(np.uint16))
    decoded = decoded.core()
    for _ in range(2):
        for m in (_core.gemv_rows() + 1, 16, 31, 64, 65, 130):
            assert _core.linear(x[:m], weight).tobytes() == _core.linear(x[:m], decoded).tobytes(), m
        _core.linear(x[:1], weight)  # packs


@pytest.mark.parametrize("case", ["f32", "affine4-ragged", "nf4"])
def test_result_does_not_depend_on_threads(isa: str, rng: np.random.Generator, case: str) -> None:
    stored = make(rng, case, 201, 300)
    weight = stored.core()
    threads = _core.threads()
    try:
        for (op, size), m in itertools.product(((_core.linear, 300), (_core.linear_backward_input, 201)), (1, 230)):
            a = rng.standard_normal((m, size), dtype=np.float32)
            results = set()
            for count in (1, 2, 3, 7):
                _core.set_threads(count)
                results.add(op(a, weight).tobytes())
            assert len(results) == 1
    finally:
        _core.set_threads(threads)


@pytest.mark.parametrize("m", [1, 3, 5, 16, 17, 130])
@pytest.mark.parametrize("case", CASES)
def test_many_have_the_bits_of_each_alone(isa: str, rng: np.random.Generator, case: str, m: int) -> None:
    """Products of one x: alike, so that they share what is made of it, and of several kinds."""
    for k, rows in ((96, (67, 33)), (513, (130, 1, 65)), (300, (64,)), (640, (201, 96, 385))):
        x = rng.standard_normal((m, k), dtype=np.float32)
        alike = [make(rng, case, n, k) for n in rows]
        for stored in alike[1:]:  # one order of columns, as GPTQ gives it, each with an array of its own
            stored.perm = None if alike[0].perm is None else alike[0].perm.copy()
        for weights in (alike, [*alike[:-1], make(rng, "affine4", 40, k)], [make(rng, "bf16", 40, k), *alike[1:]]):
            handles = tuple(stored.core() for stored in weights)
            for threads in (1, 3):
                with backend.use(threads=threads):
                    each = [_core.linear(x, handle).tobytes() for handle in handles]
                    filled = [ref.guarded(np.full((m, stored.n), np.nan)) for stored in weights]
                    outs = _core.linear_many(x, handles, tuple(out for out, _ in filled))
                    assert [out.tobytes() for out in outs] == each, (k, rows)
                    assert all(ref.guards_intact(buffer) for _, buffer in filled)


def test_many_without_rows(isa: str, rng: np.random.Generator) -> None:
    weights = tuple(make(rng, case, 5, 9).core() for case in ("nf4", "f32"))
    assert [y.shape for y in _core.linear_many(np.zeros((0, 9), np.float32), weights)] == [(0, 5), (0, 5)]


def test_vector_kernels_agree_bit_for_bit(rng: np.random.Generator) -> None:
    """Lanes are columns of the output, so AVX2 and AVX-512 add in the same order."""
    usable = [isa for isa, state in _core.isa_info().items() if state["usable"] and isa in ("avx2", "avx512")]
    before = _core.isa_selected()
    try:
        for case in CASES:
            weight, x = make(rng, case, 67, 300).core(), rng.standard_normal((9, 300), dtype=np.float32)
            results = set()
            for isa in usable:
                _core.isa_select(isa)
                results.add(_core.linear(x, weight).tobytes())
            assert len(results) <= 1, case
    finally:
        _core.isa_select(before)


@pytest.mark.skipif(not _core.isa_info()["amx"]["usable"], reason="needs AMX")
@pytest.mark.parametrize("case", CASES)
def test_precise(rng: np.random.Generator, case: str) -> None:
    """float32 for a float32 W, limbs for others: the same whatever the batch and the threads. More than one block of k
    and of columns, both ragged."""
    for n, k in ((17, 33), (67, 513), (35, 1100), (261, 577), (96, 576)):
        stored = make(rng, case, n, k)
        weight, values = stored.core(), ref.decode(stored)
        for op, w in ((_core.linear, values.T), (_core.linear_backward_input, values)):
            a = rng.standard_normal((70, len(w)), dtype=np.float32)
            with backend.use(isa="amx", precise=True):
                limit = bound(a, w, "amx", case)
                out, buffer = ref.guarded(np.full((70, w.shape[1]), np.nan))
                op(a, weight, out)
                assert (np.abs(out - a.astype(np.float64) @ w) <= limit).all(), (op.__name__, n, k)
                assert ref.guards_intact(buffer)
                with backend.use(threads=3):
                    assert op(a[37:61].copy(), weight).tobytes() == out[37:61].tobytes()


@pytest.mark.parametrize("m,n,k", [(2065, 1021, 773), (704, 384, 1024)])
def test_large_shape(isa: str, rng: np.random.Generator, m: int, n: int, k: int) -> None:
    """More than one chunk of rows, many blocks, every kind of edge; and a task with as many sums as there can be."""
    if isa == "scalar":
        pytest.skip("the specification, too slow at this size")
    stored = make(rng, "affine4-ragged", n, k)
    weight, values = stored.core(), ref.decode(stored)
    x, dy = rng.standard_normal((m, k), dtype=np.float32), rng.standard_normal((331, n), dtype=np.float32)
    for op, a, w in ((_core.linear, x, values.T), (_core.linear_backward_input, dy, values)):
        limit = bound(a, w, isa, "affine4-ragged")
        assert (np.abs(op(a, weight) - a @ w) <= limit).all()


def test_no_rows(isa: str, rng: np.random.Generator) -> None:
    weight = make(rng, "nf4", 5, 9).core()
    assert _core.linear(np.zeros((0, 9), np.float32), weight).shape == (0, 5)
    assert _core.linear_backward_input(np.zeros((0, 5), np.float32), weight).shape == (0, 9)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_row(isa: str, rng: np.random.Generator, bad: float) -> None:
    for n, k in ((40, 20), (97, 650)):
        stored = make(rng, "f32", n, k)
        x = rng.standard_normal((16, k), dtype=np.float32)
        x[7, k - 1] = bad
        for op, a in ((_core.linear, x), (_core.linear_backward_input, np.resize(x.T, (16, n)).copy())):
            a[:] = np.where(np.isfinite(a), a, 1.0)
            a[7, -1] = bad
            y = op(a, stored.core())
            assert not np.isfinite(y[7]).any() and np.isfinite(np.delete(y, 7, 0)).all()


def test_float32_of_many_sizes(isa: str, rng: np.random.Generator) -> None:
    """Ragged blocks of k and of columns; rows and columns of very different sizes, values far above the rest, zeros."""
    for n, k in ((64, 64), (65, 640), (300, 577), (129, 1153), (577, 300)):
        stored = make(rng, "f32", n, k)
        stored.codes *= 10.0 ** rng.uniform(-12, 12, (n, 1)).astype(np.float32)
        stored.codes[n // 2] = 0.0
        weight, values = stored.core(), ref.decode(stored)
        for op, w in ((_core.linear, values.T), (_core.linear_backward_input, values)):
            a = rng.standard_normal((70, len(w)), dtype=np.float32)
            a *= 10.0 ** rng.uniform(-12, 12, (70, 1)).astype(np.float32)
            a[:, len(w) // 3] *= 1000
            a[33] = 0.0
            out, buffer = ref.guarded(np.full((70, w.shape[1]), np.nan))
            op(a, weight, out)
            assert (np.abs(out - a.astype(np.float64) @ w) <= bound(a, w, isa, "f32")).all(), (op.__name__, n, k)
            assert ref.guards_intact(buffer)


@pytest.mark.parametrize(
    ("power", "other"), [(-140, 0), (-118, 0), (-118, 100), (-70, 0), (60, 60), (115, -80), (115, 0)]
)
def test_float32_near_the_ends_of_its_range(isa: str, rng: np.random.Generator, power: int, other: int) -> None:
    """Products of values down to the denormal ones, and up to where they overflow."""
    stored = make(rng, "f32", 80, 96)
    stored.codes[:] = np.ldexp(stored.codes, other)
    x = np.ldexp(rng.standard_normal((9, 96), dtype=np.float32), power)
    exact, limit = x.astype(np.float64) @ ref.decode(stored).T, bound(x, ref.decode(stored).T, isa, "f32")
    denormal = 96 * 2.0**-149  # what products and sums below the normal range may lose
    assert (np.abs(_core.linear(x, stored.core()) - exact) <= limit + denormal).all()


def test_refuses_bad_arguments(rng: np.random.Generator) -> None:
    weight = make(rng, "f32", 4, 6).core()
    with pytest.raises(ValueError, match="x: dimension 1 is 5, expected 6"):
        _core.linear(np.zeros((1, 5), np.float32), weight)
    with pytest.raises(ValueError, match="dy: dimension 1 is 6, expected 4"):
        _core.linear_backward_input(np.zeros((1, 6), np.float32), weight)
    with pytest.raises(ValueError, match="out: missing, accumulate adds to it"):
        _core.linear(np.zeros((1, 6), np.float32), weight, None, True)
    with pytest.raises(TypeError, match="weight: got"):
        _core.linear(np.zeros((1, 6), np.float32), np.zeros((4, 6), np.float32))
    x = np.zeros((1, 6), np.float32)
    with pytest.raises(ValueError, match="weights: got 4, expected 1 to 3"):
        _core.linear_many(x, (weight,) * 4)
    with pytest.raises(ValueError, match="x: dimension 1 is 6, expected 7"):
        _core.linear_many(x, (weight, make(rng, "f32", 4, 7).core()))
    with pytest.raises(ValueError, match="outs: got 1, expected one for each of 2 weights"):
        _core.linear_many(x, (weight, weight), (np.zeros((1, 4), np.float32),))
    with pytest.raises(TypeError, match="weights: got"):
        _core.linear_many(x, (weight, x))


def test_new_outputs_lie_on_cache_lines(rng: np.random.Generator) -> None:
    """They own their memory, as numpy's arrays do, and numpy's own allocator is as it was."""
    w = QuantWeight.from_array(rng.standard_normal((2000, 16), dtype=np.float32))
    before = np._core.multiarray.get_handler_name()
    for m in (1, 3, 600):
        out = _core.linear(np.ones((m, 16), np.float32), w.handle)
        assert out.ctypes.data % 64 == 0
        assert out.flags.owndata
        kept = out.copy()
        out.resize((2 * m, 2000))
        assert (out[:m] == kept).all()
    assert np._core.multiarray.get_handler_name() == before


HELD = """
import resource
import numpy as np
from quantlab import _core
from quantlab.weight import QuantWeight

_core.set_threads(1)
w = QuantWeight.from_array(np.ones((32000, 4), np.float32)).handle
x = np.ones((2000, 4), np.float32)
_core.linear(x[:4], w)
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (600 << 20),) * 2)
results = [_core.linear(x[:1000], w) for _ in range(4)]
del results
assert _core.linear(x, w).shape == (2000, 32000)
assert np.empty(300 << 18, np.float32).nbytes == 300 << 20
"""


@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="a sanitizer holds what was freed")
def test_freed_results_leave_room_for_others() -> None:
    """Large results that were freed wait for the next call (csrc/core/memory.c): not all, and not at any price."""
    subprocess.run([sys.executable, "-c", HELD], check=True)
