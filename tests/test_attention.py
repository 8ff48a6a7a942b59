"""Causal attention on every ISA against float64: grouped heads, ragged sequences, key ranges, and the promise that a
token's result is bitwise the same whatever batch or chunk (of more than one query) it is computed in."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import reference as ref

from quantlab import _core, backend

I64 = np.int64


class Case:
    """Random sequences: `queries[i]` new tokens after `past[i]` cached ones; their key rows lie apart, in any order."""

    def __init__(self, rng: np.random.Generator, queries, past, hq: int, hkv: int, d: int, spread: float = 1.0):
        queries, past = np.asarray(queries, I64), np.asarray(past, I64)
        self.q_start = np.concatenate([[0], np.cumsum(queries)]).astype(I64)
        self.kv_len = queries + past
        gaps = np.cumsum(self.kv_len + 3)
        order = rng.permutation(len(queries))
        self.kv_start = np.empty(len(queries), I64)
        self.kv_start[order] = np.concatenate([[0], np.cumsum(self.kv_len[order] + 3)[:-1]])
        rows = int(gaps[-1])
        self.q = rng.standard_normal((int(queries.sum()), hq, d), dtype=np.float32) * np.float32(spread)
        self.k, self.v = (rng.standard_normal((rows, hkv, d), dtype=np.float32) for _ in range(2))
        self.scale = float(np.float32(d**-0.5))

    def arguments(self) -> tuple:
        return self.q, self.k, self.v, self.q_start, self.kv_start, self.kv_len, self.scale

    def bound(self) -> float:
        """A score is a sum of d products, whose roundings add up like a random walk, sqrt(d) EPS of their sizes; an
        error of a score is a relative error of its weight. The sums over keys walk likewise; exp comes on top."""
        d = self.q.shape[2]
        size = np.abs(self.q).sum(-1).max() * np.abs(self.k).max() * self.scale
        return float(np.abs(self.v).max() * ref.EPS * (2 * np.sqrt(d) * size + 2 * np.sqrt(self.kv_len.max()) + 8))


def check(case: Case) -> None:
    out, buffer = ref.guarded(np.zeros(case.q.shape))
    lse, lse_buffer = ref.guarded(np.zeros(case.q.shape[:2]))
    assert _core.attention(*case.arguments(), out, lse) is out
    expected, expected_lse = ref.attention(*case.arguments())
    error = np.abs(out - expected).max()
    assert error <= case.bound(), f"{error} > {case.bound()}"
    # the error of a score, as in the bound, and the rounding of a result of some size
    lse_bound = case.bound() / np.abs(case.v).max() + 2 * ref.EPS * np.abs(expected_lse).max()
    assert np.abs(lse - expected_lse).max() <= lse_bound
    assert ref.guards_intact(buffer) and ref.guards_intact(lse_buffer)


@pytest.mark.parametrize("length", [*ref.SIZES, 63, 64, 65, 130])
@pytest.mark.parametrize("hq, hkv, d", [(1, 1, 2), (9, 3, 64), (4, 4, 10), (3, 1, 128)])
def test_one_sequence(isa: str, rng: np.random.Generator, length: int, hq: int, hkv: int, d: int) -> None:
    check(Case(rng, [length], [0], hq, hkv, d))


@pytest.mark.parametrize("d", [2, 4, 6, 16, 34, 96, 256, 258, 7])  # over 256, or odd: the scalar kernel
def test_head_sizes(isa: str, rng: np.random.Generator, d: int) -> None:
    check(Case(rng, [20, 3], [0, 70], 4, 2, d))


@pytest.mark.parametrize("d", [16, 64])
@pytest.mark.parametrize("hq, hkv", [(1, 1), (9, 3), (8, 8), (40, 1)])
def test_ragged_batch(isa: str, rng: np.random.Generator, hq: int, hkv: int, d: int) -> None:
    queries = rng.integers(0, 40, 20)  # some sequences have no query
    check(Case(rng, queries, rng.integers(1, 90, 20), hq, hkv, d))


def test_decode_after_a_long_past(isa: str, rng: np.random.Generator) -> None:
    check(Case(rng, [1, 1, 2], [1000, 0, 129], 9, 3, 64))


@pytest.mark.parametrize("hq, hkv, d", [(9, 3, 64), (8, 8, 34), (12, 1, 128), (40, 1, 16), (2, 1, 256)])
def test_decode_of_long_sequences(isa: str, rng: np.random.Generator, hq: int, hkv: int, d: int) -> None:
    """Around the parts of keys whose sums are made apart (512), with and without a share of them for each thread: on a
    CPU the same bits for any number of threads, and in any batch of single queries."""
    past = np.array([511, 512, 1023, 0, 1100, 63, 1535, 64])
    check(Case(rng, np.ones(8, I64), past, hq, hkv, d))
    if isa == "cuda":
        return
    case = Case(rng, np.ones(40, I64), np.resize(past, 40), hq, hkv, d)
    results = set()
    for threads in (1, 2, 7):
        with backend.use(threads=threads):
            results.add(_core.attention(*case.arguments()).tobytes())
    together = _core.attention(*case.arguments())
    assert results == {together.tobytes()}
    for s in (0, 1, 2, 3, 4):
        one = slice(s, s + 1)
        rest = case.k, case.v, np.array([0, 1]), case.kv_start[one], case.kv_len[one], case.scale
        assert _core.attention(case.q[one], *rest).tobytes() == together[one].tobytes()


@pytest.mark.parametrize("first, last", [(64, 128), (512, 576), (512, 1024), (600, 700)])
def test_keys_of_no_weight_are_left_out(isa: str, rng: np.random.Generator, first: int, last: int) -> None:
    """Scores that overflow to -infinity, whole blocks and parts of them."""
    case = Case(rng, [1], [1099], 2, 1, 16)
    case.q[:], case.k[:], case.v[:] = 1e20, 1e-20, 1.0
    case.k[case.kv_start[0] + first : case.kv_start[0] + last] = -3e19
    case.v[case.kv_start[0] + first : case.kv_start[0] + last] = 7.0
    np.testing.assert_allclose(_core.attention(*case.arguments()), 1.0, rtol=1e-5)


@pytest.mark.parametrize("length, d", [(70, 16), (150, 64)])
def test_large_scores(isa: str, rng: np.random.Generator, length: int, d: int) -> None:
    """Scores of some hundred: all but a few weights vanish, and nothing overflows."""
    case = Case(rng, [length], [0], 2, 1, d, spread=100)
    out = _core.attention(*case.arguments())
    expected, _ = ref.attention(*case.arguments())
    np.testing.assert_allclose(out, expected, atol=case.bound())


def test_no_worse_than_twice_naive_float32(isa: str, rng: np.random.Generator) -> None:
    case = Case(rng, [300], [0], 2, 2, 64)
    expected, _ = ref.attention(*case.arguments())
    scores = np.einsum("thd,shd->hts", case.q, case.k[:300]) * np.float32(case.scale)
    scores[:, np.triu(np.ones((300, 300), bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    naive = np.einsum("hts,shd->thd", weights / weights.sum(-1, keepdims=True), case.v[:300])

    def rms(a: np.ndarray) -> float:
        return float(np.sqrt(np.mean((a - expected) ** 2)))

    assert rms(_core.attention(*case.arguments())) <= 2 * rms(naive)


@pytest.mark.parametrize("hq, hkv, d", [(9, 3, 64), (2, 2, 6), (5, 1, 32)])
def test_bitwise_whatever_chunk_and_batch(isa: str, rng: np.random.Generator, hq: int, hkv: int, d: int) -> None:
    length = 150
    q = rng.standard_normal((length, hq, d), dtype=np.float32)
    k, v = (rng.standard_normal((length, hkv, d), dtype=np.float32) for _ in range(2))

    def run(first: int, last: int) -> np.ndarray:
        """Queries first..last of the sequence, all their keys present, as one sequence of a call."""
        return _core.attention(
            q[first:last], k, v, np.array([0, last - first]), np.zeros(1, I64), np.array([last]), 0.2
        )

    whole = run(0, length)
    for cuts in ([0, 1, 2, 64, 65, 129, 150], [0, 33, 100, 150], [0, 149, 150]):
        for a, b in itertools.pairwise(cuts):
            if b - a > 1:
                assert run(a, b).tobytes() == whole[a:b].tobytes()
            else:  # one query: a step of generation, which adds in another order
                np.testing.assert_allclose(run(a, b), whole[a:b], rtol=0, atol=150 * ref.EPS)
    # beside other sequences of one call, its keys elsewhere in the cache
    other_q, (other_k, other_v) = q[:17] * 3, (np.ascontiguousarray(a[::-1][:90]) for a in (k, v))
    batch = _core.attention(
        np.concatenate([other_q, q, other_q]), np.concatenate([other_k, k]), np.concatenate([other_v, v]),
        np.array([0, 17, 17 + length, 34 + length]), np.array([0, 90, 5]), np.array([17, length, 60]), 0.2,
    )  # fmt: skip
    assert batch[17 : 17 + length].tobytes() == whole.tobytes()


@pytest.mark.parametrize("length, key, d", [(40, 20, 16), (150, 100, 64)])
def test_later_keys_do_not_reach_earlier_queries(
    isa: str, rng: np.random.Generator, length: int, key: int, d: int
) -> None:
    """Not even as NaN or infinity times a weight of zero."""
    case = Case(rng, [length], [0], 3, 1, d)
    clean = _core.attention(*case.arguments())
    start = int(case.kv_start[0])
    case.k[start + key], case.v[start + key] = np.nan, np.inf
    dirty = _core.attention(*case.arguments())
    assert dirty[:key].tobytes() == clean[:key].tobytes()
    assert np.isnan(dirty[key:]).all()


@pytest.mark.parametrize("size", [2.0**-115, 2.0**-33, 2.0**33])
def test_small_and_large_values(isa: str, rng: np.random.Generator, size: float) -> None:
    """Queries and values of one size, keys of the inverse: scores stay what they were; powers of two round nothing."""
    case = Case(rng, [130], [0], 3, 1, 64)
    (expected, _), bound = ref.attention(*case.arguments()), case.bound()
    case.q *= np.float32(size)
    case.k /= np.float32(size)
    case.v *= np.float32(size)
    np.testing.assert_allclose(_core.attention(*case.arguments()) / size, expected, rtol=0, atol=bound)


def test_refuses_bad_arguments(rng: np.random.Generator) -> None:
    q, k, v, q_start, kv_start, kv_len, scale = Case(rng, [5], [0], 4, 2, 8).arguments()
    with pytest.raises(ValueError, match="kv_len: sequence 0 has a range outside of q or k"):
        _core.attention(q, k, v, q_start, kv_start, kv_len + 100, scale)
    with pytest.raises(ValueError, match="q: 3 heads are no multiple of the 2 heads of k"):
        _core.attention(np.ascontiguousarray(q[:, :3]), k, v, q_start, kv_start, kv_len, scale)
    with pytest.raises(ValueError, match="v: dimension 2 is 4, expected 8"):
        _core.attention(q, k, np.ascontiguousarray(v[:, :, :4]), q_start, kv_start, kv_len, scale)
    with pytest.raises(ValueError, match="kv_len: sequence 0 has a range outside of q or k"):
        _core.attention(q, k, v, np.array([2, np.iinfo(np.int64).min]), kv_start, kv_len, scale)


def test_queries_of_no_sequence_are_zero(rng: np.random.Generator) -> None:
    q, k, v, _, kv_start, kv_len, scale = Case(rng, [5], [0], 4, 2, 8).arguments()
    out = _core.attention(q, k, v, np.array([1, 4]), kv_start, kv_len, scale, None)
    assert np.all(out[1:4] != 0) and not out[[0, 4]].any()
