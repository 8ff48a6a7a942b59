"""A run of the TweetEval study with invented numbers, for the tests of the report and of the notebook."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from quantlab.experiments import statistics
from quantlab.experiments.record import Cell, Run, write_bytes
from quantlab.experiments.tweeteval import SELECTION, demo_config

LABELS = ["negative", "neutral", "positive"]
# variant: probability of a right answer, checkpoint MB, ms a tweet, quantization s, perplexity
INVENTED = {
    "fp32": (0.64, 538.1, 38.0, None, 55.1),
    "gptq-8": (0.64, 172.0, 41.0, 22.0, 55.2),
    "gptq-4": (0.62, 114.0, 40.0, 21.0, 61.0),
    "gptq-3": (0.55, 101.0, 45.0, 23.0, 99.0),
    "nf4": (0.61, 117.0, 47.0, 0.4, 63.0),
}


def make_run(path: Path, n: int = 120, failed: str | None = None) -> Path:
    """Writes a run directory of `INVENTED` variants; the variant `failed` is recorded as failed."""
    random = np.random.default_rng(0)
    truth = random.choice(3, size=n, p=(0.25, 0.5, 0.25))
    config = demo_config(variants=tuple(INVENTED)).to_dict()
    with Run(path, "tweeteval", config, SELECTION, energy={"enabled": False}) as run:
        run.cell("head", {"invented": True}, head)
        for name, numbers in INVENTED.items():
            run.cell(name, {"variant": name}, broken if name == failed else variant(name, truth, numbers))
    return path


def head(cell: Cell) -> None:
    steps = np.arange(1, 201)
    losses = 0.75 + 0.5 * np.exp(-steps / 40)
    noise = np.random.default_rng(1).normal(0, 0.05, steps.size)
    cell.record["history"] = [
        {"step": int(step), "epoch": int(step // 25) + 1, "train_loss": float(loss + error),
         "eval_loss": float(loss + 0.03), "eval_accuracy": 0.6}
        for step, loss, error in zip(steps, losses, noise, strict=True)
    ]  # fmt: skip
    cell.record["data"] = {"val": {"n": 200}, "labels": LABELS}
    cell.note("Invented numbers: no model was run.")
    write_bytes(cell.run.path / "head" / "none", b"")


def broken(cell: Cell) -> None:
    raise ArithmeticError("layer 3: the Hessian is not finite <&>")


def variant(name: str, truth: np.ndarray, numbers: tuple):
    right, megabytes, milliseconds, quantization, perplexity = numbers

    def work(cell: Cell) -> None:
        random = np.random.default_rng(7)  # the same draws for every variant: paired examples
        predicted = np.where(
            random.random(truth.size) < right, truth, (truth + 1 + random.integers(0, 2, truth.size)) % 3
        )
        result = statistics.classification(truth, predicted, LABELS, official="macro_recall")
        cell.record["metrics"].update(result["metrics"])
        cell.record["classification"] = {
            "labels": LABELS,
            "classes": result["classes"],
            "confusion": result["confusion"],
        }
        cell.record["truth"], cell.record["predictions"] = truth, predicted
        cell.record["data"] = {"name": "demo", "split": "test", "n": truth.size, "sha256": "0" * 64, "labels": LABELS,
                               "official": "macro_recall"}  # fmt: skip
        times = milliseconds * (1 + 0.03 * random.random(5))
        cell.timing("tweet", times.tolist(), "ms")
        cell.metric("ms_per_tweet", float(np.median(times)), "ms", 5, higher_is_better=False, p95=float(times.max()),
                    mean=float(times.mean()), range=[float(times.min()), float(times.max())])  # fmt: skip
        cell.metric("size_checkpoint", megabytes * 1e6, "B", 1, higher_is_better=False)
        cell.metric("size_memory", 1.05e6 * megabytes, "B", 1, higher_is_better=False)
        cell.metric(
            "perplexity",
            perplexity,
            "1",
            2048,
            higher_is_better=False,
            stderr=1.5,
            ci95=(perplexity - 3, perplexity + 3),
            context=512,
        )
        invent_energy(cell, "evaluation", milliseconds * truth.size / 1000)
        cell.metric("energy_per_tweet", 0.02 * milliseconds, "J", truth.size, higher_is_better=False)
        if quantization is not None:
            cell.metric("quantization_time", quantization, "s", 1, higher_is_better=False)
            invent_energy(cell, "quantization", quantization)

    return work


def invent_energy(cell: Cell, phase: str, seconds: float) -> None:
    kwh = seconds * 20 / 3.6e6
    cell.record["energy"][phase] = {
        "duration_s": seconds, "cpu_kwh": kwh / 2, "gpu_kwh": 0.0, "ram_kwh": kwh / 2, "kwh": kwh, "kg": kwh * 0.17405,
        "intensity_g_kwh": 174.05, "country": "ESP", "method": {"cpu": "estimate (invented)"}, "counter": False,
    }  # fmt: skip
    cell.record["memory"].setdefault("peak_host", {})[phase] = {"value": 700_000_000, "unit": "B", "scope": "phase"}
