"""Sequence classification: a linear head on one pooled hidden state of a frozen LLaMA backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from quantlab import _core
from quantlab.config import is_integer, is_number
from quantlab.llama import BATCH_TOKENS, Llama, LlamaConfig
from quantlab.progress import progress
from quantlab.token_rows import Ids, Texts, are_ids, listed, rows_of, to_sequences
from quantlab.weight import QuantWeight, linear_of_any_rows

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from quantlab.io import Checkpoint
    from quantlab.lora import Adapter

Labels = Sequence[int] | np.ndarray


def _check_fit(epochs: int, batch_size: int, patience: int, lr: float) -> None:
    for name, count in (("epochs", epochs), ("batch_size", batch_size), ("patience", patience)):
        if not is_integer(count) or count < 1:
            raise ValueError(f"{name}: got {count!r}, expected an integer of at least 1")
    if not is_number(lr) or not lr > 0:
        raise ValueError(f"lr: got {lr!r}, expected a number above 0")


def pooled_position(ids: np.ndarray, pad_token_id: int | None) -> int:
    """Where transformers pools a row (T,): the rightmost token that is not the config's pad id; 0 if all are; the last
    one where the config has no pad id. An end-of-text token that doubles as pad is therefore passed over."""
    if pad_token_id is None:
        return len(ids) - 1
    kept = np.flatnonzero(ids != pad_token_id)
    return int(kept[-1]) if kept.size else 0


class LlamaForSequenceClassification(Llama):
    """`score` (num_labels, hidden) on the pooled hidden state, without bias: transformers' model of the same name.

    num_labels: None takes that of the checkpoint's `score`, else of its `id2label`, else 2. The names of labels in
    the config are kept where their number fits. Without a trained `score` in the checkpoint it is drawn from
    normal(0, initializer_range) with seed 0.
    """

    architecture = "LlamaForSequenceClassification"
    options = ("num_labels",)

    def __init__(
        self,
        config: LlamaConfig | Mapping[str, Any],
        weights: Mapping[str, QuantWeight],
        vectors: Mapping[str, np.ndarray],
        tokenizer: Tokenizer | None = None,
        checkpoint: Checkpoint | None = None,
        num_labels: int | None = None,
        device: str = "cpu",
        adapter: Adapter | None = None,
    ):
        values = (config if isinstance(config, LlamaConfig) else LlamaConfig(config)).to_dict()
        found = weights["score"].shape[0] if "score" in weights else None
        named = values.get("id2label")
        named = named if isinstance(named, Mapping) and named else {}
        num_labels = (found or len(named) or 2) if num_labels is None else num_labels
        if not is_integer(num_labels) or num_labels < 1:
            raise ValueError(f"num_labels: got {num_labels!r}, expected an integer of at least 1")
        if found is not None and num_labels != found:
            raise ValueError(f"num_labels: got {num_labels}, the checkpoint's score has {found}")
        names = {str(label): str(name) for label, name in named.items()}
        if set(names) != {str(label) for label in range(num_labels)}:
            names = {str(label): f"LABEL_{label}" for label in range(num_labels)}
        values.update(
            num_labels=int(num_labels), id2label=names, label2id={name: int(label) for label, name in names.items()}
        )
        weights = {module: weight for module, weight in weights.items() if module != "lm_head"}
        if found is None:
            draw = np.random.default_rng(0).normal(
                0.0, values["initializer_range"], (num_labels, values["hidden_size"])
            )
            weights["score"] = QuantWeight.from_array(draw.astype(np.float32))
        super().__init__(values, weights, vectors, tokenizer, checkpoint, device, adapter)

    @property
    def num_labels(self) -> int:
        return int(self.config.num_labels)

    @property
    def score(self) -> np.ndarray:
        """The head, float32 (num_labels, hidden_size)."""
        return self.weights["score"].dequantize()

    @score.setter
    def score(self, value: np.ndarray) -> None:
        if value.shape != (self.num_labels, self.config.hidden_size):
            raise ValueError(f"score: got shape {value.shape}, expected {(self.num_labels, self.config.hidden_size)}")
        self.weights["score"] = QuantWeight.from_array(np.ascontiguousarray(value, dtype=np.float32))

    def _rows(self, texts: Texts) -> list[np.ndarray]:
        """Token ids up to the pooled position: causal attention makes what follows irrelevant."""
        if isinstance(texts, str):
            raise ValueError("texts: got one string, expected a list of them")
        start = self.config.bos_token_id if isinstance(self.config.bos_token_id, int) else 0
        empty = np.array([start], np.int32)  # an empty text is one start token
        limit = self.config.max_position_embeddings
        rows = [row[:limit] if row.size else empty for row in rows_of(texts, self.tokenizer)]
        return [row[: pooled_position(row, self.config.pad_token_id) + 1] for row in rows]

    def features(self, texts: Texts, batch_tokens: int = BATCH_TOKENS, show: bool = True) -> np.ndarray:
        """The pooled hidden states of texts (or rows of ids), float32 (N, hidden_size).

        Batches hold at most `batch_tokens` tokens of texts sorted by length; 1 runs one text at a time. A text's
        features do not depend on its batch.
        """
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens: got {batch_tokens}, expected at least 1")
        rows = self._rows(texts)
        out = np.empty((len(rows), self.config.hidden_size), np.float32)
        with progress(len(rows), "features", "text", show) as bar:
            for group in self.batches(rows, batch_tokens):
                ends = np.cumsum([len(rows[index]) for index in group]) - 1
                out[group] = self.packed_hidden([rows[index] for index in group], keep=ends)
                bar.advance(len(group))
        return out

    def __call__(self, input_ids: Ids, lengths: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """Logits of rows of ids, float32 (B, num_labels)."""
        return self.predict(to_sequences(input_ids, lengths))

    def predict(self, texts: Texts, batch_tokens: int = BATCH_TOKENS, show: bool = True) -> np.ndarray:
        """Logits of texts (or rows of ids), float32 (N, num_labels)."""
        return linear_of_any_rows(self.features(texts, batch_tokens, show), self.weights["score"])

    def fit_head(
        self,
        texts: Texts,
        labels: Labels,
        eval_texts: Texts,
        eval_labels: Labels,
        epochs: int = 40,
        lr: float = 1e-3,
        batch_size: int = 32,
        weight_decay: float = 0.01,
        patience: int = 5,
        seed: int = 0,
        batch_tokens: int = BATCH_TOKENS,
    ) -> list[dict[str, float]]:
        """Trains `score` by AdamW on the frozen backbone and keeps the head with the least evaluation loss.

        Features are computed once. Stops after `patience` epochs without a lower evaluation loss. Returns one dict a
        step: step, epoch, train_loss (of the batch), eval_loss, eval_accuracy.
        """
        _check_fit(epochs, batch_size, patience, lr)
        texts, eval_texts = listed(texts), listed(eval_texts)
        are_ids(texts), are_ids(eval_texts, "eval_texts")  # what cannot be is said before the features are computed
        y = self._labels(labels, len(texts), "labels")
        eval_y = self._labels(eval_labels, len(eval_texts), "eval_labels")
        train, evaluation = (self.features(texts, batch_tokens), y), (self.features(eval_texts, batch_tokens), eval_y)
        return self.fit_features(train, evaluation, epochs, lr, batch_size, weight_decay, patience, seed)

    def fit_features(
        self,
        train: tuple[np.ndarray, np.ndarray],
        evaluation: tuple[np.ndarray, np.ndarray],
        epochs: int,
        lr: float,
        batch_size: int,
        weight_decay: float,
        patience: int,
        seed: int,
    ) -> list[dict[str, float]]:
        """`fit_head` on features (N, hidden) and labels (N,) that are there already."""
        _check_fit(epochs, batch_size, patience, lr)
        (x, y), order = train, np.random.default_rng(seed)
        head = AdamW(self.score, lr, weight_decay)
        history: list[dict[str, float]] = []
        best, best_loss, waited = head.value.copy(), np.inf, 0
        with progress(epochs, "head", "epoch") as bar:
            for epoch in range(1, epochs + 1):
                shuffled = order.permutation(len(x))
                for start in range(0, len(x), batch_size):
                    index = shuffled[start : start + batch_size]
                    loss, gradient = head_loss(head.value, x[index], y[index])
                    head.step(gradient)
                    eval_loss, accuracy = head_accuracy(head.value, *evaluation)
                    step = {"step": len(history) + 1, "epoch": epoch, "train_loss": loss}
                    history.append({**step, "eval_loss": eval_loss, "eval_accuracy": accuracy})
                bar.advance(note=f"evaluation loss {eval_loss:.4f}")
                if eval_loss < best_loss:
                    best, best_loss, waited = head.value.copy(), eval_loss, 0
                else:
                    waited += 1
                if waited >= patience:
                    break
        self.score = best
        return history

    def _labels(self, labels: Labels, count: int, name: str) -> np.ndarray:
        array = np.asarray(labels)
        if array.shape != (count,) or count == 0:
            raise ValueError(
                f"{name}: got shape {array.shape} for {count} texts, expected one label a text and at least one"
            )
        if array.dtype.kind not in "iuf":
            raise ValueError(f"{name}: got {array.dtype}, expected integers from 0 to {self.num_labels - 1}")
        if array.dtype.kind == "f" or array.min() < 0 or array.max() >= self.num_labels:
            raise ValueError(
                f"{name}: got {array.min()} to {array.max()}, expected integers from 0 to {self.num_labels - 1}"
            )
        return array.astype(np.int32)


def head_loss(score: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean cross-entropy of a head (labels, c) on features (n, c), and its gradient (labels, c)."""
    loss, dlogits = _core.cross_entropy(np.ascontiguousarray(x @ score.T), y, True)
    return float(loss.mean()), dlogits.T @ x / len(x)


def head_accuracy(score: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Mean cross-entropy and accuracy of a head on features (n, c)."""
    logits = np.ascontiguousarray(x @ score.T)
    return float(_core.cross_entropy(logits, y).mean()), float((logits.argmax(axis=1) == y).mean())


class AdamW:
    """AdamW (Loshchilov and Hutter 2019) for one array, betas 0.9 and 0.999, eps 1e-8."""

    def __init__(self, value: np.ndarray, lr: float, weight_decay: float):
        self.value = value.astype(np.float32, copy=True)
        self.lr, self.weight_decay = lr, weight_decay
        self.mean, self.square = np.zeros_like(self.value), np.zeros_like(self.value)
        self.steps = 0

    def step(self, gradient: np.ndarray) -> None:
        self.steps += 1
        self.mean += 0.1 * (gradient - self.mean)
        self.square += 0.001 * (gradient * gradient - self.square)
        mean, square = self.mean / (1 - 0.9**self.steps), self.square / (1 - 0.999**self.steps)
        self.value -= self.lr * (mean / (np.sqrt(square) + 1e-8) + self.weight_decay * self.value)
