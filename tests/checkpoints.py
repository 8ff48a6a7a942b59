"""Tiny checkpoints for the tests: random weights, a byte-level tokenizer, a directory as Hugging Face lays it out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from models import TINY, tiny_parts
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

SPECIAL = ["<unk>", "<s>", "</s>"]
VOCABULARY = len(SPECIAL) + 256


def byte_tokenizer() -> Tokenizer:
    """One token a byte, after three special tokens: any text can be encoded, and decodes to itself."""
    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(BPE({word: index for index, word in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def tiny_tensors(seed: int = 0, **changes: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """config.json's content and the float32 tensors of a random model, under Hugging Face's names."""
    config, weights, vectors = tiny_parts(seed, **{"vocab_size": VOCABULARY, **changes})
    tensors = {f"{module}.weight": weight.dequantize() for module, weight in weights.items()}
    tensors |= {f"{module}.weight": vector.astype(np.float32) for module, vector in vectors.items()}
    values = {**TINY, **changes, "vocab_size": config.vocab_size, "architectures": ["LlamaForCausalLM"]}
    return values, tensors


def save_tiny(path: Path, seed: int = 0, **changes: Any) -> Path:
    """Writes a tiny checkpoint directory and returns it."""
    config, tensors = tiny_tensors(seed, **changes)
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    byte_tokenizer().save(str(path / "tokenizer.json"))
    return path
