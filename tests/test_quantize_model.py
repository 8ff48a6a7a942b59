"""Quantizing whole models: the stream of layers, what is refused, and runs that are stopped and resumed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import TINY, tiny_parts
from threadpoolctl import threadpool_limits

import quantlab as ql
from quantlab import _core, gptq
from quantlab.calibration import STAGES, Activations, chunks_of
from quantlab.config import GPTQConfig
from quantlab.llama import LlamaForCausalLM, layer_modules
from quantlab.weight import cast_weight

CONFIGS = [
    ql.NF4Config(),
    ql.FP4Config(block_size=32),
    ql.RTNConfig(bits=3, group_size=32),
    ql.Int8Config(),
    GPTQConfig(bits=4, group_size=32),
    GPTQConfig(bits=3, group_size=48, desc_act=True, true_sequential=False),
    GPTQConfig(bits=8, group_size=-1, sym=False),
    GPTQConfig.recommended(2, group_size=32),
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """The models are tiny: threads would only wait for each other."""
    with ql.backend.use(threads=1), threadpool_limits(1):
        yield


def tiny_model(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(*tiny_parts(seed, **changes))


def rows(seed: int = 1, count: int = 6, length: int = 40) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, TINY["vocab_size"], length + i).astype(np.int32) for i in range(count)]


def arrays(model: LlamaForCausalLM) -> dict[str, np.ndarray]:
    """Codes, scales and zeros by name."""
    return {
        f"{module}.{part}": getattr(model.weights[module], part)
        for module in layer_modules(model.config)
        for part in ("codes", "scales", "zeros", "perm")
        if getattr(model.weights[module], part) is not None
    }


def assert_same(a: LlamaForCausalLM, b: LlamaForCausalLM) -> None:
    left, right = arrays(a), arrays(b)
    assert left.keys() == right.keys()
    for name, array in left.items():
        np.testing.assert_array_equal(array, right[name], err_msg=name)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.method}-{getattr(c, 'bits', '')}")
def test_every_method_gives_a_model_that_runs(config: Any) -> None:
    model = tiny_model()
    calibration = rows() if isinstance(config, GPTQConfig) else None
    quantized = ql.quantize(model, config, calibration, progress=False)
    assert type(quantized) is type(model)
    assert len(quantized.quantization_report) == 14
    assert {entry["module"] for entry in quantized.quantization_report} == set(layer_modules(model.config))
    assert quantized.weights["lm_head"] is model.weights["lm_head"]
    assert model.weights["model.layers.0.mlp.up_proj"].format == "f32"
    ids = rows(2, 1)[0]
    logits, expected = quantized([ids]), model([ids])
    assert np.isfinite(logits).all()
    bits = 8 if config.method == "int8" else getattr(config, "bits", 4)
    error = np.abs(logits - expected).mean() / np.abs(expected).mean()
    assert error < {8: 0.05, 4: 0.4, 3: 0.6, 2: 1.0}[bits]  # random weights: nothing is redundant


def test_activations_are_those_of_the_model() -> None:
    model, sequences = tiny_model(), rows()
    config = model.config
    run = Activations(config, chunks_of(sequences, tokens=100), model.weight("model.embed_tokens").handle)
    assert [len(chunk.lengths) for chunk in run.chunks] == [2, 2, 2]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        norms = tuple(model.vector(prefix + n) for n in ("input_layernorm", "post_attention_layernorm"))
        run.run(norms, {module: model.weight(prefix + module).handle for stage in STAGES for module in stage})
    hidden = _core.rmsnorm(np.concatenate(run.residual), model.vector("model.norm"), config.rms_norm_eps)
    expected = np.concatenate([model.packed_hidden([row]) for row in sequences])
    np.testing.assert_allclose(hidden, expected, rtol=1e-4, atol=1e-4)


def test_the_first_matrix_is_gptq_of_its_own_inputs() -> None:
    model, sequences = tiny_model(), rows()
    config = GPTQConfig(bits=4, group_size=32)
    quantized = ql.quantize(model, config, sequences, progress=False)
    hessian = gptq.Hessian(model.config.hidden_size)
    embedded = _core.embedding(np.concatenate(sequences), model.weight("model.embed_tokens").handle)
    hessian.add(_core.rmsnorm(embedded, model.vector("model.layers.0.input_layernorm"), model.config.rms_norm_eps))
    name = "model.layers.0.self_attn.k_proj"
    expected, _ = gptq.quantize(model.weight(name).dequantize(), hessian, config)
    np.testing.assert_array_equal(quantized.weight(name).codes, expected.codes)


def test_gptq_beats_rounding_and_recommended_beats_textbook() -> None:
    """Mean squared error of the hidden states on other data from the same source: inputs that lie near a subspace."""
    model = tiny_model(seed=3)
    calibration, test = rows(4, 40), rows(5, 10)
    target = np.concatenate([model.packed_hidden([row]) for row in test])

    def error(config: Any) -> float:
        quantized = ql.quantize(model, config, calibration if config.method == "gptq" else None, progress=False)
        return float(np.square(np.concatenate([quantized.packed_hidden([row]) for row in test]) - target).mean())

    rounded = error(ql.RTNConfig(bits=3, group_size=32))
    textbook, recommended = error(GPTQConfig(bits=3, group_size=32)), error(GPTQConfig.recommended(3, group_size=32))
    assert textbook < 0.9 * rounded
    assert recommended < 0.9 * textbook


def test_one_pass_and_threads_do_not_change_the_codes() -> None:
    model = tiny_model()
    results = []
    for threads in (1, 3):
        with ql.backend.use(threads=threads):
            results.append(ql.quantize(model, GPTQConfig.recommended(3, group_size=32), rows(), progress=False))
    assert_same(*results)


def test_inputs_that_are_not_kept_give_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = tiny_model(), GPTQConfig.recommended(3, group_size=32)
    kept = ql.quantize(model, config, rows(), progress=False)
    monkeypatch.setattr("quantlab.calibration.HOLD_BYTES", 0)
    assert_same(kept, ql.quantize(model, config, rows(), progress=False))


def test_calibration_that_is_refused() -> None:
    model = tiny_model()
    config = GPTQConfig(group_size=32)
    for calibration, message in [
        (None, "calibration: got nothing"),
        ([], "calibration: it is empty"),
        ("one text", "calibration: got one text"),
        (["a text"], "has no tokenizer"),
        ([[1, 2], []], "calibration: an empty row"),
        ([[1, 128]], "token id 128, expected less than the vocabulary of 128"),
        ([[1, -1]], "calibration: got -1"),
        (np.ones((2, 3)), "expected integers"),
    ]:
        with pytest.raises(ValueError, match=message):
            ql.quantize(model, config, calibration, progress=False)
    with pytest.raises(TypeError, match="config: got dict"):
        ql.quantize(model, {"bits": 4}, progress=False)
    with pytest.raises(TypeError, match="model: got int"):
        ql.quantize(3, config, progress=False)
    with pytest.raises(ValueError, match="only GPTQ keeps finished layers"):
        ql.quantize(model, ql.NF4Config(), resume_dir="somewhere", progress=False)
    with pytest.raises(ValueError, match="is nf4 already"):
        ql.quantize(ql.quantize(model, ql.NF4Config(), progress=False), config, rows(), progress=False)


def test_a_nan_weight_is_an_error_that_names_its_matrix() -> None:
    for config, calibration in [(ql.NF4Config(), None), (GPTQConfig(group_size=32), rows())]:
        model = tiny_model()
        model.weights["model.layers.1.mlp.up_proj"].codes[3, 5] = np.nan
        with pytest.raises(ql.NumericError, match=r"model\.layers\.1\.mlp\.up_proj"):
            ql.quantize(model, config, calibration, progress=False)


# ---- stopped and resumed -------------------------------------------------------------------------------------------


class _Stop(Exception):
    pass


@pytest.mark.parametrize("config", [CONFIGS[4], CONFIGS[5], CONFIGS[7]], ids=["one pass", "two passes", "corrected"])
def test_a_resumed_run_ends_with_the_same_codes(tmp_path: Path, config: GPTQConfig, monkeypatch: Any) -> None:
    model, whole = tiny_model(num_hidden_layers=3), None
    whole = ql.quantize(model, config, rows(), progress=False)
    calls = iter(range(100))
    quantize_shared = gptq.quantize_shared

    def stop_in_the_second_layer(*arguments: Any) -> Any:
        if next(calls) == 6:
            raise _Stop
        return quantize_shared(*arguments)

    monkeypatch.setattr(gptq, "quantize_shared", stop_in_the_second_layer)
    with pytest.raises(_Stop):
        ql.quantize(model, config, rows(), progress=False, resume_dir=tmp_path)
    monkeypatch.setattr(gptq, "quantize_shared", quantize_shared)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["layer-00000.safetensors", "manifest.json"]
    resumed = ql.quantize(model, config, rows(), progress=False, resume_dir=tmp_path)
    assert_same(whole, resumed)
    losses = [[entry["loss"] for entry in run.quantization_report] for run in (whole, resumed)]
    assert losses[0] == losses[1]
    assert_same(whole, ql.quantize(model, config, rows(), progress=False, resume_dir=tmp_path))


def test_a_folder_of_other_settings_is_refused(tmp_path: Path) -> None:
    model, config = tiny_model(), GPTQConfig(group_size=32)
    ql.quantize(model, config, rows(), progress=False, resume_dir=tmp_path)
    for other_model, other_config, other_rows, what in [
        (model, GPTQConfig(group_size=16), rows(), r"config \(group_size: 32 there, 16 asked\): use"),
        (model, config, rows(9), "calibration"),
        (tiny_model(seed=8), config, rows(), "model"),
    ]:
        with pytest.raises(ValueError, match=f"resume_dir: .* another {what}"):
            ql.quantize(other_model, other_config, other_rows, progress=False, resume_dir=tmp_path)


def test_a_damaged_layer_is_an_error(tmp_path: Path) -> None:
    model, config = tiny_model(), GPTQConfig(group_size=32)
    ql.quantize(model, config, rows(), progress=False, resume_dir=tmp_path)
    path = tmp_path / "layer-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"layer-00001\.safetensors is damaged"):
        ql.quantize(model, config, rows(), progress=False, resume_dir=tmp_path)


_RUN = """
import sys
sys.path.insert(0, sys.argv[1])
import quantlab as ql
from test_quantize_model import killed_model, killed_rows
print("ready", flush=True)
config = ql.GPTQConfig.recommended(3, group_size=32)
ql.quantize(killed_model(), config, killed_rows(), progress=False, resume_dir=sys.argv[2])
"""


def killed_model() -> LlamaForCausalLM:
    return tiny_model(num_hidden_layers=8)


def killed_rows() -> list[np.ndarray]:
    return rows(1, 20, 60)


def test_kill_at_random_moments(tmp_path: Path) -> None:
    """kill -9, five times in a row on the same folder, then one run to the end."""
    command = [sys.executable, "-c", _RUN, str(Path(__file__).parent), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "QL_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    generator = random.Random(7)
    for _ in range(5):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(generator.uniform(0.0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    config = GPTQConfig.recommended(3, group_size=32)
    resumed = ql.quantize(killed_model(), config, killed_rows(), progress=False, resume_dir=tmp_path)
    assert_same(resumed, ql.quantize(killed_model(), config, killed_rows(), progress=False))
    assert not list(tmp_path.glob(".layer-*.tmp"))


def test_a_checkpoint_is_quantized_from_its_file(tmp_path: Path) -> None:
    model, config = tiny_model(), GPTQConfig(group_size=32)
    model.save_pretrained(tmp_path)
    expected = ql.quantize(model, config, rows(), progress=False)
    outer = {name: cast_weight(weight, "float16") for name, weight in model.weights.items() if "layers" not in name}
    expected = expected.replace(outer)  # what a file's embedding and output matrix are kept in
    for source in (tmp_path, str(tmp_path), ql.open_checkpoint(tmp_path)):
        quantized = ql.quantize(source, config, rows(), progress=False)
        assert isinstance(quantized, LlamaForCausalLM)
        assert_same(quantized, expected)
        np.testing.assert_array_equal(quantized([[1, 2, 3]]), expected([[1, 2, 3]]))
