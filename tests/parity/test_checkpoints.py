"""Checkpoints of ours in transformers with bitsandbytes, theirs here, and GPTQ's by the published formula."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import quantlab as ql
from quantlab.io import open_checkpoint
from quantlab.io.bitsandbytes import QUANT_MAPS

sys.path.insert(0, str(Path(__file__).parents[1]))
from checkpoints import save_tiny

torch = pytest.importorskip("torch", reason="the parity extra is not installed")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

IDS = np.array([[1, 5, 9, 200, 33, 2, 77, 140, 8, 8, 250, 17]])
# rows of whole blocks: bitsandbytes on a CPU decodes blocks that cross rows wrongly, its own included
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}


def quantize(model: ql.LlamaForCausalLM, config: Any) -> ql.LlamaForCausalLM:
    return model.replace(
        {m: ql.QuantWeight.from_float(w.dequantize(), config) for m, w in model.weights.items() if "layers" in m}
    )


def their_logits(folder: Path, **options: Any) -> np.ndarray:
    """In train mode, where bitsandbytes dequantizes; its kernel for inference on a CPU computes in bfloat16."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options).train()
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.float().numpy()


@pytest.fixture
def model(tmp_path: Path) -> ql.LlamaForCausalLM:
    return ql.LlamaForCausalLM.from_pretrained(save_tiny(tmp_path / "float", **SIZES))


def test_plain(model: ql.LlamaForCausalLM, tmp_path: Path) -> None:
    sizes = model.save_pretrained(tmp_path / "out")
    assert "tokenizer.json" in sizes
    np.testing.assert_allclose(model(IDS), their_logits(tmp_path / "out", dtype=torch.float32), atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [ql.NF4Config(), ql.NF4Config(double_quant=True), ql.FP4Config(), ql.NF4Config(block_size=128), ql.Int8Config()],
    ids=["nf4", "nf4 nested", "fp4", "nf4 of 128", "int8"],
)
def test_ours_in_transformers(config: Any, model: ql.LlamaForCausalLM, tmp_path: Path) -> None:
    """LLM.int8() rounds the activations too, which ours does not: its logits are compared by their correlation."""
    pytest.importorskip("bitsandbytes")
    quantized = quantize(model, config)
    quantized.save_pretrained(tmp_path / "out")
    theirs = their_logits(tmp_path / "out", dtype=torch.float32)
    ours = ql.LlamaForCausalLM.from_pretrained(tmp_path / "out")(IDS)
    np.testing.assert_array_equal(ours, quantized(IDS))
    if isinstance(config, ql.Int8Config):
        assert np.corrcoef(theirs.ravel(), ours.ravel())[0, 1] > 0.999
    else:
        np.testing.assert_allclose(theirs, ours, atol=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("config", [ql.NF4Config(), ql.Int8Config()], ids=["nf4", "int8"])
def test_ours_in_transformers_in_the_dtype_of_the_file(
    config: Any, dtype: str, model: ql.LlamaForCausalLM, tmp_path: Path
) -> None:
    """What a call that names no dtype gives: they compute in 16 bits, so only large errors show."""
    pytest.importorskip("bitsandbytes")
    source = ql.LlamaForCausalLM.from_pretrained(tmp_path / "float", dtype=dtype)
    source.save_pretrained(tmp_path / "source")
    ql.quantize(tmp_path / "source", config).save_pretrained(tmp_path / "out")
    ours = ql.LlamaForCausalLM.from_pretrained(tmp_path / "out")(IDS)
    assert np.corrcoef(their_logits(tmp_path / "out").ravel(), ours.ravel())[0, 1] > 0.999


@pytest.mark.parametrize(("kind", "nested"), [("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True)])
def test_theirs_here(kind: str, nested: bool, model: ql.LlamaForCausalLM, tmp_path: Path) -> None:
    """transformers quantizes the float checkpoint and saves it: we read the same matrices, and write the same bytes."""
    pytest.importorskip("bitsandbytes")
    options = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=nested
    )
    theirs = open_checkpoint(save_theirs(tmp_path, options))
    config = (ql.NF4Config if kind == "nf4" else ql.FP4Config)(double_quant=nested)
    ours = quantize(model, config)
    for module, weight in ours.weights.items():
        assert theirs.weight(module).format == weight.format
        np.testing.assert_array_equal(theirs.weight(module).dequantize(), weight.dequantize())
    ours.save_pretrained(tmp_path / "ours")
    written, reference = (
        safetensors.numpy.load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs")
    )
    assert written.keys() == reference.keys()
    for name, array in reference.items():
        assert written[name].dtype == array.dtype and written[name].shape == array.shape, name
        np.testing.assert_array_equal(written[name], array, err_msg=name)


def test_their_int8_here(model: ql.LlamaForCausalLM, tmp_path: Path) -> None:
    """They round the weights to float16 first, so a code may be one step off ours; names and shapes are the same."""
    pytest.importorskip("bitsandbytes")
    theirs = open_checkpoint(save_theirs(tmp_path, transformers.BitsAndBytesConfig(load_in_8bit=True)))
    ours = quantize(model, ql.Int8Config())
    for module, weight in ours.weights.items():
        got = theirs.weight(module)
        assert got.format == weight.format
        if got.format == "int8":
            assert np.abs(got.codes.astype(int) - weight.codes).max() <= 1
            np.testing.assert_allclose(got.scales, weight.scales, rtol=1e-3)
    ours.save_pretrained(tmp_path / "ours")
    written, reference = (
        safetensors.numpy.load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs")
    )
    assert {name: (a.dtype, a.shape) for name, a in written.items()} == {
        name: (a.dtype, a.shape) for name, a in reference.items()
    }


def save_theirs(folder: Path, options: Any) -> Path:
    """Quantizes folder/float with transformers and saves it to folder/theirs."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "float", quantization_config=options, dtype=torch.float32
    )
    model.save_pretrained(folder / "theirs")
    return folder / "theirs"


@pytest.mark.parametrize("kind", QUANT_MAPS)
def test_code_tables(kind: str) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    table = functional.get_4bit_type(kind, device="cpu").numpy()
    np.testing.assert_array_equal(QUANT_MAPS[kind], table)


@pytest.mark.parametrize(("bits", "sym"), [(4, True), (4, False), (3, True), (3, False), (8, True), (2, False)])
def test_gptq_by_the_formula(bits: int, sym: bool, model: ql.LlamaForCausalLM, tmp_path: Path) -> None:
    """Unpacked by shifts in NumPy, put into transformers' float model: the same logits."""
    quantized = quantize(model, ql.RTNConfig(bits, 32, sym=sym))
    quantized.save_pretrained(tmp_path / "out")
    tensors = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype=torch.float32).eval()
    for name in [name for name in tensors if name.endswith(".qweight")]:
        module = name.removesuffix(".qweight")
        matrix = by_formula(tensors, module, bits, 1 if sym else 0)
        reference.get_submodule(module).weight.data = torch.tensor(matrix)
    with torch.no_grad():
        expected = reference(torch.tensor(IDS)).logits.numpy()
    np.testing.assert_allclose(quantized(IDS), expected, atol=1e-4)
    np.testing.assert_allclose(ql.LlamaForCausalLM.from_pretrained(tmp_path / "out")(IDS), expected, atol=1e-4)


def by_formula(tensors: dict[str, np.ndarray], module: str, bits: int, offset: int) -> np.ndarray:
    """W = scales[g_idx] * (q - zero[g_idx]); offset: what version 1 took from the zero points."""
    g_idx = tensors[f"{module}.g_idx"]

    def codes(words: np.ndarray, count: int) -> np.ndarray:
        """Fields along axis 0 of packed words (words, columns)."""
        bit = np.arange(count) * bits
        wide = np.vstack([words.view(np.uint32).astype(np.uint64), np.zeros((1, words.shape[1]), np.uint64)])
        pair = wide[bit // 32] | wide[bit // 32 + 1] << np.uint64(32)
        return (pair >> (bit % 32).astype(np.uint64)[:, None]).astype(np.int64) & (2**bits - 1)

    q = codes(tensors[f"{module}.qweight"], len(g_idx))
    n = q.shape[1]
    zeros = codes(np.ascontiguousarray(tensors[f"{module}.qzeros"].T), n).T + offset
    return (tensors[f"{module}.scales"].astype(np.float32)[g_idx] * (q - zeros[g_idx])).T.astype(np.float32)
