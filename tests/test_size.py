"""The size report against the files that are written."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import save_tiny

import quantlab as ql

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
