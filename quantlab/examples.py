"""Training data as a model learns from it: rows of token ids, and at each place the token to be predicted."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from quantlab.conversations import (
    ChatTemplate,
    chat_template,
    conversation_of,
    joined,
    learned_tokens,
    read_json_lines,
    special_token,
)
from quantlab.llama import Llama
from quantlab.token_rows import encoded, listed, to_sequences
from quantlab.training import IGNORED, TrainingConfig

Data = Any  # texts, rows of ids, conversations, or the path of a JSON-lines file of objects that hold one of these


@dataclass
class Examples:
    """Rows int32 (t,) and their targets int32 (t,): targets[i] follows ids[i], or is -100 where nothing is learned.

    cut, dropped: rows that were longer than the limit, and those of which nothing to learn was left (or one token).
    template: "model", "chatml", "given" or "joined" for conversations, None for texts and ids.
    """

    ids: list[np.ndarray] = field(default_factory=list)
    targets: list[np.ndarray] = field(default_factory=list)
    cut: int = 0
    dropped: int = 0
    template: str | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def target_tokens(self) -> int:
        return sum(int((targets != IGNORED).sum()) for targets in self.targets)

    def report(self) -> dict[str, Any]:
        tokens = sum(len(row) for row in self.ids)
        counts = {"rows": len(self), "tokens": tokens, "target_tokens": self.target_tokens}
        return {**counts, "cut": self.cut, "dropped": self.dropped, "template": self.template}

    def add(self, ids: np.ndarray, learned: np.ndarray | None, limit: int) -> None:
        """A row, and which of its tokens are to be learned (None: all); the first token never is."""
        self.cut += len(ids) > limit
        targets = np.append(ids[1:limit], np.int32(IGNORED)).astype(np.int32)[: len(ids)]
        if learned is not None:
            targets[:-1][~learned[1:limit]] = IGNORED
        if np.all(targets == IGNORED):
            self.dropped += 1
            return
        self.ids.append(np.ascontiguousarray(ids[:limit], np.int32))
        self.targets.append(targets)


def prepare_examples(model: Llama, data: Data, config: TrainingConfig, name: str = "data") -> Examples:
    """The rows of `data` for a language model.

    data: a list of texts (with the model's end token after each), of rows of ids (as they are), of conversations
    (messages {"role", "content"}, or strings by turns), or of objects with "text", "messages" or "conversations"; or
    the path of a JSON-lines file of such. Rows longer than config.max_length, or than the model's context, are cut.

    A ValueError names the row that is empty, one-sided or no text; cut and dropped rows are counted and warned of.
    """
    items = read_json_lines(data) if isinstance(data, (str, Path)) else listed(data)
    where = str(data) if isinstance(data, (str, Path)) else name
    if not isinstance(items, np.ndarray) and not isinstance(items, Sequence):
        raise ValueError(f"{name}: got {type(items).__name__}, expected a list of texts, rows of ids or conversations")
    if len(items) == 0:
        raise ValueError(f"{name}: it is empty, expected at least one row")
    context = model.config.max_position_embeddings
    limit = min(config.max_length or context, context)
    examples = Examples()
    if is_ids(items):
        _add_ids(examples, items, limit, model, config, name)
    else:
        _add_texts(examples, items, limit, model, config, where)
    if not len(examples):
        raise ValueError(f"{name}: nothing to learn in its {len(items)} rows of up to {limit} tokens")
    if examples.cut or examples.dropped:
        left_out = f", {examples.dropped} left out: nothing to learn was left" if examples.dropped else ""
        warnings.warn(f"{name}: of {len(items)} rows {examples.cut} were cut to {limit} tokens{left_out}", stacklevel=4)
    return examples


def is_ids(items: Any) -> bool:
    """Whether these are rows of token ids (or one such row)."""
    first = items[0]
    return (
        isinstance(items, np.ndarray)
        or isinstance(first, (int, np.integer, np.ndarray))
        or (isinstance(first, Sequence) and len(first) > 0 and isinstance(first[0], (int, np.integer)))
    )


def _add_ids(examples: Examples, items: Any, limit: int, model: Llama, config: TrainingConfig, name: str) -> None:
    if config.assistant_only_loss:
        raise ValueError("assistant_only_loss: got True for rows of ids, which do not tell who says what")
    for row in to_sequences(items, name=name):
        if row.max() >= model.config.vocab_size:
            raise ValueError(f"{name}: token id {row.max()}, expected less than {model.config.vocab_size}")
        examples.add(row, None, limit)


def _add_texts(
    examples: Examples, items: Iterable[Any], limit: int, model: Llama, config: TrainingConfig, where: str
) -> None:
    tokenizer = model.require_tokenizer()
    end = tokenizer.token_to_id(special_token(model, "eos"))
    eos = [] if end is None else [end]
    template: ChatTemplate | None = None
    for number, item in enumerate(items, 1):
        place = f"{where}, row {number}"
        text = item.get("text") if isinstance(item, dict) else item
        if not isinstance(text, str):
            if template is None and config.chat_template != "joined":
                template = chat_template(model, config.chat_template)
            examples.template = template.name if template is not None else "joined"
            examples.add(*_conversation(model, item, template, config, place), limit)
            continue
        if config.assistant_only_loss:
            raise ValueError(f"{place}: a text does not tell what the assistant says, as assistant_only_loss needs it")
        ids = encoded(tokenizer, text, name=place).ids
        if not text.strip():
            raise ValueError(f"{place}: the text is empty")
        examples.add(np.array(ids if ids[-1:] == eos else ids + eos, np.int32), None, limit)


def _conversation(
    model: Llama, item: Any, template: ChatTemplate | None, config: TrainingConfig, place: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """ids (t,) of a conversation, and which are to be learned (None: all)."""
    messages, tokenizer = conversation_of(item, place), model.require_tokenizer()
    if template is None:
        text, spans = joined(messages)
        encoding = encoded(tokenizer, text, name=place)
    else:
        text, spans = template.render_spans(messages) if config.assistant_only_loss else (template.render(messages), [])
        eos = special_token(model, "eos")
        if not text.rstrip().endswith(eos):
            text += eos
            if messages[-1]["role"] == "assistant":
                spans = [*spans[:-1], (spans[-1][0], len(text))] if spans else []
        encoding = encoded(tokenizer, text, add_special_tokens=False, name=place)
    ids = np.array(encoding.ids, np.int32)
    return ids, learned_tokens(encoding.offsets, spans) if config.assistant_only_loss else None
