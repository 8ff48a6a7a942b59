"""What a training run is, before any of it runs: its settings, its learning rates, its batches."""

from __future__ import annotations

import bisect
import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from quantlab.config import check_choice, check_flag, check_number, plain_numbers

Schedule = Literal["linear", "cosine", "constant", "constant_with_warmup"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
Policy = Literal["none", "selective", "full"]  # of recomputing activations, in the order of falling memory
POLICIES: tuple[Policy, ...] = get_args(Policy)
IGNORED = -100  # a target that is not learned


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of a training run, with transformers' names and meanings.

    learning_rate: the highest. lr_scheduler_type: linear, cosine, constant or constant_with_warmup, over all steps;
    warmup_steps, or where it is 0 warmup_ratio of the steps, rounded up, rise linearly from 0. A step takes
    gradient_accumulation_steps batches of per_device_train_batch_size rows, and its loss is the mean over their target
    tokens. num_train_epochs may be a fraction; max_steps > 0 takes its place. max_grad_norm: gradients longer than it
    are cut to it; 0: never. optimizer: AdamW. max_length: rows are cut to so many tokens (None: the model's context).

    packing: rows are grouped into batches of up to max_length tokens, without seeing each other; a batch then counts as
    one row. assistant_only_loss: only what the assistant says in conversations is learned. chat_template: "auto" (the
    model's own, else ChatML), "chatml", "joined" (all turns joined by one space, no end token), or a Jinja template.

    logging_steps: steps between entries of the log. eval_steps: steps between evaluations; None: after each epoch.
    save_steps: steps between checkpoints in output_dir; None: none but the adapter at the end. resume_from_checkpoint:
    True (the last of output_dir) or a checkpoint's directory. gradient_checkpointing: which activations are computed
    again in the backward pass: none, selective, full, or auto, by the memory that is free; the result is the same.
    report_to: "none" or "wandb".
    """

    learning_rate: float = 2e-4
    lr_scheduler_type: Schedule = "linear"
    warmup_ratio: float = 0.0
    warmup_steps: int = 0
    num_train_epochs: float = 1.0
    max_steps: int = -1
    per_device_train_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    seed: int = 42
    shuffle: bool = True
    max_length: int | None = None
    packing: bool = False
    assistant_only_loss: bool = False
    chat_template: str = "auto"
    logging_steps: int = 10
    eval_steps: int | None = None
    save_steps: int | None = None
    output_dir: str | os.PathLike[str] | None = None
    resume_from_checkpoint: bool | str | os.PathLike[str] | None = None
    gradient_checkpointing: Literal["auto"] | Policy = "auto"
    report_to: Literal["none", "wandb"] = "none"

    def __post_init__(self) -> None:
        plain_numbers(self)
        check_choice("lr_scheduler_type", self.lr_scheduler_type, SCHEDULES)
        check_choice("gradient_checkpointing", self.gradient_checkpointing, ("auto", *POLICIES))
        check_choice("report_to", self.report_to, ("none", "wandb"))
        for name in ("learning_rate", "num_train_epochs", "max_grad_norm", "weight_decay"):
            check_number(name, getattr(self, name), 0.0)
        for name in ("warmup_ratio", "adam_beta1", "adam_beta2", "adam_epsilon"):
            check_number(name, getattr(self, name), 0.0, 1.0)
        for name in ("shuffle", "packing", "assistant_only_loss"):
            check_flag(name, getattr(self, name))
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps"):
            _check_count(name, getattr(self, name), 1)
        for name in ("warmup_steps", "seed"):
            _check_count(name, getattr(self, name), 0)
        for name, least in (("max_length", 2), ("eval_steps", 1), ("save_steps", 1)):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name), least)
        if self.max_steps != -1:
            _check_count("max_steps", self.max_steps, 1)
        if not self.num_train_epochs > 0:
            raise ValueError(f"num_train_epochs: got {self.num_train_epochs}, expected more than 0")
        if self.packing and self.max_length is None:
            raise ValueError("packing: got True without max_length, which says how many tokens a pack may have")
        if self.output_dir is None and (self.save_steps is not None or self.resume_from_checkpoint is True):
            name = "save_steps" if self.save_steps is not None else "resume_from_checkpoint"
            raise ValueError(f"{name}: got {getattr(self, name)} without output_dir, where checkpoints are")

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> TrainingConfig:
        """From plain values; an unknown name is a ValueError."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise ValueError(f"{name}: TrainingConfig has no such field; it has {', '.join(known)}")
        return cls(**fields)

    def total_steps(self, batches: int) -> int:
        """Steps of a run over so many batches an epoch."""
        if self.max_steps > 0:
            return self.max_steps
        return math.ceil(self.num_train_epochs * self.steps_per_epoch(batches))

    def steps_per_epoch(self, batches: int) -> int:
        return -(-batches // self.gradient_accumulation_steps)

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step, counted from 0, of so many: that of transformers' schedules."""
        if self.lr_scheduler_type == "constant":
            return self.learning_rate
        warmup = self.warmup_steps or math.ceil(self.warmup_ratio * steps)
        if step < warmup:
            return self.learning_rate * step / max(1, warmup)
        if self.lr_scheduler_type == "constant_with_warmup":
            return self.learning_rate
        done = (step - warmup) / max(1, steps - warmup)
        if self.lr_scheduler_type == "linear":
            return self.learning_rate * max(0.0, 1.0 - done)
        return self.learning_rate * max(0.0, 0.5 * (1.0 + math.cos(math.pi * done)))


def _check_count(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: got {value!r}, expected an integer of {least} or more")


# ---- batches -------------------------------------------------------------------------------------------------------


class Batches:
    """The order of a run: which rows each step takes, the same for the same seed wherever the run is taken up.

    `units` are what is shuffled: single rows, or packs of rows. A step has up to gradient_accumulation_steps batches,
    each a list of row numbers; a batch's number counts from the start of the run.
    """

    def __init__(self, lengths: Sequence[int], config: TrainingConfig):
        self.config = config
        room = config.max_length if config.packing else None  # packing asks for a max_length
        self.units = [[row] for row in range(len(lengths))] if room is None else pack(lengths, room)
        self.per_epoch = -(-len(self.units) // config.per_device_train_batch_size)
        self.steps_per_epoch = config.steps_per_epoch(self.per_epoch)
        self.steps = config.total_steps(self.per_epoch)
        self._epoch = -1
        self._order: np.ndarray = np.arange(len(self.units))

    def step(self, step: int) -> list[tuple[int, list[int]]]:
        """(number of the batch, its rows) of each batch of a step, counted from 0."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order, size = self._order_of(epoch), self.config.per_device_train_batch_size
        first = within * self.config.gradient_accumulation_steps
        batches = range(first, min(first + self.config.gradient_accumulation_steps, self.per_epoch))
        return [
            (epoch * self.per_epoch + batch, [row for unit in order[batch * size :][:size] for row in self.units[unit]])
            for batch in batches
        ]

    def epochs(self, steps: int) -> float:
        """Epochs that so many steps are."""
        return steps / self.steps_per_epoch

    def _order_of(self, epoch: int) -> np.ndarray:
        if self.config.shuffle and epoch != self._epoch:
            self._order = np.random.default_rng([self.config.seed, epoch]).permutation(len(self.units))
        self._epoch = epoch
        return self._order


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows in groups of at most `capacity` tokens, whole rows each: best fit, the longest first. Groups are in the
    order of their first rows."""
    room: list[tuple[int, int]] = []  # (tokens free, number of the group), sorted
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect.bisect_left(room, (lengths[row], -1))
        if place == len(room):
            groups.append([])
            free, group = capacity, len(groups) - 1
        else:
            free, group = room.pop(place)
        groups[group].append(row)
        bisect.insort(room, (free - lengths[row], group))
    return sorted((sorted(group) for group in groups), key=lambda group: group[0])
