"""What `quantlab bench` times: every op at the shapes of real models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import ml_dtypes
import numpy as np

from quantlab import _core
from quantlab.config import FP4Config, Int8Config, NF4Config, RTNConfig
from quantlab.weight import QuantWeight

RANK = 8  # of a LoRA


@dataclass(frozen=True)
class Sizes:
    """The dimensions of a model, and how many tokens an op is given."""

    model: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tokens: int


MODELS = (
    Sizes("smollm2-135m", 576, 1536, 9, 3, 64, 49152, 512),
    Sizes("llama-2-7b", 4096, 11008, 32, 32, 128, 32000, 512),
)
TINY = (Sizes("tiny", 40, 72, 4, 2, 8, 96, 24),)
WEIGHTS: dict[str, Any] = {  # name -> config; floats: dtype
    "f32": "float32", "f16": "float16", "bf16": "bfloat16", "int8": Int8Config(), "affine8": RTNConfig(8, 128),
    "affine4": RTNConfig(4, 128), "affine3": RTNConfig(3, 128), "affine2": RTNConfig(2, 64), "nf4": NF4Config(64),
    "fp4": FP4Config(64),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One op at one shape. run() fills and returns its output; nbytes and flops are those of one run."""

    op: str
    format: str
    model: str
    shape: str
    run: Callable[[], Any]
    nbytes: int
    flops: int

    def __str__(self) -> str:
        return f"{self.op}-{self.format}-{self.model}-{self.shape}"


# ---- cases ---------------------------------------------------------------------------------------------------------


def _floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@lru_cache(maxsize=2)
def _matrix(n: int, k: int) -> np.ndarray:
    return _floats(n, k, seed=1) * np.float32(0.02)


@lru_cache(maxsize=2 * len(WEIGHTS) + 4)  # decode and both linears share the matrices of both models
def _weight(name: str, n: int, k: int) -> QuantWeight:
    how = WEIGHTS[name]
    if isinstance(how, str):
        dtype = ml_dtypes.bfloat16 if how == "bfloat16" else np.dtype(how)
        return QuantWeight.from_array(_matrix(n, k).astype(dtype))
    return QuantWeight.from_float(_matrix(n, k), how)


def _nbytes(*arrays: np.ndarray) -> int:
    return sum(array.nbytes for array in arrays)


def _embedding(s: Sizes) -> Iterator[Case]:
    if s.vocabulary * s.hidden > 40_000_000:  # half a gigabyte of table to read 8 MB of it
        return
    ids = np.random.default_rng(2).integers(0, s.vocabulary, s.tokens).astype(np.int32)
    out = np.empty((s.tokens, s.hidden), np.float32)
    for name in WEIGHTS:
        table = _weight(name, s.vocabulary, s.hidden)
        read = table.nbytes * s.tokens // s.vocabulary
        run = lambda table=table.handle: _core.embedding(ids, table, out)  # noqa: E731
        yield Case("embedding", name, s.model, f"t{s.tokens} c{s.hidden}", run, read + _nbytes(ids, out), 0)


def _rmsnorm(s: Sizes) -> Iterator[Case]:
    for t in (1, s.tokens):
        x, gain, out = _floats(t, s.hidden), _floats(s.hidden), np.empty((t, s.hidden), np.float32)
        run = lambda x=x, gain=gain, out=out: _core.rmsnorm(x, gain, 1e-5, out)  # noqa: E731
        yield Case("rmsnorm", "f32", s.model, f"t{t} c{s.hidden}", run, _nbytes(x, gain, out), 4 * x.size)


def _rope(s: Sizes) -> Iterator[Case]:
    x, half = _floats(s.tokens, s.heads, s.head_dim), s.head_dim // 2
    angles = np.arange(s.tokens, dtype=np.float32)[:, None] * np.linspace(1, 1e-4, half, dtype=np.float32)
    cos, sin, positions = np.cos(angles), np.sin(angles), np.arange(s.tokens, dtype=np.int32)
    shape = f"t{s.tokens} h{s.heads} d{s.head_dim}"
    run = lambda: _core.rope(x, cos, sin, positions, x)  # noqa: E731 (in place, as the model does)
    yield Case("rope", "f32", s.model, shape, run, _nbytes(x, x, cos, sin), 3 * x.size)


def _attention(s: Sizes) -> Iterator[Case]:
    for queries, past in ((s.tokens, 0), (1, 2 * s.tokens - 1)):
        keys = queries + past
        q, out = _floats(queries, s.heads, s.head_dim), np.empty((queries, s.heads, s.head_dim), np.float32)
        k, v = _floats(keys, s.kv_heads, s.head_dim, seed=1), _floats(keys, s.kv_heads, s.head_dim, seed=2)
        ranges = np.array([0, queries]), np.array([0]), np.array([keys])
        run = partial(_core.attention, q, k, v, *ranges, s.head_dim**-0.5, out)
        pairs = queries * past + queries * (queries + 1) // 2  # of a query and a key that it sees
        shape = f"t{queries} s{keys} h{s.heads}/{s.kv_heads} d{s.head_dim}"
        yield Case("attention", "f32", s.model, shape, run, _nbytes(q, k, v, out), 4 * pairs * s.heads * s.head_dim)


def _attention_backward(s: Sizes) -> Iterator[Case]:
    for t in (s.tokens, 4 * s.tokens):
        q, dout = _floats(t, s.heads, s.head_dim), _floats(t, s.heads, s.head_dim, seed=3)
        k, v = _floats(t, s.kv_heads, s.head_dim, seed=1), _floats(t, s.kv_heads, s.head_dim, seed=2)
        rest = np.array([0, t]), np.array([0]), np.array([t]), s.head_dim**-0.5
        lse = np.empty(q.shape[:2], np.float32)
        arrays = dout, q, k, v, _core.attention(q, k, v, *rest, None, lse), lse
        grads = tuple(np.zeros_like(a) for a in (q, k, v))
        run = lambda a=arrays, r=rest, g=grads: _core.attention_backward(*a, *r, *g)  # noqa: E731
        flops = 10 * t * (t + 1) // 2 * s.heads * s.head_dim  # five products
        yield Case("attention_backward", "f32", s.model, f"t{t} h{s.heads}/{s.kv_heads} d{s.head_dim}", run,
                   _nbytes(*arrays, *grads), flops)  # fmt: skip


def _rmsnorm_backward(s: Sizes) -> Iterator[Case]:
    dy, x, out = (
        _floats(s.tokens, s.hidden),
        _floats(s.tokens, s.hidden, seed=1),
        np.zeros((s.tokens, s.hidden), np.float32),
    )
    gain, inv_rms = _floats(s.hidden), np.ones(s.tokens, np.float32)
    run = lambda: _core.rmsnorm_backward(dy, x, gain, inv_rms, out)  # noqa: E731
    yield Case("rmsnorm_backward", "f32", s.model, f"t{s.tokens} c{s.hidden}", run, _nbytes(dy, x, out), 8 * x.size)


def _swiglu_backward(s: Sizes) -> Iterator[Case]:
    inputs = [_floats(s.tokens, s.intermediate, seed=seed) for seed in range(3)]
    outputs = [np.zeros_like(inputs[0]) for _ in range(2)]
    run = lambda: _core.swiglu_backward(*inputs, *outputs)  # noqa: E731
    yield Case("swiglu_backward", "f32", s.model, f"t{s.tokens} f{s.intermediate}", run, _nbytes(*inputs, *outputs), 0)


def _dropout(s: Sizes) -> Iterator[Case]:
    x, out = _floats(s.tokens, s.hidden), np.empty((s.tokens, s.hidden), np.float32)
    run = lambda: _core.dropout(x, 0.05, 1, 0, out)  # noqa: E731
    yield Case("dropout", "f32", s.model, f"t{s.tokens} c{s.hidden}", run, _nbytes(x, out), 0)


def _adamw(s: Sizes) -> Iterator[Case]:
    """The parameters of LoRA on q, k, v and o of all layers, about."""
    w, m, g = (_floats(16 * 128 * s.hidden, seed=seed) for seed in range(3))
    v = m * m

    def run() -> np.ndarray:
        _core.adamw(w, m, v, g, 1e-4, 0.9, 0.999, 1e-8, 0.0, 1, 1.0)
        return w

    yield Case("adamw", "f32", s.model, f"{len(w)}", run, 2 * _nbytes(w, m, v, g), 0)


def _swiglu(s: Sizes) -> Iterator[Case]:
    gate, up = _floats(s.tokens, s.intermediate), _floats(s.tokens, s.intermediate, seed=1)
    out = np.empty_like(gate)
    run = lambda: _core.swiglu(gate, up, out)  # noqa: E731
    yield Case("swiglu", "f32", s.model, f"t{s.tokens} f{s.intermediate}", run, _nbytes(gate, up, out), 0)


def _add(s: Sizes) -> Iterator[Case]:
    y, x = _floats(s.tokens, s.hidden), _floats(s.tokens, s.hidden, seed=1)

    def run() -> np.ndarray:
        _core.add_into(y, x)
        return y

    yield Case("add", "f32", s.model, f"t{s.tokens} c{s.hidden}", run, _nbytes(y, y, x), y.size)


def _cross_entropy(s: Sizes) -> Iterator[Case]:
    logits, targets = _floats(s.tokens // 4, s.vocabulary), np.arange(s.tokens // 4, dtype=np.int32)
    run = lambda: _core.cross_entropy(logits, targets)  # noqa: E731
    yield Case("cross_entropy", "f32", s.model, f"t{len(targets)} v{s.vocabulary}", run, logits.nbytes, 0)


def _sample(s: Sizes) -> Iterator[Case]:
    logits, streams = 3 * _floats(1, s.vocabulary), np.zeros(1, np.int32)
    choices = (("greedy", 0.0, 0, 1.0), ("top_k 50", 0.8, 50, 1.0), ("top_p 0.9", 0.8, 0, 0.9))
    for name, temperature, top_k, top_p in choices:
        run = lambda t=temperature, k=top_k, p=top_p: _core.sample(logits, streams, 0, t, k, p, 1)  # noqa: E731
        yield Case("sample", "f32", s.model, f"v{s.vocabulary} {name}", run, logits.nbytes, 0)


def _gram(s: Sizes) -> Iterator[Case]:
    x, h = _floats(s.tokens, s.hidden), np.zeros((s.hidden, s.hidden), np.float32)

    def run() -> np.ndarray:
        _core.gram_into(h, x, x, True)
        return h

    flops = s.tokens * s.hidden * (s.hidden + 1)
    yield Case("gram", "f32", s.model, f"t{s.tokens} k{s.hidden} lower", run, _nbytes(x, h), flops)
    u, da, db = _floats(s.tokens, RANK), np.zeros((RANK, s.hidden), np.float32), np.zeros((s.hidden, RANK), np.float32)

    def lora() -> tuple[np.ndarray, np.ndarray]:
        _core.gram_into(da, u, x, False)
        _core.gram_into(db, x, u, False)
        return da, db

    flops = 4 * s.tokens * s.hidden * RANK
    yield Case("gram", "f32", s.model, f"t{s.tokens} k{s.hidden} r{RANK} both", lora, _nbytes(x, u, x, u), flops)


def _projection(s: Sizes) -> tuple[int, int]:
    """(n, k) of the matrix that stands for a model: up_proj of a small one, q_proj of a large one."""
    return (s.intermediate, s.hidden) if s.hidden < 1024 else (s.hidden, s.hidden)


def _decode(s: Sizes) -> Iterator[Case]:
    n, k = _projection(s)
    for name in WEIGHTS:
        w = _weight(name, n, k)
        run = lambda w=w.handle: _core.decode(w, 0, n)  # noqa: E731
        yield Case("decode", name, s.model, f"n{n} k{k}", run, w.nbytes + 4 * n * k, 0)


def _linear_like(s: Sizes, op: str, function: Callable, rows: Sequence[int]) -> Iterator[Case]:
    n, k = _projection(s)
    columns_in, columns_out = (k, n) if op == "linear" else (n, k)
    for name in WEIGHTS:
        w = _weight(name, n, k)
        for m in rows:
            x, out = _floats(m, columns_in), np.empty((m, columns_out), np.float32)
            run = lambda x=x, w=w.handle, out=out: function(x, w, out)  # noqa: E731
            yield Case(op, name, s.model, f"m{m} n{n} k{k}", run, w.nbytes + _nbytes(x, out), 2 * m * n * k)


def _linear(s: Sizes) -> Iterator[Case]:
    yield from _linear_like(s, "linear", _core.linear, (1, 8, s.tokens))
    a, x, out = _weight("f32", RANK, s.hidden), _floats(s.tokens, s.hidden), np.empty((s.tokens, RANK), np.float32)
    run = lambda: _core.linear(x, a.handle, out)  # noqa: E731
    flops = 2 * x.size * RANK
    yield Case("linear", "f32", s.model, f"m{s.tokens} n{RANK} k{s.hidden}", run, a.nbytes + _nbytes(x, out), flops)


def _linear_many(s: Sizes) -> Iterator[Case]:
    """q, k and v of a layer."""
    rows = (s.heads * s.head_dim, *[s.kv_heads * s.head_dim] * 2)
    for name in ("bf16", "int8", "affine4", "nf4"):
        weights = [_weight(name, n, s.hidden) for n in rows]
        handles, n = tuple(w.handle for w in weights), sum(rows)
        for m in (1, 8, s.tokens):
            x, outs = _floats(m, s.hidden), tuple(np.empty((m, n), np.float32) for n in rows)
            run = lambda x=x, handles=handles, outs=outs: _core.linear_many(x, handles, outs)  # noqa: E731
            size = sum(w.nbytes for w in weights) + _nbytes(x, *outs)
            yield Case("linear_many", name, s.model, f"m{m} n{n} k{s.hidden}", run, size, 2 * m * n * s.hidden)


def _linear_backward_input(s: Sizes) -> Iterator[Case]:
    return _linear_like(s, "linear_backward_input", _core.linear_backward_input, (s.tokens,))


def _quantize(s: Sizes) -> Iterator[Case]:
    n, k = _projection(s)
    for name, group, bits in (("nf4", 64, 4), ("fp4", 64, 4), ("int8", k, 8)):
        run = lambda name=name, group=group: _core.quantize(_matrix(n, k), name, group)  # noqa: E731
        written = n * k * bits // 8 + 4 * -(-n * k // group)
        yield Case("quantize", name, s.model, f"n{n} k{k}", run, 4 * n * k + written, 0)


def _quantize_affine(s: Sizes) -> Iterator[Case]:
    n, k = _projection(s)
    for bits in (4, 3):
        run = lambda bits=bits: _core.quantize_rtn(_matrix(n, k), bits, 128, True)[:2]  # noqa: E731
        written = n * k * bits // 8 + 4 * -(-n * k // 128)
        yield Case("quantize_affine", f"affine{bits}", s.model, f"n{n} k{k} g128", run, 4 * n * k + written, 0)


def _gptq_panel(s: Sizes) -> Iterator[Case]:
    """GPTQ's whole column loop, whose panel products are in float64: at most half of the roof can be reached."""
    n, k = _projection(s)
    rng = np.random.default_rng(0)
    feedback = np.triu(rng.standard_normal((k, k)), 1) / k
    ones, order, dead = np.ones(k), np.arange(k, dtype=np.int32), np.zeros(k, np.uint8)

    def run() -> tuple[np.ndarray, ...]:
        options = (min(64, k), 4, False, 2, False, False, False, True, False)
        return _core.gptq_quantize(_matrix(n, k), feedback, ones, order, ones, dead, *options)[1:]

    yield Case("gptq_panel", "f64", s.model, f"n{n} k{k} g64", run, 4 * n * k + 8 * k * k, n * k * k)


OPS: dict[str, Callable[[Sizes], Iterator[Case]]] = {
    "embedding": _embedding, "rmsnorm": _rmsnorm, "rope": _rope, "attention": _attention, "swiglu": _swiglu,
    "add": _add, "cross_entropy": _cross_entropy, "gram": _gram, "decode": _decode, "linear": _linear,
    "linear_many": _linear_many, "sample": _sample, "linear_backward_input": _linear_backward_input,
    "quantize": _quantize, "quantize_affine": _quantize_affine, "gptq_panel": _gptq_panel,
    "rmsnorm_backward": _rmsnorm_backward, "attention_backward": _attention_backward,
    "swiglu_backward": _swiglu_backward, "dropout": _dropout, "adamw": _adamw,
}  # fmt: skip


def cases(op: str, models: Iterable[Sizes] = MODELS) -> list[Case]:
    """All cases of an op. ValueError: no such op."""
    if op not in OPS:
        raise ValueError(f"op: got {op!r}, expected one of {', '.join(OPS)}")
    return [case for sizes in models for case in OPS[op](sizes)]
