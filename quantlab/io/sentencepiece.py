"""SentencePiece BPE tokenizers (Llama 1 and 2, TinyLlama) as `tokenizers` BPE, without the sentencepiece library."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPACE = "\u2581"  # how SentencePiece writes a space


class PieceType(IntEnum):
    """The types of a piece, in sentencepiece_model.proto and in GGUF alike."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def sentencepiece_tokenizer(pieces: list[tuple[str, float, int]], add_prefix: bool = True) -> Tokenizer:
    """A BPE tokenizer with byte fallback from (piece, score, type); ids are the positions. add_prefix: a text begins
    with a space, as Llama's does."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    unknown = next((piece for piece, _, kind in pieces if kind == PieceType.UNKNOWN), None)
    has_bytes = any(kind == PieceType.BYTE for _, _, kind in pieces)
    model = models.BPE(
        vocabulary, merges_from_scores(pieces), unk_token=unknown, fuse_unk=True, byte_fallback=has_bytes
    )
    tokenizer = Tokenizer(model)
    prepend = [normalizers.Prepend(SPACE)] if add_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(content=" ", left=1)] if add_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def merges_from_scores(pieces: Iterable[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose union scores best. As ranked pairs: every split of every piece into two
    pieces, best score first."""
    joinable = {
        piece: (i, score)
        for i, (piece, score, kind) in enumerate(pieces)
        if kind in (PieceType.NORMAL, PieceType.UNUSED)
    }
    ranked = []
    for piece, (_, score) in joinable.items():
        for cut in range(1, len(piece)):
            left, right = joinable.get(piece[:cut]), joinable.get(piece[cut:])
            if left is not None and right is not None:
                ranked.append((-score, left[0], right[0], piece[:cut], piece[cut:]))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]
