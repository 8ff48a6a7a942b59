"""The GPTQ layout against published words, an independent unpacker, and files as AutoGPTQ and GPTQModel write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from checkpoints import tiny_tensors

import quantlab as ql
from quantlab.io import open_checkpoint, save_checkpoint
from quantlab.io.architecture import check_config, module_shapes
from quantlab.io.bitstream import pack, unpack, words_per_row
from quantlab.io.gptq import quantization_config, regroup, stored_tensors
from quantlab.io.save import checkpoint_nbytes

LAYER = "model.layers.0.self_attn.q_proj"

# words that files in the wild hold (AutoGPTQ, GPTQModel)
VECTORS = {
    4: (range(8), [0x76543210]),
    2: ([i % 4 for i in range(16)], [0xE4E4E4E4]),
    8: (range(4), [0x03020100]),
    3: ([i % 8 for i in range(32)], [0x88FAC688, 0xC688FAC6, 0xFAC688FA]),
}
SYM_ZEROS = {
    ("gptq", 2): [0x55555555], ("gptq", 4): [0x77777777], ("gptq", 8): [0x7F7F7F7F],
    ("gptq", 3): [0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D],
    ("gptq_v2", 2): [0xAAAAAAAA], ("gptq_v2", 4): [0x88888888], ("gptq_v2", 8): [0x80808080],
    ("gptq_v2", 3): [0x24924924, 0x49249249, 0x92492492],
}  # fmt: skip


@pytest.mark.parametrize("bits", VECTORS)
def test_published_words(bits: int) -> None:
    codes, words = VECTORS[bits]
    codes = np.array([list(codes)], np.uint8)
    np.testing.assert_array_equal(pack(codes, bits), np.array([words], np.uint32))
    np.testing.assert_array_equal(unpack(np.array([words], np.uint32), codes.shape[1], bits), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 100])
def test_pack_is_the_stream_of_the_core(bits: int, count: int, rng: np.random.Generator) -> None:
    codes = rng.integers(0, 2**bits, (5, count), dtype=np.uint8)
    words = pack(codes, bits)
    assert words.shape == (5, words_per_row(count, bits))
    np.testing.assert_array_equal(unpack(words, count, bits), codes)
    weight = ql.QuantWeight(
        "affine", bits, (5, count), count, words, np.ones((5, 1), np.float32), np.zeros((5, 1), np.uint8)
    )
    np.testing.assert_array_equal(weight.dequantize(), codes.astype(np.float32))


def shift_and_mask(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Codes of packed rows (words along axis 1), one at a time in Python's integers: another way than the module's."""
    rows = []
    for row in words.view(np.uint32):
        stream = sum(int(word) << (32 * i) for i, word in enumerate(row))
        rows.append([(stream >> (bits * i)) & (2**bits - 1) for i in range(count)])
    return np.array(rows)


def independent(tensors: dict[str, np.ndarray], module: str, bits: int, version: str, n: int) -> np.ndarray:
    """W (n, k) from the four tensors by the formula W[n, k] = scales[g_idx[k], n] * (q[k, n] - zero[g_idx[k], n])."""
    g_idx = tensors[f"{module}.g_idx"]
    q = shift_and_mask(np.ascontiguousarray(tensors[f"{module}.qweight"].T), bits, len(g_idx)).T
    zeros = shift_and_mask(tensors[f"{module}.qzeros"], bits, n) + (version == "gptq")
    scales = tensors[f"{module}.scales"].astype(np.float32)
    return (scales[g_idx] * (q - zeros[g_idx]).astype(np.float32)).T


def random_weight(
    rng: np.random.Generator, bits: int, n: int, k: int, group: int, sym: bool, perm: bool, least_zero: int = 0
) -> ql.QuantWeight:
    groups = -(-k // group)
    scales = rng.uniform(0.001, 0.1, (n, groups)).astype(np.float16).astype(np.float32)
    zeros = None if sym else rng.integers(least_zero, 2**bits, (n, groups), dtype=np.uint8)
    codes = pack(rng.integers(0, 2**bits, (n, k), dtype=np.uint8), bits)
    order = rng.permutation(k).astype(np.int32) if perm else None
    return ql.QuantWeight("affine", bits, (n, k), group, codes, scales, zeros, order)


def tiny_checkpoint(folder: Path, make: Any) -> tuple[dict[str, Any], dict[str, ql.QuantWeight]]:
    """Saves a tiny checkpoint whose layers' matrices are make(n, k); returns its config and weights."""
    config, tensors = tiny_tensors()
    weights, vectors = {}, {}
    for module, shape in module_shapes(check_config(config, "tiny")).items():
        array = tensors[f"{module}.weight"]
        if len(shape) == 1:
            vectors[module] = array
        else:
            weights[module] = make(*shape) if "layers" in module else ql.QuantWeight.from_array(array)
    save_checkpoint(folder, config, weights, vectors)
    return config, weights


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [16, 24, 64, 1000])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("perm", [False, True])
def test_round_trip(bits: int, group: int, sym: bool, perm: bool, tmp_path: Path, rng: np.random.Generator) -> None:
    _, weights = tiny_checkpoint(tmp_path, lambda n, k: random_weight(rng, bits, n, k, group, sym, perm))
    checkpoint = open_checkpoint(tmp_path)
    version = "gptq" if sym else "gptq_v2"
    assert checkpoint.quantization["checkpoint_format"] == version
    assert checkpoint.quantization["bits"] == bits and checkpoint.quantization["sym"] == sym
    assert checkpoint.quantization["desc_act"] == perm
    stored = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    for module, weight in weights.items():
        if weight.format != "affine":
            continue
        np.testing.assert_array_equal(checkpoint.weight(module).dequantize(), weight.dequantize())
        if module in (LAYER, "model.layers.1.mlp.down_proj"):
            got = independent(stored, module, bits, version, weight.shape[0])
            np.testing.assert_array_equal(got, weight.dequantize())
        assert checkpoint_nbytes(weight) == sum(a.nbytes for name, a in stored.items() if name.startswith(f"{module}."))
    assert json.loads((tmp_path / "quantize_config.json").read_text()) == checkpoint.quantization


@pytest.mark.parametrize("k", [1, 7, 33, 65, 100])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_inputs_that_do_not_fill_words(bits: int, k: int, rng: np.random.Generator) -> None:
    """k * bits need not be a multiple of 32, nor n * bits: the last words are filled up with zeros."""
    n = 5
    weight = random_weight(rng, bits, n, k, 32, False, True)
    tensors = {name: tensor.make() for name, tensor in stored_tensors("p", weight, "gptq_v2").items()}
    np.testing.assert_array_equal(independent(tensors, "p", bits, "gptq_v2", n), weight.dequantize())


@pytest.mark.parametrize(("version", "bits"), SYM_ZEROS)
def test_zeros_of_symmetric_weights(version: str, bits: int, rng: np.random.Generator) -> None:
    weight = random_weight(rng, bits, 32, 32, 32, True, False)
    qzeros = stored_tensors("p", weight, version)["p.qzeros"].make().view(np.uint32)
    assert qzeros[0].tolist() == SYM_ZEROS[version, bits] * (bits * 32 // 32 // len(SYM_ZEROS[version, bits]))


def test_version_1_cannot_hold_a_zero_of_zero(rng: np.random.Generator) -> None:
    weight = random_weight(rng, 4, 8, 32, 32, False, False, least_zero=1)
    tensors = {name: tensor.make() for name, tensor in stored_tensors("p", weight, "gptq").items()}
    np.testing.assert_array_equal(independent(tensors, "p", 4, "gptq", 8), weight.dequantize())
    weight.zeros[3, 0] = 0
    with pytest.raises(ValueError, match="gptq_v2"):
        stored_tensors("p", weight, "gptq")["p.qzeros"].make()


def test_failed_save_leaves_nothing(tmp_path: Path, rng: np.random.Generator) -> None:
    def make(n: int, k: int) -> ql.QuantWeight:
        weight = random_weight(rng, 4, n, k, 32, True, False)
        weight.scales[-1] = 1e6  # more than a float16 holds
        return weight

    with pytest.raises(ValueError, match="float16"):
        tiny_checkpoint(tmp_path / "out", make)
    assert list(tmp_path.iterdir()) == []


# ---- files by others -------------------------------------------------------------------------------------------------


def rewrite(folder: Path, quantization: dict[str, Any] | None, change: Any = None) -> None:
    """Gives the checkpoint in `folder` another quantization_config, and other tensors of LAYER."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config")
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    if change is not None:
        tensors = safetensors.numpy.load_file(folder / "model.safetensors")
        change(tensors)
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def test_symmetric_reader_ignores_qzeros(tmp_path: Path, rng: np.random.Generator) -> None:
    """Symmetric 3-bit files by older GPTQModel hold zero points that other readers decode to something else."""
    _, weights = tiny_checkpoint(tmp_path, lambda n, k: random_weight(rng, 3, n, k, 32, True, False))

    def change(tensors: dict[str, np.ndarray]) -> None:
        words = np.array([0x00000000, 0xB6DB6DB7, 0x49249249] * 2, np.uint32).view(np.int32)
        tensors[f"{LAYER}.qzeros"] = np.tile(words, (2, 1))

    rewrite(tmp_path, {"quant_method": "gptq", "bits": 3, "group_size": 32, "sym": True, "desc_act": False}, change)
    np.testing.assert_array_equal(open_checkpoint(tmp_path).weight(LAYER).dequantize(), weights[LAYER].dequantize())


@pytest.mark.parametrize("sym", [True, False])
def test_without_a_word_on_symmetry_the_zero_points_tell(sym: bool, tmp_path: Path, rng: np.random.Generator) -> None:
    _, weights = tiny_checkpoint(tmp_path, lambda n, k: random_weight(rng, 4, n, k, 32, sym, False))
    version = "gptq" if sym else "gptq_v2"
    rewrite(tmp_path, {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": version})
    read = open_checkpoint(tmp_path).weight(LAYER)
    assert (read.zeros is None) == sym
    np.testing.assert_array_equal(read.dequantize(), weights[LAYER].dequantize())


def test_zero_points_that_a_stated_symmetry_leaves_out_are_told_of_once(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    tiny_checkpoint(tmp_path, lambda n, k: random_weight(rng, 4, n, k, 32, False, False))
    stated = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "checkpoint_format": "gptq_v2"}
    rewrite(tmp_path, stated)
    checkpoint = open_checkpoint(tmp_path)
    with pytest.warns(UserWarning, match="sym is true, and the zero points of .* are not used") as told:
        assert checkpoint.weight(LAYER).zeros is None
        assert checkpoint.weight(LAYER).zeros is None
    assert len(told) == 1


def test_synonyms_and_missing_keys(tmp_path: Path, rng: np.random.Generator) -> None:
    _, weights = tiny_checkpoint(tmp_path, lambda n, k: random_weight(rng, 4, n, k, 32, False, False))
    rewrite(tmp_path, {"method": "gptq", "wbits": 4, "q_group_size": 32, "zero_point": True, "version": "gptq_v2"})
    checkpoint = open_checkpoint(tmp_path)
    np.testing.assert_array_equal(checkpoint.weight(LAYER).dequantize(), weights[LAYER].dequantize())


def test_autogptq_files(tmp_path: Path, rng: np.random.Generator) -> None:
    """AutoGPTQ: settings in quantize_config.json alone, a file name of its own, zero biases, no g_idx."""
    _, weights = tiny_checkpoint(tmp_path, lambda n, k: random_weight(rng, 4, n, k, 32, True, False))

    def change(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if name.endswith("g_idx")]:
            del tensors[name]
        tensors[f"{LAYER}.bias"] = np.zeros(64, np.float16)

    rewrite(tmp_path, None, change)
    (tmp_path / "model.safetensors").rename(tmp_path / "gptq_model-4bit-32g.safetensors")
    settings = {"bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": False, "sym": True,
                "model_file_base_name": "gptq_model-4bit-32g"}  # fmt: skip
    (tmp_path / "quantize_config.json").write_text(json.dumps(settings))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.quantization["quant_method"] == "gptq"
    np.testing.assert_array_equal(checkpoint.weight(LAYER).dequantize(), weights[LAYER].dequantize())
    rewrite_settings = {**settings, "desc_act": True}
    (tmp_path / "quantize_config.json").write_text(json.dumps(rewrite_settings))
    with pytest.raises(ValueError, match="g_idx"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("kind", ["blocks of unequal size", "shuffled", "one each", "a group unused"])
def test_any_g_idx(kind: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """Whatever column belongs to whatever group: the formula holds."""
    tiny_checkpoint(tmp_path, lambda n, k: random_weight(rng, 4, n, k, 16, False, False))
    g_idx = {
        "blocks of unequal size": np.repeat([0, 1, 2, 3], [8, 24, 20, 12]),
        "shuffled": rng.permutation(np.repeat(np.arange(4), 16)),
        "one each": rng.integers(0, 4, 64),
        "a group unused": rng.permutation(np.repeat([0, 1, 3, 3], 16)),
    }[kind].astype(np.int32)

    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[f"{LAYER}.g_idx"] = g_idx

    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False, "checkpoint_format": "gptq_v2"}
    rewrite(tmp_path, {**quantization, "desc_act": True}, change)
    stored = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    weight = open_checkpoint(tmp_path).weight(LAYER)
    np.testing.assert_array_equal(weight.dequantize(), independent(stored, LAYER, 4, "gptq_v2", 64))
    again = {name: tensor.make() for name, tensor in stored_tensors("p", weight, "gptq_v2").items()}
    np.testing.assert_array_equal(independent(again, "p", 4, "gptq_v2", 64), weight.dequantize())


def test_regroup_keeps_equal_groups() -> None:
    perm, group, rows = regroup(np.array([1, 0, 1, 0, 2]), 2)
    assert group == 2 and rows.tolist() == [0, 1, 2] and perm.tolist() == [1, 3, 0, 2, 4]


def test_settings_by_module(tmp_path: Path, rng: np.random.Generator) -> None:
    """Modules of other settings go to `dynamic`, and come back; a module may stay a float matrix."""
    config, tensors = tiny_tensors()
    weights, vectors = {}, {}
    for module, shape in module_shapes(check_config(config, "tiny")).items():
        array = tensors[f"{module}.weight"]
        if len(shape) == 1:
            vectors[module] = array
        elif "down_proj" in module:
            weights[module] = random_weight(rng, 8, *shape, 32, True, False)
        elif "layers.1" in module and "o_proj" not in module:
            weights[module] = random_weight(rng, 3, *shape, 16, True, False)
        elif "layers.0" in module and "o_proj" not in module:
            weights[module] = random_weight(rng, 4, *shape, 32, True, False)
        else:
            weights[module] = ql.QuantWeight.from_array(array)
    save_checkpoint(tmp_path, config, weights, vectors)
    checkpoint = open_checkpoint(tmp_path)
    assert len(checkpoint.quantization["dynamic"]) >= 7
    for module, weight in weights.items():
        assert checkpoint.weight(module).bits == weight.bits
        np.testing.assert_array_equal(checkpoint.weight(module).dequantize(), weight.dequantize())


@pytest.mark.parametrize(
    ("group", "asked", "expected"),
    [(64, 64, 64), (64, -1, -1), (64, 128, 128), (32, 32, 32), (64, None, 64), (32, None, 32)],
)
def test_group_size_in_the_config(group: int, asked: int | None, expected: int, rng: np.random.Generator) -> None:
    weight = random_weight(rng, 4, 8, 64, group, True, False)
    meta = {} if asked is None else {"group_size": asked}
    weight = ql.QuantWeight("affine", 4, (8, 64), group, weight.codes, weight.scales, meta=meta)
    assert quantization_config({"p": weight})["group_size"] == expected


def test_refuses_mixed_layouts(tmp_path: Path, rng: np.random.Generator) -> None:
    flip = iter(range(1000))

    def make(n: int, k: int) -> ql.QuantWeight:
        if next(flip) % 2:
            return random_weight(rng, 4, n, k, 32, True, False)
        return ql.QuantWeight.from_float(rng.normal(size=(n, k)).astype(np.float32), ql.NF4Config())

    with pytest.raises(ValueError, match="affine and nf4"):
        tiny_checkpoint(tmp_path / "out", make)
    assert list(tmp_path.iterdir()) == []
