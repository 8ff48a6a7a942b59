"""Training runs: they learn, resume to the bit, stop on NaN without loss, and refuse what they cannot do."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
from checkpoints import save_tiny
from models import tiny_model, tiny_parts

import quantlab as ql
from quantlab.checkpoints import RunFolder
from quantlab.finetune import free_bytes
from quantlab.lora import read_adapter

ALL = ql.LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear")


def made_up(count: int = 24, seed: int = 0) -> list[np.ndarray]:
    """Rows of a language that can be learned: the next token is three more."""
    rng = np.random.default_rng(seed)
    lengths, starts = rng.integers(2, 34, count), rng.integers(3, 100, count)
    return [(start + 3 * np.arange(n)) % 100 + 3 for n, start in zip(lengths, starts, strict=True)]


def settings(**changes) -> ql.TrainingConfig:
    return ql.TrainingConfig(**{"learning_rate": 1e-2, "logging_steps": 1, "per_device_train_batch_size": 2, **changes})


def losses(log) -> list[tuple[int, float, float, float]]:
    fields = ("step", "loss", "learning_rate", "grad_norm")
    return [tuple(entry[field] for field in fields) for entry in log if "loss" in entry]


BASES = [
    None,
    ql.NF4Config(),
    ql.FP4Config(),
    ql.RTNConfig(4, 32),
    ql.Int8Config(),
    ql.GPTQConfig(4, 32, desc_act=True),
]


@pytest.mark.parametrize("config", BASES, ids=str)
def test_it_learns_beside_every_base(config):
    calibration = made_up() if isinstance(config, ql.GPTQConfig) else None
    model = tiny_model() if config is None else ql.quantize(tiny_model(), config, calibration)
    held_out = made_up(8, seed=1)
    before, logits = ql.evaluate(model, held_out), model(held_out[0])
    tuned = ql.finetune(model, ALL, made_up(), settings(num_train_epochs=4), eval_data=held_out)
    log = tuned.training_log
    assert [entry["step"] for entry in log if "loss" in entry] == list(range(1, 49))
    evaluations = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert len(evaluations) == 4 and evaluations[-1] < 0.8 * before["loss"]
    assert ql.evaluate(tuned, held_out)["loss"] == evaluations[-1]
    np.testing.assert_array_equal(model(held_out[0]), logits)  # the base is as it was
    assert all(entry["tokens_per_second"] > 0 and entry["peak_memory_bytes"] > 0 for entry in log if "loss" in entry)


def test_the_format_of_the_base_goes_with_the_adapter(tmp_path):
    base = tiny_model()
    tuned = ql.finetune(ql.quantize(base, ql.RTNConfig(4, 32)), ALL, made_up(), settings(max_steps=1))
    tuned.save_adapter(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = ql.load_adapter(ql.quantize(base, ql.RTNConfig(4, 16)), tmp_path)
    with pytest.warns(UserWarning, match="beside affine-4 weights, .* this model's are nf4"):
        ql.load_adapter(ql.quantize(base, ql.NF4Config()), tmp_path)
    with pytest.warns(UserWarning, match="this model's are float"):
        ql.load_adapter(base, tmp_path)
    more = ql.finetune(base, again.adapter, made_up(), settings(max_steps=1))  # trained on, beside floats now
    assert (more.adapter.base_format, again.adapter.base_format) == ("float", "affine-4")


def labelled(count: int = 40, seed: int = 0) -> tuple[list[np.ndarray], np.ndarray]:
    """Rows whose last token tells the label."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    return [np.append(rng.integers(3, 100, rng.integers(1, 20)), 100 + label) for label in labels], labels


@pytest.mark.parametrize("config", [None, ql.NF4Config()], ids=str)
def test_a_classifier_learns_with_its_head(tmp_path, config):
    model = ql.LlamaForSequenceClassification(*tiny_parts(), num_labels=3)
    model = model if config is None else ql.quantize(model, config)
    (rows, labels), (held_out, answers), score = labelled(), labelled(20, seed=1), model.score.copy()
    run = settings(num_train_epochs=6, per_device_train_batch_size=8, output_dir=str(tmp_path))
    tuned = ql.finetune(model, ql.LoraConfig(r=4), rows, run, held_out, labels=labels, eval_labels=answers)
    assert tuned.training_log[-1]["eval_accuracy"] >= 0.9 > ql.evaluate(model, held_out, labels=answers)["accuracy"]
    assert ql.evaluate(tuned, held_out, labels=answers)["loss"] == tuned.training_log[-1]["eval_loss"]
    np.testing.assert_array_equal(model.score, score)  # the base is as it was
    assert np.abs(tuned.score - score).max() > 0.01
    np.testing.assert_array_equal(ql.load_adapter(model, tmp_path).predict(held_out), tuned.predict(held_out))


def test_a_classifiers_run_is_resumed_to_the_bit(tmp_path):
    def run(**changes):
        model = ql.LlamaForSequenceClassification(*tiny_parts(), num_labels=3)
        rows, labels = labelled()
        return ql.finetune(model, ALL, rows, settings(save_steps=5, **changes), labels=labels)

    whole = run(output_dir=str(tmp_path / "a"))
    resumed = run(output_dir=str(tmp_path / "b"), resume_from_checkpoint=str(tmp_path / "a/checkpoint-5"))
    assert losses(resumed.training_log) == losses(whole.training_log)
    np.testing.assert_array_equal(resumed.adapter.parameters, whole.adapter.parameters)


def test_evaluation_is_the_mean_over_target_tokens():
    model, rows = tiny_model(), made_up(5)
    result = ql.evaluate(model, rows)
    each = np.concatenate([model.losses(row, np.append(row[1:], -100))[:-1] for row in rows])
    assert result["tokens"] == each.size and result["rows"] == 5
    assert result["loss"] == pytest.approx(each.mean(), rel=1e-5)
    assert result["perplexity"] == pytest.approx(np.exp(each.mean()), rel=1e-5)


def test_a_step_is_the_same_however_its_rows_are_batched():
    """The loss is the mean over the target tokens of the step: 8 rows at once, one by one, or packed."""
    rows = made_up(16)
    ways = [
        {"per_device_train_batch_size": 8},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    ]
    lora = ql.LoraConfig(r=4, target_modules="all-linear")
    logs = [losses(ql.finetune(tiny_model(), lora, rows, settings(**way)).training_log) for way in ways]
    np.testing.assert_allclose(logs[1], logs[0], rtol=2e-4)
    np.testing.assert_allclose(logs[2], logs[0], rtol=2e-4)
    packed = ql.finetune(tiny_model(), lora, rows, settings(packing=True, max_length=2000, num_train_epochs=2))
    whole = ql.finetune(tiny_model(), lora, rows, settings(per_device_train_batch_size=16, num_train_epochs=2))
    np.testing.assert_allclose(losses(packed.training_log), losses(whole.training_log), rtol=2e-4)


def test_the_policy_changes_nothing():
    runs = [
        ql.finetune(tiny_model(), ALL, made_up(), settings(gradient_checkpointing=policy))
        for policy in ("auto", "none", "selective", "full")
    ]
    assert all(losses(run.training_log) == losses(runs[0].training_log) for run in runs)
    assert all((run.adapter.parameters == runs[0].adapter.parameters).all() for run in runs)


def test_seeds_and_an_adapter_to_go_on_with():
    first = ql.finetune(tiny_model(), ALL, made_up(), settings())
    same = ql.finetune(tiny_model(), ALL, made_up(), settings())
    other = ql.finetune(tiny_model(), ALL, made_up(), settings(seed=7))
    assert losses(first.training_log) == losses(same.training_log) != losses(other.training_log)
    kept = first.adapter.parameters.copy()
    more = ql.finetune(tiny_model(), first.adapter, made_up(), settings())
    assert more.training_log[0]["loss"] < first.training_log[0]["loss"]
    np.testing.assert_array_equal(first.adapter.parameters, kept)  # a copy is trained on


# ---- files, resuming ----


def test_the_folder_of_a_run(tmp_path):
    tuned = ql.finetune(
        tiny_model(), ALL, made_up(), settings(output_dir=str(tmp_path / "run"), save_steps=5), eval_data=made_up(3)
    )
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors", "checkpoint-10", "checkpoint-12",
                     "checkpoint-5", "metrics.jsonl"]  # fmt: skip
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == tuned.training_log
    final = read_adapter(tmp_path / "run" / "checkpoint-12")
    assert all((final[module][i] == tuned.adapter[module][i]).all() for module in final for i in (0, 1))


@pytest.mark.parametrize("logging_steps", [1, 4])
def test_a_resumed_run_is_the_same_to_the_bit(tmp_path, logging_steps):
    shared = {"num_train_epochs": 3, "weight_decay": 0.1, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1}
    shared |= {"save_steps": 3, "logging_steps": logging_steps, "gradient_accumulation_steps": 2}
    whole = ql.finetune(tiny_model(), ALL, made_up(), settings(output_dir=str(tmp_path / "a"), **shared))
    again = settings(output_dir=str(tmp_path / "b"), resume_from_checkpoint=str(tmp_path / "a/checkpoint-9"), **shared)
    resumed = ql.finetune(tiny_model(), ALL, made_up(), again)
    assert losses(resumed.training_log) == losses(whole.training_log)
    np.testing.assert_array_equal(resumed.adapter.parameters, whole.adapter.parameters)


KILLED = """
import sys, os, signal
sys.path[:0] = {paths!r}
from test_finetune import ALL, made_up, settings, tiny_model
import quantlab as ql
from quantlab.finetune import TrainingRun
step = TrainingRun._step
def killed(self):
    if self.state.step == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self)
TrainingRun._step = killed
going_on = True if any(name.startswith("checkpoint-") for name in os.listdir(sys.argv[2])) else None
ql.finetune(tiny_model(), ALL, made_up(), settings(num_train_epochs=5, save_steps=2, output_dir=sys.argv[2],
                                                   resume_from_checkpoint=going_on))
"""


def test_interrupted_at_random_steps_it_ends_the_same(tmp_path):
    """SIGKILL before ten steps, each time going on from the last checkpoint: the log and the adapter of one run."""
    whole = ql.finetune(tiny_model(), ALL, made_up(), settings(num_train_epochs=5))
    script = KILLED.format(paths=[str(Path(__file__).parent)])
    steps = sorted(random.Random(5).sample(range(1, 60), 10))
    for step in [*steps, -1]:
        done = subprocess.run([sys.executable, "-c", script, str(step), str(tmp_path)], capture_output=True, text=True)
        assert done.returncode == (-signal.SIGKILL if step > 0 else 0), done.stderr
    log = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert losses(log) == losses(whole.training_log)
    final = read_adapter(tmp_path)
    assert all((final[module][i] == whole.adapter[module][i]).all() for module in final for i in (0, 1))


def test_resuming_another_run_is_refused(tmp_path):
    run = settings(output_dir=str(tmp_path / "run"), save_steps=6)
    ql.finetune(tiny_model(), ALL, made_up(), run)

    def again(model=None, lora=ALL, rows=None, **changes):
        values = {"output_dir": str(tmp_path / "run"), "save_steps": 6, "resume_from_checkpoint": True, **changes}
        return lambda: ql.finetune(model or tiny_model(), lora, rows or made_up(), settings(**values))

    cases = {
        r"another training \(learning_rate: .* there, 0\.001 asked\)": again(learning_rate=1e-3),
        "another data: use": again(rows=made_up(seed=9)),
        r"another lora \(r: 4 there, 8 asked, .*": again(lora=ql.LoraConfig()),
        "another model": again(model=tiny_model(3)),
        "holds checkpoints of another run": again(resume_from_checkpoint=None),
    }
    for says, job in cases.items():
        with pytest.raises(ValueError, match=says):
            job()
    with (
        RunFolder(tmp_path / "run", {}).held(),
        pytest.raises(ValueError, match=r"^output_dir: another run is writing"),
    ):
        again()()
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        again(output_dir=str(tmp_path / "empty"))()
    with pytest.raises(FileNotFoundError, match=r"holds no state\.json"):
        again(resume_from_checkpoint=str(tmp_path))()
    (tmp_path / "run/checkpoint-12/optimizer.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="checkpoint-12 is damaged"):
        again()()


# ---- what goes wrong ----


@pytest.mark.parametrize("save_steps", [None, 1])
def test_a_loss_that_is_not_finite_stops_the_run_and_loses_nothing(tmp_path, save_steps, monkeypatch):
    from quantlab.finetune import LanguageTask

    accumulate = LanguageTask.accumulate

    def broken(self, trainer, rows, factor, call, policy):
        return float("nan") if call == 7 else accumulate(self, trainer, rows, factor, call, policy)

    run = settings(output_dir=str(tmp_path), save_steps=save_steps)
    with monkeypatch.context() as patch:
        patch.setattr(LanguageTask, "accumulate", broken)
        with pytest.raises(
            ql.NumericError, match=r"step 8: the loss is nan; .*; checkpoint-7 in .* is as it was before"
        ):
            ql.finetune(tiny_model(), ALL, made_up(), run)
    again = settings(output_dir=str(tmp_path), save_steps=save_steps, resume_from_checkpoint=True)
    whole = ql.finetune(tiny_model(), ALL, made_up(), settings())
    resumed = ql.finetune(tiny_model(), ALL, made_up(), again)
    assert losses(resumed.training_log) == losses(whole.training_log)


def test_an_evaluation_that_was_interrupted_is_taken_up(tmp_path, monkeypatch):
    from quantlab.finetune import LanguageTask

    held_out, run = made_up(5, seed=1), {"output_dir": str(tmp_path), "eval_steps": 4}
    whole = ql.finetune(tiny_model(), ALL, made_up(), settings(eval_steps=4), held_out).training_log
    with monkeypatch.context() as patch:
        patch.setattr(LanguageTask, "evaluate", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ql.finetune(tiny_model(), ALL, made_up(), settings(**run), held_out)
    resumed = ql.finetune(tiny_model(), ALL, made_up(), settings(**run, resume_from_checkpoint=True), held_out)
    assert [entry.get("eval_loss") for entry in resumed.training_log] == [entry.get("eval_loss") for entry in whole]
    assert losses(resumed.training_log) == losses(whole)


def test_gradients_that_are_not_finite_change_nothing(tmp_path, monkeypatch):
    from quantlab.finetune import TrainingRun

    step = TrainingRun._step

    def poisoned(self):
        if self.state.step == 3:
            accumulate = self.task.accumulate
            self.task.accumulate = lambda *a: (accumulate(*a), self.gradients.fill(np.inf))[0]
        return step(self)

    monkeypatch.setattr(TrainingRun, "_step", poisoned)
    with pytest.raises(ql.NumericError, match="step 4: the norm of the gradients is"):
        ql.finetune(tiny_model(), ALL, made_up(), settings(output_dir=str(tmp_path)))
    assert np.isfinite(read_adapter(tmp_path / "checkpoint-3").parameters).all()


def test_a_run_that_diverges_stops_by_itself():
    with pytest.raises(ql.NumericError, match=r"training: step \d+: the (loss|norm of the gradients) is"):
        ql.finetune(tiny_model(), ALL, made_up(), settings(learning_rate=1e30, num_train_epochs=10))


def test_too_little_memory_is_said_before_the_first_step(monkeypatch):
    monkeypatch.setattr(sys.modules["quantlab.finetune"], "free_bytes", lambda device: 1000)
    with pytest.raises(MemoryError, match="lower max_length or per_device_train_batch_size"):
        ql.finetune(tiny_model(), ALL, made_up(), settings())
    assert free_bytes() > 1000


@pytest.mark.parametrize("available", ["none", "selective", "full"])
def test_memory_chooses_the_policy(monkeypatch, available):
    from quantlab.examples import prepare_examples
    from quantlab.finetune import FREE_SHARE, LanguageTask, TrainingRun
    from quantlab.lora import Adapter

    model = tiny_model()
    model = model.with_adapter(Adapter.fresh(ALL, model))
    task = LanguageTask(model, prepare_examples(model, made_up(), settings()))
    run = TrainingRun(model, task, settings())
    lengths = sorted((len(row) for row in made_up()), reverse=True)
    needed = run.trainer.activation_bytes(sum(lengths[:2]), available)
    monkeypatch.setattr(sys.modules["quantlab.finetune"], "free_bytes", lambda device: int(needed / FREE_SHARE) + 1)
    assert run._choose_policy() == available


def test_memory_that_ends_in_the_middle_loses_nothing(tmp_path, monkeypatch):
    from quantlab.finetune import LanguageTask

    accumulate = LanguageTask.accumulate

    def full(self, trainer, rows, factor, call, policy):
        if call == 4:
            raise MemoryError("out of memory")
        return accumulate(self, trainer, rows, factor, call, policy)

    monkeypatch.setattr(LanguageTask, "accumulate", full)
    with pytest.raises(MemoryError):
        ql.finetune(tiny_model(), ALL, made_up(), settings(output_dir=str(tmp_path)))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


def test_it_runs_in_a_thread():
    """Where no signal can be put off."""
    found = []
    thread = threading.Thread(target=lambda: found.append(ql.finetune(tiny_model(), ALL, made_up(), settings())))
    thread.start()
    thread.join()
    assert losses(found[0].training_log) == losses(ql.finetune(tiny_model(), ALL, made_up(), settings()).training_log)


def test_weights_and_biases_get_the_log(tmp_path, monkeypatch):
    sent: list[dict[str, float]] = []
    wandb = types.SimpleNamespace(init=lambda **_: types.SimpleNamespace(log=sent.append, finish=lambda: None))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    tuned = ql.finetune(tiny_model(), ALL, made_up(4), settings(output_dir=str(tmp_path), report_to="wandb"))
    assert [entry["training/loss"] for entry in sent] == [entry["loss"] for entry in tuned.training_log]


def test_what_it_does_not_take():
    model = tiny_model()
    cases = {
        "labels: a language model has none": lambda: ql.finetune(model, ALL, made_up(), settings(), labels=[1]),
        "eval_data: it is empty": lambda: ql.finetune(model, ALL, made_up(), settings(), eval_data=[]),
        "target_modules: 'lm_head' is no": lambda: ql.finetune(
            model, ql.LoraConfig(target_modules=["lm_head"]), made_up(), settings()
        ),
        "model: it has an adapter": lambda: ql.finetune(
            ql.finetune(model, ALL, made_up(), settings(max_steps=1)), ALL, made_up(), settings()
        ),
    }
    classifier = ql.LlamaForSequenceClassification(*tiny_parts(), num_labels=3)
    rows = made_up(4)
    cases |= {
        "labels: got None": lambda: ql.finetune(classifier, ALL, rows),
        r"labels: got shape \(3,\) for 4 texts": lambda: ql.finetune(classifier, ALL, rows, labels=[0, 1, 2]),
        "labels: got 0 to 3": lambda: ql.finetune(classifier, ALL, rows, labels=[0, 1, 2, 3]),
        "lora: got an adapter without a classification head": lambda: ql.finetune(
            classifier, ql.Adapter.fresh(ALL, classifier), rows, labels=[0, 1, 2, 0]
        ),
        "eval_labels: got None": lambda: ql.finetune(classifier, ALL, rows, eval_data=rows, labels=[0, 1, 2, 0]),
    }
    for says, job in cases.items():
        with pytest.raises(ValueError, match=says):
            job()


def test_interrupts_are_heard_and_leave_a_checkpoint(tmp_path):
    path = save_tiny(tmp_path / "tiny")
    script = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); import quantlab as ql\n"
        f"sys.path[:0] = [{str(Path(__file__).parent)!r}]\nfrom test_finetune import ALL, made_up, settings\n"
        f"model = ql.LlamaForCausalLM.from_pretrained({str(path)!r})\n"
        f"ql.finetune(model, ALL, made_up(), settings(num_train_epochs=1e6, output_dir={str(tmp_path / 'run')!r}))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (metrics.exists() and metrics.stat().st_size > 1000):
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and "KeyboardInterrupt" in errors
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    state = json.loads((checkpoint / "state.json").read_text())
    assert checkpoint.name == f"checkpoint-{state['step']}" and state["log"][-1]["step"] == state["step"]
