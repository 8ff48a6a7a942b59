"""The loss of a LLaMA model with an adapter in float64, and its gradient by complex steps: f(x + ih) = f(x) + ih f'(x)
without cancellation (Squire and Trapp 1998), so it needs no backward pass of its own and is exact to rounding.

Every function takes parameters with a leading axis of variants; arrays that depend on them have it too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from reference import uniform

from quantlab.llama import Llama
from quantlab.llama_config import LINEARS
from quantlab.rope import rope_tables

STEP = 1e-30
VARIANTS = 64  # parameters whose derivatives are taken at once


@dataclass
class AdapterParts:
    """What `_core.Adapter` takes, and the dropout of its inputs."""

    parameters: np.ndarray
    layout: np.ndarray
    scales: np.ndarray
    dropout: float = 0.0
    seed: int = 0
    index: dict[tuple[int, int], int] = field(init=False)

    def __post_init__(self) -> None:
        self.index = {(layer, slot): i for i, (layer, slot, *_) in enumerate(self.layout.tolist())}


def _rmsnorm(x, gain, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * gain.astype(np.float64)


def _rotate(x, cos, sin):
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    cos, sin = cos[:, None].astype(np.float64), sin[:, None].astype(np.float64)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def _softmax(x):
    e = np.exp(x - x.real.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _attention(q, k, v):
    """Causal attention of one sequence; (variants, t, heads, d). By einsum: NumPy's products of many small complex
    matrices begin BLAS's threads for each."""
    group, t = q.shape[2] // k.shape[2], q.shape[1]
    k, v = np.repeat(k, group, 2), np.repeat(v, group, 2)
    scores = np.einsum("xihd,xjhd->xhij", q, k) / np.sqrt(q.shape[-1])
    p = _softmax(np.where(np.tri(t, dtype=bool), scores, -1e300))
    return np.einsum("xhij,xjhd->xihd", p, v)


class Oracle:
    """Hidden states and losses of `model` with an adapter on packed sequences."""

    def __init__(self, model: Llama, adapter: AdapterParts, sequences: Sequence[np.ndarray], call: int = 0):
        self.model, self.adapter, self.call = model, adapter, call
        self.sequences = [np.asarray(sequence) for sequence in sequences]
        self.dense = {name: weight.dequantize().astype(np.float64) for name, weight in model.weights.items()}
        self.masks: dict[int, np.ndarray] = {}

    def mask(self, stream: int, t: int, k: int) -> np.ndarray:
        """(t, k) of 0 or 1 / (1 - p)"""
        if stream not in self.masks:
            p = np.float32(self.adapter.dropout)
            kept = uniform(t * k, self.adapter.seed, stream) >= p
            self.masks[stream] = (kept * (1.0 / (1.0 - np.float64(p)))).reshape(t, k)
        return self.masks[stream]

    def product(self, x: np.ndarray, layer: int, slot: int, parameters: np.ndarray) -> np.ndarray:
        """(W + scale B A) x, with dropout before A; parameters (variants, floats)."""
        w = self.dense[f"model.layers.{layer}.{LINEARS[slot]}"]
        y = (x.reshape(-1, w.shape[1]) @ w.T).reshape(*x.shape[:-1], -1)
        part = self.adapter.index.get((layer, slot))
        if part is None:
            return y
        r, a_at, b_at = self.adapter.layout[part, 2:]
        n, k = w.shape
        a = parameters[:, a_at : a_at + r * k].reshape(-1, r, k)
        b = parameters[:, b_at : b_at + n * r].reshape(-1, n, r)
        if self.adapter.dropout:
            layers = self.model.config.num_hidden_layers
            x = x * self.mask((self.call * layers + layer) * 7 + slot, *x.shape[-2:])
        u = np.einsum("xtk,xrk->xtr", x, a)
        return y + float(self.adapter.scales[part]) * np.einsum("xtr,xnr->xtn", u, b)

    def hidden(self, parameters: np.ndarray) -> np.ndarray:
        """(variants, t, hidden_size) after the final norm."""
        config, vector = self.model.config, self.model.vector
        d, eps = config.head_dim, config.rms_norm_eps
        lengths = [len(sequence) for sequence in self.sequences]
        tables = rope_tables(config, max(lengths))
        cos, sin = (np.concatenate([table[:n] for n in lengths]) for table in tables)
        ends = np.cumsum(lengths)[:-1]
        x = np.repeat(self.dense["model.embed_tokens"][np.concatenate(self.sequences)][None], len(parameters), 0)
        for layer in range(config.num_hidden_layers):
            name = f"model.layers.{layer}."
            h = _rmsnorm(x, vector(name + "input_layernorm"), eps)
            parts = (self.product(h, layer, slot, parameters) for slot in range(3))
            q, k, v = (part.reshape(*part.shape[:2], -1, d) for part in parts)
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
            split = (np.split(part, ends, axis=1) for part in (q, k, v))
            a = np.concatenate([_attention(*one) for one in zip(*split, strict=True)], axis=1)
            x = x + self.product(a.reshape(*a.shape[:2], -1), layer, 3, parameters)
            h = _rmsnorm(x, vector(name + "post_attention_layernorm"), eps)
            gate, up = (self.product(h, layer, slot, parameters) for slot in (4, 5))
            x = x + self.product(gate / (1 + np.exp(-gate)) * up, layer, 6, parameters)
        return _rmsnorm(x, vector("model.norm"), eps)

    def losses(self, parameters: np.ndarray, rows: np.ndarray, targets: np.ndarray, head: np.ndarray) -> np.ndarray:
        """(variants, rows): -log p(targets) of the hidden states `rows` under `head` (classes, hidden_size)."""
        hidden = self.hidden(parameters)[:, rows]
        logits = (hidden.reshape(-1, head.shape[1]) @ head.T).reshape(len(hidden), len(rows), -1)
        return -np.log(_softmax(logits)[:, np.arange(len(rows)), targets])

    def gradient(
        self, rows: np.ndarray, targets: np.ndarray, head: np.ndarray, places: np.ndarray
    ) -> tuple[float, np.ndarray]:
        """Sum of the losses and its derivatives by the parameters `places`."""
        parameters = self.adapter.parameters.astype(np.complex128)
        total = self.losses(parameters[None].real, rows, targets, head).sum()
        gradient = np.zeros(len(places))
        for start in range(0, len(places), VARIANTS):
            some = places[start : start + VARIANTS]
            variants = np.repeat(parameters[None], len(some), 0)
            variants[np.arange(len(some)), some] += 1j * STEP
            gradient[start : start + VARIANTS] = self.losses(variants, rows, targets, head).sum(1).imag / STEP
        return float(total), gradient
