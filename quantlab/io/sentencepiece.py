"""SentencePiece BPE tokenizers (Llama 1 and 2, TinyLlama) as `tokenizers` BPE, without the sentencepiece library."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPACE = "\u2581"  # how SentencePiece writes a space
BPE_MODEL = 2  # TrainerSpec.ModelType
MAX_MODEL = 64 << 20  # bytes; Llama's has 0.5 MB


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


# ---- tokenizer.model: a sentencepiece ModelProto (protocol buffers' wire format) ------------------------------------


def tokenizer_from_model(path: Path, config: dict[str, Any]) -> Tokenizer:
    """A tokenizer from a tokenizer.model of the BPE kind; `config`: tokenizer_config.json (add_bos_token, …).
    ValueError where the file is damaged or of another kind."""
    from tokenizers import AddedToken, processors

    if path.stat().st_size > MAX_MODEL:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, at most {MAX_MODEL} are accepted")
    try:
        pieces, kind, add_prefix = parse_model(path.read_bytes())
    except (ValueError, IndexError, struct.error, UnicodeDecodeError):
        raise ValueError(f"{path}: not a sentencepiece model") from None
    if kind != BPE_MODEL or not pieces:
        raise ValueError(
            f"{path}: a sentencepiece model of kind {kind} with {len(pieces)} pieces; supported: BPE, kind {BPE_MODEL}"
        )
    tokenizer = sentencepiece_tokenizer(pieces, add_prefix)
    special = [piece for piece, _, t in pieces if t in (PieceType.CONTROL, PieceType.UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    bos = tokenizer.token_to_id("<s>")
    if config.get("add_bos_token", True) and bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", bos)]
        )
    return tokenizer


def parse_model(data: bytes) -> tuple[list[tuple[str, float, int]], int, bool]:
    """Pieces (text, score, type), the kind of the model, and whether a text begins with a space."""
    pieces: list[tuple[str, float, int]] = []
    kind, add_prefix = 1, True
    for field, value in _fields(data):
        if field == 1:  # SentencePiece: piece = 1, score = 2, type = 3
            piece = dict(_fields(value))
            (score,) = struct.unpack("<f", piece.get(2, b"\0\0\0\0"))
            pieces.append(
                (piece[1].decode("utf-8"), score, piece.get(3, PieceType.NORMAL)) if 1 in piece else ("", 0.0, 5)
            )
        elif field == 2:  # TrainerSpec: model_type = 3
            kind = dict(_fields(value)).get(3, 1)
        elif field == 3:  # NormalizerSpec: add_dummy_prefix = 3
            add_prefix = bool(dict(_fields(value)).get(3, 1))
    return pieces, kind, add_prefix


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of the fields of a message: int, or bytes for text, messages and fixed-size numbers."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        wire = key & 7
        value: Any
        if wire == 0:
            value, position = _varint(data, position)
        else:
            if wire == 2:
                length, position = _varint(data, position)
            elif wire in (1, 5):
                length = 8 if wire == 1 else 4
            else:
                raise ValueError(f"wire type {wire}")
            if length > len(data) - position:
                raise ValueError("cut short")
            value, position = data[position : position + length], position + length
        yield key >> 3, value


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        byte = data[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position
    raise ValueError("a varint of more than 64 bits")
