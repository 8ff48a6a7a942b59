"""GPTQ of one matrix: Hessian, damping, order of columns, corrections. The column loop is in csrc/quant/gptq.c.

Source: Frantar et al. 2022 (arXiv:2210.17323). Group-aware order, Hessian-weighted scales, drift and residual
correction are additions; each is a formula in the docstring of what does it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import numpy as np

from quantlab import _core
from quantlab.arrays import as_float32
from quantlab.config import GPTQConfig
from quantlab.weight import QuantWeight, check_finite

DAMP_STEP = 0.01  # added to damp_percent each time the Hessian turns out not to be positive definite
THREADED_FACTOR = 4096  # columns from which LAPACK's own threads pay; below, they and ours wait for each other
ROWS_PER_SOLVE = 1024  # rows of W whose correction is solved for at once: bounds the float64 copy
_SEARCH = {None: 0, "mse": 1, "hessian": 2}


class Hessian:
    """Second moments of a matrix's inputs: `sum` is the sum over tokens of x x^T, float32 (k, k), lower triangle."""

    def __init__(self, k: int):
        if not isinstance(k, (int, np.integer)) or k < 1:
            raise ValueError(f"k: got {k!r}, expected a positive number of columns")
        self.sum = np.zeros((k, k), np.float32)
        self.tokens = 0

    @property
    def k(self) -> int:
        return self.sum.shape[0]

    def add(self, x: Any) -> None:
        """Counts the tokens of `x`, (..., k) of any float type."""
        array = as_float32(x, "x")
        if array.ndim < 1 or array.shape[-1] != self.k:
            raise ValueError(f"x: got shape {array.shape}, expected (..., {self.k})")
        array = np.ascontiguousarray(array.reshape(-1, self.k))
        _core.gram_into(self.sum, array, array, True)
        self.tokens += len(array)

    @property
    def factor(self) -> float:
        """2 / tokens: what the sum is multiplied by to be the Hessian of the mean squared output error."""
        return 2.0 / self.tokens

    def diagonal(self) -> np.ndarray:
        """float64 (k,), zero for a column that never had an input."""
        return self.sum.diagonal().astype(np.float64) * self.factor


def add_moments(moments: np.ndarray, full: np.ndarray, own: np.ndarray, x: np.ndarray) -> None:
    """moments (m, k) += sum over tokens of (full - own) x^T; full, own float32 (t, m), x float32 (t, k)."""
    _core.gram_into(moments, full - own, x, False)


@dataclass(frozen=True)
class GPTQReport:
    """How one matrix was quantized. loss: mean over tokens of the squared output error, summed over outputs.
    damp_percent: the one that was used. seconds: without the Hessian; a shared factor counts for the first matrix."""

    module: str
    shape: tuple[int, int]
    bits: int
    loss: float
    damp_percent: float
    dead_columns: int
    tokens: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def column_order(diagonal: np.ndarray, config: GPTQConfig, group: int) -> np.ndarray:
    """Columns in the order of quantization, int32 (k,).

    desc_act: falling diagonal. act_group_aware: groups by their largest diagonal element, falling diagonal inside each,
    so that every group keeps its members. Ties stay in the order of W.
    """
    columns = np.arange(diagonal.size)
    if config.desc_act:
        return np.argsort(-diagonal, kind="stable").astype(np.int32)
    if config.act_group_aware:
        largest = np.maximum.reduceat(diagonal, columns[::group])
        rank = np.empty(largest.size, np.int64)
        rank[np.argsort(-largest, kind="stable")] = np.arange(largest.size)
        return np.lexsort((-diagonal, rank[columns // group])).astype(np.int32)
    return columns.astype(np.int32)


@lru_cache(maxsize=1)
def _blas() -> Any:
    """The BLAS libraries of this process, whose number of threads can be limited."""
    import scipy.linalg.lapack  # noqa: F401  its library has to be there to be found
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas")


def _lapack_threads(k: int) -> AbstractContextManager[Any]:
    """One thread for a small matrix, LAPACK's choice for a large one."""
    return _blas().limit(limits=1) if k < THREADED_FACTOR else nullcontext()


class _Factor:
    """Cholesky factor of the permuted, damped Hessian, shared by the matrices with these inputs.

    Built as LAPACK leaves it (`solve` works), then `finish` turns it in place into the feedback of csrc/quant/gptq.h.
    """

    def __init__(self, hessian: Hessian, config: GPTQConfig, name: str):
        if hessian.tokens < 1:
            raise ValueError(f"{name}: the Hessian is empty: add inputs before quantizing")
        diagonal = hessian.diagonal()
        if not np.isfinite(diagonal).all():
            raise _core.NumericError(f"{name}: the inputs of this layer hold NaN or infinity, or overflow float32")
        self.dead = diagonal == 0
        diagonal[self.dead] = 1.0
        self.group = hessian.k if config.group_size == -1 else min(config.group_size, hessian.k)
        self.order = column_order(diagonal, config, self.group)
        self.damp_percent, self.lower = self._factorize(hessian, config.damp_percent, float(diagonal.mean()), name)
        self.damp = self.damp_percent * float(diagonal.mean())
        self.importance = diagonal + self.damp
        self.diagonal: np.ndarray | None = None

    def _factorize(self, hessian: Hessian, damp_percent: float, mean: float, name: str) -> tuple[float, np.ndarray]:
        from scipy.linalg.lapack import dpotrf

        while damp_percent < 1.0:
            try:
                lower = _core.gptq_matrix(hessian.sum, self.order, hessian.factor, damp_percent * mean)
            except _core.NumericError as error:
                raise _core.NumericError(f"{name}: {error}") from None
            with _lapack_threads(len(lower)):
                _, info = dpotrf(lower.T, lower=0, clean=0, overwrite_a=1)  # in place: the view is what Fortran wants
            if info == 0 and np.isfinite(lower.diagonal()).all():
                return damp_percent, lower
            damp_percent = round(damp_percent + DAMP_STEP, 10)
        raise _core.NumericError(
            f"{name}: its Hessian is not positive definite with any damp_percent below 1: use more calibration text"
        )

    def solve(self, rows: np.ndarray) -> np.ndarray:
        """rows (H + lambda I)^-1, float32 (n, k)."""
        from scipy.linalg.lapack import dpotrs

        backward = self.order[::-1]
        out = np.empty_like(rows)
        for i in range(0, len(rows), ROWS_PER_SOLVE):
            right = np.ascontiguousarray(rows[i : i + ROWS_PER_SOLVE, backward], np.float64)
            with _lapack_threads(len(self.lower)):
                solved, _ = dpotrs(self.lower.T, right.T, lower=0, overwrite_b=1)
            out[i : i + ROWS_PER_SOLVE, backward] = solved.T
        return out

    def finish(self) -> None:
        self.diagonal = _core.gptq_feedback(self.lower)


def quantize(
    w: Any,
    hessian: Hessian,
    config: GPTQConfig,
    name: str = "weight",
    drift: np.ndarray | None = None,
    residual: np.ndarray | None = None,
) -> tuple[QuantWeight, GPTQReport]:
    """Quantizes one matrix, w (n, k) of any float type, by GPTQ over the inputs that `hessian` has seen.

    drift (k, k): sum over tokens of (x_full - x) x^T, where x_full is the input in the unquantized model.
    residual (n, k): sum over tokens of (r_full - r) x^T, r the residual stream that the outputs are added to.
    Both aim at the unquantized model: W' = W + (W drift + residual) (H + lambda I)^-1 is quantized in place of W.

    Raises ValueError where shapes do not fit, NumericError, naming the layer, where W or H is not finite or no damping
    makes H positive definite (it is raised by 0.01 at a time; the report says what was used).
    """
    return quantize_shared({name: lambda: as_float32(w, name)}, hessian, config, drift, residual)[name]


def quantize_shared(
    weights: Mapping[str, Callable[[], np.ndarray]],
    hessian: Hessian,
    config: GPTQConfig,
    drift: np.ndarray | None = None,
    residual: np.ndarray | None = None,
    done: Callable[[str], None] = lambda name: None,
) -> dict[str, tuple[QuantWeight, GPTQReport]]:
    """Quantizes matrices that have the same inputs: one factorization for all. `weights` loads each as float32 (n, k);
    `done` is called with the name of each as it is finished."""
    if not isinstance(config, GPTQConfig):
        raise TypeError(f"config: got {type(config).__name__}, expected a GPTQConfig")
    if not isinstance(hessian, Hessian):
        raise TypeError(f"hessian: got {type(hessian).__name__}, expected a quantlab.gptq.Hessian")
    started = time.perf_counter()
    first = next(iter(weights))
    factor = _Factor(hessian, config, first)
    corrected: dict[str, np.ndarray] = {}
    if drift is not None or residual is not None:
        for name, load in weights.items():
            corrected[name] = _correct(_checked(load(), hessian.k, name), factor, hessian.factor, drift, residual)
    factor.finish()
    results = {}
    for name, load in weights.items():
        w = corrected.pop(name) if corrected else _checked(load(), hessian.k, name)
        results[name] = _quantize_matrix(w, factor, hessian, config, name, started)
        started = time.perf_counter()
        done(name)
    return results


def _checked(w: np.ndarray, k: int, name: str) -> np.ndarray:
    if w.ndim != 2 or w.shape[1] != k or len(w) < 1:
        raise ValueError(f"{name}: got shape {w.shape}, expected (n, {k}), as the Hessian has {k} columns")
    check_finite(w, name)
    return w


def _correct(
    w: np.ndarray, factor: _Factor, scale: float, drift: np.ndarray | None, residual: np.ndarray | None
) -> np.ndarray:
    """W + (W drift + residual) (H + lambda I)^-1, the moments scaled like the Hessian."""
    moments = np.zeros_like(w) if residual is None else residual * np.float32(scale)
    if drift is not None:
        moments += _core.linear_backward_input(w, QuantWeight.from_array(drift).handle) * np.float32(scale)
    return w + factor.solve(moments)


def _quantize_matrix(
    w: np.ndarray, factor: _Factor, hessian: Hessian, config: GPTQConfig, name: str, started: float
) -> tuple[QuantWeight, GPTQReport]:
    whole_row = config.group_size == -1
    fixed = config.static_groups or whole_row
    reordered = config.desc_act and not fixed and factor.group < hessian.k
    codes, scales, zeros, loss = _core.gptq_quantize(
        w, factor.lower, factor.diagonal, factor.order, factor.importance, factor.dead.view(np.uint8), factor.group,
        config.bits, config.sym, _SEARCH[config.scale_search], fixed, whole_row and config.scale_search != "hessian",
        config.block_stale_scales, True, reordered,
    )  # fmt: skip
    report = GPTQReport(
        name, (len(w), hessian.k), config.bits, float(loss.sum()), factor.damp_percent, int(factor.dead.sum()),
        hessian.tokens, time.perf_counter() - started,
    )  # fmt: skip
    meta = {**config.to_dict(), "damp_percent_used": factor.damp_percent, "loss": report.loss}
    weight = QuantWeight(
        "affine", config.bits, (len(w), hessian.k), factor.group, codes, scales, None if config.sym else zeros,
        factor.order if reordered else None, meta=MappingProxyType(meta),
    )  # fmt: skip
    return weight, report
