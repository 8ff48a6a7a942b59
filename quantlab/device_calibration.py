"""Calibration on a device: the residual stream and the inputs of a stage stay there; a part of a layer is one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from quantlab import _core
from quantlab.calibration import STAGES, Activations, Chunk, Steps
from quantlab.rope import rope_tables

CHUNK_TOKENS = 16384  # a chunk's tokens: enough for products at full speed
HOLD_BYTES = 5 << 29  # of a stage's inputs that are kept; the rest is computed again when needed

Compute = Callable[[int], _core.DeviceArray]


class DeviceActivations(Activations):
    """As `Activations`: the residual stream in float32, what is computed from it in bfloat16."""

    def __init__(self, config: Any, chunks: list[Chunk], embedding: _core.Weight, device: int):
        self.config, self.chunks, self.device = config, chunks, device
        self.tokens = sum(len(chunk.ids) for chunk in chunks)
        table = _core.DeviceWeight(device, embedding)
        self.residual: list[Any] = [_core.device_embedding(self._put(chunk.ids), table) for chunk in chunks]
        self._tables = {}
        self._sequences = [
            (self._put(c.positions), self._put(c.starts), self._put(c.starts[:-1].copy()), self._put(c.lengths))
            for c in chunks
        ]

    def copy(self) -> DeviceActivations:
        other = object.__new__(DeviceActivations)
        other.__dict__.update(self.__dict__)
        other.residual = [x.copy() for x in self.residual]
        return other

    def _put(self, array: np.ndarray) -> _core.DeviceArray:
        return _core.device_array(self.device, np.ascontiguousarray(array))

    def layer(self, norms: tuple[np.ndarray, np.ndarray]) -> Steps:
        first, second = map(self._put, norms)
        weights = yield self._normed(first)
        attended = self._kept(self._attended(first, weights))
        weights = yield attended
        self._add_products(attended, weights["self_attn.o_proj"])
        del attended  # its memory, before what is kept next
        weights = yield self._normed(second)
        activated = self._kept(self._activated(second, weights))
        weights = yield activated
        self._add_products(activated, weights["mlp.down_proj"])

    def _normed(self, gain: _core.DeviceArray) -> Compute:
        return lambda i: _core.device_norm(self.residual[i], gain, self.config.rms_norm_eps)

    def _attended(self, gain: _core.DeviceArray, weights: Any) -> Compute:
        heads = (self.config.num_attention_heads, self.config.num_key_value_heads)
        q, k, v = (weights[module] for module in STAGES[0])

        def attend(i: int) -> _core.DeviceArray:
            longest = int(self.chunks[i].lengths.max())
            where = (*self._rope(longest), *self._sequences[i])
            eps = self.config.rms_norm_eps
            return _core.device_attention(self.residual[i], gain, q, k, v, *where, *heads, longest, eps)

        return attend

    def _activated(self, gain: _core.DeviceArray, weights: Any) -> Compute:
        gate, up = (weights[module] for module in STAGES[2])
        return lambda i: _core.device_gate_up(self.residual[i], gain, gate, up, self.config.rms_norm_eps)

    def _add_products(self, inputs: Compute, weight: _core.DeviceWeight) -> None:
        for i, residual in enumerate(self.residual):
            _core.device_add(residual, inputs(i), weight)

    def _rope(self, length: int) -> tuple[_core.DeviceArray, _core.DeviceArray]:
        if length not in self._tables:
            cos, sin = rope_tables(self.config, length)
            self._tables[length] = self._put(cos), self._put(sin)
        return self._tables[length]

    def _kept(self, compute: Compute) -> Compute:
        """Keeps what `compute` gives, as far as there is room."""
        held: list[_core.DeviceArray] = []
        room = HOLD_BYTES
        while len(held) < len(self.chunks) and (not held or room >= held[-1].nbytes):
            held.append(compute(len(held)))
            room -= held[-1].nbytes
        return lambda i: held[i] if i < len(held) else compute(i)
