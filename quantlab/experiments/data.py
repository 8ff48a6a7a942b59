"""The examples of a classification study: seeded splits with their checksums, and calibration rows cut from them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

DEMO_NAMES = ("negative", "neutral", "positive")
DEMO_TEST, DEMO_VAL = 1000, 400  # tweets of the demo's 4,200; the rest is for training
# TweetEval's own measure of each task: a name of `statistics`, or the classes whose F1 is averaged
OFFICIAL: dict[str, str | tuple[int, ...]] = {
    "demo": "macro_recall", "sentiment": "macro_recall", "emoji": "macro_f1", "emotion": "macro_f1", "hate": "macro_f1",
    "offensive": "macro_f1", "irony": (1,), "stance": (1, 2),
}  # fmt: skip


@dataclass(frozen=True)
class Split:
    """Texts and labels of one split, in the order in which they are used."""

    name: str
    texts: list[str]
    labels: np.ndarray  # int64 (n,)

    def take(self, limit: int | None) -> Split:
        """The first `limit` examples."""
        return self if limit is None else Split(self.name, self.texts[:limit], self.labels[:limit])

    def describe(self, source: str) -> dict[str, Any]:
        """Name, number and SHA-256 of the examples, for a record."""
        digest = hashlib.sha256("\0".join(self.texts).encode() + self.labels.astype("<i8").tobytes()).hexdigest()
        return {"name": source, "split": self.name, "n": len(self.texts), "sha256": digest}


@dataclass(frozen=True)
class Examples:
    """A task: its class names, three splits, its official measure and what a reader should know about the data."""

    task: str
    names: list[str]
    train: Split
    val: Split
    test: Split
    notes: list[str] = field(default_factory=list)

    @property
    def official(self) -> str | tuple[int, ...]:
        return OFFICIAL.get(self.task.partition("_")[0], "macro_f1")


def load_examples(
    task: str,
    root: str | None = None,
    limits: Sequence[int | None] = (None, None, None),
    seed: int = 0,
    local_files_only: bool = False,
) -> Examples:
    """The examples of `task`: "demo", or one of TweetEval's tasks under `root` (see `quantlab.io.datasets`).

    limits: at most this many examples of train, val and test. Splits are shuffled by `seed` before they are cut, so a
    limited split is a random sample of the whole one. local_files_only: never ask the network.
    """
    if task == "demo":
        examples = demo_examples(seed, local_files_only)
    else:
        examples = tweeteval_examples(task, root, seed, local_files_only)
    train, val, test = (
        split.take(limit) for split, limit in zip((examples.train, examples.val, examples.test), limits, strict=True)
    )
    for split in (train, val, test):
        if not split.texts:
            raise ValueError(f"task {task!r}: the {split.name} split is empty; it needs at least one example")
    return Examples(examples.task, examples.names, train, val, test, examples.notes)


def shuffled(name: str, texts: Sequence[str], labels: ArrayLike, seed: int) -> Split:
    order = np.random.default_rng(seed).permutation(len(texts))
    return Split(name, [texts[i] for i in order], np.asarray(labels, np.int64)[order])


def part(split: Split, name: str, start: int, stop: int | None) -> Split:
    return Split(name, split.texts[start:stop], split.labels[start:stop])


def demo_examples(seed: int, local_files_only: bool = False) -> Examples:
    """The demo's rated tweets, shuffled once and cut into test, validation and training examples."""
    from quantlab.io.datasets import load_demo_tweets

    texts, labels = load_demo_tweets(local_files_only=local_files_only)[:2]
    everything = shuffled("all", texts, labels, seed)
    splits = part(everything, "test", 0, DEMO_TEST), part(everything, "val", DEMO_TEST, DEMO_TEST + DEMO_VAL)
    note = (
        "Tweets: 4,200 rated by people for VADER (Hutto and Gilbert 2014); a mean rating of at most -0.5 counts as "
        "negative, of at least 0.5 as positive, else as neutral. Split by a seeded shuffle: "
        f"{DEMO_TEST} test, {DEMO_VAL} validation, the rest training."
    )
    return Examples(
        "demo", list(DEMO_NAMES), part(everything, "train", DEMO_TEST + DEMO_VAL, None), splits[1], splits[0], [note]
    )


def tweeteval_examples(task: str, root: str | None, seed: int, local_files_only: bool = False) -> Examples:
    """A TweetEval task. Without training text (some copies lack sentiment's) four fifths of val train and the rest
    validates.
    """
    from quantlab.io.datasets import load_tweeteval

    load = partial(load_tweeteval, task, root=root, local_files_only=local_files_only)
    texts, labels, names = load("test")
    test = shuffled("test", texts, labels, seed)
    val = shuffled("val", *load("val")[:2], seed)
    notes = []
    try:
        train = shuffled("train", *load("train")[:2], seed)
    except FileNotFoundError:
        cut = len(val.texts) * 4 // 5
        train, val = part(val, "val (first 4/5)", 0, cut), part(val, "val (last 1/5)", cut, None)
        notes.append(
            f"This copy of {task} has no training text: the head was trained on four fifths of the validation split."
        )
    return Examples(task, list(names), train, val, test, notes)


def calibration_rows(
    encode: Callable[[str], np.ndarray], texts: Sequence[str], rows: int, length: int
) -> tuple[np.ndarray, int]:
    """Rows of token ids (rows, length), int32, cut one after the other from the texts joined by line breaks, and the
    tokens at hand.

    Fewer rows come back where the texts are too short; a text of less than one row gives one shorter row.
    """
    ids = np.asarray(encode("\n".join(texts)), np.int32)
    if ids.size == 0:
        raise ValueError("calibration: the texts hold no token")
    length = min(length, ids.size)
    count = min(rows, ids.size // length)
    return ids[: count * length].reshape(count, length), int(ids.size)


def fingerprint(source: str) -> str:
    """What tells two models apart without reading their weights: names, sizes and the configuration of a directory,
    the head of a file, the name of a hub model or "demo".
    """
    path, digest = Path(source), hashlib.sha256()
    if path.is_dir():
        for file in sorted(item for item in path.iterdir() if item.is_file()):
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        config = path / "config.json"
        digest.update(config.read_bytes() if config.exists() else b"")
    elif path.is_file():
        digest.update(f"{path.stat().st_size}\n".encode())
        with open(path, "rb") as stream:
            digest.update(stream.read(1 << 20))
    else:
        digest.update(source.encode())
    return digest.hexdigest()[:16]
