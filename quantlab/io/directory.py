"""Hugging Face directories: config.json, one or many safetensors files, in the plain, GPTQ or bitsandbytes layout."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from quantlab.io.architecture import check_config, module_shapes
from quantlab.io.checkpoint import Checkpoint
from quantlab.io.files import read_json
from quantlab.io.safetensors import SafetensorsFile, TensorInfo
from quantlab.io.tokenizer import (
    directory_chat_template,
    directory_special_tokens,
    directory_tokenizer,
    directory_tokenizer_files,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from quantlab.weight import QuantWeight

INDEX = "model.safetensors.index.json"
FLOATS = ("F32", "F16", "BF16")
IGNORED = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")  # recomputed from the config


class Tensors(Mapping[str, TensorInfo]):
    """The tensors of all files of a directory: {name: TensorInfo}, `array(name)`, and errors that name the file."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: dict[str, SafetensorsFile] = {}
        for path in weight_files(folder):
            file = SafetensorsFile(path)
            for name in file.tensors:
                if name in self._files:
                    raise ValueError(f"{path}: tensor {name!r} is also in {self._files[name].path.name}")
                self._files[name] = file
        self._check_index()

    def _check_index(self) -> None:
        if (self.folder / INDEX).is_file():
            for name, file in read_index(self.folder).items():
                if name not in self._files or self._files[name].path.name != file:
                    raise ValueError(f"{self.folder / INDEX}: tensor {name!r} is not in {file}")

    def __getitem__(self, name: str) -> TensorInfo:
        return self._files[name].tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def array(self, name: str) -> np.ndarray:
        return self._files[name].array(name)

    def expect(self, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> None:
        """ValueError unless the tensor is there with one of these dtypes and this shape."""
        if name not in self._files:
            raise ValueError(f"{self.folder}: lacks tensor {name!r}")
        got, path = self[name], self._files[name].path
        if got.dtype not in dtypes:
            raise ValueError(f"{path}: tensor {name!r} has dtype {got.dtype}, accepted: {' '.join(dtypes)}")
        if got.shape != shape:
            raise ValueError(f"{path}: tensor {name!r} has shape {got.shape}, expected {shape}")


def read_index(folder: Path) -> dict[str, str]:
    """{tensor: file name} of a sharded checkpoint; ValueError where the index is no such thing."""
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / INDEX}: lacks weight_map, an object of tensor and file names")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(
                f"{folder / INDEX}: tensor {name!r} lies in {file!r}, expected a .safetensors file beside the index"
            )
    return weight_map


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those of its index, or the only one; FileNotFoundError where a shard is
    missing."""
    if (folder / INDEX).is_file():
        paths = [folder / name for name in sorted(set(read_index(folder).values()))]
        for path in paths:
            if not path.is_file():
                raise FileNotFoundError(f"{path}: this shard, named in {INDEX}, is missing")
        return paths
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    found = own_files(folder)
    if len(found) > 1:
        raise ValueError(f"{folder}: holds {len(found)} safetensors files and no {INDEX}")
    return found


def own_files(folder: Path) -> list[Path]:
    """The safetensors files that are not an adapter's."""
    return sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_"))


def require_model(folder: Path) -> None:
    """FileNotFoundError where a directory holds no model; what its files hold is not looked at."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: holds no config.json, expected a model's directory")
    if not own_files(folder) and not (folder / INDEX).is_file():
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        hint = f" (pickled weights like {pickled[0]} are not read: convert them to safetensors)" if pickled else ""
        raise FileNotFoundError(f"{folder}: holds no safetensors file{hint}")


class Layout(Protocol):
    """How the matrix of a module is stored."""

    def holds(self, tensors: Tensors, module: str) -> bool:
        """Whether this module is stored in this layout."""

    def check(self, tensors: Tensors, module: str, shape: tuple[int, ...]) -> set[str]:
        """Names of the tensors of the module, having checked their dtypes and shapes; reads no data."""

    def read(self, tensors: Tensors, module: str, shape: tuple[int, ...]) -> QuantWeight:
        """The matrix."""


class PlainLayout:
    """`<module>.weight` (outputs, inputs) as float32, float16 or bfloat16."""

    def holds(self, tensors: Tensors, module: str) -> bool:
        return f"{module}.weight" in tensors

    def check(self, tensors: Tensors, module: str, shape: tuple[int, ...]) -> set[str]:
        tensors.expect(f"{module}.weight", FLOATS, shape)
        return {f"{module}.weight"}

    def read(self, tensors: Tensors, module: str, shape: tuple[int, ...]) -> QuantWeight:
        from quantlab.weight import QuantWeight

        return QuantWeight.from_array(tensors.array(f"{module}.weight"))


def layouts_of(quantization: dict[str, Any] | None, where: str) -> list[Layout]:
    """The layouts in which modules may be stored under this quantization_config, the quantized one first."""
    if quantization is None:
        return [PlainLayout()]
    method = quantization.get("quant_method", quantization.get("method"))
    if method == "gptq":
        from quantlab.io.gptq import GPTQLayout

        return [GPTQLayout(quantization, where), PlainLayout()]
    if method == "bitsandbytes":
        from quantlab.io.bitsandbytes import FourBitLayout, Int8Layout

        return [FourBitLayout(where), Int8Layout(where), PlainLayout()]
    raise ValueError(f"{where}: quant_method {method!r} is not supported; supported: 'gptq', 'bitsandbytes'")


class DirectoryCheckpoint(Checkpoint):
    """A directory as Hugging Face libraries write it. Opening it checks the shape and dtype of every tensor."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        require_model(self.path)
        where = str(self.path / "config.json")
        self.config = check_config(read_json(self.path / "config.json"), where)
        self.quantization = self._read_quantization(where)
        self._tensors = Tensors(self.path)
        self._prefix = "" if "model.embed_tokens.weight" in self._tensors else self._bare_prefix()
        self.config["tie_word_embeddings"] &= not self._has_own_head()
        self._shapes = self._expected_shapes()
        self._names: dict[str, set[str]] = {}  # of a module's tensors
        self._layouts = self._choose_layouts(layouts_of(self.quantization, where))
        self.modules = list(self._shapes)

    def weight(self, module: str) -> QuantWeight:
        self._require(module, rank=2)
        return self._layouts[module].read(self._tensors, self._stored(module), self._shapes[module])

    def stored(self, module: str) -> tuple[str, int]:
        tensors = [self._tensors[name] for name in sorted(self._names[module])]
        weight = self._tensors.get(f"{self._stored(module)}.weight", tensors[0])
        return weight.dtype, sum(tensor.end - tensor.begin for tensor in tensors)

    def vector(self, module: str) -> np.ndarray:
        self._require(module, rank=1)
        return self._tensors.array(f"{self._stored(module)}.weight").astype(np.float32)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        _ = self.chat_template, self.special_tokens, self.eos_token_ids  # read with it: a model outlives its directory
        return directory_tokenizer(self.path)

    @cached_property
    def tokenizer_files(self) -> dict[str, bytes]:
        return directory_tokenizer_files(self.path)

    @cached_property
    def chat_template(self) -> str | None:
        return directory_chat_template(self.path)

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        return directory_special_tokens(self.path)

    @cached_property
    def eos_token_ids(self) -> list[int] | None:
        path = self.path / "generation_config.json"
        value = read_json(path).get("eos_token_id") if path.is_file() else None
        if value is None:
            return None
        ids = value if isinstance(value, list) else [value]
        if not all(type(token) is int for token in ids):
            raise ValueError(f"{path}: eos_token_id is {value!r}, expected a token id or a list of them")
        return ids

    def _read_quantization(self, where: str) -> dict[str, Any] | None:
        quantization = self.config.get("quantization_config")
        if quantization is None:
            name = next((n for n in ("quantize_config.json", "quant_config.json") if (self.path / n).is_file()), None)
            if name is None:
                return None
            quantization = {"quant_method": "gptq", **read_json(self.path / name)}  # as AutoGPTQ wrote it
        if not isinstance(quantization, dict):
            raise ValueError(f"{where}: quantization_config is {quantization!r}, expected an object")
        return quantization

    def _bare_prefix(self) -> str:
        """LlamaModel without a head is saved without the leading `model.`"""
        return "model." if "embed_tokens.weight" in self._tensors else ""

    def _stored(self, module: str) -> str:
        return module.removeprefix(self._prefix)

    def _has_own_head(self) -> bool:
        """Whether there is an output matrix that is not the embedding: then the config is wrong to tie the two, and
        transformers does not either."""
        names = ("lm_head.weight", self._stored("model.embed_tokens") + ".weight")
        if not all(name in self._tensors and self._tensors[name].dtype in FLOATS for name in names):
            return False
        head, embedding = (self._tensors.array(name) for name in names)
        if head.dtype == embedding.dtype:
            head, embedding = head.reshape(-1).view(np.uint8), embedding.reshape(-1).view(np.uint8)
        return not np.array_equal(head, embedding)

    def _expected_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = module_shapes(self.config)
        headless = any(not name.endswith("ForCausalLM") for name in self.config.get("architectures") or [])
        if headless and "lm_head.weight" not in self._tensors:
            shapes.pop("lm_head", None)
        if "score.weight" in self._tensors:
            labels = self._tensors["score.weight"].shape[0]
            shapes["score"] = (labels, self.config["hidden_size"])
        return shapes

    def _choose_layouts(self, layouts: list[Layout]) -> dict[str, Layout]:
        chosen: dict[str, Layout] = {}
        for module, shape in self._shapes.items():
            stored = self._stored(module)
            candidates = layouts if len(shape) == 2 else [PlainLayout()]
            layout = next((item for item in candidates if item.holds(self._tensors, stored)), None)
            if layout is None:
                raise ValueError(f"{self.path}: lacks tensor {stored + '.weight'!r}")
            self._names[module] = layout.check(self._tensors, stored, shape)
            chosen[module] = layout
        self._check_rest(set().union(*self._names.values()))
        return chosen

    def _check_rest(self, used: set[str]) -> None:
        """Tensors that no module of a Llama model has: a tied head's copy and tables are ignored, zero biases too."""
        for name in self._tensors:
            if name in used or name.endswith(IGNORED) or name == "lm_head.weight":
                continue
            if name.endswith(".bias"):
                if np.any(self._tensors.array(name)):
                    raise ValueError(
                        f"{self.path}: tensor {name!r}: a bias is not supported (linear layers here have none)"
                    )
                continue
            raise ValueError(f"{self.path}: tensor {name!r} is not one of a Llama model with this config.json")
