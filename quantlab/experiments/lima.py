"""The LIMA study: LoRA adapters tuned over quantized bases, each then run for inference over either format.

The cells of a run: "base-X" quantizes the model and measures it untuned; "tune-X" trains an adapter over that base;
"merge-X" measures what putting the adapter into the weights costs; "infer-A-B" takes the adapter that was tuned over A
to inference in B, measures its quality and times generation. A and B are of `PARTS`. Four baselines, tuned over ->
inferred in: bnb-bnb and gptq-gptq keep the adapter beside the quantized base; bnb-gptq and gptq-bnb merge it into the
float model and quantize that anew. A row of one part ("fp16") is that base untuned.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from quantlab import backend
from quantlab.config import LoraConfig
from quantlab.conversations import joined
from quantlab.training import Schedule, TrainingConfig

from . import study
from .data import fingerprint
from .lima_data import Conversations, load_conversations
from .lima_stages import LimaStages
from .record import key_of
from .study import Job, Outcome, StudyConfig, Tell, check_counts, text_of
from .variants import Variant

EXPERIMENT = "lima"
SELECTION = ("baselines", "wandb", "keep_models", "local_files_only")  # may differ between the runs of one directory
PARTS = {"fp16": ("float",), "bnb": ("nf4", "fp4"), "gptq": ("gptq",)}  # name: what methods its variant may have
BASELINES = ("fp16", "bnb-bnb", "gptq-gptq", "bnb-gptq", "gptq-bnb")


@dataclass(frozen=True)
class LimaConfig(StudyConfig):
    """Settings of the study.

    The preset "seed" has the published study's own settings: FP4 with float32 compute (what its script really ran),
    fp16, GPTQ of group 128 with damping 0.1, all turns joined by a space, no end token, no length limit, the loss of
    prompts included, and "hello" as the prompt of every timed generation. "corrected" tunes on NF4 and bf16, with the
    model's chat template and its end token, a length limit and the loss of the answers alone, and times real prompts.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "corrected": {},
        "seed": {
            "fp16": "fp16", "bnb": "fp4", "gptq": "gptq-4", "precise": True, "group_size": 128, "damp_percent": 0.1,
            "calibration_rows": 128, "calibration_length": 4028, "chat_template": "joined", "answers_only": False,
            "max_length": None, "prompt": "hello", "repeats": 10, "logging_steps": 10, "seed": 42,
        },
    }  # fmt: skip
    CELLS: ClassVar[str] = "baselines"

    baselines: tuple[str, ...] = BASELINES
    fp16: str = "bf16"  # the variant that each part stands for: see `variants.py`
    bnb: str = "nf4"
    gptq: str = "gptq-4-r"
    precise: bool = False  # 24-bit integers for bfloat16: about float32's accuracy
    # conversations
    data: str | None = None  # a JSON-lines file or the folder of train.jsonl; None looks where datasets are looked for
    limit: int | None = None  # conversations, held-out ones included; None: all
    held_out: int = 50  # at most a tenth of them
    chat_template: str = "auto"  # "auto": the model's own; "chatml"; "joined": turns joined by a space; or Jinja
    answers_only: bool = True  # only the answers' tokens count for the loss
    max_length: int | None = 512  # tokens of a conversation: what is over it is cut
    # LoRA
    r: int = 8
    lora_alpha: float = 32
    lora_dropout: float = 0.05
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    # training
    epochs: float = 1.0
    lr: float = 2e-4
    lr_scheduler: Schedule = "linear"
    warmup_ratio: float = 0.03
    batch_size: int = 1
    accumulation: int = 1
    evaluations: int = 3  # of the held-out loss, spread over the training
    logging_steps: int = 5
    save_steps: int = 50  # a killed training goes on from there
    # generation
    prompt: str | None = None  # of timed generations; None: the held-out conversations' first turns
    prompt_tokens: int = 32  # of such a turn
    new_tokens: int = 30
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    repeats: int = 5
    answer_tokens: int = 96  # of the sample answers
    perplexity_tokens: int | None = 4096

    def __post_init__(self) -> None:
        """Raises ValueError naming the first field that cannot be."""
        super().__post_init__()
        for name in ("batches", "target_modules"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        counts = ("held_out", "batch_size", "accumulation", "evaluations", "prompt_tokens", "new_tokens")
        check_counts(self, *counts, "answer_tokens", "logging_steps", "save_steps")
        check_counts(self, "repeats", least=2)
        check_counts(self, "limit", "max_length", least=2, optional=True)
        if not self.batches or any(size < 1 for size in self.batches):
            raise ValueError(f"batches: got {self.batches!r}, expected integers of at least 1")
        for part, methods in PARTS.items():
            if self.part(part).method not in methods:
                raise ValueError(f"{part}: got {getattr(self, part)!r}, expected a variant by {' or '.join(methods)}")
        for name in self.baselines:
            parts_of(name)
        self.lora()
        self.training(1)

    def part(self, name: str) -> Variant:
        """The variant that "fp16", "bnb" or "gptq" stands for."""
        return self.variant(getattr(self, name))

    def lora(self) -> LoraConfig:
        return LoraConfig(self.r, self.lora_alpha, self.lora_dropout, self.target_modules)

    def training(self, rows: int, folder: Path | None = None) -> TrainingConfig:
        """The training of so many conversations. folder: where its checkpoints are kept; one that is there already is
        gone on from."""
        config = TrainingConfig(
            learning_rate=self.lr, lr_scheduler_type=self.lr_scheduler, warmup_ratio=self.warmup_ratio,
            num_train_epochs=self.epochs, per_device_train_batch_size=self.batch_size,
            gradient_accumulation_steps=self.accumulation, seed=self.seed, max_length=self.max_length,
            chat_template=self.chat_template, assistant_only_loss=self.answers_only, logging_steps=self.logging_steps,
        )  # fmt: skip
        if folder is None:
            return config
        steps, started = config.total_steps(-(-rows // self.batch_size)), any(folder.glob("checkpoint-*"))
        return replace(
            config, output_dir=str(folder), save_steps=self.save_steps, eval_steps=-(-steps // self.evaluations),
            resume_from_checkpoint=started or None,
        )  # fmt: skip


def limited(config: LimaConfig, limit: int) -> LimaConfig:
    """The same study on at most `limit` conversations, and of generation in batches of no more rows."""
    return replace(config, limit=limit, batches=tuple(size for size in config.batches if size <= limit) or (limit,))


def parts_of(baseline: str) -> tuple[str | None, str]:
    """("bnb", "gptq") of "bnb-gptq": tuned over, inferred in; (None, "fp16") of "fp16"."""
    first, dash, second = baseline.partition("-")
    if first not in PARTS or (dash and second not in PARTS):
        raise ValueError(
            f"baseline {baseline!r}: accepted are A-B (tuned over A, inferred in B) and A (untuned), "
            f"with A and B of {', '.join(PARTS)}"
        )
    return (first, second) if dash else (None, first)


@dataclass(frozen=True)
class Plan:
    """The cells of a study with their resolved configurations, before any model is loaded."""

    config: LimaConfig
    conversations: Conversations
    cells: dict[str, dict[str, Any]]  # by name, in order
    calibration_texts: list[str] = field(repr=False)
    perplexity_texts: list[str] | None = field(repr=False)


def resolve(config: LimaConfig) -> Plan:
    """Loads the conversations and works out the configuration of every cell."""
    data = load_conversations(config.data, config.limit, config.held_out, config.seed, config.local_files_only)
    calibration_texts = text_of(config.calibration, [joined(messages)[0] for messages in data.train])
    perplexity_texts = None if config.perplexity_text is None else text_of(config.perplexity_text, [])
    shared: dict[str, Any] = {
        "model": {"source": config.model, "fingerprint": fingerprint(config.model)},
        "data": {"held_out": data.describe("held out")},
        "format": settings(config, "chat_template", "answers_only", "max_length", "precise", "device"),
        "perplexity": None,
        "energy": settings(config, "energy", "country", "intensity_g_kwh"),
    }
    if perplexity_texts is not None:
        key = key_of({"texts": perplexity_texts})
        shared["perplexity"] = settings(config, "perplexity_context", "perplexity_tokens") | {"key": key}
    calibration = settings(config, "calibration_rows", "calibration_length") | {"key": key_of({"t": calibration_texts})}
    needed = {part for name in config.baselines for part in parts_of(name)}
    tuned = {parts_of(name)[0] for name in config.baselines}
    cells: dict[str, dict[str, Any]] = {}
    for part in PARTS:
        if part in needed:
            gptq = calibration if part == "gptq" else None
            cells[f"base-{part}"] = {**shared, "variant": config.part(part).to_dict(), "calibration": gptq}
    for part in PARTS:
        if part in tuned:
            cells[f"tune-{part}"] = {"base": key_of(cells[f"base-{part}"]), **tuning(config, data)}
    for part in PARTS:
        if part in tuned:
            cells[f"merge-{part}"] = {"tune": key_of(cells[f"tune-{part}"])}
    generation = settings(config, "prompt", "prompt_tokens", "new_tokens", "batches", "repeats", "answer_tokens")
    for name in config.baselines:
        source, target = parts_of(name)
        tune = key_of(cells[f"tune-{source}"]) if source else None
        cells[f"infer-{name}"] = {"tune": tune, "base": key_of(cells[f"base-{target}"]), "generation": generation}
    return Plan(config, data, cells, calibration_texts, perplexity_texts)


def settings(config: LimaConfig, *names: str) -> dict[str, Any]:
    return {name: getattr(config, name) for name in names}


def tuning(config: LimaConfig, data: Conversations) -> dict[str, Any]:
    """What an adapter depends on beside its base."""
    training = ("epochs", "lr", "lr_scheduler", "warmup_ratio", "batch_size", "accumulation", "evaluations", "seed")
    lora = ("r", "lora_alpha", "lora_dropout", "target_modules")
    return {"train": data.describe("train"), "lora": settings(config, *lora), "training": settings(config, *training)}


def foresee(config: LimaConfig, out: str | os.PathLike[str]) -> dict[str, Any]:
    """The dry run: see `study.foresee`."""
    plan = resolve(config)
    data = plan.conversations
    told = f"{data.source}, conversations: {len(data.train):,} to train on, {len(data.held_out):,} held out"
    return study.foresee(config, EXPERIMENT, plan.cells, Path(out), told, "causal")


def run(config: LimaConfig, out: str | os.PathLike[str], progress: bool = True, on_cell: Tell | None = None) -> Outcome:
    """Runs the study into the directory `out`, skipping finished cells. A failing cell is recorded, what needs it is
    left out, and the rest goes on.

    on_cell: called with a cell's name and "skipped", "left out" or "started", then "done" or "failed".
    Raises RecordError when `out` holds a run of another configuration.
    """
    plan = resolve(config)
    with (
        study.open_run(config, EXPERIMENT, Path(out), SELECTION) as opened,
        backend.use(precise=config.precise),
    ):
        stages = LimaStages(opened, plan, progress)
        cells, worked = study.run_jobs(opened, jobs(stages), on_cell or (lambda *_: None))
        if not config.keep_models:
            stages.drop_bases()
    return Outcome(Path(out), cells, worked)


def jobs(stages: LimaStages) -> list[Job]:
    """The cells in order, with what each needs and leaves."""
    found = []
    for name, config in stages.plan.cells.items():
        kind, _, rest = name.partition("-")
        if kind == "base":
            job = Job(name, config, stages.measure_base(rest), (), stages.base_path(rest))
        elif kind == "tune":
            job = Job(name, config, stages.tune(rest), (f"base-{rest}",), stages.adapter_path(rest))
        elif kind == "merge":
            job = Job(name, config, stages.merge(rest), (f"base-{rest}", f"tune-{rest}"))
        else:
            source, target = parts_of(rest)
            needs = (f"base-{target}", *([f"tune-{source}"] if source else []))
            job = Job(name, config, stages.infer(source, target), needs)
        found.append(job)
    return found
