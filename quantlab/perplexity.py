"""Perplexity over consecutive chunks of a text, as the GPTQ papers measure it."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

import numpy as np

from quantlab.progress import progress
from quantlab.token_rows import Ids, to_sequences

if TYPE_CHECKING:
    from quantlab.llama import LlamaForCausalLM


def token_losses(model: LlamaForCausalLM, ids: np.ndarray) -> np.ndarray:
    """Negative log-likelihood in nats of tokens 1.. of one chunk of ids (T,), float32 (T - 1,)."""
    return model.losses(ids, np.append(ids[1:], np.int32(-100)))[:-1]


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
    if context < 2:
        raise ValueError(f"context: got {context}, expected at least 2 tokens")
    if max_tokens is not None and max_tokens < 2:
        raise ValueError(f"max_tokens: got {max_tokens}, expected at least 2, or None for all")
    ids = model.encode(text_or_ids) if isinstance(text_or_ids, str) else np.concatenate(to_sequences(text_or_ids))
    ids = ids[:max_tokens] if max_tokens is not None else ids
    if len(ids) < 2:
        raise ValueError(f"text_or_ids: {len(ids)} tokens, perplexity needs at least 2")
    whole = len(ids) // context * context
    chunks = np.split(ids[:whole], whole // context) if whole else [ids]
    positions = model.config.max_position_embeddings
    if len(chunks[0]) > positions:
        text = f"context: chunks of {len(chunks[0])} tokens, the model was trained on no more than {positions}"
        warnings.warn(text, UserWarning, stacklevel=3)  # where model.perplexity is called
    losses = []
    with progress(len(chunks), "perplexity", "chunk", show) as bar:
        for chunk in chunks:
            losses.append(token_losses(model, chunk).astype(np.float64))
            bar.advance(note=f"ppl {math.exp(np.concatenate(losses).mean()):.3f}")
    nll = float(np.concatenate(losses).mean())
    means = np.array([loss.mean() for loss in losses])
    spread = float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else math.nan
    tokens = sum(len(loss) for loss in losses)
    return {"ppl": math.exp(nll), "nll": nll, "tokens": tokens, "chunks": len(chunks), "stderr": math.exp(nll) * spread}
