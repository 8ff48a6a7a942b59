"""Settings of a training run: what is refused, the learning rates of transformers' schedules, batches and packs."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantlab.config import LoraConfig
from quantlab.training import Batches, TrainingConfig, pack

BAD = [
    ("learning_rate", -1e-4), ("learning_rate", math.nan), ("lr_scheduler_type", "polynomial"), ("warmup_ratio", 1.5),
    ("warmup_steps", -1), ("num_train_epochs", 0), ("max_steps", 0), ("per_device_train_batch_size", 0),
    ("gradient_accumulation_steps", 1.5), ("max_grad_norm", -1), ("adam_beta1", 1.0), ("shuffle", 1),
    ("max_length", 1), ("packing", True), ("logging_steps", 0), ("save_steps", 5), ("resume_from_checkpoint", True),
    ("gradient_checkpointing", True), ("report_to", "tensorboard"), ("seed", -1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda value: str(value))
def test_what_is_not_accepted_is_named(name, value):
    with pytest.raises(ValueError, match=f"^{name}: got "):
        TrainingConfig.from_dict({name: value})


def test_unknown_settings_are_named():
    with pytest.raises(ValueError, match=r"^optim: TrainingConfig has no such field; it has learning_rate"):
        TrainingConfig.from_dict({"optim": "adamw"})


@pytest.mark.parametrize(
    ("name", "value"),
    [("r", 0), ("r", 2.0), ("lora_alpha", -1), ("lora_dropout", 1.0), ("target_modules", "q_proj"),
     ("target_modules", []), ("bias", "all"), ("use_rslora", "yes"), ("task_type", "SEQ_2_SEQ_LM"),
     ("rank_pattern", 3)],
    ids=lambda value: str(value),
)  # fmt: skip
def test_what_an_adapter_does_not_accept_is_named(name, value):
    with pytest.raises(ValueError, match=f"^{name}: got "):
        LoraConfig(**{name: value})


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern, 'q_proj': got 0, expected an integer of 1 to 4096"),
        ({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern, 'q_proj': got 2.5"),
        ({"alpha_pattern": {"q_proj": -1}}, "alpha_pattern, 'q_proj': got -1, expected a number of 0 or more"),
        ({"alpha_pattern": {"q_(proj": 1}}, "alpha_pattern: 'q_(proj' is no regular expression"),
        ({"rank_pattern": {3: 1}}, "rank_pattern: 3 is no regular expression"),
    ],
)
def test_patterns_that_are_none_are_named(fields, says):
    with pytest.raises(ValueError, match=f"^{re.escape(says)}"):
        LoraConfig(**fields)


def test_the_first_pattern_counts_that_is_a_name_or_its_end():
    """As in peft's get_pattern_key."""
    patterns = {"1.mlp.up_proj": 2, "up_proj": np.int64(3), "^model": 4, "^k_proj": 5, r"model\..*q_proj": 6, "v": 7}
    config = LoraConfig(r=8, lora_alpha=1, rank_pattern=patterns, alpha_pattern={"up_proj": 10.0})
    names = ("1.mlp.up_proj", "11.mlp.up_proj", "0.self_attn.q_proj", "0.self_attn.k_proj", "0.self_attn.v_proj")
    assert [config.rank(f"model.layers.{name}") for name in names] == [2, 3, 6, 8, 8] and config.rank("k_proj") == 5
    assert [config.scale(f"model.layers.{name}") for name in names] == [10 / 2, 10 / 3, 1 / 6, 1 / 8, 1 / 8]
    assert type(config.rank_pattern["up_proj"]) is int and hash(config) == hash(dataclasses.replace(config))


def test_scale_of_an_adapter():
    assert LoraConfig(r=8, lora_alpha=32).scale("q_proj") == 4.0
    assert LoraConfig(r=16, lora_alpha=32, use_rslora=True).scale("q_proj") == 8.0


def test_linear_schedule_with_warm_up():
    """1,030 steps and a ratio of 0.03, the study's: 31 steps of warm-up, the last step is not quite at 0."""
    config = TrainingConfig(learning_rate=2e-4, warmup_ratio=0.03)
    assert config.rate(0, 1030) == 0.0
    assert config.rate(31, 1030) == 2e-4
    assert config.rate(1029, 1030) == pytest.approx(2e-4 / 999)


@pytest.mark.parametrize(("kind", "middle", "last"), [("cosine", 0.5, 0.0), ("linear", 0.5, 0.0), ("constant", 1, 1)])
def test_schedules(kind, middle, last):
    config = TrainingConfig(learning_rate=1.0, lr_scheduler_type=kind)
    assert [config.rate(step, 100) for step in (0, 50, 100)] == pytest.approx([1, middle, last])


def test_warm_up_steps_take_the_place_of_the_ratio():
    config = TrainingConfig(
        learning_rate=1.0, lr_scheduler_type="constant_with_warmup", warmup_steps=4, warmup_ratio=0.5
    )
    assert [config.rate(step, 100) for step in range(6)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize(("rows", "epochs", "steps"), [(7, 1, 2), (7, 2.5, 5), (8, 1, 2), (1, 1, 1), (9, 1, 3)])
def test_steps_of_a_run(rows, epochs, steps):
    """Batches of 2, two a step; what is left over makes a smaller step, as in transformers."""
    config = TrainingConfig(num_train_epochs=epochs, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert Batches([5] * rows, config).steps == steps


def test_every_row_is_seen_once_an_epoch_in_another_order():
    config = TrainingConfig(per_device_train_batch_size=3, gradient_accumulation_steps=2, num_train_epochs=2)
    batches = Batches([4] * 17, config)
    steps = [batches.step(step) for step in range(batches.steps)]
    rows = [row for step in steps for _, batch in step for row in batch]
    assert sorted(rows[:17]) == list(range(17)) == sorted(rows[17:]) and rows[:17] != rows[17:]
    assert [number for step in steps for number, _ in step] == list(range(12))
    assert batches.epochs(3) == 1.0
    again = Batches([4] * 17, config)
    assert again.step(4) == steps[4]  # taken up in the middle


def test_the_order_is_the_files_without_shuffling():
    batches = Batches([4] * 5, TrainingConfig(shuffle=False, num_train_epochs=2))
    assert [batches.step(step)[0][1] for step in range(10)] == [[0], [1], [2], [3], [4]] * 2


@given(st.lists(st.integers(1, 33), min_size=1, max_size=60))
def test_packs_hold_every_row_once_and_are_not_too_long(lengths):
    packs = pack(lengths, 33)
    assert sorted(row for group in packs for row in group) == list(range(len(lengths)))
    loads = [sum(lengths[row] for row in group) for group in packs]
    assert max(loads) <= 33
    assert sum(load <= 16 for load in loads) <= 1  # two half-empty packs would have been one


def test_packing_makes_packs_the_rows_of_a_batch():
    config = TrainingConfig(packing=True, max_length=10, shuffle=False)
    batches = Batches([6, 4, 9, 5, 5], config)
    assert [batches.step(step) for step in range(3)] == [[(0, [0, 1])], [(1, [2])], [(2, [3, 4])]]
