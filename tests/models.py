"""Tiny random LLaMA models for the tests."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from training_reference import AdapterParts

from quantlab.llama import LlamaConfig, LlamaForCausalLM
from quantlab.llama_config import LINEARS
from quantlab.weight import QuantWeight

TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "model_type": "llama",
}


def linear_shape(config: LlamaConfig, linear: str) -> tuple[int, int]:
    c, f = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    name = linear.rsplit(".", 1)[-1]
    return {
        "q_proj": (q, c),
        "k_proj": (kv, c),
        "v_proj": (kv, c),
        "o_proj": (c, q),
        "gate_proj": (f, c),
        "up_proj": (f, c),
        "down_proj": (c, f),
    }[name]


def tiny_parts(seed: int = 0, **changes: Any) -> tuple[LlamaConfig, dict[str, QuantWeight], dict[str, np.ndarray]]:
    """config, weights, vectors of a random model; matrices are normal with standard deviation 0.08."""
    config = LlamaConfig({**TINY, **changes})
    rng = np.random.default_rng(seed)

    def matrix(n: int, k: int) -> QuantWeight:
        return QuantWeight.from_array((0.08 * rng.standard_normal((n, k))).astype(np.float32))

    weights = {"model.embed_tokens": matrix(config.vocab_size, config.hidden_size)}
    vectors = {"model.norm": 1 + 0.1 * rng.standard_normal(config.hidden_size).astype(np.float32)}
    for layer in range(config.num_hidden_layers):
        for linear in LINEARS:
            weights[f"model.layers.{layer}.{linear}"] = matrix(*linear_shape(config, linear))
        for norm in ("input_layernorm", "post_attention_layernorm"):
            vectors[f"model.layers.{layer}.{norm}"] = 1 + 0.1 * rng.standard_normal(config.hidden_size).astype(
                np.float32
            )
    if not config.tie_word_embeddings:
        weights["lm_head"] = matrix(config.vocab_size, config.hidden_size)
    return config, weights, vectors


def tiny_model(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(*tiny_parts(seed, **changes))


def tiny_adapter(
    config: LlamaConfig,
    slots: Sequence[int] = range(7),
    r: int | Sequence[int] = 2,
    seed: int = 0,
    layers: Sequence[int] | None = None,
) -> AdapterParts:
    """A random adapter of these slots of these layers (None: all), B not zero, each part with a scale of its own; of
    several ranks each in turn."""
    rng = np.random.default_rng(seed)
    rows, at, ranks = [], 0, itertools.cycle([r] if isinstance(r, int) else r)
    for layer in range(config.num_hidden_layers) if layers is None else layers:
        for slot in slots:
            r, (n, k) = next(ranks), linear_shape(config, LINEARS[slot])
            rows.append((layer, slot, r, at, at + r * k))
            at += r * (n + k)
    parameters = (0.2 * rng.standard_normal(at)).astype(np.float32)
    scales = rng.uniform(0.5, 2, len(rows)).astype(np.float32)
    return AdapterParts(parameters, np.array(rows, np.int64).reshape(-1, 5), scales)
