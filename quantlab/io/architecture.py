"""What a checkpoint of the Llama family must hold: its config, checked, and the name and shape of every module."""

from __future__ import annotations

import math
from typing import Any

from quantlab.rope import ROPE_TYPES

ARCHITECTURES = ("LlamaForCausalLM", "LlamaForSequenceClassification", "LlamaModel")
LIMITS = {
    "hidden_size": 1 << 20, "num_hidden_layers": 4096, "num_attention_heads": 1 << 16, "intermediate_size": 1 << 24,
    "vocab_size": 1 << 28,
}  # fmt: skip


def check_config(config: dict[str, Any], where: str) -> dict[str, Any]:
    """A copy of a config.json with the defaults of the Llama family filled in; ValueError where it is not supported."""
    config = dict(config)
    _check_family(config, where)
    for name, limit in LIMITS.items():
        _natural(config, name, limit, where)
    heads = config["num_attention_heads"]
    if config.get("num_key_value_heads") is None:
        config["num_key_value_heads"] = heads
    kv_heads = _natural(config, "num_key_value_heads", heads, where)
    if heads % kv_heads:
        raise ValueError(f"{where}: num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}")
    if config.get("head_dim") is None:
        if config["hidden_size"] % heads:
            raise ValueError(
                f"{where}: num_attention_heads {heads} does not divide hidden_size {config['hidden_size']}"
            )
        config["head_dim"] = config["hidden_size"] // heads
    if _natural(config, "head_dim", 1 << 16, where) % 2:
        raise ValueError(f"{where}: head_dim is {config['head_dim']}, expected an even number")
    config["rms_norm_eps"] = _epsilon(config.get("rms_norm_eps"), where)
    config["tie_word_embeddings"] = bool(config.get("tie_word_embeddings", False))
    _check_rope(config, where)
    return config


def _check_family(config: dict[str, Any], where: str) -> None:
    architectures = config.get("architectures") or []
    family = config.get("model_type", "llama" if architectures else None)
    if family != "llama" or not all(name in ARCHITECTURES for name in architectures):
        raise ValueError(
            f"{where}: architecture {', '.join(map(str, architectures)) or '(none)'} of model_type {family!r} is not "
            f"supported; supported: model_type 'llama' with {', '.join(ARCHITECTURES)}"
        )
    for name in ("attention_bias", "mlp_bias"):
        if config.get(name):
            raise ValueError(f"{where}: {name} = true is not supported (linear layers here have no bias)")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"{where}: hidden_act {config['hidden_act']!r} is not supported; supported: 'silu'")


def _natural(config: dict[str, Any], name: str, limit: int, where: str) -> int:
    value = config.get(name)
    if type(value) is not int or not 1 <= value <= limit:
        raise ValueError(f"{where}: {name} is {value!r}, expected an integer of 1 to {limit}")
    return value


def _epsilon(value: Any, where: str) -> float:
    if value is None:
        return 1e-6
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{where}: rms_norm_eps is {value!r}, expected a finite number, 0 or more")
    return float(value)


def _check_rope(config: dict[str, Any], where: str) -> None:
    """Both spellings: rope_theta beside rope_scaling {"type" or "rope_type"}, and rope_parameters with both inside."""
    for name in ("rope_scaling", "rope_parameters"):
        settings = config.get(name)
        if settings is None:
            continue
        if not isinstance(settings, dict):
            raise ValueError(f"{where}: {name} is {settings!r}, expected an object")
        kind = settings.get("rope_type", settings.get("type", "default"))
        if kind not in ROPE_TYPES:
            raise ValueError(f"{where}: rope type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
        if settings.get("partial_rotary_factor", 1) != 1:
            raise ValueError(f"{where}: partial_rotary_factor {settings['partial_rotary_factor']} is not supported")


def module_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """{module: shape of its weight}, in the order of the layers: (outputs, inputs), or (size,) for a norm's gain.
    `lm_head` is there unless tied; `score`, whose number of labels is not always in the config, is not."""
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes[f"{layer}.input_layernorm"] = (hidden,)
        shapes[f"{layer}.self_attn.q_proj"] = (query, hidden)
        shapes[f"{layer}.self_attn.k_proj"] = (key, hidden)
        shapes[f"{layer}.self_attn.v_proj"] = (key, hidden)
        shapes[f"{layer}.self_attn.o_proj"] = (hidden, query)
        shapes[f"{layer}.post_attention_layernorm"] = (hidden,)
        shapes[f"{layer}.mlp.gate_proj"] = (inner, hidden)
        shapes[f"{layer}.mlp.up_proj"] = (inner, hidden)
        shapes[f"{layer}.mlp.down_proj"] = (hidden, inner)
    shapes["model.norm"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head"] = (config["vocab_size"], hidden)
    return shapes
