"""bitsandbytes' 4-bit and LLM.int8() layouts, and directories as a whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from checkpoints import save_tiny, tiny_tensors

import quantlab as ql
from quantlab.io import open_checkpoint, save_checkpoint
from quantlab.io.architecture import check_config, module_shapes
from quantlab.io.save import checkpoint_nbytes

CONFIGS = {
    "nf4": ql.NF4Config(), "nf4 nested": ql.NF4Config(double_quant=True), "fp4": ql.FP4Config(),
    "nf4 of 4096": ql.NF4Config(block_size=4096), "fp4 nested of 128": ql.FP4Config(block_size=128, double_quant=True),
    "int8": ql.Int8Config(), "float": None,
}  # fmt: skip


def parts(config: Any, **changes: Any) -> tuple[dict[str, Any], dict[str, ql.QuantWeight], dict[str, np.ndarray]]:
    """Values of config.json, weights quantized by `config` in the layers, norms."""
    values, tensors = tiny_tensors(**changes)
    weights, vectors = {}, {}
    for module, shape in module_shapes(check_config(values, "tiny")).items():
        array = tensors[f"{module}.weight"]
        if len(shape) == 1:
            vectors[module] = array
        elif config is not None and "layers" in module:
            weights[module] = ql.QuantWeight.from_float(array, config)
        else:
            weights[module] = ql.QuantWeight.from_array(array)
    return values, weights, vectors


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("changes", [{}, {"hidden_size": 36, "head_dim": 10, "intermediate_size": 45}])
def test_round_trip(name: str, changes: dict[str, int], tmp_path: Path) -> None:
    """Blocks that cross rows included: the odd sizes."""
    values, weights, vectors = parts(CONFIGS[name], **changes)
    sizes = save_checkpoint(tmp_path, values, weights, vectors, {"tokenizer.json": b"{}"})
    assert sizes == {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    checkpoint = open_checkpoint(tmp_path)
    for module, weight in weights.items():
        got = checkpoint.weight(module)
        assert (got.format, got.bits, got.shape, got.group) == (weight.format, weight.bits, weight.shape, weight.group)
        np.testing.assert_array_equal(got.codes.reshape(-1), weight.codes.reshape(-1))
        np.testing.assert_array_equal(got.dequantize(), weight.dequantize())
    for module, vector in vectors.items():
        np.testing.assert_array_equal(checkpoint.vector(module), vector)
    assert checkpoint.tokenizer_files == {"tokenizer.json": b"{}"}


@pytest.mark.parametrize("name", ["nf4", "nf4 nested", "int8"])
def test_files_hold_what_size_says(name: str, tmp_path: Path) -> None:
    values, weights, vectors = parts(CONFIGS[name])
    save_checkpoint(tmp_path, values, weights, vectors)
    raw = (tmp_path / "model.safetensors").read_bytes()
    body = len(raw) - 8 - int.from_bytes(raw[:8], "little")
    assert body == sum(checkpoint_nbytes(w) for w in weights.values()) + sum(v.nbytes for v in vectors.values())


def test_names_and_state(tmp_path: Path) -> None:
    values, weights, vectors = parts(ql.NF4Config(double_quant=True))
    save_checkpoint(tmp_path, {**values, "torch_dtype": "float16"}, weights, vectors)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    layer = "model.layers.0.mlp.down_proj.weight"
    assert tensors[layer].shape == (64 * 96 // 2, 1) and tensors[layer].dtype == np.uint8
    assert tensors[f"{layer}.absmax"].dtype == np.uint8 and tensors[f"{layer}.absmax"].shape == (96,)
    assert tensors[f"{layer}.nested_absmax"].shape == (1,) and tensors[f"{layer}.nested_quant_map"].shape == (256,)
    assert tensors[f"{layer}.quant_map"].shape == (16,)
    text = tensors[f"{layer}.quant_state.bitsandbytes__nf4"].tobytes().decode()
    offset = json.loads(text)["nested_offset"]
    assert text == (
        '{"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [64, 96], "nested_blocksize": 256, '
        f'"nested_dtype": "float32", "nested_offset": {offset!r}}}'
    )
    quantization = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert quantization["quant_method"] == "bitsandbytes" and quantization["load_in_4bit"]
    assert quantization["bnb_4bit_quant_type"] == "nf4" and quantization["bnb_4bit_use_double_quant"]
    assert quantization["llm_int8_skip_modules"] == ["lm_head"]


def test_float_linears_are_skipped(tmp_path: Path) -> None:
    values, weights, vectors = parts(ql.NF4Config())
    plain = parts(None)[1]
    module = "model.layers.1.mlp.up_proj"
    save_checkpoint(tmp_path, values, {**weights, module: plain[module]}, vectors)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.quantization["llm_int8_skip_modules"] == ["lm_head", module]
    assert checkpoint.weight(module).format == "f32"


def test_other_storage_types(tmp_path: Path) -> None:
    """bnb_4bit_quant_storage: the same bytes under another dtype."""
    values, weights, vectors = parts(ql.NF4Config())
    save_checkpoint(tmp_path, values, weights, vectors)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    module = "model.layers.0.self_attn.q_proj"
    tensors[f"{module}.weight"] = tensors[f"{module}.weight"].reshape(-1).view(np.float32).reshape(-1, 1)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(open_checkpoint(tmp_path).weight(module).dequantize(), weights[module].dequantize())


# ---- directories -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nf4", "float"])
def test_shards(name: str, tmp_path: Path) -> None:
    values, weights, vectors = parts(CONFIGS[name])
    sizes = save_checkpoint(tmp_path / "one", values, weights, vectors)
    shards = save_checkpoint(tmp_path / "many", values, weights, vectors, max_shard_bytes=30_000)
    assert "model.safetensors" in sizes and "model.safetensors.index.json" in shards and len(shards) > 4
    one, many = open_checkpoint(tmp_path / "one"), open_checkpoint(tmp_path / "many")
    for module in weights:
        np.testing.assert_array_equal(one.weight(module).codes, many.weight(module).codes)


def test_saving_over_an_older_checkpoint(tmp_path: Path) -> None:
    """Stale weights go, the user's other files stay, and the checkpoint read from may be the one written to."""
    values, weights, vectors = parts(None)
    save_checkpoint(tmp_path, values, weights, vectors, max_shard_bytes=30_000)
    (tmp_path / "notes.txt").write_text("mine")
    old = open_checkpoint(tmp_path)
    mapped = {module: old.weight(module) for module in weights}
    save_checkpoint(tmp_path, values, mapped, vectors)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors", "notes.txt"]
    for module, weight in weights.items():
        np.testing.assert_array_equal(open_checkpoint(tmp_path).weight(module).dequantize(), weight.dequantize())


def test_plain_reading_is_zero_copy(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_tiny(tmp_path))
    module = "model.layers.0.mlp.up_proj"
    assert np.shares_memory(checkpoint.weight(module).codes, checkpoint.weight(module).codes)


def test_save_refuses(tmp_path: Path) -> None:
    values, weights, vectors = parts(ql.NF4Config())
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="file"):
        save_checkpoint(tmp_path / "file", values, weights, vectors)
    with pytest.raises(ValueError, match="max_shard_bytes"):
        save_checkpoint(tmp_path / "a", values, weights, vectors, max_shard_bytes=0)
    with pytest.raises(ValueError, match="plain file name"):
        save_checkpoint(tmp_path / "a", values, weights, vectors, {"../evil": b""})
    with pytest.raises(ValueError, match="embed_tokens"):
        embedding = ql.QuantWeight.from_float(weights["model.embed_tokens"].dequantize(), ql.NF4Config())
        save_checkpoint(tmp_path / "a", values, {**weights, "model.embed_tokens": embedding}, vectors)
    assert os.listdir(tmp_path) == ["file"]


def test_quantized_head(tmp_path: Path) -> None:
    values, weights, vectors = parts(ql.NF4Config())
    head = ql.QuantWeight.from_float(weights["lm_head"].dequantize(), ql.NF4Config())
    save_checkpoint(tmp_path, values, {**weights, "lm_head": head}, vectors)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.quantization["llm_int8_skip_modules"] == []
    np.testing.assert_array_equal(checkpoint.weight("lm_head").dequantize(), head.dequantize())
