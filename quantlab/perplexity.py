"""Perplexity over consecutive chunks of a text, as the GPTQ papers measure it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from quantlab.config import is_integer
from quantlab.llama import BATCH_TOKENS
from quantlab.progress import progress
from quantlab.token_rows import Ids, to_sequences

if TYPE_CHECKING:
    from quantlab.llama import LlamaForCausalLM


def token_losses(model: LlamaForCausalLM, chunks: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Negative log-likelihoods in nats of tokens 1.. of chunks of ids (T,) that do not see each other: float32 (T - 1,)
    each, in one call of the core."""
    targets = np.concatenate([np.append(ids[1:], np.int32(-100)) for ids in chunks])
    losses = model._core.losses(*model.packed(chunks), model.lm_head.handle, targets)
    return [part[:-1] for part in np.split(losses, np.cumsum([len(ids) for ids in chunks])[:-1])]


def perplexity(
    model: LlamaForCausalLM,
    text_or_ids: str | Ids,
    context: int = 2048,
    max_tokens: int | None = None,
    show: bool = True,
) -> dict[str, float]:
    """Perplexity of a text or of ids, cut into chunks of `context` tokens that do not see each other.

    Only whole chunks count, unless there is none; the first token of a chunk is not predicted. Returns `ppl`, `nll`
    (mean, nats a token), `tokens` (predicted), `chunks`, and `stderr` (of ppl, from the spread of the chunks' means;
    nan for one chunk). A UserWarning where chunks are longer than what the model was trained on.
    """
    if not is_integer(context) or context < 2:
        raise ValueError(f"context: got {context!r}, expected an integer of at least 2 tokens")
    if max_tokens is not None and (not is_integer(max_tokens) or max_tokens < 2):
        raise ValueError(f"max_tokens: got {max_tokens!r}, expected an integer of at least 2, or None for all")
    if isinstance(text_or_ids, str):
        ids = model.encode(text_or_ids)
    else:
        ids = np.concatenate(to_sequences(text_or_ids, name="text_or_ids"))
    ids = ids[:max_tokens] if max_tokens is not None else ids
    if len(ids) < 2:
        raise ValueError(f"text_or_ids: {len(ids)} tokens, perplexity needs at least 2")
    whole = len(ids) // context * context
    chunks = np.split(ids[:whole], whole // context) if whole else [ids]
    model.config.warn_beyond_positions(f"context: chunks of {len(chunks[0])} tokens", len(chunks[0]))
    at_once, means = max(1, BATCH_TOKENS // len(chunks[0])), np.empty(len(chunks))  # chunks are of one length
    with progress(len(chunks), "perplexity", "chunk", show) as bar:
        for first in range(0, len(chunks), at_once):
            group = chunks[first : first + at_once]
            means[first : first + len(group)] = [loss.mean(dtype=np.float64) for loss in token_losses(model, group)]
            bar.advance(len(group), note=f"ppl {math.exp(means[: first + len(group)].mean()):.3f}")
    nll = float(means.mean())
    spread = float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else math.nan
    tokens = len(chunks) * (len(chunks[0]) - 1)
    return {"ppl": math.exp(nll), "nll": nll, "tokens": tokens, "chunks": len(chunks), "stderr": math.exp(nll) * spread}
