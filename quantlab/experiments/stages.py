"""The stages of the TweetEval study: training the head, quantizing, predicting, timing, perplexity. Each fills fields
of a cell.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantlab.progress import progress

from . import statistics
from .model_stages import ModelStages
from .record import Cell, Run, key_of, write_bytes
from .variants import Variant

if TYPE_CHECKING:
    from quantlab.classify import LlamaForSequenceClassification
    from quantlab.io import Checkpoint

    from .tweeteval import Plan

WARM_UP_TWEETS = 8


class Stages(ModelStages):
    """The work of the cells of one study."""

    task_text = "training tweets"

    def __init__(self, run: Run, plan: Plan, show: bool = True):
        super().__init__(run, plan.config, plan.calibration_texts, show)
        self.plan, self.config = plan, plan.config

    @property
    def head_path(self) -> Path:
        """Where the trained head is kept: safetensors with `score.weight`."""
        return self.run.path / "head" / f"{key_of(self.plan.head)}.safetensors"

    # ---- the head --------------------------------------------------------------------------------------------

    def train_head(self, cell: Cell) -> None:
        """Trains the softmax head on the frozen fp32 backbone and saves it."""
        from safetensors.numpy import save

        config, examples = self.config, self.plan.examples
        model = self.load(cell, "float32")
        with cell.phase("training"):
            history = model.fit_head(
                examples.train.texts, examples.train.labels.tolist(), examples.val.texts, examples.val.labels.tolist(),
                epochs=config.epochs, lr=config.lr, batch_size=config.batch_size, patience=config.patience,
                seed=config.seed,
            )  # fmt: skip
        cell.record["history"] = history
        for step in history:
            cell.log(event="step", **step)
        best = min(history, key=lambda step: step["eval_loss"])
        n = len(examples.val.texts)
        hits = round(best["eval_accuracy"] * n)
        cell.metric("eval_loss", best["eval_loss"], "nat", n, higher_is_better=False)
        cell.metric(
            "eval_accuracy",
            best["eval_accuracy"],
            "1",
            n,
            higher_is_better=True,
            ci95=statistics.wilson(hits, n),
            interval="Wilson",
        )
        cell.metric("steps", len(history), "1", 1)
        cell.record["data"] = {
            "train": examples.train.describe(config.task),
            "val": examples.val.describe(config.task),
            "labels": examples.names,
        }
        cell.record["seeds"] = {"head": config.seed, "examples": config.seed}
        cell.record["notes"] += examples.notes
        if config.preset == "seed":
            cell.note(
                "The published study's head training is not known; this head was trained with quantlab's own settings."
            )
        write_bytes(self.head_path, save({"score.weight": np.ascontiguousarray(model.score, dtype=np.float32)}))
        cell.record["head_file"] = str(self.head_path.relative_to(self.run.path))

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The model's file with its tokenizer, opened once for all cells; weights are read by each."""
        from quantlab.io import open_checkpoint

        return open_checkpoint(self.config.model, local_files_only=self.config.local_files_only)

    def load(self, cell: Cell, dtype: str) -> LlamaForSequenceClassification:
        """The classifier without a trained head, its matrices in `dtype`; the time it took goes to the cell."""
        from quantlab import LlamaForSequenceClassification

        labels, device = len(self.plan.examples.names), self.config.device
        started = time.perf_counter()
        model = LlamaForSequenceClassification.from_checkpoint(self.checkpoint, dtype, num_labels=labels, device=device)
        cell.timing("load", [time.perf_counter() - started])
        return model

    # ---- one variant -----------------------------------------------------------------------------------------

    def measure(self, variant: Variant) -> Callable[[Cell], None]:
        """The work of a variant's cell."""

        def work(cell: Cell) -> None:
            from safetensors.numpy import load_file

            model = self.load(cell, variant.dtype or "float32")
            model.score = load_file(self.head_path)["score.weight"]
            if variant.config is not None:
                model = self.quantize(cell, variant, model)
            self.weigh(cell, model)
            self.predict(cell, model)
            self.time_repeats(cell, model)
            if self.plan.perplexity_texts is not None:
                self.perplexity(cell, causal(model), self.plan.perplexity_texts)
            cell.record["seeds"] = {"examples": self.config.seed, "bootstrap": 0}
            if self.config.keep_models and variant.config is not None:
                model.save_pretrained(self.run.path / "models" / variant.name)
            shutil.rmtree(self.work_path(cell), ignore_errors=True)

        return work

    def predict(self, cell: Cell, model: Any) -> None:
        """Predicts the test tweets once, under the energy meter, and records every measure of the predictions."""
        config, examples = self.config, self.plan.examples
        texts, truth = examples.test.texts, examples.test.labels
        model.predict(
            texts[:WARM_UP_TWEETS], batch_tokens=config.batch_tokens, show=False
        )  # not timed: first touch of the weights
        with cell.phase("evaluation") as reading:
            if config.one_at_a_time:
                logits, milliseconds = self.predict_singly(model, texts)
            else:
                logits, milliseconds = model.predict(texts, batch_tokens=config.batch_tokens, show=self.show), None
        if not np.isfinite(logits).all():
            raise ArithmeticError(
                f"{int((~np.isfinite(logits)).any(axis=1).sum())} of {len(texts)} tweets got logits that are not finite"
            )
        predicted = logits.argmax(axis=1)
        result = statistics.classification(truth, predicted, examples.names, official=examples.official)
        cell.record["metrics"].update(result["metrics"])
        cell.record["classification"] = {
            "labels": examples.names,
            "classes": result["classes"],
            "confusion": result["confusion"],
        }
        cell.record["truth"], cell.record["predictions"] = truth, predicted
        cell.record["data"] = {
            **examples.test.describe(config.task),
            "labels": examples.names,
            "official": result["official"],
        }
        n = len(texts)
        cell.metric("evaluation_time", reading.duration_s, "s", n, higher_is_better=False)
        if milliseconds is not None:
            cell.timing("tweet", milliseconds, "ms", batch="one tweet at a time")
        if reading.kwh is not None:
            cell.metric("energy_per_tweet", reading.kwh * 3.6e6 / n, "J", n, higher_is_better=False)

    def predict_singly(self, model: Any, texts: list[str]) -> tuple[np.ndarray, list[float]]:
        """Logits of one tweet after the other, and the milliseconds that each took."""
        logits, milliseconds = [], []
        with progress(len(texts), "evaluation", "tweet", self.show) as bar:
            for text in texts:
                started = time.perf_counter()
                logits.append(model.predict([text], show=False)[0])
                milliseconds.append(1000 * (time.perf_counter() - started))
                bar.advance()
        return np.stack(logits), milliseconds

    def time_repeats(self, cell: Cell, model: Any) -> None:
        """Times a sample of the test tweets again and again: the median and the spread that tables print."""
        config = self.config
        if config.one_at_a_time:
            tweet = cell.record["timings"]["tweet"]
            cell.metric(
                "ms_per_tweet",
                tweet["p50"],
                "ms",
                tweet["n"],
                higher_is_better=False,
                mean=tweet["mean"],
                p95=tweet["p95"],
                range=span(tweet["values"]),
            )
            return
        texts = sample_by_length(self.plan.examples.test.texts, config.timing_tweets)
        tokens = int(sum(len(model.encode(text)) for text in texts))
        seconds = []
        for _ in range(config.timing_repeats):
            started = time.perf_counter()
            model.predict(texts, batch_tokens=config.batch_tokens, show=False)
            seconds.append(time.perf_counter() - started)
        cell.timing("repeats", seconds, "s", tweets=len(texts), tokens=tokens)
        each = [1000 * value / len(texts) for value in seconds]
        cell.timing("tweet", each, "ms", batch=f"batches of up to {config.batch_tokens} tokens, sorted by length")
        tweet = cell.record["timings"]["tweet"]
        cell.metric(
            "ms_per_tweet",
            tweet["p50"],
            "ms",
            len(each),
            higher_is_better=False,
            mean=tweet["mean"],
            p95=tweet["p95"],
            range=span(each),
        )
        cell.metric("tokens_per_s", tokens / float(np.median(seconds)), "1/s", len(each), higher_is_better=True)


def causal(model: Any) -> Any:
    """The language model on a classifier's backbone. Its output matrix is the embedding, or the checkpoint's own in
    `kept_dtype`."""
    from quantlab import LlamaForCausalLM
    from quantlab.weight import cast_weight

    weights = {name: weight for name, weight in model.weights.items() if name != "score"}
    checkpoint = model.checkpoint
    if not model.config.tie_word_embeddings and checkpoint is not None and checkpoint.has("lm_head"):
        weights["lm_head"] = cast_weight(checkpoint.weight("lm_head"), checkpoint.kept_dtype, "lm_head")
    return LlamaForCausalLM(model.config, weights, model.vectors, model.tokenizer, checkpoint, model.device)


def sample_by_length(texts: list[str], count: int) -> list[str]:
    """At most `count` of the texts, evenly spaced in order of length: a small sample with the lengths of the whole."""
    order = sorted(range(len(texts)), key=lambda index: (len(texts[index]), index))
    picks = np.unique(np.linspace(0, len(texts) - 1, min(count, len(texts))).round().astype(int))
    return [texts[order[pick]] for pick in picks]


def span(values: list[float]) -> list[float]:
    return [min(values), max(values)]
