"""save_checkpoint: a model as a Hugging Face directory, in the layout that its weights ask for."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantlab.io import bitsandbytes, gptq
from quantlab.io.directory import INDEX
from quantlab.io.files import output_directory, write_bytes
from quantlab.io.safetensors import LazyTensor, shard, write_safetensors
from quantlab.io.tokenizer import dump_config

if TYPE_CHECKING:
    from quantlab.weight import QuantWeight

FLOATS = ("f32", "f16", "bf16")
OURS = re.compile(r"(model|gptq_model)[^/]*\.safetensors|model\.safetensors\.index\.json|quantize_config\.json")


def save_checkpoint(
    path: str | os.PathLike[str],
    config: Mapping[str, Any],
    weights: Mapping[str, QuantWeight],
    vectors: Mapping[str, np.ndarray],
    tokenizer_files: Mapping[str, bytes] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> dict[str, int]:
    """Writes a checkpoint directory; returns {file name: bytes}.

    weights: {module: matrix}: all float: plain safetensors; affine: the GPTQ layout; nf4, fp4, int8: bitsandbytes'.
    vectors: {module: norm gain}. config: config.json, whose quantization_config is made here. Every file is written
    beside `path` first and moved there at the end, config.json last: a failure (ValueError, OSError on a full disk)
    leaves what was there before.
    """
    target = output_directory(path, "path", "the checkpoint")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes: got {max_shard_bytes}, expected at least 1")
    config = dict(config)
    quantization = quantization_config(weights, config)
    config.pop("quantization_config", None)
    if quantization is not None:
        config["quantization_config"] = quantization
    tensors = checkpoint_tensors(weights, vectors, quantization)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        sizes = _write_files(staging, config, tensors, tokenizer_files or {}, max_shard_bytes)
        _move_into(staging, target, list(sizes))
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return sizes


def quantization_config(weights: Mapping[str, QuantWeight], config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The quantization_config of a checkpoint of these weights; None where all are floats."""
    quantized = {module: weight for module, weight in weights.items() if weight.format not in FLOATS}
    if not quantized:
        return None
    if "model.embed_tokens" in quantized or "score" in quantized:
        raise ValueError(
            "weights: model.embed_tokens and score must be float weights; no checkpoint layout holds them quantized"
        )
    affine = [weight.format == "affine" for weight in quantized.values()]
    if any(affine):
        if not all(affine):
            formats = sorted({weight.format for weight in quantized.values()})
            raise ValueError(f"weights: got {' and '.join(formats)}; one checkpoint holds one quantized layout")
        return gptq.quantization_config(quantized)
    floats = [
        module for module in weights if module not in quantized and module not in ("model.embed_tokens", "lm_head")
    ]
    skipped = [*([] if "lm_head" in quantized else ["lm_head"]), *floats]  # a tied head is a linear layer too
    return bitsandbytes.quantization_config(quantized, skipped, config_dtype(config))


def checkpoint_tensors(
    weights: Mapping[str, QuantWeight], vectors: Mapping[str, np.ndarray], quantization: Mapping[str, Any] | None
) -> dict[str, LazyTensor]:
    """{name: tensor} of a checkpoint in the order of the layers, made one at a time while they are written."""
    version = (quantization or {}).get("checkpoint_format", gptq.V1)
    dtype = (quantization or {}).get("bnb_4bit_compute_dtype", "float32")
    tensors: dict[str, LazyTensor] = {}
    for module in sorted({*weights, *vectors}, key=_layer_order):
        if module in vectors:
            tensors[f"{module}.weight"] = LazyTensor.of(np.asarray(vectors[module]))
        else:
            tensors |= stored_tensors(module, weights[module], version, dtype)
    return tensors


def stored_tensors(
    module: str, weight: QuantWeight, version: str = gptq.V1, dtype: str = "float32"
) -> dict[str, LazyTensor]:
    """The tensors that hold one weight. version: of the GPTQ layout; dtype: written beside 4-bit weights."""
    if weight.format in FLOATS:
        import ml_dtypes

        numpy_dtype = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}[weight.format]
        return {f"{module}.weight": LazyTensor.of(weight.codes.view(numpy_dtype).reshape(weight.shape))}
    if weight.format == "affine":
        return gptq.stored_tensors(module, weight, version)
    return bitsandbytes.stored_tensors(module, weight, dtype)


def checkpoint_nbytes(weight: QuantWeight, dtype: str = "float32") -> int:
    """Bytes of the tensors that hold one weight in its checkpoint layout, the header of the file aside. dtype: as in
    `stored_tensors`."""
    return sum(tensor.nbytes for tensor in stored_tensors("", weight, dtype=dtype).values())


def config_dtype(config: Mapping[str, Any]) -> str:
    """The dtype that a config.json names and that is written beside 4-bit weights; float32 where it names none."""
    dtype = str(config.get("torch_dtype") or config.get("dtype") or "float32").removeprefix("torch.")
    return dtype if dtype in bitsandbytes.DTYPES else "float32"


def _layer_order(module: str) -> tuple[int, int, str]:
    parts = module.split(".")
    if len(parts) > 2 and parts[1] == "layers" and parts[2].isdigit():
        return 1, int(parts[2]), module
    return (0 if module == "model.embed_tokens" else 2), 0, module


def _write_files(
    folder: Path,
    config: dict[str, Any],
    tensors: dict[str, LazyTensor],
    extra: Mapping[str, bytes],
    max_shard_bytes: int,
) -> dict[str, int]:
    sizes: dict[str, int] = {}
    parts = dict(shard(tensors, max_shard_bytes))
    for name, part in parts.items():
        sizes[name] = write_safetensors(folder / name, part)
    if len(parts) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        weight_map = {tensor: name for name, part in parts.items() for tensor in part}
        sizes[INDEX] = write_bytes(
            folder / INDEX, dump_config({"metadata": {"total_size": total}, "weight_map": weight_map})
        )
    for name, content in extra.items():
        if Path(name).name != name or OURS.fullmatch(name) or name == "config.json":
            raise ValueError(
                f"tokenizer_files: got the name {name!r}, expected a plain file name that is not the model's"
            )
        sizes[name] = write_bytes(folder / name, content)
    quantization = config.get("quantization_config")
    if quantization is not None and quantization["quant_method"] == "gptq":
        sizes["quantize_config.json"] = write_bytes(folder / "quantize_config.json", dump_config(quantization))
    sizes["config.json"] = write_bytes(folder / "config.json", dump_config(config))
    return sizes


def _move_into(staging: Path, target: Path, names: list[str]) -> None:
    """Moves the files into `target`, config.json (written last) last; weights of an older save there are removed."""
    if not target.exists():
        staging.chmod(0o777 & ~_umask())
        os.rename(staging, target)
        return
    for name in names:
        os.replace(staging / name, target / name)
    for old in target.iterdir():
        if OURS.fullmatch(old.name) and old.name not in names:
            old.unlink()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
