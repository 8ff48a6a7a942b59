"""GPTQ in float64 NumPy as the paper and the reference code describe it: inverse Hessian, right-looking updates.

Written from the description, one column at a time and without regard for speed; quantlab's own form is left-looking and
has no inverse, so that agreement of codes says something.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quantlab.config import GPTQConfig

BLOCK = 128


@dataclass
class Result:
    codes: np.ndarray  # (n, k) in the order of W
    scales: np.ndarray  # (n, groups)
    zeros: np.ndarray  # (n, groups)
    loss: float
    order: np.ndarray  # (k,)


def stored(scale: np.ndarray) -> np.ndarray:
    """As a float16 holds it, never zero, never infinite."""
    half = np.minimum(scale, 65504.0).astype(np.float32).astype(np.float16).astype(np.float64)
    return np.where(half == 0, 2.0**-24, half)


def dequantize(x, scale, zero, maxq):
    """Codes of x (n, count) with scale and zero (n,), and their values."""
    codes = np.clip(np.round(x / scale[:, None]) + zero[:, None], 0, maxq)
    return codes, scale[:, None] * (codes - zero[:, None])


def find_params(x, config: GPTQConfig, importance):
    """Scale and zero (n,) of the weights x (n, count) of one group."""
    maxq = 2**config.bits - 1
    low, high = np.minimum(x.min(1), 0), np.maximum(x.max(1), 0)
    if config.sym:
        high = np.maximum(np.abs(low), high)
        low = np.where((low < 0) | (config.scale_search == "hessian"), -high, low)
    nothing = (low == 0) & (high == 0)
    low, high = np.where(nothing, -1.0, low), np.where(nothing, 1.0, high)

    def grid(p):
        scale = stored((p * high - p * low) / maxq)
        if config.sym:
            return scale, np.full(len(x), (maxq + 1) / 2)
        if config.scale_search == "hessian":
            return scale, np.clip(np.round(-low / ((high - low) / maxq)), 0, maxq)
        return scale, np.clip(np.round(-p * low / scale), 0, maxq)

    scale, zero = grid(1.0)
    if config.scale_search is None:
        return scale, zero
    tries = [1 - i / 100 for i in range(80)] if config.scale_search == "mse" else [(20 - i) / 20 for i in range(11)]
    best = np.full(len(x), np.inf)
    for p in tries:
        tried_scale, tried_zero = grid(p)
        error = dequantize(x, tried_scale, tried_zero, maxq)[1] - x
        cost = (np.abs(error) ** 2.4).sum(1) if config.scale_search == "mse" else (importance * error**2).sum(1)
        better = cost < best
        best = np.where(better, cost, best)
        scale, zero = np.where(better, tried_scale, scale), np.where(better, tried_zero, zero)
    return scale, zero


def order_of(diagonal, config: GPTQConfig, group: int):
    k = len(diagonal)
    if config.desc_act:
        return np.array(sorted(range(k), key=lambda j: -diagonal[j]))
    if config.act_group_aware:
        groups = [
            sorted(range(first, min(first + group, k)), key=lambda j: -diagonal[j]) for first in range(0, k, group)
        ]
        groups.sort(key=lambda members: -diagonal[members[0]])
        return np.array([j for members in groups for j in members])
    return np.arange(k)


def gptq(w, h, config: GPTQConfig) -> Result:
    """w (n, k), h (k, k) the full Hessian; both any float type."""
    w, h = np.array(w, np.float64), np.array(h, np.float64)
    n, k = w.shape
    group = k if config.group_size == -1 else min(config.group_size, k)
    groups, maxq = -(-k // group), 2**config.bits - 1
    whole_row = config.group_size == -1
    dead = np.diag(h) == 0
    h[dead, dead] = 1
    damp = config.damp_percent * np.diag(h).mean()
    importance = np.diag(h) + damp
    scales, zeros = np.zeros((n, groups)), np.zeros((n, groups))
    if whole_row and config.scale_search != "hessian":
        scales[:, 0], zeros[:, 0] = find_params(w, config, importance)
    w[:, dead] = 0
    if whole_row and config.scale_search == "hessian":
        scales[:, 0], zeros[:, 0] = find_params(w, config, importance)
    fixed = whole_row or config.static_groups
    if fixed and not whole_row:
        for g in range(groups):
            part = slice(g * group, (g + 1) * group)
            scales[:, g], zeros[:, g] = find_params(w[:, part], config, importance[part])
    order = order_of(np.diag(h), config, group)
    w, h, importance = w[:, order], h[np.ix_(order, order)], importance[order]
    h[np.diag_indices(k)] += damp
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    group_of = np.arange(k) // group if config.desc_act and not fixed else order // group
    codes, loss = np.zeros((n, k)), 0.0
    for first in range(0, k, BLOCK):
        stale = w.copy()
        for j in range(first, min(first + BLOCK, k)):
            g = group_of[j]
            if not fixed and (j == 0 or group_of[j - 1] != g):
                members = np.flatnonzero(group_of == g)
                source = stale if config.block_stale_scales else w
                scales[:, g], zeros[:, g] = find_params(source[:, members], config, importance[members])
            code, value = dequantize(w[:, j : j + 1], scales[:, g], zeros[:, g], maxq)
            codes[:, j] = code[:, 0]
            error = (w[:, j] - value[:, 0]) / upper[j, j]
            loss += (error**2).sum() / 2
            w[:, j:] -= np.outer(error, upper[j, j:])
    in_order = np.zeros_like(codes)
    in_order[:, order] = codes
    return Result(in_order.astype(np.int64), scales, zeros.astype(np.int64), loss, order)
