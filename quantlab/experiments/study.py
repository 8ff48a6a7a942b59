"""What all studies share: configurations with presets, the loop over cells, the dry run, and what a run leaves."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

from quantlab.cuda import device_number
from quantlab.tracking import event_sink

from .energy import require_country
from .record import Cell, Run, cell_id, read_cell, read_config
from .variants import Variant, parse_variant

C = TypeVar("C", bound="StudyConfig")
Tell = Callable[[str, str], None]


@dataclass(frozen=True)
class StudyConfig:
    """Settings that every study has. A study adds its own, and the defaults of its presets in `PRESETS`."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"corrected": {}}
    CELLS: ClassVar[str]  # the field that chooses the cells: a run may be extended by it

    preset: str = "corrected"
    model: str = "demo"  # directory, .gguf file, hub id or "demo"
    # GPTQ (and RTN, the first two)
    group_size: int = 64
    sym: bool = True
    desc_act: bool = False
    damp_percent: float = 0.01
    calibration: str = "task"  # "task": the training text; or a text file
    calibration_rows: int = 32
    calibration_length: int = 512  # tokens a row
    # perplexity
    perplexity_text: str | None = None  # None; a text file; or "task", where the study says so
    perplexity_context: int = 512
    perplexity_tokens: int | None = 16_384
    # energy
    energy: bool = True
    country: str = "ESP"
    intensity_g_kwh: float | None = None
    # the rest
    seed: int = 0
    keep_models: bool = False  # leave quantized models under models/
    device: str = "cpu"  # where the model runs: cpu, cuda, cuda:N
    local_files_only: bool = False
    wandb: str = "off"  # off, offline, online: needs the extra `wandb`

    def __post_init__(self) -> None:
        check_kinds(self)
        object.__setattr__(self, self.CELLS, tuple(dict.fromkeys(getattr(self, self.CELLS))))
        if not getattr(self, self.CELLS):
            raise ValueError(f"{self.CELLS}: got none, expected at least one")
        check_counts(self, "calibration_rows", "calibration_length")
        check_counts(self, "perplexity_context", least=2)
        check_counts(self, "perplexity_tokens", optional=True)
        if not re.fullmatch("[A-Za-z]{3}", self.country):
            raise ValueError(f"country: got {self.country!r}, expected three letters (ISO 3166), such as ESP")
        if self.wandb not in ("off", "offline", "online"):
            raise ValueError(f"wandb: got {self.wandb!r}, accepted are off, offline, online")
        device_number(self.device)

    @classmethod
    def from_preset(cls: type[C], name: str, **overrides: Any) -> C:
        """The configuration of a preset with some fields replaced."""
        if name not in cls.PRESETS:
            raise ValueError(f"preset: got {name!r}, accepted are {', '.join(cls.PRESETS)}")
        known = {item.name for item in fields(cls)}
        unknown = sorted(set(overrides) - known)
        if unknown:
            raise ValueError(f"config: no field {unknown[0]!r}; the fields are {', '.join(sorted(known))}")
        return cls(preset=name, **{**cls.PRESETS[name], **overrides})

    @classmethod
    def from_dict(cls: type[C], values: Mapping[str, Any]) -> C:
        """A configuration from a mapping: `preset` chooses the defaults, the other fields replace them."""
        values = dict(values)
        return cls.from_preset(values.pop("preset", "corrected"), **values)

    @classmethod
    def from_file(cls: type[C], path: str | os.PathLike[str], **overrides: Any) -> C:
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

    def energy_settings(self) -> dict[str, Any]:
        """What `energy.track` takes."""
        return {"enabled": self.energy, "country": self.country, "intensity_g_kwh": self.intensity_g_kwh}

    def variant(self, name: str) -> Variant:
        """A variant by its name, with this study's settings of GPTQ and RTN."""
        return parse_variant(name, self.group_size, self.sym, self.desc_act, self.damp_percent)


_KINDS = {bool: "True or False", int: "an integer", float: "a finite number", str: "text"}


def _is(value: object, kind: type) -> bool:
    if kind is float:
        return not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def check_kinds(config: StudyConfig) -> None:
    """Raises ValueError naming the first field whose value is not of the kind that it is declared as: a file of
    settings may hold anything, and "false" would count as true. A path becomes text."""
    hints = get_type_hints(type(config))
    for name in (item.name for item in fields(config)):
        value, hint = getattr(config, name), hints[name]
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
            object.__setattr__(config, name, value)
        options = get_args(hint) if get_origin(hint) is UnionType else (hint,)
        optional, kind = NoneType in options, options[0]
        many = get_origin(kind) is tuple
        one = get_args(kind)[0] if many else kind if kind in _KINDS else str  # str: a choice of words
        if optional and value is None:
            continue
        if isinstance(value, (list, tuple)) and all(_is(item, one) for item in value) if many else _is(value, one):
            continue
        wanted = f"a list, each {_KINDS[one]}" if many else _KINDS[one]
        raise ValueError(f"{name}: got {value!r}, expected {wanted}{' or None' if optional else ''}")


def check_counts(config: StudyConfig, *names: str, least: int = 1, optional: bool = False) -> None:
    """Raises ValueError naming the first of these fields, integers, that is less than `least` (nor None)."""
    for name in names:
        value = getattr(config, name)
        if not (optional and value is None) and value < least:
            kind = "None or an integer" if optional else "an integer"
            raise ValueError(f"{name}: got {value!r}, expected {kind} of at least {least}")


def text_of(choice: str, task_texts: list[str]) -> list[str]:
    """The task's own texts, or the content of a text file."""
    if choice == "task":
        return task_texts
    from quantlab.io.datasets import load_text

    return [load_text(choice)]


# ---- cells -----------------------------------------------------------------------------------------------------------


class StudyError(RuntimeError):
    """A study that cannot go on, because the cell that all others need has failed."""


@dataclass(frozen=True)
class Job:
    """A cell to be worked on.

    needs: names of the cells before it that it builds on. artifact: a file or directory that the cell leaves for
    those: without it the record is of no use to them, and the cell is run again.
    """

    name: str
    config: dict[str, Any]
    work: Callable[[Cell], None]
    needs: tuple[str, ...] = ()
    artifact: Path | None = None


def run_jobs(run: Run, jobs: Sequence[Job], tell: Tell) -> tuple[dict[str, dict[str, Any]], int]:
    """The records of the jobs by name, and how many were not finished before. What fails is recorded and the rest goes
    on, but for what needs it: that is left out.

    tell: called with a cell's name and "skipped", "left out" or "started", then "done" or "failed".
    """
    cells: dict[str, dict[str, Any]] = {}
    worked = 0
    forget_what_lacks_its_artifact(run, jobs)
    for job in jobs:
        if any(cells.get(name, {}).get("status") != "done" for name in job.needs):
            tell(job.name, "left out")
            continue
        skipped = run.finished(job.name, job.config) is not None
        tell(job.name, "skipped" if skipped else "started")
        cells[job.name] = run.cell(job.name, job.config, job.work)
        if not skipped:
            worked += 1
            tell(job.name, cells[job.name]["status"])
    return cells, worked


def forget_what_lacks_its_artifact(run: Run, jobs: Sequence[Job]) -> None:
    """Removes the records of cells whose artifact is gone, where a cell that is not finished needs it."""
    wanted: set[str] = set()
    for job in reversed(jobs):
        finished = run.finished(job.name, job.config) is not None
        if finished and job.name in wanted and job.artifact is not None and not job.artifact.exists():
            run.forget(job.name, job.config)
            finished = False
        if not finished:
            wanted |= set(job.needs)


def foresee(
    config: StudyConfig, experiment: str, cells: Mapping[str, Mapping[str, Any]], out: Path, data: str, head: str
) -> dict[str, Any]:
    """The dry run: the model, the data, and every cell with its id, whether it is done, failed or still to do, and
    about how many bytes the weights take that it makes (None: none, or the model is not here to tell). head: as in
    `size_from_config`."""
    model, architecture = foresee_model(config)
    rows = []
    for name, settings in cells.items():
        identity = cell_id(experiment, name, settings)
        path = out / "cells" / f"{identity}.json"
        status, size = read_cell(path)["status"] if path.exists() else "to do", None
        if architecture is not None and "variant" in settings:
            size = expected_bytes(config.variant(settings["variant"]["name"]), architecture, head)
        rows.append({"cell": name, "cell_id": identity, "status": status, "weights": size})
    return {"model": model, "data": data, "cells": rows}


def foresee_model(config: StudyConfig) -> tuple[dict[str, Any], Mapping[str, Any] | None]:
    """The source, the bytes of its tensors (or of the file to download; None: not known), whether it is here; and its
    config, if it is."""
    from quantlab.io import open_checkpoint
    from quantlab.io.cache import ITEMS
    from quantlab.io.checkpoint import source_kind
    from quantlab.size import size_of_checkpoint

    try:
        found = open_checkpoint(config.model, local_files_only=True)
    except FileNotFoundError:
        if source_kind(config.model) not in ("demo", "hub"):
            raise
        size = ITEMS["demo-model"].size if config.model == "demo" else None
        return {"source": config.model, "bytes": size, "here": False}, None
    return {"source": config.model, "bytes": size_of_checkpoint(found)["total"], "here": True}, found.config


def expected_bytes(variant: Variant, architecture: Mapping[str, Any], head: str) -> int:
    """About what the weights of a variant take."""
    from quantlab.size import size_from_config

    config = variant.config
    if config is None or variant.method in ("gptq", "rtn"):
        group = 128 if config is None else config.group_size
        return int(size_from_config(architecture, variant.bits, group, head)["total"])
    scale = 0 if variant.method == "int8" else (8 if config.double_quant else 32) / config.block_size
    floats = size_from_config(architecture, 16, head=head)
    linear = floats["parts"]["linear"]
    return int(floats["total"] - linear + linear * (variant.bits + scale) / 16)


@dataclass(frozen=True)
class Outcome:
    """What a run of the study left: the records of its cells, by name, and how many were worked on now."""

    path: Path
    cells: dict[str, dict[str, Any]]
    worked: int

    @property
    def failed(self) -> list[str]:
        return [name for name, cell in self.cells.items() if cell["status"] != "done"]


def extended(config: C, out: Path) -> C:
    """The configuration with the cells that the directory already holds put first: a run may be extended."""
    if not (out / "config.json").exists():
        return config
    held = read_config(out).get(config.CELLS, ())  # another experiment has none: `Run` refuses it
    changes: dict[str, Any] = {config.CELLS: (*held, *getattr(config, config.CELLS))}
    return replace(config, **changes)


@contextmanager
def open_run(config: StudyConfig, experiment: str, out: Path, selection: Sequence[str]) -> Iterator[Run]:
    """The run directory of a study, with its energy meter and its Weights & Biases sink. selection: fields that may
    differ between the runs of one directory."""
    if config.energy and config.intensity_g_kwh is None and not (out / "config.json").exists():  # a new run
        require_country(config.country)
    settings = extended(config, out).to_dict()
    with (
        event_sink(config.wandb, out, experiment, settings) as sink,
        Run(out, experiment, settings, selection, config.energy_settings(), sink) as run,
    ):
        yield run
