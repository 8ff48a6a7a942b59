"""Generation with a KV cache: greedy or sampled, several ragged rows at once."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from quantlab import _core
from quantlab.config import is_integer, is_number
from quantlab.llama import BATCH_TOKENS
from quantlab.token_rows import Ids, to_sequences

if TYPE_CHECKING:
    from quantlab.llama import LlamaForCausalLM


Steps = Generator[np.ndarray, "list[int] | None", None]  # see generation_steps


def _check(max_new_tokens: int, temperature: float, top_k: int, top_p: float, seed: int) -> None:
    if not is_integer(max_new_tokens) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: got {max_new_tokens!r}, expected an integer of at least 1")
    if not is_number(temperature) or not 1e-30 <= temperature <= 1e30:
        raise ValueError(
            f"temperature: got {temperature!r}, expected a number of 1e-30 to 1e30 (do_sample=False is greedy)"
        )
    if not is_integer(top_k) or top_k < 0:
        raise ValueError(f"top_k: got {top_k!r}, expected an integer of 0 (all) or more")
    if not is_number(top_p) or not 1e-30 <= top_p <= 1:
        raise ValueError(f"top_p: got {top_p!r}, expected a number of 1e-30 to 1")
    if not is_integer(seed) or not 0 <= seed < 1 << 64:
        raise ValueError(f"seed: got {seed!r}, expected an integer of 0 to 2^64 - 1")


def _shares(left: np.ndarray, tokens: int) -> np.ndarray:
    """How many of its `left` tokens (rows,) each row gives to a chunk of at most `tokens`: row after row."""
    before = np.concatenate([[0], np.cumsum(left)[:-1]])
    return np.clip(tokens - before, 0, left)


def generation_steps(
    model: LlamaForCausalLM,
    sequences: list[np.ndarray],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Steps:
    """The next token of each row, int32 (rows,), `max_new_tokens` times: all of it on the model's device, where the
    steps run ahead of what is read here. May be sent the places of those rows that go on; the others' tokens are then
    left out. temperature 0: the likeliest token.

    top_k keeps the k largest (0: all); top_p keeps the smallest set whose probability reaches p (Holtzman et al. 2020).
    """
    lengths = np.array([len(row) for row in sequences], np.int64)
    given = int(lengths.max())
    tables = model.rope(given + max_new_tokens, given)
    generation = _core.Generation(
        model._core, model.lm_head.handle, lengths, max_new_tokens, *tables, temperature, top_k, top_p, seed
    )
    held, seen = np.zeros_like(lengths), (tables[0][:given], tables[1][:given])
    while (held < lengths).any():
        taken = _shares(lengths - held, BATCH_TOKENS)
        chunks = [row[start : start + count] for row, start, count in zip(sequences, held, taken, strict=True)]
        batch = model.packed(chunks, held, generation.capacity)[:5]
        held += taken
        last = (held == lengths) & (taken > 0)  # rows whose prompt ends in this chunk
        generation.prefill(*batch, *seen, np.where(last, batch[2][1:] - 1, -1).astype(np.int32))
    running = np.arange(len(sequences), dtype=np.int32)  # places among what the generation computes
    for _ in range(max_new_tokens):
        kept = yield generation.next()[running]
        if kept is not None:
            running = running[kept]
            if generation.keep(running):
                running = np.arange(len(running), dtype=np.int32)


class Stop:
    """Whether a row ends: its last token is one of `tokens`, or its text now holds one of `strings`."""

    def __init__(
        self, model: LlamaForCausalLM, tokens: int | Sequence[int] | None, strings: Sequence[str] | str | None
    ):
        one = isinstance(tokens, str) or not isinstance(tokens, Iterable)
        ends: list[Any] = [] if tokens is None else [tokens] if one else [*cast(Iterable[Any], tokens)]
        if not all(map(is_integer, ends)):
            raise ValueError(f"eos_token_id: got {tokens!r}, expected a token id or a list of them")
        self.tokens = {int(token) for token in ends}
        if not isinstance(strings, Iterable) and strings is not None:
            raise ValueError(f"stop_strings: got {strings!r}, expected texts")
        self.strings = [strings] if isinstance(strings, str) else list(strings or ())
        if not all(isinstance(string, str) and string for string in self.strings):
            raise ValueError(f"stop_strings: got {strings!r}, expected texts")
        if self.strings and model.tokenizer is None:
            raise ValueError("stop_strings: this checkpoint has no tokenizer to find them with")
        self._tokenizer = model.tokenizer if self.strings else None
        # a token is a byte or more; half of a surrogate pair, which is never found, counts as the three it would have
        self._tail = max((len(string.encode("utf-8", "surrogatepass")) for string in self.strings), default=0) + 1

    def __call__(self, new: Sequence[int]) -> bool:
        if new[-1] in self.tokens:
            return True
        if self._tokenizer is None:
            return False
        text = self._tokenizer.decode(list(new[-self._tail :]), skip_special_tokens=False)
        return any(string in text for string in self.strings)


def read_steps(steps: Steps, rows: int, stop: Stop, on_token: Callable[[int, int], None] | None) -> list[list[int]]:
    """The tokens of each row up to its stop; ends with the last row's."""
    new: list[list[int]] = [[] for _ in range(rows)]
    running, kept = list(range(rows)), None
    while running:
        try:
            tokens = steps.send(kept)
        except StopIteration:
            break
        for row, token in zip(running, tokens.tolist(), strict=True):
            new[row].append(token)
            if on_token is not None:
                on_token(row, token)
        going = [place for place, row in enumerate(running) if not stop(new[row])]
        kept = None if len(going) == len(running) else going
        running = [running[place] for place in going]
    return new


def generate(
    model: LlamaForCausalLM,
    input_ids: Ids,
    max_new_tokens: int = 64,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_token_id: int | Sequence[int] | None = None,
    on_token: Callable[[int, int], None] | None = None,
    stop_strings: Sequence[str] | str | None = None,
) -> list[np.ndarray]:
    """Continues each row of `input_ids` (one row, (B, T), or rows of any length) by up to `max_new_tokens` tokens.

    Returns a list of int32 arrays, prompt included; a row ends after an `eos_token_id` (None: the model's
    `eos_token_ids`; []: never), or after the token with which its new text holds one of `stop_strings`. Greedy unless
    `do_sample`. A draw depends on the logits, the seed, the number of the row and the step: not on the rows beside it.
    `on_token(row, token)` is called as tokens come. Which kernels compute the logits may depend on how many rows run
    together, and on the device: a choice between two tokens that are as likely but for rounding may then be another. A
    UserWarning says where a row may grow beyond the positions that the model was trained on.
    """
    _check(max_new_tokens, temperature, top_k, top_p, seed)
    sequences = to_sequences(input_ids)
    longest = max(map(len, sequences), default=0) + max_new_tokens
    model.config.warn_beyond_positions(f"max_new_tokens: up to {longest} tokens a row", longest)
    stop = Stop(model, model.eos_token_ids if eos_token_id is None else eos_token_id, stop_strings)
    sampling = (temperature if do_sample else 0.0, min(int(top_k), model.config.vocab_size), top_p, int(seed))
    steps = generation_steps(model, sequences, max_new_tokens, *sampling)
    new = read_steps(steps, len(sequences), stop, on_token)
    return [np.concatenate([row, np.array(tokens, np.int32)]) for row, tokens in zip(sequences, new, strict=True)]
