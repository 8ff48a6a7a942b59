"""The TweetEval study: a sentiment (or other) head on a frozen LLaMA, then the same head on every quantized variant.

A configuration goes in, a run directory of records comes out (`record.py`). The cells are "head", which trains the
softmax head, and one for each variant, which quantizes, measures size, predicts the test tweets, times, and measures
perplexity. Cells depend on nothing but their configuration and the head, so a run may be killed and started again at
any moment.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from quantlab.cuda import device_number
from quantlab.io.datasets import TASKS

from .data import Examples, fingerprint, load_examples
from .record import Cell, RecordError, Run, cell_id, key_of, read_json
from .stages import Stages
from .tracking import event_sink
from .variants import Variant, parse_variant

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
class TweetEvalConfig:
    """Settings of the study. `preset()` gives the two sets of defaults, `from_dict` reads a file's content."""

    preset: str = "corrected"
    model: str = "demo"  # directory, .gguf file, hub id or "demo"
    task: str = "demo"  # "demo", or a TweetEval task: emoji emotion hate irony offensive sentiment stance_*
    data_root: str | None = None  # folder of the data set; None looks where quantlab.io.datasets looks
    variants: tuple[str, ...] = CORRECTED_VARIANTS
    # GPTQ and RTN
    group_size: int = 64
    sym: bool = True
    desc_act: bool = False
    damp_percent: float = 0.01
    calibration: str = "task"  # "task": the training tweets; or a text file
    calibration_rows: int = 32
    calibration_length: int = 512  # tokens a row
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
    perplexity_text: str | None = "task"  # None; "task": the test tweets joined by line breaks; or a text file
    perplexity_context: int = 512
    perplexity_tokens: int | None = 16_384
    # energy
    energy: bool = True
    country: str = "ESP"
    intensity_g_kwh: float | None = None
    # the rest
    seed: int = 0
    keep_models: bool = False  # save each quantized model under models/
    device: str = "cpu"  # where the model runs: cpu, cuda, cuda:N; quantization is on the CPU
    local_files_only: bool = False
    wandb: str = "off"  # off, offline, online: needs the extra `wandb`

    def __post_init__(self) -> None:
        object.__setattr__(self, "variants", tuple(dict.fromkeys(self.variants)))
        check_config(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TweetEvalConfig:
        """A configuration from a mapping: `preset` chooses the defaults, the other fields replace them."""
        values = dict(values)
        return preset(values.pop("preset", "corrected"), **values)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], **overrides: Any) -> TweetEvalConfig:
        """A configuration from a JSON file of `from_dict`'s fields (a run's own config.json is one)."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"config {path}: not a readable JSON file ({error})") from error
        if not isinstance(values, dict):
            raise ValueError(f"config {path}: expected a JSON object, got {type(values).__name__}")
        return cls.from_dict({**values.get("config", values), **overrides})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_config(config: TweetEvalConfig) -> None:
    """Raises ValueError naming the first field that cannot be."""
    for name in (
        "calibration_rows",
        "calibration_length",
        "epochs",
        "batch_size",
        "patience",
        "batch_tokens",
        "timing_tweets",
        "timing_repeats",
    ):
        if not isinstance(getattr(config, name), int) or getattr(config, name) < 1:
            raise ValueError(f"{name}: got {getattr(config, name)!r}, expected an integer of at least 1")
    for name in ("train_limit", "val_limit", "test_limit", "perplexity_tokens"):
        value = getattr(config, name)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}: got {value!r}, expected None or an integer of at least 1")
    if config.task not in ("demo", *TASKS):
        raise ValueError(f"task: got {config.task!r}, accepted are demo, {', '.join(TASKS)}")
    if not isinstance(config.perplexity_context, int) or config.perplexity_context < 2:
        raise ValueError(f"perplexity_context: got {config.perplexity_context!r}, expected an integer of at least 2")
    if not (isinstance(config.lr, (int, float)) and config.lr > 0):
        raise ValueError(f"lr: got {config.lr!r}, expected a positive number")
    if config.wandb not in ("off", "offline", "online"):
        raise ValueError(f"wandb: got {config.wandb!r}, accepted are off, offline, online")
    device_number(config.device)
    if not config.variants:
        raise ValueError("variants: got none, expected at least one")
    for name in config.variants:
        variant_of(config, name)


def preset(name: str, **overrides: Any) -> TweetEvalConfig:
    """The configuration of a preset with some fields replaced.

    "corrected" evaluates batches sorted by length and calibrates on the task's text. "seed" has the published study's
    own settings where they are known: an fp32 base, GPTQ at 8, 4 and 3 bits, group 128, damping 0.1, symmetric, no
    activation order, 128 rows of up to 4,028 tokens, one tweet at a time, Spain's carbon factor. Its calibration text
    (c4) is replaced by what is at hand.
    """
    defaults: dict[str, dict[str, Any]] = {
        "corrected": {},
        "seed": {
            "variants": SEED_VARIANTS, "group_size": 128, "damp_percent": 0.1, "calibration_rows": 128,
            "calibration_length": 4028, "one_at_a_time": True, "country": "ESP", "perplexity_text": None,
        },
    }  # fmt: skip
    if name not in defaults:
        raise ValueError(f"preset: got {name!r}, accepted are {', '.join(defaults)}")
    known = {item.name for item in fields(TweetEvalConfig)}
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise ValueError(f"config: no field {unknown[0]!r}; the fields are {', '.join(sorted(known))}")
    return TweetEvalConfig(preset=name, **{**defaults[name], **overrides})


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


def variant_of(config: TweetEvalConfig, name: str) -> Variant:
    return parse_variant(name, config.group_size, config.sym, config.desc_act, config.damp_percent)


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
        variant = variant_of(config, name)
        cells[name] = {
            **shared,
            "variant": variant.to_dict(),
            "calibration": calibration if variant.method == "gptq" else None,
        }
    return Plan(config, examples, head, cells, calibration_texts, perplexity_texts)


def text_of(choice: str, task_texts: list[str]) -> list[str]:
    """The task's own texts, or the content of a text file."""
    if choice == "task":
        return task_texts
    from quantlab.io.datasets import load_text

    return [load_text(choice)]


def listing(config: TweetEvalConfig, out: str | os.PathLike[str]) -> list[dict[str, str]]:
    """The dry run: every cell of the study with its id and whether it is done, failed or still to do."""
    plan, rows = resolve(config), []
    cells = {"head": plan.head, **plan.variants}
    for name, cell_config in cells.items():
        identity = cell_id(EXPERIMENT, name, cell_config)
        path = Path(out) / "cells" / f"{identity}.json"
        rows.append(
            {"cell": name, "cell_id": identity, "status": read_json(path)["status"] if path.exists() else "to do"}
        )
    return rows


@dataclass(frozen=True)
class Outcome:
    """What a run of the study left: the records of its cells, by name, and how many were worked on now."""

    path: Path
    cells: dict[str, dict[str, Any]]
    worked: int

    @property
    def failed(self) -> list[str]:
        return [name for name, cell in self.cells.items() if cell["status"] != "done"]


def run(
    config: TweetEvalConfig,
    out: str | os.PathLike[str],
    progress: bool = True,
    on_cell: Callable[[str, str], None] | None = None,
) -> Outcome:
    """Runs the study into the directory `out`, skipping finished cells. A failing variant is recorded and the rest
    goes on.

    on_cell: called with a cell's name and "skipped", "started", then "done" or "failed".
    Raises RecordError when `out` holds a run of another configuration, and StudyError when the head cannot be trained.
    """
    plan = resolve(config)
    energy = {"enabled": config.energy, "country": config.country, "intensity_g_kwh": config.intensity_g_kwh}
    settings = merged_variants(config, Path(out)).to_dict()
    with (
        event_sink(config.wandb, Path(out), EXPERIMENT, settings) as sink,
        Run(out, EXPERIMENT, settings, SELECTION, energy, sink) as study,
    ):
        cells, worked = run_cells(study, plan, progress, on_cell or (lambda name, status: None))
    return Outcome(Path(out), cells, worked)


def run_cells(
    study: Run, plan: Plan, progress: bool, tell: Callable[[str, str], None]
) -> tuple[dict[str, dict[str, Any]], int]:
    """The records of the head and of every variant, and how many cells were not finished before."""
    stages = Stages(study, plan, progress)
    work: dict[str, tuple[dict[str, Any], Callable[[Cell], None]]] = {"head": (plan.head, stages.train_head)}
    work |= {name: (config, stages.measure(variant_of(plan.config, name))) for name, config in plan.variants.items()}
    if not stages.head_path.exists():
        study.forget("head", plan.head)  # a record without its head is of no use to the variants
    cells: dict[str, dict[str, Any]] = {}
    worked = 0
    for name, (config, function) in work.items():
        skipped = study.finished(name, config) is not None
        tell(name, "skipped" if skipped else "started")
        cells[name] = study.cell(name, config, function)
        if not skipped:
            worked += 1
            tell(name, cells[name]["status"])
        if name == "head" and cells[name]["status"] != "done":
            error = cells[name]["error"]
            raise StudyError(
                f"the head could not be trained ({error['type']}: {error['message']}); "
                f"its record is in {study.path / 'cells'}"
            )
    return cells, worked


class StudyError(RuntimeError):
    """A study that cannot go on, because the cell that the others need has failed."""


def merged_variants(config: TweetEvalConfig, out: Path) -> TweetEvalConfig:
    """The configuration with the variants that the directory already holds put first: a run may be extended."""
    path = out / "config.json"
    if not path.exists():
        return config
    try:
        held = json.loads(path.read_text())["config"]["variants"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecordError(f"{path}: not a readable run configuration ({error})") from error
    return replace(config, variants=(*held, *config.variants))
