"""The size report against the files that are written."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import save_tiny

import quantlab as ql
from quantlab.io.safetensors import SafetensorsFile
from quantlab.size import open_config, size_from_config, size_of_checkpoint

CONFIGS = {
    "plain": None,
    "nf4": ql.NF4Config(),
    "nf4 double quant": ql.NF4Config(double_quant=True),
    "fp4": ql.FP4Config(block_size=32),
    "int8": ql.Int8Config(),
    "rtn, ragged groups": ql.RTNConfig(3, 40),
    "gptq v1": ql.GPTQConfig(4, 32),
    "gptq v2, act-order": ql.GPTQConfig(3, 32, sym=False, desc_act=True),
    "gptq, whole rows": ql.GPTQConfig(2, -1),
}


def bytes_of_tensors(folder: Path) -> int:
    """What the safetensors files hold, their headers aside."""
    total = 0
    for path in folder.glob("*.safetensors"):
        raw = path.read_bytes()
        total += len(raw) - 8 - int.from_bytes(raw[:8], "little")
    return total


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("cls", [ql.LlamaForCausalLM, ql.LlamaForSequenceClassification])
def test_report_is_the_size_of_the_files(tmp_path, name, dtype, cls):
    model = cls.from_pretrained(save_tiny(tmp_path / "source", torch_dtype="bfloat16"), dtype=dtype)
    if CONFIGS[name] is not None:
        model = ql.quantize(model, CONFIGS[name], calibration=[list(range(3, 60))] * 3)
    model.save_pretrained(tmp_path / "saved")
    assert model.size_report()["total"] == bytes_of_tensors(tmp_path / "saved")
    again = cls.from_pretrained(tmp_path / "saved", dtype="auto")
    assert again.config.torch_dtype == dtype  # what the float matrices are held in, not what they once were
    assert again.size_report()["total"] == model.size_report()["total"]
    floats = {
        info.dtype
        for name, info in SafetensorsFile(tmp_path / "saved/model.safetensors").tensors.items()
        if name.endswith(("norm.weight", "embed_tokens.weight", "lm_head.weight", "score.weight"))
    }
    assert len(floats) == 1  # readers compute in one type


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("config", [ql.RTNConfig(8, 128), ql.RTNConfig(3, 40), ql.GPTQConfig(2, -1)], ids=repr)
def test_estimate_is_what_quantize_writes(tmp_path, dtype, tied, config):
    source = ql.LlamaForCausalLM.from_pretrained(save_tiny(tmp_path / "f32", tie_word_embeddings=tied), dtype=dtype)
    source.save_pretrained(tmp_path / "source")
    values, checkpoint = open_config(str(tmp_path / "source"))
    kept = "bfloat16" if dtype == "bfloat16" else "float16"
    assert checkpoint is not None and checkpoint.kept_dtype == kept
    assert size_of_checkpoint(checkpoint)["total"] == bytes_of_tensors(tmp_path / "source")
    estimate = size_from_config(values, config.bits, config.group_size, "causal")
    model = ql.quantize(tmp_path / "source", config, calibration=[list(range(3, 60))] * 3)
    model.save_pretrained(tmp_path / "saved")
    assert estimate["total"] == model.size_report()["total"] == bytes_of_tensors(tmp_path / "saved")
    assert ql.open_checkpoint(tmp_path / "saved").config["torch_dtype"] == kept


@pytest.mark.parametrize("name", CONFIGS)
def test_a_checkpoint_is_as_large_as_its_files(tmp_path, name):
    model = ql.LlamaForCausalLM.from_pretrained(save_tiny(tmp_path / "source"))
    if CONFIGS[name] is not None:
        model = ql.quantize(model, CONFIGS[name], calibration=[list(range(3, 60))] * 3)
    model.save_pretrained(tmp_path / "saved")
    assert size_of_checkpoint(ql.open_checkpoint(tmp_path / "saved"))["total"] == bytes_of_tensors(tmp_path / "saved")
