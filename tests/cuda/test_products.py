"""linear_forward and linear_backward_input on the GPU: every format, few tokens and many, against float64."""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np
import pytest
import reference as ref

from quantlab import _core

GROUPS = (16, 64, 128)
BITS = (2, 3, 4, 8)


def affine(bits: int, group: int, **more: bool) -> dict:
    return {"format": "affine", "bits": bits, "group": group, **more}


CASES = {
    **{format: {"format": format} for format in ("f32", "f16", "bf16", "int8")},
    **{f"{format}-perm": {"format": format, "perm": True} for format in ("f32", "int8")},
    **{f"affine{bits}-{group}": affine(bits, group) for bits in BITS for group in GROUPS},
    **{f"affine{bits}-32": affine(bits, 32) for bits in range(2, 9)},
    **{f"affine{bits}-zeros": affine(bits, 128, zeros=True, perm=True) for bits in range(2, 9)},
    **{f"affine{bits}-48": affine(bits, 48, zeros=True) for bits in (3, 4, 8)},
    **{f"affine{bits}-ragged": affine(bits, 7, zeros=True, perm=True) for bits in BITS},
    **{f"affine{bits}-row": affine(bits, 1 << 20, zeros=True) for bits in (3, 4)},
    **{f"{format}-{group}": {"format": format, "group": group} for format in ("nf4", "fp4") for group in (32, 64, 128)},
    **{f"{format}-crossing": {"format": format, "group": 34, "perm": True} for format in ("nf4", "fp4")},
    **{f"{format}-double": {"format": format, "group": 64, "double": True} for format in ("nf4", "fp4")},
}  # fmt: skip
PACKED = ("affine4-128", "affine4-zeros", "affine3-64", "affine2-64", "affine8-128", "int8", "nf4-64", "fp4-32")
BF16_ROUNDING = 2.0**-8  # relative: half a unit of the 8 bits of a bfloat16
HALF_ROUNDING = 2.0**-11  # scales of packed weights are float16
SHAPES = [(1, 1), (3, 16), (7, 33), (16, 31), (17, 128), (33, 129), (8, 300), (201, 96), (385, 1024), (35, 1100)]
TOKENS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 130)


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    _core.device_select(0)
    yield
    _core.device_select(-1)


def make(rng: np.random.Generator, case: str, n: int, k: int) -> ref.StoredWeight:
    arguments = dict(CASES[case])
    if "group" in arguments and arguments["format"] == "affine":
        arguments["group"] = min(arguments["group"], k)
    return ref.random_weight(rng, arguments.pop("format"), n, k, **arguments)


def bound(terms: int, magnitude: np.ndarray, case: str) -> np.ndarray:
    """A priori, as on the CPU's tiles: roundings of x and w to bfloat16, of the scales to float16, and of the sums."""
    if case.startswith("f32"):
        return (terms + 6) * ref.EPS / 2 * magnitude
    return (2 * BF16_ROUNDING + BF16_ROUNDING**2 + HALF_ROUNDING + (terms + 6) * ref.EPS) * magnitude


def check(rng: np.random.Generator, case: str, n: int, k: int, tokens: tuple[int, ...]) -> None:
    stored = make(rng, case, n, k)
    weight, values = stored.core(), ref.decode(stored)
    for op, w, terms in ((_core.linear, values.T, k), (_core.linear_backward_input, values, n)):
        a = rng.standard_normal((max(tokens), terms), dtype=np.float32)
        exact, limit = a.astype(np.float64) @ w, bound(terms, np.abs(a) @ np.abs(w), case)
        for m in tokens:
            out, buffer = ref.guarded(np.full((m, w.shape[1]), np.nan))
            assert op(a[:m], weight, out) is out
            assert (np.abs(out - exact[:m]) <= limit[:m]).all(), (op.__name__, n, k, m)
            assert ref.guards_intact(buffer)
            assert np.array_equal(out, op(a[:m], weight)), "not the same twice"


@pytest.mark.parametrize("case", CASES)
def test_matches_float64(rng: np.random.Generator, case: str) -> None:
    for n, k in SHAPES:
        check(rng, case, n, k, TOKENS)


@pytest.mark.parametrize(
    "case", ["affine4-128", "affine4-zeros", "affine3-64", "affine2-64", "affine8-128", "int8", "nf4-64", "fp4-32"]
)
def test_many_tiles(rng: np.random.Generator, case: str) -> None:
    """Several tiles a thread block, clusters that split K, ragged ends of both."""
    check(rng, case, 9000, 512, (1, 8, 16, 32, 64))
    check(rng, case, 1064, 4224, (1, 2, 8, 16, 32, 64, 100))
    check(rng, case, 1064, 11008, (1, 8, 16, 32, 64))  # several items a cluster, few steps of K each
    check(rng, case, 272, 11008, (1, 8, 16, 32, 64))
    for n in (4264, 5816):  # a few items more than an H100 has pairs of blocks, the last one ragged
        check(rng, case, n, 2048, (16, 32, 48, 64))


@pytest.mark.parametrize("case", [*PACKED, "affine4-32", "affine3-128", "affine2-16"])
def test_many_tokens(rng: np.random.Generator, case: str) -> None:
    """Several items of tokens, of outputs and of both, ragged in each; clusters that split K."""
    check(rng, case, 385, 1024, (65, 96, 128, 129, 300, 1024, 1025, 2048, 2049))
    check(rng, case, 1064, 4224, (65, 128, 200, 513))
    check(rng, case, 4360, 512, (65, 100, 300))
    check(rng, case, 17416, 512, (66, 200))  # items that blocks take alone, then shared ones, the last of them ragged
    check(rng, case, 130, 11008, (66, 256))


@pytest.mark.parametrize("case", ["affine4-128", "affine3-64", "nf4-64", "int8"])
def test_error_is_at_most_twice_the_naive_error(rng: np.random.Generator, case: str) -> None:
    """Root mean square; naive: the product of operands rounded to bfloat16."""
    stored = make(rng, case, 193, 1024)
    weight, values = stored.core(), ref.decode(stored)
    x = rng.standard_normal((70, 1024), dtype=np.float32)
    rounded = [a.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64) for a in (x, values)]
    naive, exact = rounded[0] @ rounded[1].T, x.astype(np.float64) @ values.T
    for m in (1, 8, 33, 70):
        error = _core.linear(x[:m], weight) - exact[:m]
        assert np.sqrt(np.mean(error**2)) <= 2 * np.sqrt(np.mean((naive[:m] - exact[:m]) ** 2))


@pytest.mark.parametrize("case", ["f32", "f16", "affine4-128", "affine3-ragged", "nf4-crossing"])
def test_accumulates(rng: np.random.Generator, case: str) -> None:
    for n, k, tokens in ((67, 513, (1, 18, 70)), (4264, 2048, (32,))):
        check_accumulates(rng, case, n, k, tokens)


def check_accumulates(rng: np.random.Generator, case: str, n: int, k: int, tokens: tuple[int, ...]) -> None:
    stored = make(rng, case, n, k)
    weight, values = stored.core(), ref.decode(stored)
    for op, w in ((_core.linear, values.T), (_core.linear_backward_input, values)):
        for m in tokens:
            a = rng.standard_normal((m, w.shape[0]), dtype=np.float32)
            before = rng.standard_normal((m, w.shape[1]), dtype=np.float32)
            out, buffer = ref.guarded(before)
            op(a, weight, out, True)
            limit = bound(w.shape[0] + 1, np.abs(before) + np.abs(a) @ np.abs(w), case)
            assert (np.abs(out - (before + a.astype(np.float64) @ w)) <= limit).all()
            assert ref.guards_intact(buffer)


@pytest.mark.parametrize("case", CASES)
def test_decodes_bit_for_bit(rng: np.random.Generator, case: str) -> None:
    for n, k in ((1, 1), (7, 33), (33, 128), (17, 1100), (64, 4096)):
        weight = make(rng, case, n, k).core()
        on_gpu = _core.decode(weight, 0, n), _core.decode(weight, n // 2, n)
        _core.device_select(-1)
        on_cpu = _core.decode(weight, 0, n)
        _core.device_select(0)
        assert np.array_equal(on_gpu[0], on_cpu)
        assert np.array_equal(on_gpu[1], on_cpu[n // 2 :])
