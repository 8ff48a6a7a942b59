"""The conversations of the LIMA study: read, drawn, and parted into training and held-out ones, with checksums."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantlab.conversations import Message, conversation_of, read_json_lines
from quantlab.io.datasets import lima_file

# Ours, for the sample answers: no text of the data set goes into a record.
QUESTIONS = (
    "What should I look at before I buy a used bicycle?",
    "Explain to a child why the sky is blue.",
    "Write a short letter that thanks a neighbour for watering my plants.",
)


@dataclass(frozen=True)
class Conversations:
    """Conversations as lists of messages (see `quantlab.conversations`)."""

    source: str
    train: list[list[Message]]
    held_out: list[list[Message]]

    def describe(self, split: str) -> dict[str, Any]:
        """Name, number and SHA-256 of a split, "train" or "held out", for a record."""
        rows = self.train if split == "train" else self.held_out
        digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        return {"name": self.source, "split": split, "n": len(rows), "sha256": digest}


def load_conversations(
    data: str | None, limit: int | None, held_out: int, seed: int, local_files_only: bool = False
) -> Conversations:
    """At most `limit` conversations of LIMA (see `quantlab.io.datasets.lima_file`), a random sample by `seed`: at most
    `held_out` of them, and a tenth, are held out.
    """
    path = lima_file(data, local_files_only=local_files_only)
    rows = [conversation_of(row, f"{path}, row {number}") for number, row in enumerate(read_json_lines(path), 1)]
    if len(rows) < 2:
        raise ValueError(f"data: {path} holds {len(rows)} conversations, expected at least 2: one is held out")
    order = np.random.default_rng(seed).permutation(len(rows))[:limit]
    count = min(held_out, max(1, len(order) // 10))
    chosen = [rows[index] for index in order]
    return Conversations(path.name, chosen[count:], chosen[:count])
