"""Calibration: token rows in chunks, and a model run over them one decoder layer at a time, matrix by matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantlab import _core
from quantlab.rope import rope_tables

CHUNK_TOKENS = 1024  # tokens that one op works on: bounds the memory of what is not kept
HOLD_BYTES = 2 << 30  # inputs of a stage up to this size are kept; larger ones are computed again when needed

# the matrices of one layer that share their inputs, in the order of the forward pass
STAGES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
ADDED_TO_RESIDUAL = (1, 3)  # the stages whose output is added to the residual stream

# chunk -> inputs of a stage, float32 (tokens, k), good until the next call; on a device a DeviceArray
Inputs = Callable[[int], Any]
Filled = Callable[[int, np.ndarray], np.ndarray]  # the same, in the array that is given
Handles = Mapping[str, Any]  # "self_attn.q_proj" -> _core.Weight, on a device _core.DeviceWeight
Steps = Generator[Inputs, Handles, None]


@dataclass(frozen=True)
class Chunk:
    """Whole token rows laid end to end."""

    ids: np.ndarray  # int32 (t,)
    positions: np.ndarray  # int32 (t,)
    starts: np.ndarray  # int64 (rows + 1,)
    lengths: np.ndarray  # int64 (rows,)


def spread_rows(ids: np.ndarray, rows: int, length: int) -> np.ndarray:
    """Rows of a long text's token ids (at least `length`), (rows, length): of its consecutive rows, ones that are
    evenly spread from the first to the last, in their order; all, where there are no more.

    The head of a text is a few of its subjects. For SmolLM2 at 3 bits, 32 rows spread over WikiText-2 instead of its
    first 32 take the perplexity from 33.5 to 31.0.
    """
    whole = ids[: len(ids) // length * length].reshape(-1, length)
    return whole[np.unique(np.linspace(0, len(whole) - 1, min(rows, len(whole))).astype(np.int64))]


def chunks_of(rows: Iterable[np.ndarray], tokens: int = CHUNK_TOKENS) -> list[Chunk]:
    """Rows of int32 ids in their order, in chunks of at most `tokens` (a longer row makes a chunk of its own)."""
    groups: list[list[np.ndarray]] = []
    for row in rows:
        if groups and sum(map(len, groups[-1])) + len(row) <= tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return [_chunk(group) for group in groups]


def _chunk(rows: list[np.ndarray]) -> Chunk:
    lengths = np.array([len(row) for row in rows], np.int64)
    positions = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
    return Chunk(np.concatenate(rows), positions, np.concatenate([[0], np.cumsum(lengths)]), lengths)


class _Buffers:
    """Arrays that are filled again for every chunk: fresh memory costs more than a small op."""

    def __init__(self) -> None:
        self._arrays: dict[Any, np.ndarray] = {}

    def __call__(self, name: Any, *shape: int) -> np.ndarray:
        """The float32 array of this name; its contents are what was last written to it, in any shape."""
        count = math.prod(shape)
        if name not in self._arrays or self._arrays[name].size < count:
            self._arrays[name] = np.empty(count, np.float32)
        return self._arrays[name][:count].reshape(shape)


class Activations:
    """The residual stream of all chunks, moved through the model one decoder layer at a time."""

    def __init__(self, config: Any, chunks: list[Chunk], embedding: _core.Weight):
        self.config, self.chunks = config, chunks
        self.tokens = sum(len(chunk.ids) for chunk in chunks)
        self.residual = [_core.embedding(chunk.ids, embedding) for chunk in chunks]
        self._tables: dict[int, tuple[Any, Any]] = {}
        self._held = _Buffers()
        self._width = config.num_attention_heads * config.head_dim

    def copy(self) -> Activations:
        other = object.__new__(Activations)
        other.__dict__.update(self.__dict__)
        other.residual = [chunk.copy() for chunk in self.residual]
        other._held = _Buffers()
        return other

    def layer(self, norms: tuple[np.ndarray, np.ndarray]) -> Steps:
        """Runs one decoder layer: yields the inputs of each stage of STAGES, and is sent that stage's weights."""
        weights = yield self._norm(norms[0])
        attended = self._hold(self._attention(self._norm(norms[0]), weights), self._width)
        weights = yield attended
        self._add(attended, weights["self_attn.o_proj"])
        weights = yield self._norm(norms[1])
        activated = self._hold(self._swiglu(self._norm(norms[1]), weights), self.config.intermediate_size)
        weights = yield activated
        self._add(activated, weights["mlp.down_proj"])

    def run(self, norms: tuple[np.ndarray, np.ndarray], weights: Handles) -> None:
        """Moves on by one layer with these weights."""
        steps = self.layer(norms)
        next(steps)
        for _ in STAGES:
            advance(steps, weights)

    def _norm(self, gain: np.ndarray) -> Inputs:
        buffer = _Buffers()

        def normed(i: int) -> np.ndarray:
            x = self.residual[i]
            return _core.rmsnorm(x, gain, self.config.rms_norm_eps, buffer("x", *x.shape))

        return normed

    def _add(self, inputs: Inputs, weight: _core.Weight) -> None:
        for i, residual in enumerate(self.residual):
            _core.linear(inputs(i), weight, residual, True)

    def _attention(self, inputs: Inputs, weights: Handles) -> Filled:
        config, buffer = self.config, _Buffers()
        heads_of = dict(zip(STAGES[0], (config.num_attention_heads, *[config.num_key_value_heads] * 2), strict=True))

        def attend(i: int, out: np.ndarray) -> np.ndarray:
            chunk, x = self.chunks[i], inputs(i)
            outs = tuple(buffer(module, len(x), heads * config.head_dim) for module, heads in heads_of.items())
            products = _core.linear_many(x, tuple(weights[module] for module in heads_of), outs)
            q, k, v = (part.reshape(len(x), -1, config.head_dim) for part in products)
            tables = self._rope(int(chunk.lengths.max()))
            q = _core.rope(q, *tables, chunk.positions, buffer("q", *q.shape))
            k = _core.rope(k, *tables, chunk.positions, buffer("k", *k.shape))
            scale = config.head_dim**-0.5
            _core.attention(q, k, v, chunk.starts, chunk.starts[:-1].copy(), chunk.lengths, scale, out.reshape(q.shape))
            return out

        return attend

    def _swiglu(self, inputs: Inputs, weights: Handles) -> Filled:
        buffer = _Buffers()

        def activate(i: int, out: np.ndarray) -> np.ndarray:
            x = inputs(i)
            outs = tuple(buffer(module, *out.shape) for module in STAGES[2])
            gate, up = _core.linear_many(x, tuple(weights[module] for module in STAGES[2]), outs)
            return _core.swiglu(gate, up, out)

        return activate

    def _rope(self, length: int) -> tuple[Any, Any]:
        if length not in self._tables:
            self._tables[length] = rope_tables(self.config, length)
        return self._tables[length]

    def _hold(self, compute: Filled, width: int) -> Inputs:
        """Keeps what `compute` gives, (tokens, width), where it is not too large."""
        if 4 * self.tokens * width > HOLD_BYTES:
            buffer = _Buffers()
            return lambda i: compute(i, buffer("out", len(self.residual[i]), width))
        return [compute(i, self._held(i, len(x), width)) for i, x in enumerate(self.residual)].__getitem__


def advance(steps: Steps, weights: Handles) -> Any:
    """The `Inputs` of the next stage once the last one has these weights; None after the last stage."""
    try:
        return steps.send(weights)
    except StopIteration:
        return None
