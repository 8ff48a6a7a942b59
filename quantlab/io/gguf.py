"""GGUF files of the llama architecture: metadata, tensors, q/k row order, as a Checkpoint with Hugging Face names.

The format (ggml's docs/gguf.md): magic, version, counts, key-value metadata, tensor infos, then the aligned data. The
header is read here, every count and offset checked against the file (the `gguf` library's reader trusts them, and takes
seconds over a vocabulary); the blocks of the quantized types are decoded by the core.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from quantlab import _core
from quantlab.io.architecture import check_config, module_shapes
from quantlab.io.checkpoint import Checkpoint

if TYPE_CHECKING:
    from quantlab.weight import QuantWeight

# value types of the metadata: struct codes of the fixed-size ones
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
FLOATS: dict[str, np.dtype] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
DECODED = _core.gguf_kinds

MODULES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_MODULES = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


@dataclass(frozen=True)
class GGUFTensor:
    """`kind`: the name of its ggml type; `shape`: row-major, (outputs, inputs); its bytes [begin, end) of the file."""

    kind: str
    shape: tuple[int, ...]
    begin: int
    end: int


class GGUFFile:
    """`metadata` and `tensors` of one file, memory-mapped. ValueError, with the file's name, where damaged."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        with open(self.path, "rb") as file:
            self._size = os.fstat(file.fileno()).st_size
            if self._size < 24:
                raise self._fail(f"{self._size} bytes, expected at least 24")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._position = 0
        tensor_count, pair_count = self._read_start()
        self.metadata: dict[str, Any] = {}
        for _ in range(pair_count):
            key = self._string()
            if key in self.metadata:
                raise self._fail(f"its metadata names {key!r} twice")
            self.metadata[key] = self._value(self._number("I"))
        entries = [self._entry() for _ in range(tensor_count)]
        self.tensors = self._place(entries)

    def _fail(self, what: str) -> ValueError:
        return ValueError(f"{self.path}: not a valid GGUF file: {what}")

    def _read_start(self) -> tuple[int, int]:
        if self._map[:4] != b"GGUF":
            raise self._fail(f"it begins with {bytes(self._map[:4])!r}, expected b'GGUF'")
        self._position = 4
        version = self._number("I")
        if version not in (2, 3):
            raise self._fail(f"version {version} is not supported; supported: 2, 3 (little-endian)")
        tensors, pairs = self._number("Q"), self._number("Q")
        if tensors * 24 + pairs * 13 > self._size:  # the least that a tensor info and a pair take
            raise self._fail(f"it claims {tensors} tensors and {pairs} metadata values in {self._size} bytes")
        return tensors, pairs

    def _take(self, count: int) -> int:
        """Moves over `count` bytes and returns where they begin."""
        begin = self._position
        if count > self._size - begin:
            raise self._fail(f"cut short: {count} bytes expected at byte {begin}, the file has {self._size}")
        self._position = begin + count
        return begin

    def _number(self, code: str) -> Any:
        return struct.unpack_from("<" + code, self._map, self._take(struct.calcsize("<" + code)))[0]

    def _string(self) -> str:
        length = self._number("Q")
        begin = self._take(length)
        return self._map[begin : begin + length].decode("utf-8", errors="replace")

    def _value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self._number(SCALARS[kind])
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            raise self._fail(f"a metadata value has type {kind}, expected 0 to 12")
        item, count = self._number("I"), self._number("Q")
        if item in SCALARS:
            dtype = np.dtype("<" + SCALARS[item] if SCALARS[item] != "?" else "?")
            begin = self._take(count * dtype.itemsize)
            return np.frombuffer(self._map[begin : self._position], dtype)
        if item != STRING:
            raise self._fail(f"a metadata array has items of type {item}; arrays of numbers or strings are accepted")
        if count * 8 > self._size - self._position:
            raise self._fail(f"a metadata array claims {count} strings, the file has {self._size} bytes")
        return [self._string() for _ in range(count)]

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name, rank = self._string(), self._number("I")
        if not 1 <= rank <= 4:
            raise self._fail(f"tensor {name!r} has {rank} dimensions, expected 1 to 4")
        sizes = tuple(self._number("Q") for _ in range(rank))
        return name, sizes[::-1], self._number("I"), self._number("Q")

    def _place(self, entries: list[tuple[str, tuple[int, ...], int, int]]) -> dict[str, GGUFTensor]:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment % 8:
            raise self._fail(f"general.alignment is {alignment!r}, expected a positive multiple of 8")
        start = -(-self._position // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        for name, shape, kind, offset in entries:
            if name in tensors:
                raise self._fail(f"it names tensor {name!r} twice")
            try:
                ggml = GGMLQuantizationType(kind)
            except ValueError:
                raise self._fail(f"tensor {name!r} has the unknown type {kind}") from None
            block, nbytes = GGML_QUANT_SIZES[ggml]
            if math.prod(shape) < 1 or shape[-1] % block:
                raise self._fail(f"tensor {name!r} of type {ggml.name} has shape {shape}, expected rows of k * {block}")
            begin = start + offset
            end = begin + math.prod(shape) // block * nbytes
            if offset % alignment or end > self._size:
                raise self._fail(
                    f"tensor {name!r} lies at bytes {begin} to {end}, the file has {self._size} (cut short?)"
                )
            tensors[name] = GGUFTensor(ggml.name, shape, begin, end)
        ordered = sorted(tensors.items(), key=lambda item: item[1].begin)
        for (before, a), (after, b) in pairwise(ordered):
            if b.begin < a.end:
                raise self._fail(f"tensor {after!r} overlaps tensor {before!r}")
        return tensors

    def decode(self, name: str) -> np.ndarray:
        """The tensor as float32, float16 or bfloat16 (views of the file) or, from a quantized type, float32."""
        info = self.tensors[name]
        if info.kind in FLOATS:
            return np.frombuffer(self._map, FLOATS[info.kind], math.prod(info.shape), info.begin).reshape(info.shape)
        if info.kind not in DECODED:
            raise ValueError(
                f"{self.path}: tensor {name!r} has type {info.kind}; supported: F32 F16 BF16 {' '.join(DECODED)}"
            )
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        _, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[info.kind]]  # of a block; rows hold whole blocks
        blocks = np.frombuffer(self._map, np.uint8, info.end - info.begin, info.begin).reshape(-1, nbytes)
        return _core.gguf_decode(blocks, info.kind).reshape(info.shape)


class GGUFCheckpoint(Checkpoint):
    """A GGUF file of the llama architecture, with the names, the config and the row order of Hugging Face's."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.file = GGUFFile(path)
        self.quantization = None
        parts = self.file.metadata.get("split.count")
        if isinstance(parts, int) and parts > 1:
            raise ValueError(
                f"{path}: one of the {parts} files of a split model: join them with llama-gguf-split --merge"
            )
        self._names = self._module_names()
        self.config = check_config(self._translate_config(), str(path))
        shapes = module_shapes(self.config)
        for module, shape in shapes.items():
            if module not in self._names:
                raise ValueError(f"{path}: lacks tensor {self._gguf_name(module)!r} ({module})")
            got = self.file.tensors[self._names[module]]
            if got.shape != shape:
                raise ValueError(
                    f"{path}: tensor {self._names[module]!r} has shape {got.shape}, expected {shape} ({module})"
                )
            if got.kind not in (*FLOATS, *DECODED) or (len(shape) == 1 and got.kind not in FLOATS):
                raise ValueError(f"{path}: tensor {self._names[module]!r} has type {got.kind}; "
                                 f"supported: F32 F16 BF16, and for matrices {' '.join(DECODED)}")  # fmt: skip
        self.modules = list(shapes)

    def weight(self, module: str) -> QuantWeight:
        from quantlab.weight import QuantWeight

        self._require(module, rank=2)
        matrix = self.file.decode(self._names[module])
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(module.rsplit(".", 1)[-1])
        if heads:
            matrix = half_split_rows(matrix, self.config[heads])
        return QuantWeight.from_array(np.ascontiguousarray(matrix))

    def stored(self, module: str) -> tuple[str, int]:
        tensor = self.file.tensors[self._names[module]]
        return tensor.kind, tensor.end - tensor.begin

    def vector(self, module: str) -> np.ndarray:
        self._require(module, rank=1)
        return self.file.decode(self._names[module]).astype(np.float32)

    def _module_names(self) -> dict[str, str]:
        """{module: name of its tensor}; ValueError for a tensor that the llama architecture does not have."""
        names = {}
        for name in self.file.tensors:
            stem, _, suffix = name.rpartition(".")
            parts = stem.split(".")
            if name == "rope_freqs.weight" or name.endswith("attn_rot_embd.weight"):
                continue
            if suffix == "weight" and stem in MODULES:
                names[MODULES[stem]] = name
            elif suffix == "weight" and len(parts) == 3 and parts[0] == "blk" and parts[2] in LAYER_MODULES:
                names[f"model.layers.{parts[1]}.{LAYER_MODULES[parts[2]]}"] = name
            else:
                raise ValueError(f"{self.path}: tensor {name!r} is not supported (not one of a Llama model)")
        return names

    @staticmethod
    def _gguf_name(module: str) -> str:
        parts = module.split(".", 3)
        if len(parts) == 4:
            stem = next(name for name, tail in LAYER_MODULES.items() if tail == parts[3])
            return f"blk.{parts[2]}.{stem}.weight"
        return next(name for name, tail in MODULES.items() if tail == module) + ".weight"

    def _meta(self, key: str, default: Any = None) -> Any:
        value = self.file.metadata.get(f"llama.{key}", default)
        if isinstance(value, (np.ndarray, list, str)) and key != "rope.scaling.type":
            raise ValueError(f"{self.path}: llama.{key} differs between layers, which is not supported")
        return value

    def _translate_config(self) -> dict[str, Any]:
        meta = self.file.metadata
        if meta.get("general.architecture") != "llama":
            raise ValueError(
                f"{self.path}: general.architecture is {meta.get('general.architecture')!r}; supported: 'llama'"
            )
        if self._meta("expert_count", 0):
            raise ValueError(f"{self.path}: a mixture of {self._meta('expert_count')} experts is not supported")
        embedding = self.file.tensors.get("token_embd.weight")
        heads = self._meta("attention.head_count")
        config: dict[str, Any] = {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "hidden_size": self._meta("embedding_length"), "intermediate_size": self._meta("feed_forward_length"),
            "num_hidden_layers": self._meta("block_count"), "num_attention_heads": heads,
            "num_key_value_heads": self._meta("attention.head_count_kv", heads),
            "head_dim": self._meta("attention.key_length"),
            "rms_norm_eps": self._meta("attention.layer_norm_rms_epsilon", 1e-5),
            "max_position_embeddings": self._meta("context_length", 2048),
            "vocab_size": embedding.shape[0] if embedding else self._meta("vocab_size"),
            "tie_word_embeddings": "output.weight" not in self.file.tensors,
            "attention_bias": False, "mlp_bias": False, "torch_dtype": "float32",
            "rope_theta": self._meta("rope.freq_base", 10000.0), "rope_scaling": None,
        }  # fmt: skip
        for name, key in {"bos": "bos", "eos": "eos", "pad": "padding"}.items():
            config[f"{name}_token_id"] = meta.get(f"tokenizer.ggml.{key}_token_id")
        config = check_config(config, str(self.path))
        rotated = self._meta("rope.dimension_count", config["head_dim"])
        if rotated != config["head_dim"]:
            raise ValueError(
                f"{self.path}: llama.rope.dimension_count is {rotated}; supported: head_dim, {config['head_dim']}"
            )
        config["rope_scaling"] = self._rope_scaling(config)
        return config

    def _rope_scaling(self, config: dict[str, Any]) -> dict[str, Any] | None:
        if "rope_freqs.weight" in self.file.tensors:
            return self._llama3_scaling(config)
        kind = self._meta("rope.scaling.type", "none")
        factor = self._meta("rope.scaling.factor", self._meta("rope.scale_linear", 1.0))
        if kind not in ("none", "linear"):
            raise ValueError(f"{self.path}: llama.rope.scaling.type {kind!r} is not supported; supported: none, "
                             "linear, and llama3 by rope_freqs.weight")  # fmt: skip
        return {"rope_type": "linear", "factor": float(factor)} if factor and factor != 1.0 else None

    def _llama3_scaling(self, config: dict[str, Any]) -> dict[str, Any]:
        """Llama 3.1 and later: the file holds the factors by which each frequency is divided, not their parameters.
        They are found again with the low and high factors of every released model, 1 and 4 of 8,192 tokens."""
        stored = self.file.decode("rope_freqs.weight").astype(np.float64).ravel()
        low, high, original = 1.0, 4.0, 8192
        if len(stored) != config["head_dim"] // 2 or not np.isfinite(stored).all():
            raise ValueError(
                f"{self.path}: rope_freqs.weight has {len(stored)} factors, expected {config['head_dim'] // 2}"
            )
        factor = float(np.round(stored.max(), 4))
        frequencies = config["rope_theta"] ** (-np.arange(len(stored)) * 2.0 / config["head_dim"])
        turns = original * frequencies / (2 * np.pi)
        smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
        expected = 1.0 / ((1.0 - smooth) / factor + smooth)
        if not np.allclose(stored, expected, rtol=1e-3):
            raise ValueError(
                f"{self.path}: rope_freqs.weight holds factors other than Llama 3's, which is not supported"
            )
        return {
            "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }  # fmt: skip

    @cached_property
    def tokenizer(self) -> Any:
        from quantlab.io.gguf_tokenizer import build_tokenizer

        return build_tokenizer(self.file.metadata, str(self.path))

    @cached_property
    def tokenizer_files(self) -> dict[str, bytes]:
        from quantlab.io.gguf_tokenizer import tokenizer_files

        return tokenizer_files(self.file.metadata, self.tokenizer, str(self.path))

    @property
    def eos_token_ids(self) -> list[int] | None:
        from quantlab.io.gguf_tokenizer import end_tokens

        return end_tokens(self.file.metadata)

    @property
    def chat_template(self) -> str | None:
        return self.file.metadata.get("tokenizer.chat_template")


def half_split_rows(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k projection from GGUF's order (the two of a rotated pair are neighbours) to Hugging Face's (they
    are half a head apart): (heads, d/2, 2) -> (heads, 2, d/2)."""
    n, k = matrix.shape
    return matrix.reshape(heads, n // heads // 2, 2, k).swapaxes(1, 2).reshape(n, k)
