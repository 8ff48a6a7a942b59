"""The TweetEval study: a sentiment (or other) head on a frozen LLaMA, then the same head on every quantized variant.

A configuration goes in, a run directory of records comes out (`record.py`). The cells are "head", which trains the
softmax head, and one for each variant, which quantizes, measures size, predicts the test tweets, times, and measures
perplexity. Cells depend on nothing but their configuration and the head, so a run may be killed and started again at
any moment.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from quantlab.io.datasets import TASKS

from . import study
from .data import Examples, fingerprint, load_examples
from .record import key_of
from .stages import Stages
from .study import Job, Outcome, StudyConfig, StudyError, Tell, check_counts, text_of

EXPERIMENT = "tweeteval"
SELECTION = ("variants", "wandb", "keep_models", "local_files_only")  # may differ between the runs of one directory
DEMO_VARIANTS = ("fp32", "gptq-8", "gptq-4", "gptq-3", "nf4")
CORRECTED_VARIANTS = (
    "fp32",
    "bf16",
    "gptq-8",
    "gptq-4",
    "gptq-4-r",
    "gptq-3",
    "gptq-3-r",
    "nf4",
    "int8",
    "rtn-4",
    "rtn-3",
)
SEED_VARIANTS = ("fp32", "gptq-8", "gptq-4", "gptq-3")


@dataclass(frozen=True)
class TweetEvalConfig(StudyConfig):
    """Settings of the study.

    The preset "corrected" evaluates batches sorted by length and calibrates on the task's text. "seed" has the
    published study's own settings where they are known: an fp32 base, GPTQ at 8, 4 and 3 bits, group 128, damping 0.1,
    symmetric, no activation order, 128 rows of up to 4,028 tokens, one tweet at a time, Spain's carbon factor. Its
    calibration text (c4) is replaced by what is at hand.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "corrected": {},
        "seed": {
            "variants": SEED_VARIANTS, "group_size": 128, "damp_percent": 0.1, "calibration_rows": 128,
            "calibration_length": 4028, "one_at_a_time": True, "country": "ESP", "perplexity_text": None,
        },
    }  # fmt: skip
    CELLS: ClassVar[str] = "variants"

    task: str = "demo"  # "demo", or a TweetEval task: emoji emotion hate irony offensive sentiment stance_*
    data_root: str | None = None  # folder of the data set; None looks where quantlab.io.datasets looks
    variants: tuple[str, ...] = CORRECTED_VARIANTS
    # examples: None takes all
    train_limit: int | None = None
    val_limit: int | None = None
    test_limit: int | None = None
    # head
    epochs: int = 60
    lr: float = 1e-3
    batch_size: int = 32
    patience: int = 5  # epochs without a better evaluation loss before training stops
    # evaluation
    one_at_a_time: bool = False
    batch_tokens: int = 4096
    timing_tweets: int = 64  # a sample of the test tweets, timed again and again
    timing_repeats: int = 10
    perplexity_text: str | None = "task"  # "task": the test tweets joined by line breaks

    def __post_init__(self) -> None:
        """Raises ValueError naming the first field that cannot be."""
        super().__post_init__()
        check_counts(self, "epochs", "batch_size", "patience", "batch_tokens", "timing_tweets", "timing_repeats")
        check_counts(self, "train_limit", "val_limit", "test_limit", optional=True)
        if self.task not in ("demo", *TASKS):
            raise ValueError(f"task: got {self.task!r}, accepted are demo, {', '.join(TASKS)}")
        if not self.lr > 0:
            raise ValueError(f"lr: got {self.lr!r}, expected a positive number")
        for name in self.variants:
            self.variant(name)


def preset(name: str, **overrides: Any) -> TweetEvalConfig:
    """The configuration of a preset with some fields replaced."""
    return TweetEvalConfig.from_preset(name, **overrides)


def demo_config(**overrides: Any) -> TweetEvalConfig:
    """The study of `quantlab demo`: small enough for a few minutes on two cores."""
    small = {
        "variants": DEMO_VARIANTS, "train_limit": 800, "val_limit": 200, "test_limit": 300, "calibration_rows": 8,
        "timing_tweets": 32, "timing_repeats": 5, "perplexity_context": 256, "perplexity_tokens": 1024,
    }  # fmt: skip
    return preset("corrected", **{**small, **overrides})


def limited(config: TweetEvalConfig, limit: int) -> TweetEvalConfig:
    """The same study on at most `limit` examples of every split."""
    return replace(config, train_limit=limit, val_limit=limit, test_limit=limit)


@dataclass(frozen=True)
class Plan:
    """The cells of a study with their resolved configurations, before anything is loaded but the examples."""

    config: TweetEvalConfig
    examples: Examples
    head: dict[str, Any]
    variants: dict[str, dict[str, Any]]  # by name
    calibration_texts: list[str] = field(repr=False)
    perplexity_texts: list[str] | None = field(repr=False)


def resolve(config: TweetEvalConfig) -> Plan:
    """Loads the examples and works out the configuration of every cell."""
    limits = (config.train_limit, config.val_limit, config.test_limit)
    examples = load_examples(config.task, config.data_root, limits, config.seed, config.local_files_only)
    source = {"source": config.model, "fingerprint": fingerprint(config.model)}
    described = {split.name: split.describe(config.task) for split in (examples.train, examples.val, examples.test)}
    training = {name: getattr(config, name) for name in ("epochs", "lr", "batch_size", "patience", "seed")}
    head = {"model": source, "train": described[examples.train.name], "val": described[examples.val.name], **training}
    calibration_texts, perplexity_texts = text_of(config.calibration, examples.train.texts), None
    calibration = {
        "text": config.calibration,
        "rows": config.calibration_rows,
        "length": config.calibration_length,
        "key": key_of({"texts": calibration_texts}),
    }
    evaluation = {
        name: getattr(config, name) for name in ("one_at_a_time", "batch_tokens", "timing_tweets", "timing_repeats")
    }
    perplexity = None
    if config.perplexity_text is not None:
        perplexity_texts = text_of(config.perplexity_text, examples.test.texts)
        perplexity = {
            "text": config.perplexity_text,
            "context": config.perplexity_context,
            "tokens": config.perplexity_tokens,
            "key": key_of({"texts": perplexity_texts}),
        }
    shared = {
        "model": source,
        "head": key_of(head),
        "test": described[examples.test.name],
        "evaluation": evaluation,
        "perplexity": perplexity,
    }
    shared["energy"] = {"on": config.energy, "country": config.country, "intensity_g_kwh": config.intensity_g_kwh}
    if config.device != "cpu":  # cells of the CPU have no such field: their ids stay those of records made before it
        shared["device"] = head["device"] = config.device
        shared["head"] = key_of(head)
    cells = {}
    for name in config.variants:
        variant = config.variant(name)
        cells[name] = {
            **shared,
            "variant": variant.to_dict(),
            "calibration": calibration if variant.method == "gptq" else None,
        }
    return Plan(config, examples, head, cells, calibration_texts, perplexity_texts)


def foresee(config: TweetEvalConfig, out: str | os.PathLike[str]) -> dict[str, Any]:
    """The dry run: see `study.foresee`."""
    plan = resolve(config)
    splits = ", ".join(f"{len(getattr(plan.examples, name).texts):,} {name}" for name in ("train", "val", "test"))
    cells = {"head": plan.head, **plan.variants}
    return study.foresee(config, EXPERIMENT, cells, Path(out), f"{config.task}, tweets: {splits}", "classifier")


def run(
    config: TweetEvalConfig, out: str | os.PathLike[str], progress: bool = True, on_cell: Tell | None = None
) -> Outcome:
    """Runs the study into the directory `out`, skipping finished cells. A failing variant is recorded and the rest
    goes on.

    on_cell: called with a cell's name and "skipped", "started", then "done" or "failed".
    Raises RecordError when `out` holds a run of another configuration, and StudyError when the head cannot be trained.
    """
    plan = resolve(config)
    with study.open_run(config, EXPERIMENT, Path(out), SELECTION) as opened:
        cells, worked = study.run_jobs(opened, jobs(Stages(opened, plan, progress)), on_cell or (lambda *_: None))
    if cells["head"]["status"] != "done":
        error, records = cells["head"]["error"], Path(out) / "cells"
        raise StudyError(
            f"the head could not be trained ({error['type']}: {error['message']}); its record is in {records}"
        )
    return Outcome(Path(out), cells, worked)


def jobs(stages: Stages) -> list[Job]:
    plan = stages.plan
    head = Job("head", plan.head, stages.train_head, artifact=stages.head_path)
    variants = [
        Job(name, config, stages.measure(plan.config.variant(name)), needs=("head",))
        for name, config in plan.variants.items()
    ]
    return [head, *variants]
