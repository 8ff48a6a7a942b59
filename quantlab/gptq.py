"""GPTQ of one matrix: Hessian, damping, order of columns, corrections. The column loop is in csrc/quant/gptq.c.

A Hessian is on the host or on a device (by number, -1: the host), and the work is done where it is.

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
from quantlab.weight import QuantWeight, check_finite, check_scales

DAMP_STEP = 0.01  # added to damp_percent each time the Hessian turns out not to be positive definite
THREADED_SOLVE = 4096  # columns from which LAPACK's own threads pay; below, they and ours wait for each other
ROWS_PER_SOLVE = 1024  # rows of W whose correction is solved for at once: bounds the float64 copy
_SEARCH = {None: 0, "mse": 1, "hessian": 2}

Array = Any  # np.ndarray on the host, _core.DeviceArray on a device: which of them, the device of the Hessian says


def zeros(m: int, n: int, device: int) -> Array:
    """float32 (m, n) of zeros."""
    return np.zeros((m, n), np.float32) if device < 0 else _core.device_zeros(device, m, n)


def _moved(array: Array, device: int) -> Array:
    """The same array (or None) on the host, or there."""
    if array is None or (array.device if isinstance(array, _core.DeviceArray) else -1) == device:
        return array
    host = array.numpy() if isinstance(array, _core.DeviceArray) else array
    return host if device < 0 else _core.device_array(device, np.ascontiguousarray(host, np.float32))


class Hessian:
    """Second moments of a matrix's inputs: `sum` is the sum over tokens of x x^T, float32 (k, k), lower triangle."""

    def __init__(self, k: int, device: int = -1):
        if not isinstance(k, (int, np.integer)) or k < 1:
            raise ValueError(f"k: got {k!r}, expected a positive number of columns")
        self.sum = zeros(int(k), int(k), device)
        self.device = device
        self.tokens = 0

    def to(self, device: int) -> Hessian:
        """The same on another device, or itself."""
        if device == self.device:
            return self
        other = object.__new__(Hessian)
        other.sum, other.device, other.tokens = _moved(self.sum, device), device, self.tokens
        return other

    @property
    def k(self) -> int:
        return self.sum.shape[0]

    def add(self, x: Any) -> None:
        """Counts the tokens of `x`, (..., k) of any float type; on a device: a DeviceArray (tokens, k)."""
        if self.device >= 0:
            _core.device_gram(self.sum, x, x, True)
            self.tokens += len(x)
            return
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
        diagonal = self.sum.diagonal() if self.device < 0 else _core.device_diagonal(self.sum)
        return diagonal.astype(np.float64) * self.factor


def add_moments(moments: Array, full: Array, own: Array, x: Array) -> None:
    """moments (m, k) += sum over tokens of (full - own) x^T; full, own (t, m), x (t, k), float32 on the host."""
    if isinstance(moments, np.ndarray):
        _core.gram_into(moments, full - own, x, False)
    else:
        _core.device_gram(moments, _core.device_difference(full, own, full.dtype == "float32"), x, False)


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
    return _blas().limit(limits=1) if k < THREADED_SOLVE else nullcontext()


def _cholesky(matrix: np.ndarray) -> bool:
    """Puts the Cholesky factor (lower) of `matrix`, float64 (k, k), of which the lower triangle counts, in its place;
    False: it is not positive definite. LAPACK factors blocks on the diagonal; the rest is ours, on all threads."""
    from scipy.linalg.lapack import dpotrf, dtrtri

    with _blas().limit(limits=1):
        for first in range(0, len(matrix), _core.gptq_panel):
            count = min(_core.gptq_panel, len(matrix) - first)
            _core.gptq_factor_update(matrix, first, count)
            block = matrix[first : first + count, first : first + count]
            upper, info = dpotrf(block.T, lower=0)  # of the transposed block: what Fortran wants
            if info != 0:
                return False
            block[:] = upper.T
            inverse, _ = dtrtri(upper, lower=0)
            _core.gptq_factor_solve(matrix, first, np.ascontiguousarray(inverse))
    return bool(np.isfinite(matrix.diagonal()).all())


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
        self.lower: Any = None
        self.diagonal: Any = None
        self.damp_percent = self._factorize(hessian, config.damp_percent, float(diagonal.mean()), name)
        self.damp = self.damp_percent * float(diagonal.mean())
        self.importance = diagonal + self.damp

    def _factorize(self, hessian: Hessian, damp_percent: float, mean: float, name: str) -> float:
        """The share of the mean that it took."""
        while damp_percent < 1.0:
            try:
                if self._try(hessian, damp_percent * mean):
                    return damp_percent
            except _core.NumericError as error:
                raise _core.NumericError(f"{name}: {error}") from None
            damp_percent = round(damp_percent + DAMP_STEP, 10)
        raise _core.NumericError(
            f"{name}: its Hessian is not positive definite with any damp_percent below 1: use more calibration text"
        )

    def _try(self, hessian: Hessian, damp: float) -> bool:
        """Whether the factor with this damping is there; it is kept."""
        self.lower = _core.gptq_matrix(hessian.sum, self.order, hessian.factor, damp)
        return _cholesky(self.lower)

    def correct(self, w: Any, scale: float, drift: Any, residual: Any) -> Any:
        """W + (W drift + residual) (H + lambda I)^-1, the moments scaled like the Hessian."""
        moments = np.zeros_like(w) if residual is None else residual * np.float32(scale)
        if drift is not None:
            moments += _core.linear_backward_input(w, QuantWeight.from_array(drift).handle) * np.float32(scale)
        return w + self.solve(moments)

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

    def quantize(self, w: Any, *options: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """codes, scales, zeros, loss of each row."""
        return _core.gptq_quantize(
            w, self.lower, self.diagonal, self.order, self.importance, self.dead.view(np.uint8), self.group, *options
        )


class _DeviceFactor(_Factor):
    """The same on a device: `lower` until `finish`, beside the feedback that is made with it."""

    feedback: Any

    def _try(self, hessian: Hessian, damp: float) -> bool:
        self.lower = self.feedback = self.diagonal = None  # their memory, before the next try asks for it
        found = _core.device_gptq_factor(hessian.sum, self.order, hessian.factor, damp)
        if found is None:
            return False
        self.lower, self.feedback, self.diagonal = found
        return bool(np.isfinite(self.diagonal.numpy()).all())

    def correct(self, w: Any, scale: float, drift: Any, residual: Any) -> Any:
        moments = zeros(len(w), w.shape[1], w.device) if residual is None else residual.copy()
        if drift is not None:
            _core.device_product(moments, w, drift)
        _core.device_gptq_correct(w, moments, self.lower, self.order, scale)
        return w

    def finish(self) -> None:
        self.lower = None

    def quantize(self, w: Any, *options: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        return _core.device_gptq_quantize(
            w, self.feedback, self.diagonal, self.order, self.importance, self.dead.view(np.uint8), self.group, *options
        )


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

    Raises ValueError where shapes do not fit, NumericError, naming the layer, where W or H is not finite, W too large
    for float16 scales, or no damping makes H positive definite (it is raised by 0.01 at a time; the report says what
    was used).
    """
    load = {name: lambda: as_float32(w, name)}
    if not isinstance(hessian, Hessian):
        raise TypeError(f"hessian: got {type(hessian).__name__}, expected a quantlab.gptq.Hessian")
    return quantize_shared(load, hessian.to(_core.device_selected()), config, drift, residual)[name]


def quantize_shared(
    weights: Mapping[str, Callable[[], Array]],
    hessian: Hessian,
    config: GPTQConfig,
    drift: Array | None = None,
    residual: Array | None = None,
    done: Callable[[str], None] = lambda name: None,
) -> dict[str, tuple[QuantWeight, GPTQReport]]:
    """Quantizes matrices that have the same inputs: one factorization for all. `weights` loads each as float32 (n, k);
    `done` is called with the name of each as it is finished. All of it where the Hessian is; on the host where the
    device has no kernel for these options (groups of more than 128 columns that are not whole rows or static)."""
    if not isinstance(config, GPTQConfig):
        raise TypeError(f"config: got {type(config).__name__}, expected a GPTQConfig")
    if not isinstance(hessian, Hessian):
        raise TypeError(f"hessian: got {type(hessian).__name__}, expected a quantlab.gptq.Hessian")
    started = time.perf_counter()
    first = next(iter(weights))
    hessian = hessian.to(_device_for(config, hessian))
    drift, residual = _moved(drift, hessian.device), _moved(residual, hessian.device)
    factor = (_Factor if hessian.device < 0 else _DeviceFactor)(hessian, config, first)
    corrected: dict[str, Array] = {}
    if drift is not None or residual is not None:
        for name, load in weights.items():
            corrected[name] = factor.correct(_checked(load(), hessian, name), hessian.factor, drift, residual)
    factor.finish()
    results = {}
    for name, load in weights.items():
        w = corrected.pop(name) if corrected else _checked(load(), hessian, name)
        results[name] = _quantize_matrix(w, factor, hessian, config, name, started)
        started = time.perf_counter()
        done(name)
    return results


def _fixed_scales(config: GPTQConfig) -> bool:
    return config.static_groups or config.group_size == -1


def _device_for(config: GPTQConfig, hessian: Hessian) -> int:
    """Where the Hessian is, or the host."""
    if hessian.device < 0:
        return -1
    group = hessian.k if config.group_size == -1 else min(config.group_size, hessian.k)
    fixed, stale = _fixed_scales(config), config.block_stale_scales
    return hessian.device if _core.device_gptq_supports(hessian.device, hessian.k, group, fixed, stale) else -1


def _checked(w: Array, hessian: Hessian, name: str) -> Array:
    """W where the Hessian is; ValueError and NumericError where it cannot be quantized."""
    if w.ndim != 2 or w.shape[1] != hessian.k or len(w) < 1:
        raise ValueError(
            f"{name}: got shape {w.shape}, expected (n, {hessian.k}), as the Hessian has {hessian.k} columns"
        )
    w = _moved(w, hessian.device)
    if isinstance(w, np.ndarray):
        check_finite(w, name)
    elif not _core.device_finite(w):
        check_finite(w.numpy(), name)
    return w


def _quantize_matrix(
    w: Array, factor: _Factor, hessian: Hessian, config: GPTQConfig, name: str, started: float
) -> tuple[QuantWeight, GPTQReport]:
    whole_row, fixed = config.group_size == -1, _fixed_scales(config)
    reordered = config.desc_act and not fixed and factor.group < hessian.k
    codes, scales, zeros, loss = factor.quantize(
        w, config.bits, config.sym, _SEARCH[config.scale_search], fixed, whole_row and config.scale_search != "hessian",
        config.block_stale_scales, True, reordered,
    )  # fmt: skip
    check_scales(scales, config.bits, name)
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
