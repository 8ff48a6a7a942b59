"""Checkpoint: one face for every file layout that a Llama model comes in; open_checkpoint chooses the reader."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from quantlab.weight import QuantWeight


class Checkpoint(ABC):
    """A memory-mapped model on disk: nothing is read before it is asked for.

    config: config.json with Hugging Face's names and the family's defaults filled in (GGUF metadata translated).
    quantization: config["quantization_config"], or None.
    modules: "model.embed_tokens", "model.layers.0.input_layernorm", "model.layers.0.self_attn.q_proj", …, "model.norm",
    "lm_head" (absent where tied to the embedding), "score" (where there is one), in the order of the layers.
    """

    path: Path
    config: dict[str, Any]
    quantization: dict[str, Any] | None
    modules: list[str]

    @abstractmethod
    def weight(self, module: str) -> QuantWeight:
        """The (outputs, inputs) matrix of a module, in the format it is stored in, zero-copy where the file allows."""

    @abstractmethod
    def vector(self, module: str) -> np.ndarray:
        """The float32 vector of a module: a norm's gain."""

    @abstractmethod
    def stored(self, module: str) -> tuple[str, int]:
        """The type of a module's weight in the file ("F32", "BF16", "U8", "Q4_1", …), and the bytes of all tensors that
        hold the module."""

    @property
    def kept_dtype(self) -> str:
        """What is beside quantized matrices is written in: 16 bits, as published files have it; bfloat16 where the
        embedding is stored so, else float16."""
        return "bfloat16" if self.stored("model.embed_tokens")[0] == "BF16" else "float16"

    def has(self, module: str) -> bool:
        return module in self.modules

    def require_language_model(self) -> None:
        """ValueError where it has no output matrix: a classifier, or a bare backbone."""
        if not self.has("lm_head") and not self.config.get("tie_word_embeddings"):
            what = "a classifier: use LlamaForSequenceClassification" if self.has("score") else "a backbone alone"
            raise ValueError(
                f"source: {self.path} holds no lm_head, and its config does not tie one to the embedding; it is {what}"
            )

    @property
    @abstractmethod
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, read when first asked for; None where the checkpoint has none."""

    @property
    @abstractmethod
    def tokenizer_files(self) -> dict[str, bytes]:
        """{file name: content} of what a copy of the checkpoint should carry for its tokenizer."""

    @property
    @abstractmethod
    def chat_template(self) -> str | None:
        """The Jinja template of a chat, if there is one."""

    @property
    def special_tokens(self) -> dict[str, str]:
        """{"eos_token": "</s>", …}: what the tokenizer's files name; it may differ from the config's ids."""
        return {}

    @property
    def eos_token_ids(self) -> list[int] | None:
        """The tokens that end a text where generation_config.json names them, which goes before the config's."""
        return None

    def _require(self, module: str, rank: int) -> None:
        """ValueError unless the module is there and is a matrix (rank 2) or a vector (rank 1)."""
        if module not in self.modules:
            raise ValueError(f"module: got {module!r}, which {self.path} does not hold")
        if module.endswith("norm") != (rank == 1):
            raise ValueError(f"module: got {module!r}, which is not a {'vector' if rank == 1 else 'matrix'}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path,)  # opened again

    def __deepcopy__(self, memo: dict[int, Any]) -> Checkpoint:
        return self  # the file is only read

    def __repr__(self) -> str:
        kind = (self.quantization or {}).get("quant_method", "plain")
        return f"{type(self).__name__}({str(self.path)!r}, {len(self.modules)} modules, {kind})"


def source_kind(source: str | os.PathLike[str]) -> Literal["demo", "directory", "gguf", "hub"]:
    """What `open_checkpoint` takes a source for: FileNotFoundError where it names nothing that is there and cannot be a
    hub id, ValueError where it is another file."""
    accepted = "accepted: a directory, a .gguf file, a hub id, or 'demo'"
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"source: got {type(source).__name__}, {accepted}")
    path, name = Path(source), str(source)
    if not name:
        raise ValueError(f"source: got nothing, {accepted}")
    if name == "demo":  # a directory of that name is "./demo"
        return "demo"
    if path.is_dir():
        return "directory"
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return "gguf"
        raise ValueError(f"source: got the file {path}; {accepted}")
    if path.suffix.lower() == ".gguf" or path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise FileNotFoundError(f"source: {source}: no such file or directory, and not a hub id (owner/name) or 'demo'")
    return "hub"


def open_checkpoint(source: str | os.PathLike[str], *, local_files_only: bool = False) -> Checkpoint:
    """Opens a directory (Hugging Face safetensors: plain, GPTQ or bitsandbytes), a .gguf file, a hub id, or "demo".

    local_files_only: use the caches, never the network. FileNotFoundError where there is no such source, ValueError
    where what is there is damaged or not supported.
    """
    from quantlab.io.directory import DirectoryCheckpoint
    from quantlab.io.gguf import GGUFCheckpoint

    kind = source_kind(source)
    if kind == "demo":
        from quantlab.io.cache import fetch

        return GGUFCheckpoint(fetch("demo-model", local_files_only=local_files_only))
    if kind == "directory":
        return DirectoryCheckpoint(source)
    if kind == "gguf":
        return GGUFCheckpoint(source)
    from quantlab.io.hub import download_model

    return DirectoryCheckpoint(download_model(str(source), local_files_only=local_files_only))
