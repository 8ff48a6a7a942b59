"""How large a checkpoint is: of a model in hand, as its files are, and from a config alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.config import check_group_size
from quantlab.io.checkpoint import open_checkpoint, source_kind
from quantlab.io.files import read_json
from quantlab.io.hub import download_config
from quantlab.io.save import checkpoint_nbytes
from quantlab.llama import LlamaConfig

if TYPE_CHECKING:
    from quantlab.io import Checkpoint
    from quantlab.llama import Llama

KNOWN_CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "llama-2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
    },
    "llama-2-13b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "vocab_size": 32000,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
    },
    "tinyllama-1.1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "rms_norm_eps": 1e-5,
    },
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "rope_theta": 100000.0,
    },
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
    },
}


def size_of_model(model: Llama) -> dict[str, Any]:
    """`parts`: bytes of embeddings, attention, mlp, norms and head in the checkpoint's files (headers aside);
    `total`: their sum; `memory`: bytes of the arrays as they are held now, `packed` of them copies that products with
    few rows made for themselves."""
    parts = dict.fromkeys(("embedding", "attention", "mlp", "norms", "head"), 0)
    for module, weight in model.saved_weights().items():
        kind = (
            "embedding"
            if module == "model.embed_tokens"
            else "attention"
            if "self_attn" in module
            else "mlp"
            if "mlp" in module
            else "head"
        )
        parts[kind] += checkpoint_nbytes(weight, model.saved_dtype)
    parts["norms"] = sum(vector.nbytes for vector in model.saved_vectors().values())
    packed = sum(weight.handle.packed_nbytes for weight in model.weights.values())
    matrices, norms = (sum(one.nbytes for one in held) for held in (model.weights.values(), model.vectors.values()))
    return {"parts": parts, "total": sum(parts.values()), "memory": matrices + norms + packed, "packed": packed}


def open_config(name: str) -> tuple[Mapping[str, Any], Checkpoint | None]:
    """The config of a known model, a config.json, or a source of `open_checkpoint`; and the checkpoint, where its files
    are on this machine (beside a config.json too): a hub model is not downloaded to tell its size."""
    if name.lower() in KNOWN_CONFIGS:
        return KNOWN_CONFIGS[name.lower()], None
    path = Path(name)
    path = path / "config.json" if (path / "config.json").is_file() else path
    if path.suffix == ".json" and not (path.name == "config.json" and any(path.parent.glob("*.safetensors"))):
        return read_json(path), None
    source = path.parent if path.suffix == ".json" else name
    hub = source_kind(source) == "hub"
    try:
        checkpoint = open_checkpoint(source, local_files_only=hub)
    except FileNotFoundError:
        if not hub:
            raise
        return read_json(download_config(name)), None
    return checkpoint.config, checkpoint


def size_of_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Bytes of a checkpoint's tensors as its files hold them, by part: those of `size_from_config`."""
    parts = dict.fromkeys(("embedding", "linear", "norms", "head"), 0)
    for module in checkpoint.modules:
        matrix = "linear" if module.startswith("model.layers.") else "head"
        other = {"model.embed_tokens": "embedding"}.get(module, matrix)
        parts["norms" if module.endswith("norm") else other] += checkpoint.stored(module)[1]
    return {"parts": parts, "total": sum(parts.values())}


def size_from_config(
    config: LlamaConfig | Mapping[str, Any],
    bits: int,
    group_size: int = 128,
    head: str = "classifier",
    num_labels: int = 3,
) -> dict[str, Any]:
    """Bytes of a checkpoint of this architecture, by part, without loading anything.

    bits: 32 or 16 for floats; 2, 3, 4, 8 for GPTQ's layout: codes, float16 scales and zeros at `bits` bits for every
    `group_size` inputs, int32 g_idx. head: "classifier" (`num_labels` rows, no lm_head: the TweetEval study's model) or
    "causal" (an lm_head unless it is tied to the embedding). What is beside quantized matrices has 16 bits: see
    `Checkpoint.kept_dtype`.
    """
    config = config if isinstance(config, LlamaConfig) else LlamaConfig(config)
    if bits not in (2, 3, 4, 8, 16, 32):
        raise ValueError(f"bits: got {bits}, accepted are 2, 3, 4, 8, 16, 32")
    check_group_size(group_size)
    if head not in ("classifier", "causal"):
        raise ValueError(f"head: got {head!r}, accepted are classifier, causal")
    c, f, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes = [(q, c), (kv, c), (kv, c), (c, q), (f, c), (f, c), (c, f)]
    float_bytes = 4 if bits == 32 else 2
    rows = num_labels if head == "classifier" else 0 if config.tie_word_embeddings else config.vocab_size
    parts = {
        "embedding": config.vocab_size * c * float_bytes,
        "linear": layers * sum(_linear_bytes(n, k, bits, group_size) for n, k in shapes),
        "norms": (2 * layers + 1) * c * float_bytes,
        "head": rows * c * float_bytes,
    }
    return {"parts": parts, "total": sum(parts.values()), "bits": bits, "group_size": group_size, "head": head}


def _linear_bytes(n: int, k: int, bits: int, group_size: int) -> int:
    if bits in (16, 32):
        return n * k * bits // 8
    groups = 1 if group_size == -1 else -(-k // group_size)
    words = -(-k * bits // 32) * n + groups * -(-n * bits // 32) + k  # codes, zeros, g_idx
    return 4 * words + 2 * groups * n
