"""Tiny GGUF files for the tests, written by the gguf library as llama.cpp's converter would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

TYPES = gguf.GGMLQuantizationType
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_name(module: str) -> str:
    parts = module.split(".", 3)
    return f"blk.{parts[2]}.{NAMES[parts[3]]}.weight" if len(parts) == 4 else f"{NAMES[module]}.weight"


def permute(matrix: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k: the halves of each head interleaved."""
    n, k = matrix.shape
    return matrix.reshape(heads, 2, n // heads // 2, k).swapaxes(1, 2).reshape(n, k)


def base_writer(path: Path, config: dict[str, Any]) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(256)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    return writer


def add_tensor(writer: gguf.GGUFWriter, name: str, array: np.ndarray, kind: TYPES) -> None:
    """float32 `array` as a tensor of this type; vectors stay float32."""
    kind = TYPES.F32 if array.ndim == 1 else kind
    if kind in (TYPES.F32, TYPES.F16):
        writer.add_tensor(name, array.astype(np.float32 if kind == TYPES.F32 else np.float16))
    else:
        writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def save_gguf(path: Path, config: dict[str, Any], arrays: dict[str, np.ndarray], kind: TYPES = TYPES.F32) -> Path:
    """A GGUF file of float32 `arrays` {module: array in Hugging Face's row order}."""
    writer = base_writer(path, config)
    for module, array in arrays.items():
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(module.rsplit(".", 1)[-1])
        add_tensor(writer, gguf_name(module), permute(array, config[heads]) if heads else array, kind)
    finish(writer)
    return path
