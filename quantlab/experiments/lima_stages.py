"""The stages of the LIMA study: bases, tuning, merging, inference. Each fills fields of a cell."""

from __future__ import annotations

import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantlab.conversations import ChatTemplate, chat_template, stop_ids
from quantlab.examples import Examples, prepare_examples
from quantlab.lora import read_adapter
from quantlab.progress import progress
from quantlab.token_rows import text_ids
from quantlab.training import IGNORED

from . import statistics
from .lima_data import QUESTIONS
from .model_stages import ModelStages
from .record import Cell, Run, key_of

if TYPE_CHECKING:
    from quantlab.llama import LlamaForCausalLM

    from .lima import Plan

WARM_UP_TOKENS = 20  # as the published study has it
Work = Callable[[Cell], None]


class LimaStages(ModelStages):
    """The work of the cells of one study."""

    task_text = "training conversations"

    def __init__(self, run: Run, plan: Plan, show: bool = True):
        super().__init__(run, plan.config, plan.calibration_texts, show)
        self.plan, self.config = plan, plan.config

    # ---- what cells leave for others -------------------------------------------------------------------------

    def base_path(self, part: str) -> Path | None:
        """Where the quantized base of a part is kept; None for floats, which are read from their source."""
        if self.config.part(part).config is None:
            return None
        return self.run.path / "models" / f"{part}-{key_of(self.plan.cells[f'base-{part}'])}"

    def adapter_path(self, part: str) -> Path:
        """Where the adapter that was tuned over a part is kept, in PEFT's layout."""
        return self.run.path / "adapters" / f"{part}-{key_of(self.plan.cells[f'tune-{part}'])}"

    def drop_bases(self) -> None:
        shutil.rmtree(self.run.path / "models", ignore_errors=True)

    def load(self, cell: Cell, source: str | Path, dtype: str) -> LlamaForCausalLM:
        """A model with its float matrices in `dtype`; the time it took goes to the cell."""
        from quantlab import LlamaForCausalLM

        started = time.perf_counter()
        model = LlamaForCausalLM.from_pretrained(source, dtype, self.config.device, self.config.local_files_only)
        cell.timing("load", [time.perf_counter() - started])
        return model

    def load_floats(self, cell: Cell, part: str) -> LlamaForCausalLM:
        """The model before it is quantized, or as the part's float type has it."""
        return self.load(cell, self.config.model, self.config.part(part).dtype or "float32")

    def load_base(self, cell: Cell, part: str) -> LlamaForCausalLM:
        path = self.base_path(part)
        return self.load_floats(cell, part) if path is None else self.load(cell, path, "auto")

    def with_adapter(self, model: LlamaForCausalLM, part: str) -> LlamaForCausalLM:
        """Over any base: that its format is another one is what is measured, and needs no warning."""
        return model.with_adapter(read_adapter(self.adapter_path(part)))

    # ---- the cells -------------------------------------------------------------------------------------------

    def measure_base(self, part: str) -> Work:
        """Quantizes the model as a part says, keeps it, and measures it before any tuning."""

        def work(cell: Cell) -> None:
            variant, path = self.config.part(part), self.base_path(part)
            model = self.load_floats(cell, part)
            if variant.config is not None and path is not None:
                model = self.quantize(cell, variant, model)
                leave(path, model.save_pretrained)
            self.weigh(cell, model)
            self.evaluate(cell, model)
            self.answer(cell, model)
            shutil.rmtree(self.work_path(cell), ignore_errors=True)

        return work

    def tune(self, part: str) -> Work:
        """Trains an adapter over a base."""

        def work(cell: Cell) -> None:
            import quantlab

            data, folder = self.plan.conversations, self.work_path(cell)
            training = self.config.training(len(data.train), folder)
            if training.resume_from_checkpoint:
                cell.record["training_resumed"] = True
                cell.note("Training went on from a checkpoint of a run that was stopped: energy is the rest's only.")
            model = self.load_base(cell, part)
            with cell.phase("training"), warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # rows that are cut: noted where they are counted
                tuned = quantlab.finetune(model, self.config.lora(), data.train, training, data.held_out, self.show)
            self.held_out(cell, tuned)
            self.record_training(cell, tuned)
            leave(self.adapter_path(part), tuned.save_adapter)
            shutil.rmtree(folder, ignore_errors=True)

        return work

    def merge(self, part: str) -> Work:
        """The held-out loss after the adapter is put into the weights, in the ways there are."""

        def work(cell: Cell) -> None:
            tuned = self.with_adapter(self.load_base(cell, part), part)
            self.held_out(cell, tuned.merge(), "merged")
            if self.base_path(part) is not None:
                again = tuned.merge(requantize="same")
                cell.record["merge_report"] = again.merge_report
                self.held_out(cell, again, "requantized")
                del tuned, again
                self.held_out(cell, self.with_adapter(self.load_floats(cell, part), part).merge(), "onto_floats")

        return work

    def infer(self, source: str | None, target: str) -> Work:
        """Takes an adapter to where it is used, and measures quality, generation and size there."""

        def work(cell: Cell) -> None:
            model = self.inference_model(cell, source, target)
            self.weigh(cell, model)
            self.evaluate(cell, model)
            self.answer(cell, model)
            self.time_generation(cell, model)
            shutil.rmtree(self.work_path(cell), ignore_errors=True)

        return work

    def inference_model(self, cell: Cell, source: str | None, target: str) -> LlamaForCausalLM:
        variant = self.config.part(target)
        if source is None:
            return self.load_base(cell, target)
        if source == target and variant.config is not None:
            cell.record["adapter"] = "beside the quantized weights"
            return self.with_adapter(self.load_base(cell, target), source)
        merged = self.with_adapter(self.load_floats(cell, target), source).merge()
        if variant.config is None:
            cell.record["adapter"] = "merged into the float weights"
            return merged
        cell.record["adapter"] = "merged into the float weights, which were quantized then"
        return self.quantize(cell, variant, merged)

    def weigh(self, cell: Cell, model: LlamaForCausalLM) -> None:
        """Size of the weights, and of an adapter beside them."""
        super().weigh(cell, model)
        if model.adapter is not None:
            for name in ("size_checkpoint", "size_memory"):
                cell.record["metrics"][name]["value"] += model.adapter.nbytes

    # ---- measures --------------------------------------------------------------------------------------------

    def evaluate(self, cell: Cell, model: LlamaForCausalLM) -> None:
        """Quality: the held-out loss, and the perplexity of the text if one was given."""
        self.held_out(cell, model)
        if self.plan.perplexity_texts is not None:
            self.perplexity(cell, model, self.plan.perplexity_texts)

    def held_out(self, cell: Cell, model: LlamaForCausalLM, kind: str = "") -> None:
        """The loss of the held-out conversations, conversation by conversation, in nats a target token."""
        examples = self.prepared(cell, model, "held out")
        sums, tokens = [], []
        with progress(len(examples), "held-out loss", "conversation", self.show) as bar:
            for ids, targets in zip(examples.ids, examples.targets, strict=True):
                sums.append(float(model.losses(ids, targets).astype(np.float64).sum()))
                tokens.append(int((targets != IGNORED).sum()))
                bar.advance()
        mean, stderr, ends = statistics.mean_loss(sums, tokens)
        if not math.isfinite(mean):
            raise ArithmeticError(f"the held-out loss is {mean}")
        name = f"eval_loss_{kind}" if kind else "eval_loss"
        fields: dict[str, Any] = {"stderr": stderr, "ci95": ends, "higher_is_better": False, "tokens": sum(tokens)}
        cell.metric(name, mean, "nat", len(sums), **fields, perplexity=math.exp(mean))
        cell.record.setdefault("held_out", {})[kind or "final"] = {"sums": sums, "tokens": tokens}
        cell.record["seeds"]["conversations"] = self.config.seed
        cell.record["data"]["held_out"] = self.plan.conversations.describe("held out")

    def prepared(self, cell: Cell, model: LlamaForCausalLM, split: str) -> Examples:
        """The conversations of "train" or "held out" as a model learns from them; rows that are cut are noted."""
        rows = self.plan.conversations.train if split == "train" else self.plan.conversations.held_out
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            examples = prepare_examples(model, rows, self.config.training(1), split)
        for text in (f"Conversations, {warning.message}." for warning in caught):
            if text not in cell.record["notes"]:
                cell.note(text)
        return examples

    def record_training(self, cell: Cell, tuned: LlamaForCausalLM) -> None:
        """Speed, losses and size of a training."""
        steps = [entry for entry in tuned.training_log if "loss" in entry]
        cell.record["history"] = steps
        cell.record["evaluations"] = [entry for entry in tuned.training_log if "eval_loss" in entry]
        for entry in tuned.training_log:
            cell.log(event="step", **entry)
        measured = sum(entry["tokens"] for entry in steps)  # of a stopped run less than all, and its seconds too
        rate = measured / sum(entry["tokens"] / entry["tokens_per_second"] for entry in steps)  # without evaluations
        rows = [len(ids) for ids in self.prepared(cell, tuned, "train").ids]
        n, tokens, count, epoch = len(rows), sum(rows), steps[-1]["step"], sum(rows) / rate
        cell.metric("epoch_time", epoch, "s", count, higher_is_better=False)
        cell.metric("samples_per_s", n / epoch, "1/s", count, higher_is_better=True)
        cell.metric("tokens_per_s", rate, "1/s", count, higher_is_better=True)
        cell.metric("tokens", tokens, "1", n)
        cell.metric("steps", count, "1", 1)
        tenth = max(1, len(steps) // 10)
        for name, part in (("first", steps[:tenth]), ("last", steps[-tenth:])):
            cell.metric(f"train_loss_{name}", float(np.mean([entry["loss"] for entry in part])), "nat", len(part))
        cell.metric("size_adapter", tuned.require_adapter().nbytes, "B", 1, higher_is_better=False)
        cell.record["seeds"]["training"] = self.config.seed
        cell.record["data"]["train"] = self.plan.conversations.describe("train")

    def answer(self, cell: Cell, model: LlamaForCausalLM) -> None:
        """Greedy answers to a few questions of ours, for a reader to judge."""
        template = self.template(model)
        prompts = [self.prompt(model, question) for question in QUESTIONS]
        stops = None if template is None else stop_ids(model, template)
        rows = model.generate(prompts, max_new_tokens=self.config.answer_tokens, eos_token_id=stops)
        cell.record["answers"] = [
            {"question": question, "answer": model.decode(row[len(prompt) :]).strip()}
            for question, prompt, row in zip(QUESTIONS, prompts, rows, strict=True)
        ]

    def template(self, model: LlamaForCausalLM) -> ChatTemplate | None:
        """The chat template of the study; None where turns are joined."""
        choice = self.config.chat_template
        return None if choice == "joined" else chat_template(model, choice)

    def prompt(self, model: LlamaForCausalLM, text: str) -> np.ndarray:
        """Token ids of a user's first turn, up to where the assistant begins, int32 (t,)."""
        template = self.template(model)
        if template is None:
            return model.encode(text)
        text = template.render([{"role": "user", "content": text}], add_generation_prompt=True)
        return text_ids(model.require_tokenizer(), text, add_special_tokens=False)

    def time_generation(self, cell: Cell, model: LlamaForCausalLM) -> None:
        """Times `generate` at every batch size, round by round, so that what else the machine does hits all sizes."""
        config, prompts = self.config, self.timed_prompts(model)
        whole: dict[int, list[float]] = {size: [] for size in config.batches}
        first: dict[int, list[float]] = {size: [] for size in config.batches}
        model.generate(prompts[:1], max_new_tokens=WARM_UP_TOKENS, eos_token_id=[])
        with (
            cell.phase("generation") as reading,
            progress(config.repeats * len(config.batches), "generation", "batch", self.show) as bar,
        ):
            for _ in range(config.repeats):
                for size in config.batches:
                    total, until_first = timed(model, prompts[:size], config.new_tokens)
                    whole[size].append(total)
                    first[size].append(until_first)
                    bar.advance(note=f"batch {size}: {total:.3g} s")
        for size in config.batches:
            self.record_generation(cell, size, whole[size], first[size])
        cell.record["generation"] = {
            "new_tokens": config.new_tokens, "batches": config.batches, "repeats": config.repeats,
            "prompt": config.prompt or f"the first {config.prompt_tokens} tokens of held-out conversations",
            "prompt_tokens": [len(prompt) for prompt in prompts],
        }  # fmt: skip
        if reading.kwh is not None:
            tokens = config.new_tokens * config.repeats * sum(config.batches)
            cell.metric("energy_per_token", reading.kwh * 3.6e6 / tokens, "J", tokens, higher_is_better=False)

    def record_generation(self, cell: Cell, size: int, whole: list[float], first: list[float]) -> None:
        """The times of one batch size. Decoding is what comes after each row's first token."""
        cell.timing(f"generate_{size}", whole)
        cell.timing(f"first_token_{size}", first)
        n, median = len(whole), float(np.median(whole))
        fields: dict[str, Any] = {"higher_is_better": False, "range": [min(whole), max(whole)]}
        cell.metric(f"generate_{size}", median, "s", n, **fields)
        decode = [size * (self.config.new_tokens - 1) / (a - b) for a, b in zip(whole, first, strict=True)]
        fields = {"higher_is_better": True, "range": [min(decode), max(decode)]}
        cell.metric(f"decode_{size}", float(np.median(decode)), "1/s", n, **fields)

    def timed_prompts(self, model: LlamaForCausalLM) -> list[np.ndarray]:
        """As many prompts as the largest batch has rows."""
        config = self.config
        if config.prompt is not None:
            return [model.encode(config.prompt)] * max(config.batches)
        prompts = []
        for messages in self.plan.conversations.held_out[: max(config.batches)]:
            ids = model.encode(next(message["content"] for message in messages if message["role"] == "user"))
            prompts.append(self.prompt(model, model.decode(ids[: config.prompt_tokens])))
        return [prompts[row % len(prompts)] for row in range(max(config.batches))]


def timed(model: LlamaForCausalLM, prompts: Sequence[np.ndarray], new_tokens: int) -> tuple[float, float]:
    """Seconds of one `generate` that never stops early, and until its first token was there."""
    until_first: list[float] = []

    def on_token(row: int, token: int) -> None:
        if not until_first:
            until_first.append(time.perf_counter() - started)

    started = time.perf_counter()
    model.generate(prompts, max_new_tokens=new_tokens, eos_token_id=[], on_token=on_token)
    return time.perf_counter() - started, until_first[0]


def leave(path: Path, save: Callable[[Path], Any]) -> None:
    """Saves a directory for other cells to read: whole, or not at all."""
    unfinished = path.with_name(f"{path.name}.part")
    for old in (unfinished, path):
        shutil.rmtree(old, ignore_errors=True)
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    save(unfinished)
    os.replace(unfinished, path)
