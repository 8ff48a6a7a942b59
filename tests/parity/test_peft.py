"""Adapters against PEFT: files both ways with equal logits, and training with equal losses and equal final matrices."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import VOCABULARY, save_tiny

import quantlab as ql
from quantlab.lora import read_adapter

torch = pytest.importorskip("torch", reason="the parity extra is not installed")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.parity

STUDY = {"r": 8, "lora_alpha": 32, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
ALL = {"r": 5, "lora_alpha": 8, "target_modules": "all-linear", "use_rslora": True}
RANKS = {"layers.1.self_attn.q_proj": 7, "q_proj": 5, r"model\..*\.up_proj": 1}
PATTERNS = {**ALL, "rank_pattern": RANKS, "alpha_pattern": {r"layers\.0\..*gate_proj": 2, "up_proj": 3}}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("peft") / "tiny")


@pytest.fixture(scope="module")
def rows() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(3, VOCABULARY, int(length)) for length in rng.integers(2, 60, 50)]


def theirs(path: Path, **more: Any) -> Any:
    torch.set_num_threads(2)
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **more)


def with_adapter(base: Any, **settings: Any) -> Any:
    torch.manual_seed(0)
    return peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings))


def their_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor(ids[None].astype(np.int64))).logits[0].numpy()


@pytest.mark.parametrize("settings", [STUDY, ALL, PATTERNS], ids=["study", "all", "patterns"])
def test_theirs_is_read_here(tiny, tmp_path, rows, settings):
    model = with_adapter(theirs(tiny), **settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    base = ql.LlamaForCausalLM.from_pretrained(tiny)
    ours = ql.load_adapter(base, tmp_path)
    expected = their_logits(model, rows[0])
    np.testing.assert_allclose(ours(rows[0])[0], expected, atol=1e-4)
    np.testing.assert_allclose(ours.merge()(rows[0])[0], expected, atol=1e-4)
    assert np.abs(base(rows[0])[0] - expected).max() > 0.1


@pytest.mark.parametrize("settings", [STUDY, ALL, PATTERNS], ids=["study", "all", "patterns"])
def test_ours_is_read_there(tiny, tmp_path, rows, settings):
    base = ql.LlamaForCausalLM.from_pretrained(tiny)
    training = ql.TrainingConfig(learning_rate=1e-2, max_steps=5)
    tuned = ql.finetune(base, ql.LoraConfig(**settings), rows, training)
    tuned.save_adapter(tmp_path)
    model = peft.PeftModel.from_pretrained(theirs(tiny), tmp_path)
    np.testing.assert_allclose(tuned(rows[0])[0], their_logits(model, rows[0]), atol=1e-4)


def test_a_classifier_is_read_both_ways(tmp_path, rows):
    path = save_tiny(tmp_path / "tiny", pad_token_id=0)
    base = ql.LlamaForSequenceClassification.from_pretrained(path, num_labels=3)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "v_proj"])
    reference = transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=3, dtype=torch.float32)
    model = peft.get_peft_model(reference, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "score" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "theirs")
    ours = ql.load_adapter(base, tmp_path / "theirs")
    expected = their_logits(model, rows[0])
    np.testing.assert_allclose(ours([rows[0]])[0], expected, atol=1e-4)
    ours.save_adapter(tmp_path / "ours")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=3, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(again, tmp_path / "ours")
    np.testing.assert_allclose(their_logits(loaded, rows[0]), expected, atol=1e-4)


# ---- training ----


class Recorder(transformers.Trainer):
    """Keeps the loss of every step, of which each batch's is its share: the trainer's own log is rounded."""

    def compute_loss(self, *args: Any, **more: Any) -> Any:
        loss = super().compute_loss(*args, **more)
        seen = self.__dict__.setdefault("seen", {})
        seen[self.state.global_step] = seen.get(self.state.global_step, 0.0) + float(loss.detach())
        return loss


def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
    """Right-padded rows; what is padded is not learned."""
    width = max(len(row["input_ids"]) for row in batch)

    def filled(row: dict[str, Any], value: int) -> list[int]:
        return row["input_ids"] + [value] * (width - len(row["input_ids"]))

    ids = torch.tensor([filled(row, 0) for row in batch])
    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in batch])
    labels = torch.tensor([row["label"] for row in batch]) if "label" in batch[0] else ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def their_run(
    model: Any, rows: list[np.ndarray], training: ql.TrainingConfig, folder: Path, labels: np.ndarray | None
) -> list[float]:
    """Trains with transformers' Trainer; the loss of each step."""
    names = (
        "learning_rate", "lr_scheduler_type", "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps",
        "num_train_epochs", "weight_decay", "max_grad_norm",
    )  # fmt: skip
    settings = {name: getattr(training, name) for name in names}
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True,
        train_sampling_strategy="sequential", warmup_steps=training.warmup_ratio, remove_unused_columns=False,
        optim="adamw_torch", **settings,
    )  # fmt: skip
    trainer = Recorder(
        model=model,
        args=arguments,
        train_dataset=[
            {"input_ids": row.tolist(), **({} if labels is None else {"label": int(label)})}
            for row, label in zip(rows, rows if labels is None else labels, strict=True)
        ],
        data_collator=collate,
    )
    trainer.train()
    return list(trainer.seen.values())


def compare(
    base: Any, model: Any, rows: list[np.ndarray], training: ql.TrainingConfig, folder: Path, loss: float, final: float,
    labels: np.ndarray | None = None,
) -> None:  # fmt: skip
    """Both train from the same adapter: relative difference of every loss, and of the final matrices (of all, by
    norm)."""
    model.save_pretrained(folder / "start")
    training = dataclasses.replace(training, shuffle=False, logging_steps=1)
    expected = their_run(model, rows, training, folder, labels)
    tuned = ql.finetune(base, read_adapter(folder / "start"), rows, training, labels=labels)
    losses = [entry["loss"] for entry in tuned.training_log]
    np.testing.assert_allclose(losses, expected, rtol=loss)
    model.save_pretrained(folder / "end")
    end, start = read_adapter(folder / "end").parameters, read_adapter(folder / "start").parameters
    assert np.linalg.norm(tuned.adapter.parameters - end) <= final * np.linalg.norm(end - start)


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        (STUDY, {"warmup_ratio": 0.03}),
        (ALL, {"lr_scheduler_type": "cosine", "per_device_train_batch_size": 2, "weight_decay": 0.1}),
        (STUDY, {"lr_scheduler_type": "constant", "gradient_accumulation_steps": 3, "num_train_epochs": 1.5,
                 "max_grad_norm": 0.05}),
    ],
    ids=["study", "batches of two", "accumulated"],
)  # fmt: skip
def test_training_goes_as_theirs(tiny, tmp_path, rows, settings, changes):
    base = ql.LlamaForCausalLM.from_pretrained(tiny)
    model = with_adapter(theirs(tiny), **settings)
    training = ql.TrainingConfig(learning_rate=2e-3, **changes)
    compare(base, model, rows, training, tmp_path, loss=1e-5, final=1e-3)


def test_a_classifier_trains_as_theirs(tmp_path, rows):
    path = save_tiny(tmp_path / "tiny", pad_token_id=0)
    reference = transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=3, dtype=torch.float32)
    model = peft.get_peft_model(reference, peft.LoraConfig(task_type="SEQ_CLS", **STUDY))
    base = ql.LlamaForSequenceClassification.from_pretrained(path, num_labels=3)
    training = ql.TrainingConfig(learning_rate=2e-3, per_device_train_batch_size=4, weight_decay=0.01)
    labels = np.array([int(row[-1]) % 3 for row in rows])
    compare(base, model, rows, training, tmp_path, loss=1e-5, final=1e-3, labels=labels)


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}


def theirs_in_nf4(path: Path) -> Any:
    """bitsandbytes' model, made ready for training by PEFT."""
    pytest.importorskip("bitsandbytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = theirs(path, quantization_config=transformers.BitsAndBytesConfig(**NF4), device_map="cpu")
    return peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def test_training_beside_nf4_goes_as_theirs(tmp_path, rows):
    """Rows of whole blocks: bitsandbytes 0.50's CPU product is wrong where a block of 64 crosses into the next row."""
    tiny = save_tiny(tmp_path / "tiny", intermediate_size=128)
    model = with_adapter(theirs_in_nf4(tiny), **STUDY)
    base = ql.quantize(ql.LlamaForCausalLM.from_pretrained(tiny), ql.NF4Config())
    training = ql.TrainingConfig(learning_rate=2e-3, warmup_ratio=0.03)
    compare(base, model, rows, training, tmp_path, loss=1e-4, final=1e-3)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("smollm2") / "float32"  # transformers trains no GGUF file
    ql.LlamaForCausalLM.from_pretrained("demo").save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", ["float32", "nf4"])
def test_smollm2_trains_as_theirs(smollm2, tmp_path, kind):
    """The LIMA study's settings without dropout; the first 50 losses, on short rows that both are quick with."""
    from quantlab.io.datasets import load_demo_tweets

    base = ql.LlamaForCausalLM.from_pretrained(smollm2)
    rows = [base.encode(text)[:16] for text in load_demo_tweets()[0] if len(text) > 60][:50]
    training = ql.TrainingConfig(learning_rate=2e-4, warmup_ratio=0.03)
    if kind == "nf4":
        model = with_adapter(theirs_in_nf4(smollm2), **STUDY)
        compare(ql.quantize(base, ql.NF4Config()), model, rows, training, tmp_path, loss=1e-3, final=1e-2)
    else:
        compare(base, with_adapter(theirs(smollm2), **STUDY), rows, training, tmp_path, loss=1e-4, final=1e-3)
