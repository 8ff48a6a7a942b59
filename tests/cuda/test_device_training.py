"""Training on the GPU against the same training on the CPU.

There activations and their gradients are rounded to bfloat16, by 2^-9 / sqrt(3) of themselves in root mean square:
about 18 times on the way through a layer (test_model.py) and as often on the way back, independently, so that the
errors add like a random walk. NOISE is three times what comes out of that for the two layers of the test model; beside
it a gradient is a sum whose terms cancel, the more the fewer tokens it has: CANCELLATION."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from models import tiny_model, tiny_parts
from test_finetune import labelled, losses, made_up, settings
from test_training import BASES, CASES, POLICIES, Setting

import quantlab as ql
from quantlab import _core

NOISE = 3 * 2.0**-9 / np.sqrt(3) * np.sqrt(2 * 18 * 2)
CANCELLATION = 2
WIDE = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
LORA = ql.LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear")


class OnDevice:
    """The model, adapter and batch of a Setting, with the model on the GPU."""

    def __init__(self, setting: Setting):
        self.setting, self.model = setting, setting.model.to("cuda")
        self.gradients, self.mean, self.square = (np.zeros_like(setting.parts.parameters) for _ in range(3))
        drop = {"dropout": setting.parts.dropout, "seed": setting.parts.seed}
        self.trainer = _core.Trainer(self.model._core, self.model.lm_head.handle, self.gradients, **drop)

    def accumulate(self, recompute: str = "none") -> tuple[float, np.ndarray]:
        self.trainer.zero()
        batch = self.model.packed(self.setting.sequences)
        loss = self.trainer.accumulate(*batch, self.setting.targets, 1.0, 3, recompute)
        self.trainer.read(self.mean, self.square)
        return loss, self.gradients.copy()


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def check(setting: Setting, share: float = 1.0) -> None:
    """share: of the adapter. A large one in a wide model makes gradients that hang on the last bits of its weights."""
    setting.parts.parameters *= np.float32(share)
    device = OnDevice(setting)
    wanted_loss, wanted = setting.accumulate()
    loss, gradient = device.accumulate()
    print(f"loss {abs(loss / wanted_loss - 1):.2e}, gradient {relative(gradient, wanted):.4f}", file=sys.stderr)
    assert loss == pytest.approx(wanted_loss, rel=NOISE)
    assert relative(gradient, wanted) <= NOISE * CANCELLATION
    for policy in POLICIES:
        again = device.accumulate(policy)
        assert again[0] == loss
        np.testing.assert_array_equal(again[1], gradient, err_msg=policy)


@pytest.mark.parametrize("case", CASES)
def test_gradient_is_the_cpus(case: str) -> None:
    check(Setting(*CASES[case]))


@pytest.mark.parametrize("base", BASES)
def test_quantized_bases(base: str) -> None:
    check(Setting(config=BASES[base]))


@pytest.mark.parametrize("d", [64, 80, 96, 128])
@pytest.mark.parametrize("lengths", [(1, 63, 64, 65), (200,), (129, 3, 150)])
def test_tiles_of_attention(d: int, lengths: tuple[int, ...]) -> None:
    check(Setting({**WIDE, "head_dim": d}, dropout=0.2, lengths=lengths), 0.25)


@pytest.mark.parametrize("hkv", [1, 4])
def test_groups_of_heads(hkv: int) -> None:
    check(Setting({**WIDE, "head_dim": 128, "num_key_value_heads": hkv}, {"r": 17}, lengths=(100, 31)), 0.25)


def test_steps_are_the_cpus() -> None:
    """AdamW from the same gradients: the arithmetic is the CPU's but for the order of the norm's sum."""
    setting = Setting()
    device = OnDevice(setting)
    mean, square = np.zeros_like(device.mean), np.zeros_like(device.square)
    device.accumulate()
    for step in range(1, 4):
        before = setting.parts.parameters.copy()
        norm = device.trainer.step(device.mean, device.square, 1e-2, 0.9, 0.999, 1e-8, 0.1, step, 0.5)
        device.trainer.read(device.mean, device.square)
        wanted = _core.adamw(before, mean, square, device.gradients, 1e-2, 0.9, 0.999, 1e-8, 0.1, step, 0.5)
        assert norm == pytest.approx(wanted, rel=1e-12)
        for found, expected in ((setting.parts.parameters, before), (device.mean, mean), (device.square, square)):
            np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("config", [None, ql.NF4Config(32), ql.GPTQConfig(4, 32, desc_act=True)], ids=str)
def test_finetune(config: ql.QuantizationConfig | None, tmp_path) -> None:
    """The first losses are those of the CPU's run, the last as low; a run is taken up again to the bit; what is read,
    saved and loaded is what the device has."""
    calibration = made_up() if isinstance(config, ql.GPTQConfig) else None
    model, held_out = (
        tiny_model() if config is None else ql.quantize(tiny_model(), config, calibration),
        made_up(8, seed=1),
    )

    def run(model: ql.LlamaForCausalLM, **changes) -> ql.LlamaForCausalLM:
        return ql.finetune(model, LORA, made_up(), settings(num_train_epochs=2, **changes), held_out)

    wanted, tuned = run(model), run(model.to("cuda"), output_dir=str(tmp_path / "a"), save_steps=10)
    first, expected = (
        np.array([loss for _, loss, *_ in losses(log)[:4]]) for log in (tuned.training_log, wanted.training_log)
    )
    np.testing.assert_allclose(first, expected, rtol=NOISE)
    assert tuned.training_log[-1]["eval_loss"] == pytest.approx(wanted.training_log[-1]["eval_loss"], rel=0.1)
    assert tuned.device == "cuda" and tuned.training_log[0]["peak_memory_bytes"] > 0
    checkpoint = str(tmp_path / "a/checkpoint-10")
    again = run(model.to("cuda"), output_dir=str(tmp_path / "b"), resume_from_checkpoint=checkpoint)
    np.testing.assert_array_equal(again.adapter.parameters, tuned.adapter.parameters)
    assert losses(again.training_log) == losses(tuned.training_log)
    loaded, row = ql.load_adapter(model.to("cuda"), tmp_path / "a"), made_up(3, seed=2)[0]
    np.testing.assert_array_equal(loaded(row), tuned(row))
    assert relative(tuned(row), tuned.to("cpu")(row)) <= 2 * NOISE


def test_generation_beside_an_adapter() -> None:
    """Each token is the likeliest of the whole sequence's logits, to the error of these."""
    tuned = ql.finetune(tiny_model().to("cuda"), LORA, made_up(), settings(num_train_epochs=4))
    prompts = [row[:2] for row in made_up(3, seed=3)]
    for prompt, new in zip(prompts, tuned.generate(prompts, max_new_tokens=8), strict=True):
        logits = tuned(new)[0, len(prompt) - 1 : -1]
        chosen = logits[np.arange(len(logits)), new[len(prompt) :]]
        assert (chosen >= logits.max(-1) - NOISE * np.abs(logits).max()).all()


# ---- classifiers -----------------------------------------------------------------------------------------------------


class Pooled:
    """A Setting's model with a head that is the end of the adapter's parameters, as LabelTask trains it."""

    pooled, labels = np.cumsum((7, 1, 17, 3)).astype(np.int32) - 1, np.array([2, 0, -100, 1], np.int32)

    def __init__(self, device: str):
        self.setting = setting = Setting(dropout=0.1)
        parts, self.shape = setting.parts, (3, setting.model.config.hidden_size)
        score = np.random.default_rng(1).standard_normal(self.shape).astype(np.float32)
        self.parameters = np.append(parts.parameters, score)
        setting.model.adapter = SimpleNamespace(handle=_core.Adapter(self.parameters, parts.layout, parts.scales))
        setting.model._core = setting.model._build_core()
        self.model = setting.model.to(device)
        self.gradients, self.mean, self.square = (np.zeros_like(self.parameters) for _ in range(3))
        self.trainer = _core.Trainer(self.model._core, None, self.gradients, dropout=parts.dropout, seed=parts.seed)

    def head(self, vector: np.ndarray) -> np.ndarray:
        return vector[-self.shape[0] * self.shape[1] :].reshape(self.shape)

    def accumulate(self, policy: str, score: np.ndarray | None = None) -> tuple[float, np.ndarray]:
        self.trainer.zero()
        score = self.head(self.parameters) if score is None else score
        arguments = (self.pooled, self.labels, score, self.head(self.gradients), 0.5, 3, policy)
        loss = self.trainer.accumulate_pooled(*self.model.packed(self.setting.sequences), *arguments)
        self.trainer.read(self.mean, self.square)
        return loss, self.gradients.copy()


def test_pooled_gradient_is_the_cpus() -> None:
    device, cpu = Pooled("cuda"), Pooled("cpu")
    (loss, gradient), (wanted_loss, wanted) = device.accumulate("none"), cpu.accumulate("none")
    assert loss == pytest.approx(wanted_loss, rel=NOISE)
    assert relative(device.head(gradient), cpu.head(wanted)) <= NOISE * CANCELLATION
    adapter = slice(None, -device.head(gradient).size)
    assert relative(gradient[adapter], wanted[adapter]) <= NOISE * CANCELLATION
    for policy in POLICIES:
        again = device.accumulate(policy)
        assert again[0] == loss
        np.testing.assert_array_equal(again[1], gradient, err_msg=policy)


def test_a_head_of_another_array_is_refused() -> None:
    device = Pooled("cuda")
    with pytest.raises(ValueError, match="score, score_gradient: on a device they are the same part"):
        device.accumulate("none", device.head(device.parameters).copy())
    with pytest.raises(ValueError, match="score, score_gradient: on a device they are the same part"):
        device.accumulate("none", device.parameters[: device.shape[0] * device.shape[1]].reshape(device.shape))


@pytest.mark.parametrize("config", [None, ql.NF4Config(32)], ids=str)
def test_finetune_a_classifier(config: ql.QuantizationConfig | None, tmp_path) -> None:
    """As test_finetune: the first losses are the CPU's, the head learns, a run is taken up again to the bit."""
    model = ql.LlamaForSequenceClassification(*tiny_parts(), num_labels=3)
    model = model if config is None else ql.quantize(model, config)
    (rows, labels), (held_out, answers), score = labelled(), labelled(20, seed=1), model.score.copy()

    def run(model: ql.LlamaForSequenceClassification, **changes) -> ql.LlamaForSequenceClassification:
        training = settings(num_train_epochs=6, per_device_train_batch_size=8, **changes)
        return ql.finetune(model, LORA, rows, training, held_out, labels=labels, eval_labels=answers)

    wanted, tuned = run(model), run(model.to("cuda"), output_dir=str(tmp_path / "a"), save_steps=10)
    first, expected = (
        np.array([loss for _, loss, *_ in losses(log)[:4]]) for log in (tuned.training_log, wanted.training_log)
    )
    np.testing.assert_allclose(first, expected, rtol=NOISE)
    assert tuned.training_log[-1]["eval_accuracy"] >= 0.9
    assert ql.evaluate(tuned, held_out, labels=answers)["loss"] == tuned.training_log[-1]["eval_loss"]
    np.testing.assert_array_equal(model.score, score)  # the base is as it was
    assert np.abs(tuned.score - score).max() > 0.01
    loaded = ql.load_adapter(model.to("cuda"), tmp_path / "a")
    np.testing.assert_array_equal(loaded.predict(held_out), tuned.predict(held_out))
    checkpoint = str(tmp_path / "a/checkpoint-10")
    again = run(model.to("cuda"), output_dir=str(tmp_path / "b"), resume_from_checkpoint=checkpoint)
    np.testing.assert_array_equal(again.adapter.parameters, tuned.adapter.parameters)
