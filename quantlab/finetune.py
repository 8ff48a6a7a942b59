"""Fine-tuning: a LoRA adapter is trained beside the weights of a model, float or quantized, which stay as they are."""

from __future__ import annotations

import dataclasses
import math
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import numpy as np

from quantlab import _core, cuda
from quantlab.checkpoints import RunFolder, TrainingState, load_state
from quantlab.classify import Labels, LlamaForSequenceClassification
from quantlab.config import LoraConfig
from quantlab.cuda import device_number
from quantlab.examples import Data, Examples, prepare_examples
from quantlab.llama import BATCH_TOKENS, Llama, Packed
from quantlab.llama_config import layer_modules
from quantlab.lora import Adapter, base_format, require_model
from quantlab.progress import progress as progress_bar
from quantlab.resume import fingerprint, hash_rows
from quantlab.token_rows import Texts
from quantlab.tracking import event_sink
from quantlab.training import IGNORED, POLICIES, Batches, Policy, TrainingConfig

Model = TypeVar("Model", bound=Llama)

# settings that may differ between a run and the one that goes on with it: none of them changes a step
WITHOUT_EFFECT = (
    "logging_steps", "eval_steps", "save_steps", "output_dir", "resume_from_checkpoint", "gradient_checkpointing",
    "report_to",
)  # fmt: skip
FREE_SHARE = 0.6  # of the free memory that activations may take


def finetune(
    model: Model,
    lora: LoraConfig | Adapter,
    data: Data,
    training: TrainingConfig | None = None,
    eval_data: Data | None = None,
    progress: bool = True,
    labels: Labels | None = None,
    eval_labels: Labels | None = None,
) -> Model:
    """Trains a LoRA adapter and returns the model with it: its weights are `model`'s, shared, of any format. It trains
    where the model is; on a GPU activations are bfloat16, parameters, gradients and sums float32.

    lora: a LoraConfig, or an Adapter, of which a copy is trained on. data, eval_data: texts, rows of token ids,
    conversations, or the path of a JSON-lines file (`quantlab.examples.prepare_examples`); for a classifier texts or
    rows of ids, with `labels` and `eval_labels`; its head is then trained too. training: a TrainingConfig.

    The result has `adapter` and `training_log`: dictionaries of step, epoch, loss (mean over the target tokens since
    the last entry), learning_rate, grad_norm (before it is cut), tokens (since the last entry), tokens_per_second and
    peak_memory_bytes, and of step, epoch, eval_loss. They go to metrics.jsonl in training.output_dir too, and the
    adapter is written there at the end.

    Raises ValueError for what is not accepted; quantlab.NumericError naming the step where the loss or a gradient is
    not finite: the parameters are then those of the step before. What stops a run (an error, Ctrl-C) leaves a
    checkpoint of its last finished step in output_dir, if there is one.
    """
    config = training or TrainingConfig()
    if not isinstance(lora, (LoraConfig, Adapter)):
        raise TypeError(f"lora: got {type(lora).__name__}, expected a LoraConfig or an Adapter")
    if not isinstance(config, TrainingConfig):
        raise TypeError(f"training: got {type(config).__name__}, expected a TrainingConfig")
    require_model(model)
    if model.adapter is not None:
        raise ValueError("model: it has an adapter; train on it as finetune(model.without_adapter(), model.adapter, …)")
    is_classifier = isinstance(model, LlamaForSequenceClassification)
    adapter = lora.copy() if isinstance(lora, Adapter) else Adapter.fresh(lora, model, config.seed, is_classifier)
    adapter.base_format = base_format(model)
    tuned = model.with_adapter(adapter)
    run = TrainingRun(tuned, _task(tuned, data, labels, config, "data"), config)
    if eval_data is not None:
        run.evaluation = _task(tuned, eval_data, eval_labels, config, "eval_data")
    run.train(progress)
    tuned.training_log = run.state.log
    return tuned


def evaluate(
    model: Llama, data: Data, training: TrainingConfig | None = None, labels: Labels | None = None
) -> dict[str, float]:
    """What a model loses on held-out data, prepared as `finetune` prepares it: loss (mean over the target tokens, in
    nats), perplexity, tokens, rows; of a classifier loss, accuracy, rows."""
    return _task(model, data, labels, training or TrainingConfig(), "data").evaluate()


def _task(model: Llama, data: Data, labels: Labels | None, config: TrainingConfig, name: str) -> Any:
    if isinstance(model, LlamaForSequenceClassification):
        if labels is None:
            raise ValueError(f"{'eval_' if name == 'eval_data' else ''}labels: got None, a classifier learns from them")
        return LabelTask(model, data, labels, config.max_length)
    if labels is not None:
        raise ValueError("labels: a language model has none; give its data alone")
    return LanguageTask(model, prepare_examples(model, data, config, name))


# ---- what is learned -----------------------------------------------------------------------------------------------


class LanguageTask:
    """The next token of every row, where it is a target."""

    def __init__(self, model: Any, examples: Examples):
        self.model, self.examples, self.rows = model, examples, examples.ids
        self.counts = [int((targets != IGNORED).sum()) for targets in examples.targets]

    def digest(self) -> str:
        return hash_rows([*self.examples.ids, *self.examples.targets])

    def trainer(self, gradients: np.ndarray, dropout: float, seed: int) -> _core.Trainer:
        return _core.Trainer(self.model._core, self.model.lm_head.handle, gradients, dropout=dropout, seed=seed)

    def _batch(self, rows: Sequence[int]) -> Packed:
        return self.model.packed([self.rows[row] for row in rows])

    def _targets(self, rows: Sequence[int]) -> np.ndarray:
        return np.concatenate([self.examples.targets[row] for row in rows])

    def accumulate(
        self, trainer: _core.Trainer, rows: Sequence[int], factor: float, call: int, policy: Policy
    ) -> float:
        """Adds the gradient of factor * the losses' sum of a batch; returns that sum."""
        return trainer.accumulate(*self._batch(rows), self._targets(rows), factor, call, policy)

    def evaluate(self) -> dict[str, float]:
        total = 0.0
        for group in self.model.batches(self.rows, BATCH_TOKENS):
            targets = self._targets(group)
            losses = self.model._core.losses(*self._batch(group), self.model.lm_head.handle, targets)
            total += float(losses.astype(np.float64).sum())
        tokens = sum(self.counts)
        loss = total / tokens
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": tokens, "rows": len(self.rows)}


class LabelTask:
    """The label of every row, by a classifier's head on the row's pooled hidden state."""

    def __init__(self, model: LlamaForSequenceClassification, texts: Texts, labels: Labels, max_length: int | None):
        self.model = model
        self.rows = [row[:max_length] for row in model._rows(texts)]
        self.labels = model._labels(labels, len(texts), "labels")
        self.counts = [1] * len(self.rows)
        self._score: np.ndarray = np.empty((0, 0), np.float32)  # (labels, c) and its gradient: of the run that trains
        self._score_gradient = self._score

    def digest(self) -> str:
        return hash_rows([*self.rows, self.labels])

    def trainer(self, gradients: np.ndarray, dropout: float, seed: int) -> _core.Trainer:
        score = self.model.require_adapter().score
        if score is None:
            raise ValueError(
                "lora: got an adapter without a classification head, expected one with it, or a LoraConfig"
            )
        self._score, self._score_gradient = score, gradients[-score.size :].reshape(score.shape)
        return _core.Trainer(self.model._core, None, gradients, dropout=dropout, seed=seed)

    def accumulate(
        self, trainer: _core.Trainer, rows: Sequence[int], factor: float, call: int, policy: Policy
    ) -> float:
        batch = self.model.packed([self.rows[row] for row in rows])
        ends, labels = (batch[2][1:] - 1).astype(np.int32), self.labels[list(rows)]
        return trainer.accumulate_pooled(*batch, ends, labels, self._score, self._score_gradient, factor, call, policy)

    def evaluate(self) -> dict[str, float]:
        logits = self.model.predict(self.rows, show=False)
        loss = _core.cross_entropy(logits, self.labels).astype(np.float64).mean()
        accuracy = (logits.argmax(axis=1) == self.labels).mean()
        return {"loss": float(loss), "accuracy": float(accuracy), "rows": len(self.rows)}


# ---- the run -------------------------------------------------------------------------------------------------------


class TrainingRun:
    """The loop: batches, gradients, AdamW, the log, the checkpoints."""

    def __init__(self, model: Llama, task: LanguageTask | LabelTask, config: TrainingConfig):
        self.model, self.task, self.config = model, task, config
        self.evaluation: LanguageTask | LabelTask | None = None
        adapter = model.require_adapter()
        self.state = TrainingState(adapter)
        self.batches = Batches([len(row) for row in task.rows], config)
        self.gradients = np.zeros_like(adapter.parameters)
        self.device = device_number(model.device)  # -1: the CPU
        self.trainer = task.trainer(self.gradients, adapter.config.lora_dropout, config.seed)
        self.policy = self._choose_policy()
        self.folder = RunFolder(config.output_dir, self._settings()) if config.output_dir is not None else None
        self._window = (time.perf_counter(), 0)  # when the log's next entry began, tokens since

    def train(self, show: bool) -> None:
        """All steps that are left, by this run alone in its folder."""
        with nullcontext() if self.folder is None else self.folder.held():
            self._train(show)

    def _train(self, show: bool) -> None:
        config, state = self.config, self.state
        resume = config.resume_from_checkpoint
        if resume and self.folder is not None:
            self.folder.load(resume, state)
        elif resume and resume is not True:  # without a folder it is never True: see TrainingConfig
            load_state(Path(resume), self._settings(), state)
        self.trainer.write(state.mean, state.square)
        if self.device >= 0:
            cuda.reset_peak(self.device)
        self._evaluate()
        if self.folder is not None:
            self.folder.begin(state)
        started = state.step
        with ExitStack() as stack:
            send = stack.enter_context(self._sink())
            bar = stack.enter_context(progress_bar(self.batches.steps, "fine-tuning", "step", show))
            bar.skip(started)
            try:
                while state.step < self.batches.steps:
                    logged = len(state.log)
                    bar.advance(note=self._step())
                    self._after_step(logged, send)
            except BaseException:  # Ctrl-C too
                if self.folder is not None and state.step > started:
                    self._save(self.folder)
                raise
        self.trainer.read(state.mean, state.square)
        if self.folder is not None:
            self.model.save_adapter(self.folder.path)

    def _save(self, folder: RunFolder) -> None:
        """A checkpoint of the last finished step."""
        self.trainer.read(self.state.mean, self.state.square)
        folder.save(self.state)

    def _step(self) -> str:
        """One step, in the log where an entry is due; returns what the progress bar says of it."""
        state = self.state
        number, batches = state.step + 1, self.batches.step(state.step)
        count = sum(self.task.counts[row] for _, rows in batches for row in rows)
        self.trainer.zero()
        total = 0.0
        for call, rows in batches:
            total += self.task.accumulate(self.trainer, rows, 1.0 / count, call, self.policy)
        if not math.isfinite(total):
            raise self._not_finite(number, "loss", total)
        tokens = sum(len(self.task.rows[row]) for _, rows in batches for row in rows)
        with uninterrupted():
            return self._update(number, total / count, tokens)

    def _update(self, number: int, loss: float, tokens: int) -> str:
        """The parameters, the step's number and the log: all of them or none."""
        config, state = self.config, self.state
        rate = config.rate(state.step, self.batches.steps)
        norm = self.trainer.step(
            state.mean, state.square, rate, config.adam_beta1, config.adam_beta2, config.adam_epsilon,
            config.weight_decay, number, config.max_grad_norm,
        )  # fmt: skip
        if not math.isfinite(norm):  # then nothing was changed
            raise self._not_finite(number, "norm of the gradients", norm)
        state.step = number
        state.losses.append(loss)
        return self._count(tokens, norm, rate)

    def _count(self, tokens: int, norm: float, rate: float) -> str:
        """The step in the log."""
        state, now = self.state, time.perf_counter()
        self._window = (self._window[0], self._window[1] + tokens)
        loss, speed = float(np.mean(state.losses)), self._window[1] / (now - self._window[0])
        if state.step == self.batches.steps or state.step % self.config.logging_steps == 0:
            values = {"loss": loss, "learning_rate": rate, "grad_norm": norm, "tokens": self._window[1]}
            self._log({**values, "tokens_per_second": speed, "peak_memory_bytes": peak_bytes(self.device)})
            state.losses.clear()
            self._window = (now, 0)
        return f"loss {loss:.4f}, lr {rate:.2e}, {speed:.0f} tok/s"

    def _not_finite(self, step: int, what: str, value: float) -> _core.NumericError:
        kept = f"; checkpoint-{step - 1} in {self.folder.path} is as it was before" if self.folder and step > 1 else ""
        return _core.NumericError(f"training: step {step}: the {what} is {value}; try a lower learning_rate{kept}")

    def _after_step(self, logged: int, send: Callable[[dict[str, Any]], None] | None) -> None:
        """What is due after a step: an evaluation, the entries of the log from `logged` on where they are to be read, a
        checkpoint."""
        config, step = self.config, self.state.step
        self._evaluate()
        for entry in self.state.log[logged:]:
            if self.folder is not None:
                self.folder.log(entry)
            if send is not None:
                send({"name": "training", **entry})
        due = config.save_steps is not None and (step == self.batches.steps or step % config.save_steps == 0)
        if self.folder is not None and due:
            self._save(self.folder)

    def _evaluate(self) -> None:
        """The held-out loss in the log, where it is due and was not taken before the run was interrupted."""
        step, log = self.state.step, self.state.log
        every = self.config.eval_steps or self.batches.steps_per_epoch
        due = step > 0 and (step == self.batches.steps or step % every == 0)
        done = bool(log) and log[-1]["step"] == step and "eval_loss" in log[-1]
        if self.evaluation is None or not due or done:
            return
        started = time.perf_counter()
        self.trainer.read(self.state.mean, self.state.square)  # a classifier's head is asked on the host
        self._log({f"eval_{name}": value for name, value in self.evaluation.evaluate().items()})
        self._window = (self._window[0] + time.perf_counter() - started, self._window[1])  # not of the training

    def _log(self, values: dict[str, float]) -> None:
        step = self.state.step
        self.state.log.append({"step": step, "epoch": self.batches.epochs(step), **values})

    def _sink(self) -> Any:
        mode = "off" if self.config.report_to == "none" else os.environ.get("WANDB_MODE", "online")
        folder = Path(self.config.output_dir or ".") / "wandb"
        return event_sink(mode, folder, "finetune", self._settings())

    def _settings(self) -> dict[str, Any]:
        """What makes the steps of this run, in JSON's types."""
        training = {k: v for k, v in dataclasses.asdict(self.config).items() if k not in WITHOUT_EFFECT}
        model = fingerprint(self.model, self.model.config, ["model.embed_tokens", *layer_modules(self.model.config)])
        lora = dataclasses.asdict(self.state.adapter.config)
        lora = {name: value for name, value in lora.items() if value != {}}  # as before there were patterns
        return {"training": training, "lora": lora, "data": self.task.digest(), "model": model}

    def _choose_policy(self) -> Policy:
        """The policy of recomputing that is set, or the fastest one whose activations of the largest batch fit."""
        units = sorted((sum(len(self.task.rows[row]) for row in unit) for unit in self.batches.units), reverse=True)
        tokens = sum(units[: self.config.per_device_train_batch_size])
        if self.config.gradient_checkpointing != "auto":
            return self.config.gradient_checkpointing
        free = free_bytes(self.device) * FREE_SHARE
        needed = {policy: self.trainer.activation_bytes(tokens, policy) for policy in POLICIES}
        fitting = [policy for policy in POLICIES if needed[policy] <= free]
        if not fitting:
            raise MemoryError(
                f"training: a batch of {tokens} tokens needs {needed['full'] / 1e9:.2f} GB, {free / 1e9:.2f} GB are "
                "left for it: lower max_length or per_device_train_batch_size"
            )
        return fitting[0]


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C in this block is heard at its end."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    heard: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda *arguments: heard.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if heard:
        handler(*heard[0])


def peak_bytes(device: int = -1) -> int:
    """The most memory that this process ever had in use; on a device, since the run began."""
    if device >= 0:
        return cuda.memory(device)["peak"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def free_bytes(device: int = -1) -> int:
    """Memory that this process may still take: of a device, with what its pool holds unused; the machine's that is
    available, or what its control group leaves."""
    if device >= 0:
        memory = cuda.memory(device)
        return memory["free"] + memory["held"] - memory["current"]
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())  # "max" where there is none
        return min(free, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        return free
