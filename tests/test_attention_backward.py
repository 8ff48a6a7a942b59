"""attention_backward on every ISA against float64: grouped heads, packed sequences, keys before the first query."""

from __future__ import annotations

import numpy as np
import pytest
import reference as ref
from test_attention import I64, Case

import quantlab as ql
from quantlab import _core


class Gradients:
    """What one call gives for a case, and what float64 does, with how far rounding may take them apart."""

    def __init__(self, rng: np.random.Generator, case: Case):
        self.case, self.dout = case, rng.standard_normal(case.q.shape, dtype=np.float32)
        self.lse = np.zeros(case.q.shape[:2], np.float32)
        self.out = _core.attention(*case.arguments(), None, self.lse)

    def call(self, *outputs: np.ndarray) -> tuple[np.ndarray, ...]:
        q, k, v, *rest = self.case.arguments()
        return _core.attention_backward(self.dout, q, k, v, self.out, self.lse, *rest, *outputs)

    def expected(self) -> tuple[np.ndarray, ...]:
        return ref.attention_backward(self.dout, *self.case.arguments())

    def bounds(self) -> tuple[np.ndarray, ...]:
        """A dot product errs by about EPS of the sum of its terms' sizes. With the rounding of lse that is the relative
        error of a weight P, beside 4 EPS of exp and products; dP = dout v^T and delta = dout out err alike, and by the
        error of out, which is that of its weights. Sums over rows add a random walk of roundings. On tiles a product of
        high and low bfloat16 parts errs by 2^-17 and not by EPS, 64 times as much."""
        unit = ref.EPS * (64 if _core.isa_selected() == "amx" else 1)
        case, group = self.case, self.case.q.shape[1] // self.case.k.shape[1]
        dq, dk, dv = (np.zeros(a.shape) for a in (case.q, case.k, case.v))
        for b, start in enumerate(case.kv_start):
            rows, span = slice(*case.q_start[b : b + 2]), slice(start, start + case.kv_len[b])
            count, length = rows.stop - rows.start, case.kv_len[b]
            seen, walk = np.tri(count, length, length - count), np.sqrt(length + group * count) + 4
            for head in range(case.q.shape[1]):
                q, k, v = case.q[rows, head], case.k[span, head // group], case.v[span, head // group]
                dout, out, lse = self.dout[rows, head], self.out[rows, head], self.lse[rows, head, None]
                weights = seen * np.exp(np.minimum(q @ k.T * case.scale - lse, 0))
                score = np.abs(q) @ np.abs(k.T) * case.scale + np.abs(lse) + 4
                size, delta = np.abs(dout) @ np.abs(v.T), (np.abs(dout) * np.abs(out)).sum(-1, keepdims=True)
                slopes = np.abs(dout @ v.T - (dout * out).sum(-1, keepdims=True))
                spread = (weights * (score + walk) * size).sum(-1, keepdims=True)  # of delta, through out
                errors = weights * (slopes * (score + walk) + size + delta + spread) * case.scale
                dq[rows, head] += unit * errors @ np.abs(k)
                dk[span, head // group] += unit * errors.T @ np.abs(q)
                dv[span, head // group] += unit * (weights * (score + walk)).T @ np.abs(dout)
        return dq, dk, dv


def check(rng: np.random.Generator, case: Case) -> None:
    g = Gradients(rng, case)
    filled = [ref.guarded(np.full(a.shape, 7)) for a in (case.q, case.k, case.v)]
    got = g.call(*(view for view, _ in filled))
    used = np.zeros(len(case.k), bool)
    for start, length in zip(case.kv_start, case.kv_len, strict=True):
        used[start : start + length] = True
    for name, (view, buffer), result, expected, bound in zip("qkv", filled, got, g.expected(), g.bounds(), strict=True):
        assert result is view and ref.guards_intact(buffer)
        rows = np.ones(len(view), bool) if name == "q" else used
        assert (view[~rows] == 7).all()
        error = np.abs(view - expected)[rows]  # 1e-30: weights that float32 cannot hold
        assert (error <= bound[rows] + 1e-30).all(), f"d{name}: {(error - bound[rows]).max()}, {error.max()}"


@pytest.mark.parametrize("length", [*ref.SIZES, 63, 64, 65, 127, 128, 129, 200, 300])
@pytest.mark.parametrize("hq, hkv, d", [(1, 1, 2), (9, 3, 64), (4, 4, 10), (3, 1, 128)])
def test_one_sequence(isa: str, rng: np.random.Generator, length: int, hq: int, hkv: int, d: int) -> None:
    check(rng, Case(rng, [length], [0], hq, hkv, d))


@pytest.mark.parametrize("d", [2, 4, 6, 16, 34, 96, 256, 258, 7])  # over 256, or odd: the scalar kernel
def test_head_sizes(isa: str, rng: np.random.Generator, d: int) -> None:
    check(rng, Case(rng, [20, 3], [0, 70], 4, 2, d))


@pytest.mark.parametrize("hq, hkv", [(1, 1), (9, 3), (8, 8), (40, 1)])
def test_packed_sequences(isa: str, rng: np.random.Generator, hq: int, hkv: int) -> None:
    queries = rng.integers(0, 40, 20)  # some sequences have no query, only keys
    check(rng, Case(rng, queries, np.zeros(20, I64), hq, hkv, 16))


@pytest.mark.parametrize("queries, past", [([5, 130], [126, 127]), ([1, 2, 150], [300, 127, 129]), ([0, 3], [5, 254])])
def test_keys_before_the_first_query(isa: str, rng: np.random.Generator, queries: list, past: list) -> None:
    check(rng, Case(rng, queries, past, 6, 2, 32))


def test_long_sequence(isa: str, rng: np.random.Generator) -> None:
    check(rng, Case(rng, [1100, 17], [0, 0], 2, 1, 64))


def test_large_scores(isa: str, rng: np.random.Generator) -> None:
    """Scores of some hundred: all but a few weights vanish, and nothing overflows."""
    check(rng, Case(rng, [70], [0], 2, 1, 16, spread=100))


def test_no_worse_than_twice_naive_float32(isa: str, rng: np.random.Generator) -> None:
    case = Case(rng, [300], [0], 2, 2, 64)
    g, scale = Gradients(rng, case), np.float32(case.scale)
    q, k, v, dout = (a[:300].transpose(1, 0, 2) for a in (case.q, case.k, case.v, g.dout))
    scores = np.where(np.tri(300, dtype=bool), q @ k.transpose(0, 2, 1) * scale, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    slopes = dout @ v.transpose(0, 2, 1)
    dscores = weights * (slopes - (weights * slopes).sum(-1, keepdims=True)) * scale
    naive = dscores @ k, dscores.transpose(0, 2, 1) @ q, weights.transpose(0, 2, 1) @ dout
    for result, expected, other in zip(g.call(), g.expected(), naive, strict=True):
        error = np.sqrt(np.mean((result[:300] - expected[:300]) ** 2))
        assert error <= (64 if isa == "amx" else 2) * np.sqrt(np.mean((other.transpose(1, 0, 2) - expected[:300]) ** 2))


def test_is_the_derivative(isa: str, rng: np.random.Generator) -> None:
    """Against central differences of the float64 forward pass, along random directions."""
    case = Case(rng, [21, 9], [0, 4], 6, 2, 8)
    g = Gradients(rng, case)
    q, k, v, *rest = case.arguments()
    for i, gradient in enumerate(g.call()):
        for _ in range(4):
            direction = rng.standard_normal(gradient.shape)

            def loss(x: np.ndarray, i: int = i) -> float:
                return float(
                    (g.dout * ref.attention(*[x if i == j else a for j, a in enumerate((q, k, v))], *rest)[0]).sum()
                )

            expected = ref.slope(loss, (q, k, v)[i], direction)
            np.testing.assert_allclose(
                (gradient * direction).sum(), expected, rtol=0, atol=1e-5 * np.abs(gradient).sum()
            )


def test_gradients_of_a_sequence_do_not_depend_on_its_batch(isa: str, rng: np.random.Generator) -> None:
    """Nor on the threads: bit for bit, a sequence alone and beside others."""
    case = Case(rng, [200, 31, 140], [0, 0, 0], 6, 2, 32)
    g = Gradients(rng, case)
    with ql.backend.use(threads=1):
        dq, dk, dv = g.call()
    with ql.backend.use(threads=3):
        assert [a.tobytes() for a in g.call()] == [a.tobytes() for a in (dq, dk, dv)]
    for b in range(3):
        rows, span = slice(*case.q_start[b : b + 2]), slice(case.kv_start[b], case.kv_start[b] + case.kv_len[b])
        one = np.array([0, rows.stop - rows.start]), np.zeros(1, I64), case.kv_len[b : b + 1]
        alone = _core.attention_backward(
            g.dout[rows], case.q[rows], case.k[span], case.v[span], g.out[rows], g.lse[rows], *one, case.scale
        )
        for result, whole in zip(alone, (dq[rows], dk[span], dv[span]), strict=True):
            assert result.tobytes() == whole.tobytes()


def test_refuses_bad_arguments(rng: np.random.Generator) -> None:
    g = Gradients(rng, Case(rng, [5, 3], [0, 0], 4, 2, 8))
    q, k, v, q_start, kv_start, kv_len, scale = g.case.arguments()
    first = g.dout, q, k, v, g.out, g.lse
    with pytest.raises(ValueError, match="kv_start: sequences 0 and 1 share rows of k"):
        _core.attention_backward(*first, q_start, np.zeros(2, I64), kv_len, scale)
    with pytest.raises(ValueError, match="kv_len: sequence 1 has a range outside of q or k"):
        _core.attention_backward(*first, q_start, kv_start, kv_len + np.array([0, 100]), scale)
    with pytest.raises(ValueError, match="lse: dimension 1 is 3, expected 4"):
        _core.attention_backward(*first[:5], g.lse[:, :3].copy(), q_start, kv_start, kv_len, scale)
    with pytest.raises(ValueError, match="dq: dimension 0 is 7, expected 8"):
        _core.attention_backward(*first, q_start, kv_start, kv_len, scale, g.dout[:7])
