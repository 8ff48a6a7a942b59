"""What the cells of every study do with a model: quantizing, weighing, perplexity of a text. Each fills fields of a
cell.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from . import statistics
from .data import calibration_rows
from .record import Cell, Run
from .study import StudyConfig
from .variants import Variant


class ModelStages:
    """Stages over one run. calibration_texts: what GPTQ is calibrated on; show: progress bars."""

    task_text = "training text"  # what `calibration="task"` is, in words
    seed_calibration = "128 rows of 4,028 tokens of c4"  # the published study's

    def __init__(self, run: Run, config: StudyConfig, calibration_texts: list[str], show: bool = True):
        self.run, self.settings, self.calibration_texts, self.show = run, config, calibration_texts, show

    def work_path(self, cell: Cell) -> Path:
        """Where the quantizer keeps finished layers until the cell is done: a killed run goes on from them."""
        return self.run.path / "work" / cell.id

    def quantize(self, cell: Cell, variant: Variant, model: Any) -> Any:
        """The quantized model; its float matrices other than the head in `Checkpoint.kept_dtype`."""
        import quantlab
        from quantlab.weight import cast_weight

        calibration = self.calibrate(cell, model) if variant.method == "gptq" else None
        work = self.work_path(cell)
        if work.exists() and any(work.iterdir()):
            cell.record["quantization_resumed"] = True
            cell.note(
                "Quantization went on from the layers of a run that was stopped: time and energy are the rest's only."
            )
        resume = work if variant.method == "gptq" else None  # the other methods take seconds
        with cell.phase("quantization") as reading:
            model = quantlab.quantize(model, variant.config, calibration, progress=self.show, resume_dir=resume)
        cell.metric("quantization_time", reading.duration_s, "s", 1, higher_is_better=False)
        cell.record["quantization_report"] = model.quantization_report
        dtype = model.checkpoint.kept_dtype
        rest = {name: cast_weight(weight, dtype, name) for name, weight in model.weights.items() if name != "score"}
        return model.replace({name: weight for name, weight in rest.items() if weight is not model.weights[name]})

    def calibrate(self, cell: Cell, model: Any) -> np.ndarray:
        """Rows of token ids for GPTQ, and what they are in the record."""
        config = self.settings
        length = min(config.calibration_length, int(model.config.max_position_embeddings))
        rows, at_hand = calibration_rows(model.encode, self.calibration_texts, config.calibration_rows, length)
        task = config.calibration == "task"
        kind = f"{self.task_text} joined by line breaks" if task else f"text file {Path(config.calibration).name}"
        text = f"GPTQ calibration: {rows.shape[0]} rows of {rows.shape[1]} tokens of the {kind}"
        text += f" ({at_hand:,} tokens at hand)."
        if config.preset == "seed":
            text += f" The published study took {self.seed_calibration}, which this text replaces."
        elif rows.shape[0] < config.calibration_rows:
            text += f" {config.calibration_rows} rows of {config.calibration_length} were asked for."
        cell.note(text)
        count, length = rows.shape
        cell.record["calibration"] = {"rows": count, "length": length, "tokens_at_hand": at_hand, "text": kind}
        return rows

    def weigh(self, cell: Cell, model: Any) -> None:
        """Size of the weights in memory and as a checkpoint holds them, in bytes."""
        report = model.size_report()
        cell.metric("size_checkpoint", report["total"], "B", 1, higher_is_better=False)
        cell.metric("size_memory", report["memory"], "B", 1, higher_is_better=False)
        cell.record["memory"]["weights"] = {"value": report["memory"], "unit": "B"}
        cell.record["memory"]["checkpoint"] = {"value": report["total"], "unit": "B", "parts": report["parts"]}

    def perplexity(self, cell: Cell, model: Any, texts: list[str]) -> None:
        """Perplexity of the texts, joined by line breaks, under a language model."""
        context, started = self.settings.perplexity_context, time.perf_counter()
        result = model.perplexity("\n".join(texts), context=context, max_tokens=self.settings.perplexity_tokens)
        cell.timing("perplexity", [time.perf_counter() - started])
        ppl, stderr = result["ppl"], result["stderr"] if np.isfinite(result["stderr"]) else None
        ends = None if stderr is None else (ppl - statistics.Z95 * stderr, ppl + statistics.Z95 * stderr)
        fields: dict[str, Any] = {"higher_is_better": False, "stderr": stderr, "ci95": ends, "context": context}
        cell.metric("perplexity", ppl, "1", result["tokens"], **fields)
