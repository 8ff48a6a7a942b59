"""The config of a LLaMA model, and the names of its linear modules."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from quantlab.rope import rope_parameters

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
LINEARS = ATTENTION + MLP  # in the order of the forward pass, which is that of the slots of an adapter


class LlamaConfig:
    """A Hugging Face `config.json` with the defaults of `LlamaConfig` filled in, read by attribute.

    Raises ValueError where a size is missing or does not fit the others, naming the field.
    """

    DEFAULTS: Mapping[str, Any] = {
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_labels": 2,
        "quantization_config": None,
    }
    REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
                "max_position_embeddings")  # fmt: skip

    def __init__(self, values: Mapping[str, Any]):
        values = {**self.DEFAULTS, **values}
        if values["max_position_embeddings"] is None:
            values["max_position_embeddings"] = self.DEFAULTS["max_position_embeddings"]
        missing = [name for name in self.REQUIRED if not isinstance(values.get(name), int) or values[name] < 1]
        if missing:
            raise ValueError(f"config: {missing[0]} is {values.get(missing[0])!r}, expected a positive integer")
        heads = values["num_attention_heads"]
        kv_heads = values.get("num_key_value_heads") or heads
        if values.get("head_dim") is None and values["hidden_size"] % heads:
            raise ValueError(f"config: hidden_size {values['hidden_size']} is no multiple of {heads} attention heads")
        head_dim = values.get("head_dim") or values["hidden_size"] // heads
        if heads % kv_heads or head_dim % 2:
            raise ValueError(
                f"config: {heads} heads, {kv_heads} key-value heads, head size {head_dim} do not fit together"
            )
        self.__dict__["_values"] = {**values, "num_key_value_heads": kv_heads, "head_dim": head_dim}
        rope_parameters(self._values)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["_values"][name]
        except KeyError:
            raise AttributeError(f"config has no field {name!r}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        """A field of `config.json`, such as `pad_token_id`: what is saved has it too; what was built stays as it is."""
        self._values[name] = value

    def get(self, name: str, default: Any = None) -> Any:
        return self._values.get(name, default)

    def to_dict(self) -> dict[str, Any]:
        """The content of `config.json`."""
        return dict(self._values)

    def warn_beyond_positions(self, what: str, tokens: int) -> None:
        """A UserWarning, where a method of the model is called, if `tokens` are more than the model was trained on."""
        positions = self.max_position_embeddings
        if tokens > positions:
            text = f"{what}, the model was trained on no more than {positions}"
            warnings.warn(text, UserWarning, stacklevel=4)  # this, the function, the model's method, its caller

    def __repr__(self) -> str:
        return (
            f"LlamaConfig({self.num_hidden_layers} layers, hidden {self.hidden_size}, heads {self.num_attention_heads}/"
            f"{self.num_key_value_heads}, intermediate {self.intermediate_size}, vocabulary {self.vocab_size})"
        )


def token_ids(config: LlamaConfig, field: str) -> list[int]:
    """The ids under a name in a config: none, one or several."""
    value = getattr(config, field, None)
    if value is None:
        return []
    return [int(value)] if isinstance(value, int) else [int(token) for token in value]


def layer_modules(config: Any) -> Iterator[str]:
    """Names of every decoder layer's linear modules, in order: `model.layers.0.self_attn.q_proj`, …"""
    for layer in range(config.num_hidden_layers):
        for linear in LINEARS:
            yield f"model.layers.{layer}.{linear}"
