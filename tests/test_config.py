"""The configurations: what they accept, what they say to the rest, and their dictionaries."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

import quantlab as ql
from quantlab.config import CONFIGS, QuantizationConfig, config_from_dict

BAD = [
    (ql.GPTQConfig, "bits", 5),
    (ql.GPTQConfig, "bits", "4"),
    (ql.GPTQConfig, "bits", True),
    (ql.GPTQConfig, "bits", 4.0),
    (ql.GPTQConfig, "group_size", 0),
    (ql.GPTQConfig, "group_size", -2),
    (ql.GPTQConfig, "group_size", 64.0),
    (ql.GPTQConfig, "sym", 1),
    (ql.GPTQConfig, "desc_act", None),
    (ql.GPTQConfig, "damp_percent", 1.0),
    (ql.GPTQConfig, "damp_percent", -0.1),
    (ql.GPTQConfig, "damp_percent", float("nan")),
    (ql.GPTQConfig, "damp_percent", "0.01"),
    (ql.GPTQConfig, "scale_search", "hessien"),
    (ql.GPTQConfig, "checkpoint_format", "marlin"),
    (ql.NF4Config, "block_size", 48),
    (ql.NF4Config, "block_size", 64.5),
    (ql.NF4Config, "block_size", 64.0),
    (ql.NF4Config, "double_quant", "yes"),
    (ql.FP4Config, "block_size", 16),
    (ql.RTNConfig, "bits", 16),
    (ql.RTNConfig, "group_size", None),
    (ql.RTNConfig, "sym", "false"),
]


@pytest.mark.parametrize(("config", "field", "value"), BAD)
def test_bad_field_is_named_with_its_value(config, field, value):
    with pytest.raises(ValueError, match=rf"^{field}: got ") as caught:
        config(**{field: value})
    assert repr(value) in str(caught.value) and "expected" in str(caught.value)


def test_two_orders_exclude_each_other():
    with pytest.raises(ValueError, match="act_group_aware"):
        ql.GPTQConfig(desc_act=True, act_group_aware=True)


@pytest.mark.parametrize("config", CONFIGS.values())
def test_dictionary_and_back(config):
    made = config()
    fields = json.loads(json.dumps(made.to_dict()))
    assert fields["method"] == made.method
    assert config.from_dict(fields) == made and config_from_dict(fields) == made
    assert type(config_from_dict(fields)) is config


def test_dictionary_of_another_method_or_with_unknown_fields():
    with pytest.raises(ValueError, match="method: got 'nf4', expected 'gptq'"):
        ql.GPTQConfig.from_dict({"method": "nf4"})
    with pytest.raises(ValueError, match="groupsize: RTNConfig has no such field; it has bits"):
        ql.RTNConfig.from_dict({"groupsize": 64})
    with pytest.raises(ValueError, match="method: got 'awq', expected one of gptq, nf4"):
        config_from_dict({"method": "awq"})


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ql.NF4Config().block_size = 128


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_recommended(bits):
    config = ql.GPTQConfig.recommended(bits)
    assert (config.bits, config.group_size, config.sym) == (bits, 64, False)
    assert config.scale_search == "hessian" and config.act_group_aware and not config.desc_act
    assert config.drift_correction == config.residual_correction == (bits <= 3)
    assert ql.GPTQConfig.recommended(bits, 128, sym=True).sym


def test_recommended_refuses_other_bits():
    with pytest.raises(ValueError, match="bits: got 5"):
        ql.GPTQConfig.recommended(5)


def test_methods_are_the_public_names():
    assert set(CONFIGS) == {"gptq", "nf4", "fp4", "rtn", "int8"}
    assert all(issubclass(config, QuantizationConfig) for config in CONFIGS.values())


# ---- the package -----------------------------------------------------------------------------------------------------


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize(
    "code",
    [
        "import quantlab.quantize\nimport quantlab as ql\nprint(type(ql.quantize).__name__)",
        "import quantlab as ql\nql.quantize\nimport quantlab.quantize\nprint(type(ql.quantize).__name__)",
        "from quantlab import quantize\nprint(type(quantize).__name__)",
        "from quantlab.quantize import quantize\nimport quantlab\nprint(type(quantlab.quantize).__name__)",
    ],
)
def test_quantize_is_the_function_and_its_module_stays_importable(code):
    assert run(code) == "function"


def test_every_public_name_resolves():
    for name in ql.__all__:
        assert getattr(ql, name) is not None
        assert name in dir(ql)


def test_unknown_name():
    with pytest.raises(AttributeError, match="quantise"):
        _ = ql.quantise


def test_import_is_quick():
    code = "import time\nstart = time.perf_counter()\nimport quantlab\nprint(time.perf_counter() - start)"
    assert min(float(run(code)) for _ in range(3)) < 0.25


def test_numpy_numbers_become_pythons():
    """A sweep over an array of widths gives configurations that can be written to a checkpoint."""
    gptq = ql.GPTQConfig(bits=np.int64(3), group_size=np.int32(64), damp_percent=np.float32(0.5))  # type: ignore[arg-type]
    lora = ql.LoraConfig(r=np.int64(4), lora_alpha=np.float32(8))  # type: ignore[arg-type]
    training = ql.TrainingConfig(max_steps=np.int16(3), learning_rate=np.float32(0.5))  # type: ignore[arg-type]
    assert json.loads(json.dumps(gptq.to_dict()))["bits"] == 3
    for value, kind in (
        (gptq.group_size, int), (gptq.damp_percent, float), (lora.r, int), (lora.lora_alpha, float),
        (training.max_steps, int), (training.learning_rate, float), (ql.NF4Config(np.int64(64)).block_size, int),  # type: ignore[arg-type]
        (ql.RTNConfig(np.uint8(4)).bits, int),  # type: ignore[arg-type]
    ):  # fmt: skip
        assert type(value) is kind
    with pytest.raises(ValueError, match=r"^group_size: got 64\.0"):
        ql.RTNConfig(group_size=np.float64(64))  # type: ignore[arg-type]
