"""The oracle: every op in NumPy float64, written for reading. Shapes and names are those of csrc/quantlab.h.

`StoredWeight` holds a weight the way the C core does; `random_weight` makes one of any format with arbitrary codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from quantlab import _core

FORMATS = ("f32", "f16", "bf16", "int8", "affine", "nf4", "fp4")
SIZES = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33)  # around the vector lengths
EPS = float(np.finfo(np.float32).eps)  # 2^-23: one rounding errs by at most half of it
IGNORED = -100
ROUNDING = ("avx512_bf16", "amx")  # ISAs whose products round both operands to bfloat16, unless `precise` is set

NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
)  # fmt: skip
_FP4 = np.array([0.0, 0.005208333333, 2 / 3, 1.0, 1 / 3, 0.5, 1 / 6, 0.25])
FP4 = np.concatenate([_FP4, -_FP4]).astype(np.float32).astype(np.float64)


# ---- activations ---------------------------------------------------------------------------------------------------


def _f64(array) -> np.ndarray:
    return np.asarray(array, np.float64)


def rmsnorm(x, gain, eps) -> np.ndarray:
    """x (t, c), gain (c,) -> x / sqrt(mean(x^2) + eps) * gain."""
    x = _f64(x)
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * _f64(gain)


def rope(x, cos, sin, positions) -> np.ndarray:
    """x (t, heads, d), cos and sin (positions, d/2): element i turns with element i + d/2."""
    x, cos, sin = _f64(x), _f64(cos)[positions][:, None], _f64(sin)[positions][:, None]
    low, high = np.split(x, 2, -1)
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], -1)


def attention(q, k, v, q_start, kv_start, kv_len, scale) -> tuple[np.ndarray, np.ndarray]:
    """q (t, hq, d), k and v (rows, hkv, d) -> out (t, hq, d), log-sum-exp (t, hq); causal, grouped heads, ragged."""
    group = q.shape[1] // k.shape[1]
    out, lse = np.zeros(q.shape), np.zeros(q.shape[:2])
    for b, (start, length) in enumerate(zip(kv_start, kv_len, strict=True)):
        rows, keys = slice(q_start[b], q_start[b + 1]), slice(start, start + length)
        kb, vb = (np.repeat(_f64(a[keys]), group, 1) for a in (k, v))
        scores = np.einsum("thd,shd->hts", _f64(q[rows]), kb) * scale
        queries = scores.shape[1]
        hidden = np.arange(length)[None] > np.arange(length - queries, length)[:, None]
        scores[:, hidden] = -np.inf
        lse[rows] = logsumexp(scores).T
        out[rows] = np.einsum("hts,shd->thd", np.exp(scores - lse[rows].T[:, :, None]), vb)
    return out, lse


def swiglu(gate, up) -> np.ndarray:
    gate = _f64(gate)
    with np.errstate(over="ignore"):  # exp of a large number: the quotient is then 0, which is right
        return gate / (1 + np.exp(-gate)) * _f64(up)


def rmsnorm_backward(dy, x, gain, eps) -> np.ndarray:
    """The gradient of x (t, c) from dy."""
    x, slopes = _f64(x), _f64(dy) * _f64(gain)
    inverse = 1 / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps)
    return inverse * (slopes - x * inverse**2 * np.mean(slopes * x, -1, keepdims=True))


def attention_backward(dout, q, k, v, q_start, kv_start, kv_len, scale) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The gradients of q, k, v (0 in rows of no sequence), by matrices: dS = P (dout v^T - delta), P the weights."""
    group, heads = q.shape[1] // k.shape[1], q.shape[1]
    dq, dk, dv = (np.zeros(a.shape) for a in (q, k, v))
    out, lse = attention(q, k, v, q_start, kv_start, kv_len, scale)
    for b, (start, length) in enumerate(zip(kv_start, kv_len, strict=True)):
        rows, keys = slice(q_start[b], q_start[b + 1]), slice(start, start + length)
        seen = np.tri(rows.stop - rows.start, length, length - (rows.stop - rows.start))
        for head in range(heads):
            qh, kh, vh, slopes = (
                _f64(a) for a in (q[rows, head], k[keys, head // group], v[keys, head // group], dout[rows, head])
            )
            weights = np.exp(np.where(seen, qh @ kh.T * scale - lse[rows, head, None], -np.inf))
            delta = (slopes * out[rows, head]).sum(-1, keepdims=True)
            dscores = weights * (slopes @ vh.T - delta) * scale
            dq[rows, head] = dscores @ kh
            dk[keys, head // group] += dscores.T @ qh
            dv[keys, head // group] += weights.T @ slopes
    return dq, dk, dv


def swiglu_backward(dy, gate, up) -> tuple[np.ndarray, np.ndarray]:
    dy, gate, up = _f64(dy), _f64(gate), _f64(up)
    with np.errstate(over="ignore"):
        sigmoid = 1 / (1 + np.exp(-gate))
    return dy * up * sigmoid * (1 + gate * (1 - sigmoid)), dy * gate * sigmoid


def uniform(count, seed, stream) -> np.ndarray:
    """The random numbers of dropout: splitmix64's output function over seed, stream and place; 24 bits, in [0, 1)."""

    def mix(z: np.ndarray) -> np.ndarray:
        z = z + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    of_stream = mix(mix(np.array([seed], np.uint64)) ^ np.array([stream], np.int64).view(np.uint64))
    return (mix(of_stream ^ np.arange(count, dtype=np.uint64)) >> np.uint64(40)) / 2.0**24


def dropout(x, p, seed, stream) -> np.ndarray:
    x = _f64(x)
    return np.where(
        uniform(x.size, seed, stream).reshape(x.shape) >= np.float32(p), x / (1 - np.float64(np.float32(p))), 0
    )


def adamw(w, m, v, g, lr, beta1, beta2, eps, weight_decay, step, max_norm) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """w, m, v after a step (Loshchilov and Hutter 2019, algorithm 2, as torch.optim.AdamW scales it)."""
    w, m, v, g = (_f64(a) for a in (w, m, v, g))
    norm = np.sqrt((g * g).sum())
    g = g * (max_norm / norm if 0 < max_norm < norm else 1)
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    size = (m / (1 - beta1**step)) / (np.sqrt(v / (1 - beta2**step)) + eps)
    return w * (1 - lr * weight_decay) - lr * size, m, v


def slope(f, x, direction, step=2.0**-13) -> float:
    """The derivative of f at x along `direction` by central differences in float64; errs by about step^2."""
    x, direction = _f64(x), _f64(direction)
    return (f(x + step * direction) - f(x - step * direction)) / (2 * step)


def logsumexp(x) -> np.ndarray:
    """Over the last axis."""
    maximum = x.max(-1, keepdims=True, initial=-np.inf)
    return (maximum + np.log(np.exp(x - maximum).sum(-1, keepdims=True)))[..., 0]


def cross_entropy(logits, targets) -> tuple[np.ndarray, np.ndarray]:
    """logits (t, v), targets (t,) -> loss (t,), dlogits (t, v); both 0 where the target is -100."""
    logits, targets = _f64(logits), np.asarray(targets)
    counted = targets != IGNORED
    rows, columns = np.nonzero(counted)[0], targets[counted]
    lse = logsumexp(logits)
    gradient = np.exp(logits - lse[:, None])
    gradient[rows, columns] -= 1
    loss = np.zeros(len(targets))
    loss[rows] = lse[rows] - logits[rows, columns]
    return loss, gradient * counted[:, None]


def gram(h, a, b, lower) -> np.ndarray:
    """h (ka, kb) + a^T b; where lower is set only elements with row >= column change."""
    update = _f64(a).T @ _f64(b)
    return _f64(h) + (np.tril(update) if lower else update)


# ---- weights -------------------------------------------------------------------------------------------------------


@dataclass
class StoredWeight:
    """The arrays of a ql_weight (see csrc/quantlab.h). double: (scale_codes, scale_absmax, scale_map, scale_offset)."""

    format: str
    bits: int
    n: int
    k: int
    group: int
    codes: np.ndarray
    scales: np.ndarray | None = None
    zeros: np.ndarray | None = None
    perm: np.ndarray | None = None
    double: tuple | None = None

    def core(self) -> _core.Weight:
        return _core.Weight(self.format, self.bits, self.n, self.k, self.group, self.codes, self.scales, self.zeros,
                            self.perm, *(self.double or ()))  # fmt: skip


def gemv_rows(w: StoredWeight) -> int:
    """Rows of x up to which the selected ISA's products with w may have kernels of decode (formats/packed.h)."""
    on_tiles = w.format == "f32"  # on vectors, while more rows are on tiles
    if w.format == "int8" or (w.format == "affine" and w.bits > 4):  # bytes
        on_tiles = 32 <= (w.k if w.format == "int8" else min(w.group, w.k)) <= 65_536
    elif w.format in ("affine", "nf4", "fp4"):  # panels, unless they would be padding mostly
        affine = w.format == "affine"
        group = w.group if affine or w.k % w.group == 0 else w.k if w.group % w.k == 0 else 0  # of one row
        step = {4: 8, 3: 32, 2: 16}[w.bits] if affine else 8  # columns of a block
        columns = sum(-(-min(group, w.k - start) // step) * step for start in range(0, w.k, group or w.k))
        on_tiles = group > 0 and 2 * columns <= 3 * w.k + 2 * step
        on_tiles &= group <= 65_536 if affine else group <= 256 and not _core.precise()
    return _core.gemv_rows() if on_tiles else min(4, _core.gemv_rows())


def pack(codes, bits) -> np.ndarray:
    """codes (n, k) below 2^bits -> uint32 (n, ceil(k bits / 32)): each row a little-endian stream of bits."""
    stream = (codes[:, :, None] >> np.arange(bits)) & 1
    stream = stream.reshape(len(codes), -1)
    stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    return np.packbits(stream.astype(np.uint8), axis=1, bitorder="little").view(np.uint32)


def unpack(words, bits, k) -> np.ndarray:
    stream = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, : k * bits].astype(np.int64)
    return (stream.reshape(len(words), k, bits) << np.arange(bits)).sum(-1)


def block_scales(w: StoredWeight) -> np.ndarray:
    if w.double is None:
        return _f64(w.scales)
    codes, absmax, table, offset = w.double
    return _f64(table)[codes] * _f64(absmax)[np.arange(len(codes)) // 256] + offset


def stored_values(w: StoredWeight) -> np.ndarray:
    """float64 (n, k), columns as they are stored."""
    if w.format in ("f32", "f16", "bf16"):
        dtype = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}[w.format]
        return w.codes.view(dtype).astype(np.float64).reshape(w.n, w.k)
    if w.format == "int8":
        return w.codes.reshape(w.n, w.k) / 127 * _f64(w.scales)[:, None]
    if w.format == "affine":
        zeros = 2 ** (w.bits - 1) if w.zeros is None else np.repeat(w.zeros.astype(np.int64), w.group, 1)[:, : w.k]
        return (unpack(w.codes, w.bits, w.k) - zeros) * np.repeat(_f64(w.scales), w.group, 1)[:, : w.k]
    codes = np.stack([w.codes >> 4, w.codes & 15], 1).reshape(-1)[: w.n * w.k]  # the first element in the high nibble
    values = (NF4 if w.format == "nf4" else FP4)[codes]
    return (values * block_scales(w)[np.arange(w.n * w.k) // w.group]).reshape(w.n, w.k)


def decode(w: StoredWeight) -> np.ndarray:
    """float64 (n, k), columns in the order of W: stored column j is column perm[j]."""
    stored = stored_values(w)
    if w.perm is None:
        return stored
    values = np.empty_like(stored)
    values[:, w.perm] = stored
    return values


def embedding(ids, table: StoredWeight) -> np.ndarray:
    return decode(table)[ids]


def linear(x, w: StoredWeight) -> np.ndarray:
    """x (m, k) -> x W^T (m, n)."""
    return _f64(x) @ decode(w).T


def linear_backward_input(dy, w: StoredWeight) -> np.ndarray:
    """dy (m, n) -> dy W (m, k)."""
    return _f64(dy) @ decode(w)


def random_weight(rng, format, n, k, group=32, bits=4, zeros=False, perm=False, double=False) -> StoredWeight:
    """Any codes, positive scales of about 0.01 to 1; group counts columns (nf4, fp4: elements of the flat tensor)."""
    order = rng.permutation(k).astype(np.int32) if perm else None
    if format in ("f32", "f16", "bf16"):
        dtype = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}[format]
        values = rng.standard_normal((n, k)).astype(dtype)
        codes = values if format == "f32" else values.view(np.uint16)
        return StoredWeight(format, 8 * values.itemsize, n, k, k, codes, perm=order)
    blocks = {"int8": (n,), "affine": (n, -(-k // group))}.get(format, (-(-n * k // group),))
    scales = np.exp(rng.uniform(-4.5, 0, blocks)).astype(np.float32)
    if format == "int8":
        return StoredWeight(format, 8, n, k, k, rng.integers(-127, 128, (n, k)).astype(np.int8), scales, perm=order)
    if format == "affine":
        codes = pack(rng.integers(0, 2**bits, (n, k)), bits)
        zero = rng.integers(0, 2**bits, blocks).astype(np.uint8) if zeros else None
        return StoredWeight(format, bits, n, k, group, codes, scales, zero, order)
    codes = rng.integers(0, 256, -(-n * k // 2)).astype(np.uint8)
    if not double:
        return StoredWeight(format, 4, n, k, group, codes, scales, perm=order)
    absmax = np.exp(rng.uniform(-4.5, 0, -(-blocks[0] // 256))).astype(np.float32)
    table = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)
    nested = (rng.integers(0, 256, blocks).astype(np.uint8), absmax, table, 1.5)
    return StoredWeight(format, 4, n, k, group, codes, perm=order, double=nested)


# ---- quantization --------------------------------------------------------------------------------------------------


def quantize_blocks(x, format, group) -> tuple[np.ndarray, np.ndarray]:
    """x flat -> codes (one a value, not packed), scales: absmax of each block; the nearest value of the format's grid.

    int8: code = 127 x / absmax, rounded to even. Elements next to a midpoint of the grid may fall on either side.
    """
    x = np.asarray(x, np.float32).reshape(-1)
    blocks = [x[i : i + group] for i in range(0, len(x), group)]
    absmax = np.array([np.abs(block).max() for block in blocks], np.float32)
    block_of = np.arange(len(x)) // group
    if format == "int8":
        return np.rint(127 * _f64(x) / np.where(absmax > 0, absmax, 1)[block_of]).astype(np.int8), absmax
    grid = NF4 if format == "nf4" else FP4
    unit = _f64(x) / np.maximum(_f64(absmax), 1e-38)[block_of]
    return np.abs(unit[:, None] - grid).argmin(1).astype(np.uint8), absmax


# ---- guard words ---------------------------------------------------------------------------------------------------

GUARD = np.uint32(0xDEADBEEF)
GUARD_WORDS = 16


def select(kernels: str) -> None:
    """Single ops run on the kernels of this ISA, or, "cuda", on the GPU."""
    _core.device_select(0 if kernels == "cuda" else -1)
    if kernels != "cuda":
        _core.isa_select(kernels)


def guarded(array) -> tuple[np.ndarray, np.ndarray]:
    """A float32 copy of `array` between guard words: (the view to pass, the whole buffer for `guards_intact`)."""
    array = np.asarray(array, np.float32)
    buffer = np.full(array.size + 2 * GUARD_WORDS, GUARD).view(np.float32)
    view = buffer[GUARD_WORDS : GUARD_WORDS + array.size].reshape(array.shape)
    view[...] = array
    return view, buffer


def guards_intact(buffer) -> bool:
    words = buffer.view(np.uint32)
    return bool((words[:GUARD_WORDS] == GUARD).all() and (words[-GUARD_WORDS:] == GUARD).all())
