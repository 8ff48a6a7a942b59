"""A run of the LIMA study with invented numbers, for the tests of the report and of the notebook."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from synthetic_run import invent_energy

from quantlab.experiments.lima import SELECTION, LimaConfig, parts_of
from quantlab.experiments.lima_data import QUESTIONS
from quantlab.experiments.record import Cell, Run
from quantlab.experiments.statistics import mean_loss

HELD_OUT = 20
# loss untuned, loss tuned beside the base
LOSSES = {"fp16": (2.10, 1.95), "bnb": (2.22, 2.03), "gptq": (2.16, 1.99)}
# baseline: held-out loss, seconds of batch 1, of batch 32, checkpoint MB
INVENTED = {
    "fp16": (2.10, 0.40, 1.9, 269.0), "fp16-fp16": (1.95, 0.40, 1.9, 269.0), "bnb-bnb": (2.03, 0.30, 1.6, 117.0),
    "gptq-gptq": (1.99, 0.31, 1.7, 119.0), "bnb-gptq": (2.05, 0.28, 1.5, 115.0), "gptq-bnb": (2.08, 0.27, 1.5, 117.0),
}  # fmt: skip
TOKENS = np.random.default_rng(3).integers(40, 400, HELD_OUT)


def make_lima_run(path: Path, failed: str | None = None, **changes) -> Path:
    """Writes a run directory of all baselines; the cell `failed` is recorded as failed."""
    config = LimaConfig.from_preset("corrected", **{"baselines": tuple(INVENTED), **changes})
    parts = {part for name in config.baselines for part in parts_of(name)}
    tuned = {parts_of(name)[0] for name in config.baselines} - {None}
    works = {f"base-{part}": base(part) for part in LOSSES if part in parts}
    works |= {f"tune-{part}": tune(part) for part in LOSSES if part in tuned}
    works |= {f"merge-{part}": merge(part) for part in LOSSES if part in tuned}
    works |= {f"infer-{name}": infer(name, config) for name in config.baselines}
    with Run(path, "lima", config.to_dict(), SELECTION, energy={"enabled": False}) as run:
        for name, work in works.items():
            run.cell(name, {"invented": True}, broken if name == failed else work)
    return path


def broken(cell: Cell) -> None:
    raise ArithmeticError("the held-out loss is nan <&>")


def held_out(cell: Cell, loss: float, kind: str = "final") -> None:
    """The same conversations for every cell: their losses differ from each other more than cells do."""
    noise = np.random.default_rng(4).normal(0, 0.3, HELD_OUT) + np.random.default_rng(len(cell.id)).normal(
        0, 0.01, HELD_OUT
    )
    sums = (loss + noise) * TOKENS
    mean, stderr, ends = mean_loss(sums, TOKENS)
    name = "eval_loss" if kind == "final" else f"eval_loss_{kind}"
    cell.metric(name, mean, "nat", HELD_OUT, stderr=stderr, ci95=ends, tokens=int(TOKENS.sum()))
    cell.record.setdefault("held_out", {})[kind] = {"sums": sums.tolist(), "tokens": TOKENS.tolist()}
    description = {"name": "invented.jsonl", "split": "held out", "n": HELD_OUT, "sha256": "0" * 64}
    cell.record["data"]["held_out"] = description


def base(part: str):
    def work(cell: Cell) -> None:
        held_out(cell, LOSSES[part][0])
        if part != "fp16":
            cell.metric("quantization_time", 12.0, "s", 1)
        cell.note("Invented numbers: no model was run.")

    return work


def tune(part: str):
    def work(cell: Cell) -> None:
        held_out(cell, LOSSES[part][1])
        steps = np.arange(5, 185, 5)
        losses = LOSSES[part][1] + 0.5 * np.exp(-steps / 30) + np.random.default_rng(5).normal(0, 0.1, steps.size)
        cell.record["history"] = [
            {"step": int(step), "epoch": step / 180, "loss": float(loss), "learning_rate": 1e-4, "grad_norm": 0.5}
            for step, loss in zip(steps, losses, strict=True)
        ]
        cell.record["evaluations"] = [
            {"step": step, "eval_loss": LOSSES[part][1] + 0.1 * np.exp(-step / 60)} for step in (45, 90, 135, 180)
        ]
        for name, value in (("samples_per_s", 0.9), ("tokens_per_s", 380.0)):
            cell.metric(name, value * (1.0 if part == "bnb" else 0.95), "1/s", 180)
        cell.metric("epoch_time", 200.0, "s", 180)
        for name, value in (("train_loss_first", 2.4), ("train_loss_last", 2.0)):
            cell.metric(name, value, "nat", 4)
        cell.metric("steps", 180, "1", 1)
        cell.metric("size_adapter", 3.7e6, "B", 1)
        cell.record["data"]["train"] = {"name": "invented.jsonl", "split": "train", "n": 180, "sha256": "1" * 64}
        invent_energy(cell, "training", 200.0)

    return work


def merge(part: str):
    def work(cell: Cell) -> None:
        held_out(cell, LOSSES[part][1], "merged")
        if part != "fp16":
            held_out(cell, LOSSES[part][1] + 0.02, "requantized")
            held_out(cell, LOSSES[part][1] + 0.03, "onto_floats")

    return work


def infer(name: str, config: LimaConfig):
    loss, first, last, megabytes = INVENTED[name]

    def work(cell: Cell) -> None:
        held_out(cell, loss)
        random = np.random.default_rng(7)
        for size in config.batches:
            median = first + (last - first) * (size - 1) / 31
            times = median * (1 + 0.05 * random.random(config.repeats))
            span = [float(times.min()), float(times.max())]
            cell.timing(f"generate_{size}", times.tolist())
            cell.metric(f"generate_{size}", float(np.median(times)), "s", config.repeats, range=span)
            cell.metric(f"decode_{size}", 29 * size / median, "1/s", config.repeats, range=span)
        cell.record["generation"] = {
            "new_tokens": 30,
            "repeats": config.repeats,
            "prompt": "hello",
            "prompt_tokens": [1],
        }
        cell.record["answers"] = [{"question": text, "answer": f"{name} says <so> & so"} for text in QUESTIONS]
        cell.metric("size_checkpoint", megabytes * 1e6, "B", 1)
        cell.metric("size_memory", megabytes * 1.02e6, "B", 1)
        cell.metric("energy_per_token", 0.2, "J", 1000)
        if name in ("bnb-gptq", "gptq-bnb"):
            cell.metric("quantization_time", 11.0, "s", 1)
        invent_energy(cell, "generation", 30.0)

    return work
