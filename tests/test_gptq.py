"""GPTQ of one matrix against the float64 reference, option by option."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from gptq_reference import dequantize, find_params, gptq
from threadpoolctl import threadpool_limits

import quantlab as ql
from quantlab import _core
from quantlab.config import GPTQConfig
from quantlab.gptq import Hessian, _cholesky, column_order, quantize

ORDERS = [
    {},
    {"desc_act": True},
    {"desc_act": True, "static_groups": True},
    {"static_groups": True},
    {"act_group_aware": True},
]
OPTIONS = [
    {"bits": bits, "sym": sym, "scale_search": search, "block_stale_scales": stale, **order}
    for (bits, sym, search, stale), order in itertools.product(
        [(4, True, None, True), (3, False, None, False), (2, False, "mse", False), (8, True, "hessian", True),
         (4, False, "hessian", False), (3, True, "mse", True)],
        ORDERS,
    )
]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _one_blas_thread() -> Iterator[None]:
    """The oracle's matrices are small: BLAS threads would only wait for each other."""
    with threadpool_limits(1):
        yield


def layer(seed: int, n: int | None = None, k: int | None = None) -> tuple[np.ndarray, Hessian]:
    """A matrix with correlated inputs of very different sizes, two equal diagonals and some dead columns."""
    rng = np.random.default_rng(seed)
    n, k = n or int(rng.integers(3, 70)), k or int(rng.integers(5, 330))
    w = rng.standard_normal((n, k), np.float32) * np.exp(rng.standard_normal((1, k), np.float32))
    mix = np.eye(k, dtype=np.float32) + 0.3 * rng.standard_normal((k, k), np.float32) / k**0.5
    x = rng.standard_normal((2 * k + 8, k), np.float32) @ mix
    x *= np.exp(rng.standard_normal(k, np.float32))
    x[:, rng.random(k) < 0.05] = 0
    w[rng.integers(n)] = 0
    w[rng.integers(n)] = np.abs(w[rng.integers(n)])
    hessian = Hessian(k)
    for part in np.array_split(x, 3):
        hessian.add(part)
    return w, hessian


@pytest.mark.parametrize("k", [1, 2, 7, 8, 15, 17, 33, 63, 64, 65, 128, 131, 200, 300])
def test_cholesky(k: int) -> None:
    """Within a few roundings of LAPACK's, the same for any number of threads, on every ISA; the upper triangle is not
    read."""
    x = np.random.default_rng(k).standard_normal((2 * k, k))
    matrix = x.T @ x
    expected = np.linalg.cholesky(matrix)
    for isa in [name for name, usable in ql.info()["isa"]["usable"].items() if usable]:
        found = []
        for threads in (1, 2):
            lower = np.where(np.tri(k, dtype=bool), matrix, np.nan)
            with ql.backend.use(isa=isa, threads=threads):
                assert _cholesky(lower)
            found.append(np.tril(lower))
        np.testing.assert_array_equal(*found)
        np.testing.assert_allclose(found[0], expected, rtol=0, atol=1e-13 * np.abs(expected).max())
    matrix[k - 1, k - 1] = -1.0
    assert not _cholesky(matrix)


def test_cholesky_refuses() -> None:
    square, narrow = np.eye(70), np.ones((70, 3))
    for call in (
        lambda: _core.gptq_factor_update(narrow, 0, 3),
        lambda: _core.gptq_factor_update(square, 64, 7),
        lambda: _core.gptq_factor_update(square, -1, 2),
        lambda: _core.gptq_factor_update(square, 0, 65),
        lambda: _core.gptq_factor_solve(square, 60, np.eye(11)),
        lambda: _core.gptq_factor_solve(square, 0, narrow),
    ):
        with pytest.raises(ValueError):
            call()


def full(hessian: Hessian) -> np.ndarray:
    lower = np.tril(hessian.sum).astype(np.float64) * hessian.factor
    return lower + np.tril(lower, -1).T


def codes_of(weight: ql.QuantWeight) -> np.ndarray:
    """Integer codes (n, k) in the order of W."""
    n, k = weight.shape
    bits = np.unpackbits(weight.codes.view(np.uint8).reshape(n, -1), axis=1, bitorder="little")[:, : k * weight.bits]
    codes = bits.reshape(n, k, weight.bits) @ (1 << np.arange(weight.bits))
    if weight.perm is None:
        return codes
    out = np.empty_like(codes)
    out[:, weight.perm] = codes
    return out


def assert_equal(w: np.ndarray, hessian: Hessian, config: GPTQConfig) -> None:
    weight, report = quantize(w, hessian, config)
    expected = gptq(w, full(hessian), config)
    np.testing.assert_array_equal(weight.scales, expected.scales)
    if config.sym:
        assert weight.zeros is None
        assert (expected.zeros == 2 ** (config.bits - 1)).all()
    else:
        np.testing.assert_array_equal(weight.zeros, expected.zeros)
    np.testing.assert_array_equal(codes_of(weight), expected.codes)
    assert report.loss == pytest.approx(expected.loss, rel=1e-9)
    group_of = np.arange(weight.shape[1]) // weight.group
    if weight.perm is not None:
        group_of = group_of[np.argsort(weight.perm)]
    value = expected.scales[:, group_of] * (expected.codes - expected.zeros[:, group_of])
    np.testing.assert_array_equal(weight.dequantize(), value.astype(np.float32))


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: " ".join(f"{k}={v}" for k, v in o.items()))
def test_options_give_the_codes_of_the_reference(options: dict) -> None:
    for seed, group_size in [(1, 32), (2, 48), (3, -1), (4, 200)]:
        w, hessian = layer(seed)
        assert_equal(w, hessian, GPTQConfig(group_size=group_size, **options))


@pytest.mark.parametrize("options", OPTIONS[::4], ids=lambda o: " ".join(f"{k}={v}" for k, v in o.items()))
def test_every_isa_gives_the_codes_of_the_reference(isa: str, options: dict) -> None:
    """Rows that fill no tile, one tile and several; groups that fill no vector of columns."""
    for seed, n, group_size in [(5, 1, 33), (6, 48, 64), (7, 97, 7)]:
        w, hessian = layer(seed, n=n)
        assert_equal(w, hessian, GPTQConfig(group_size=group_size, **options))


def hard_weights(rng: np.random.Generator, n: int, k: int) -> dict[str, np.ndarray]:
    normal = rng.standard_normal((n, k))
    return {
        "normal": normal,
        "any size": normal * 10.0 ** rng.integers(-44, 37, (n, 1)),  # beyond what scales of float16 reach, both ways
        "wide": normal * np.exp(4 * rng.standard_normal((n, k))),
        "outliers": np.where(rng.random((n, k)) < 0.97, 1e-6 * normal, normal),
        "near a grid": 0.0137 * rng.integers(-127, 128, (n, k)) + 1e-7 * normal,  # errors as small as float32's own
        "positive": np.abs(normal),
        "zero": np.zeros((n, k)),
    }


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_search_in_float32_finds_the_grid_of_float64(
    isa: str, bits: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """scale_search="mse" looks with float32 powers first: what it then leaves out must not have been the best grid."""
    monkeypatch.setattr(ql.gptq, "check_scales", lambda *_: None)  # sizes that are refused are of use here
    for n, k, group in [(49, 132, 32), (9, 300, 300), (3, 9, 1)]:
        hessian = Hessian(k)  # of independent inputs: no column changes another
        hessian.sum[:], hessian.tokens = np.eye(k), 2
        for (name, w), sym in itertools.product(hard_weights(rng, n, k).items(), (True, False)):
            config = GPTQConfig(bits=bits, group_size=group, sym=sym, scale_search="mse")
            weight, _ = quantize(w.astype(np.float32), hessian, config)
            for g, first in enumerate(range(0, k, group)):
                part = w[:, first : first + group].astype(np.float32).astype(np.float64)
                scale, zero = find_params(part, config, np.ones(part.shape[1]))
                np.testing.assert_array_equal(weight.scales[:, g], scale, err_msg=name)
                np.testing.assert_array_equal(zero if sym else weight.zeros[:, g], zero, err_msg=name)


@pytest.mark.parametrize("seed", range(50))
def test_random_layers_give_the_codes_of_the_reference(seed: int) -> None:
    rng = np.random.default_rng(1000 + seed)
    options = OPTIONS[int(rng.integers(len(OPTIONS)))]
    group_size = int(rng.choice([-1, 1, 7, 16, 32, 33, 64, 100, 128, 130, 256]))
    w, hessian = layer(100 + seed)
    assert_equal(
        w, hessian, GPTQConfig(group_size=group_size, damp_percent=float(rng.choice([0.01, 0.05, 0.1])), **options)
    )


@pytest.mark.parametrize("k", [1, 2, 3, 127, 128, 129, 255, 256, 257])
def test_sizes_around_the_block(k: int) -> None:
    w, hessian = layer(k, n=33, k=k)
    for group_size in (-1, 64, 96):
        assert_equal(w, hessian, GPTQConfig(bits=4, group_size=group_size, sym=False, block_stale_scales=True))


def test_same_codes_on_any_number_of_threads() -> None:
    w, hessian = layer(5, n=300, k=200)
    config, codes = GPTQConfig.recommended(4), []
    for threads in (1, 2, 5):
        with ql.backend.use(threads=threads):
            codes.append(quantize(w, hessian, config)[0].codes)
    assert all(np.array_equal(codes[0], other) for other in codes[1:])


def test_symmetric_row_without_negative_weights_keeps_the_rule_of_the_reference() -> None:
    hessian = Hessian(4)
    hessian.add(np.eye(4, dtype=np.float32))
    weight, _ = quantize(np.array([[0.0, 1.5, 3.0, 0.75]]), hessian, GPTQConfig(bits=4, group_size=-1))
    assert weight.scales[0, 0] == pytest.approx(3.0 / 15, rel=1e-3)  # half the range that the codes can reach
    zero, _ = quantize(np.zeros((1, 4)), hessian, GPTQConfig(bits=4, group_size=-1))
    assert zero.scales[0, 0] == pytest.approx(2.0 / 15, rel=1e-3)
    assert not zero.dequantize().any()


def test_scales_fit_a_float16() -> None:
    w, hessian = layer(7, n=4, k=64)
    w[1] *= 1e-12
    scales = quantize(w, hessian, GPTQConfig(group_size=16))[0].scales
    assert np.isfinite(scales).all()
    assert (scales > 0).all()
    np.testing.assert_array_equal(scales, scales.astype(np.float16))
    w[0] *= 1e12
    with pytest.raises(ql.NumericError, match=r"^w: a group of row 0 spans 982,560 or more"):
        quantize(w, hessian, GPTQConfig(group_size=16), name="w")


def test_group_aware_order_keeps_groups_together() -> None:
    diagonal = np.array([1.0, 5.0, 2.0, 2.0, 9.0, 0.5, 3.0])
    order = column_order(diagonal, GPTQConfig(act_group_aware=True, group_size=3), 3)
    assert order.tolist() == [4, 3, 5, 1, 2, 0, 6]


def test_drift_and_residual_are_the_formulas() -> None:
    rng = np.random.default_rng(3)
    w, x = rng.standard_normal((6, 40), np.float32), rng.standard_normal((200, 40), np.float32)
    x_full = x + 0.2 * rng.standard_normal(x.shape, np.float32)
    gap = rng.standard_normal((200, 6), np.float32)
    hessian = Hessian(40)
    hessian.add(x)
    drift, residual = (x_full - x).T @ x, gap.T @ x
    config = GPTQConfig.recommended(3, group_size=16)
    weight, _ = quantize(w, hessian, config, drift=drift, residual=residual)
    h = x.astype(np.float64).T @ x
    h += config.damp_percent * np.diag(h).mean() * np.eye(40)
    corrected = w + np.linalg.solve(h, (w.astype(np.float64) @ drift + residual).T).T
    expected, _ = quantize(corrected.astype(np.float32), hessian, config)
    assert (codes_of(weight) == codes_of(expected)).mean() > 0.99
    target = x_full @ w.T + gap
    errors = [np.square(x @ q.dequantize().T - target).sum() for q in (weight, quantize(w, hessian, config)[0])]
    assert errors[0] < 0.9 * errors[1]


def test_no_inputs_left_for_any_column() -> None:
    hessian = Hessian(8)
    hessian.add(np.zeros((4, 8), np.float32))
    weight, report = quantize(np.ones((2, 8)), hessian, GPTQConfig(group_size=4))
    assert report.dead_columns == 8
    assert not weight.dequantize().any()


def test_singular_hessian_raises_the_damping_and_reports_it() -> None:
    rng = np.random.default_rng(0)
    hessian = Hessian(64)
    hessian.add(rng.standard_normal((3, 64), np.float32))
    weight, report = quantize(
        rng.standard_normal((8, 64), np.float32), hessian, GPTQConfig(damp_percent=0.0, group_size=32)
    )
    assert report.damp_percent == pytest.approx(0.01)
    assert weight.meta["damp_percent_used"] == report.damp_percent
    assert np.isfinite(weight.dequantize()).all()


def test_a_matrix_no_damping_can_mend_is_an_error_with_the_layers_name() -> None:
    hessian = Hessian(4)
    hessian.tokens = 1
    hessian.sum[:] = np.tril(np.full((4, 4), -100.0, np.float32))
    np.fill_diagonal(hessian.sum, 1.0)
    with pytest.raises(ql.NumericError, match=r"layers\.3\.q_proj.*damp_percent"):
        quantize(np.ones((2, 4)), hessian, GPTQConfig(), name="layers.3.q_proj")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_is_an_error_with_the_layers_name(bad: float) -> None:
    w, hessian = layer(9, n=4, k=20)
    x = np.zeros((2, 20), np.float32)
    x[1, 3] = bad
    broken = Hessian(20)
    broken.add(x)
    with pytest.raises(ql.NumericError, match="that layer"):
        quantize(w, broken, GPTQConfig(), name="that layer")
    w[2, 7] = bad
    with pytest.raises(ql.NumericError, match="that layer"):
        quantize(w, hessian, GPTQConfig(), name="that layer")


def test_wrong_arguments() -> None:
    w, hessian = layer(11, n=4, k=20)
    with pytest.raises(ValueError, match="the Hessian is empty"):
        quantize(w, Hessian(20), GPTQConfig())
    with pytest.raises(ValueError, match=r"expected \(n, 20\)"):
        quantize(w[:, :19], hessian, GPTQConfig())
    with pytest.raises(TypeError, match="expected a GPTQConfig"):
        quantize(w, hessian, ql.RTNConfig())
    with pytest.raises(ValueError, match=r"expected \(\.\.\., 20\)"):
        hessian.add(np.zeros((3, 19), np.float32))
    with pytest.raises(ValueError, match="k: got 0"):
        Hessian(0)


@pytest.mark.parametrize(
    "order, fixed, store_ordered, message",
    [([0, 2, 1, 3], False, False, "order: the columns of a group"), ([0, 1, 2, 3], True, True, "store_ordered: fixed")],
)
def test_groups_that_the_column_loop_cannot_follow(order, fixed, store_ordered, message) -> None:
    w, ones, dead = np.ones((2, 4), np.float32), np.ones(4), np.zeros(4, np.uint8)
    flags = (True, 0, fixed, False, False, False, store_ordered)
    with pytest.raises(ValueError, match=message):
        _core.gptq_quantize(w, np.eye(4), ones, np.array(order, np.int32), ones, dead, 2, 4, *flags)


def test_hessian_takes_batches_of_any_float_type() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 5, 12)).astype(np.float16)
    hessian = Hessian(12)
    hessian.add(x)
    flat = x.reshape(-1, 12).astype(np.float64)
    assert hessian.tokens == 10
    bound = 2.0**-15 * (np.abs(flat).T @ np.abs(flat))  # tiles leave out the products of low parts, 2^-16 at most
    assert (np.abs(np.tril(hessian.sum - flat.T @ flat)) <= bound).all()


def test_reference_rounds_half_to_even() -> None:
    codes, _ = dequantize(np.array([[0.5, 1.5, 2.5]]), np.ones(1), np.zeros(1), 15)
    assert codes.tolist() == [[0, 2, 2]]
