"""What models read: rows of token ids, however they come, and texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from quantlab.arrays import DLPackArray, as_array

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

Ids = Sequence[int] | Sequence[Sequence[int]] | Sequence[DLPackArray] | DLPackArray
Texts = Sequence[str] | Ids


def listed(rows: Any) -> Any:
    """Rows as they are, but texts of an array or of a column of a data frame, whose labels do not count, as a list."""
    if hasattr(rows, "__array__") and not hasattr(rows, "__dlpack__") and np.ndim(rows) == 1:
        rows = np.asarray(rows)
    return rows.tolist() if isinstance(rows, np.ndarray) and rows.dtype.kind in "OUT" else rows


def are_ids(texts: Texts, name: str = "texts") -> TypeGuard[Ids]:
    """Whether these are token ids, not texts. ValueError, with the argument's name, for what is neither."""
    if hasattr(texts, "__dlpack__"):
        return True
    if not isinstance(texts, Sequence) or isinstance(texts, bytes):
        raise ValueError(f"{name}: got {type(texts).__name__}, expected a list of texts, or rows of token ids")
    if len(texts) == 0 or not isinstance(texts[0], str):
        return True
    other = next((text for text in texts if not isinstance(text, str)), None)
    if other is not None:
        raise ValueError(f"{name}: got {type(other).__name__} among texts, expected texts alone")
    return False


def encoded(tokenizer: Tokenizer, text: str, add_special_tokens: bool = True, name: str = "text") -> Encoding:
    """One text in tokens, with their places. ValueError, with the argument's name, for half of a surrogate pair: what
    the shell makes of bytes that are no text, and JSON of half an emoji."""
    try:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)
    except TypeError:  # the tokenizer's, without a word about the text
        raise ValueError(f"{name}: it is not valid Unicode and has no UTF-8") from None


def text_ids(tokenizer: Tokenizer, text: str, add_special_tokens: bool = True, name: str = "text") -> np.ndarray:
    """Token ids of one text, int32 (t,)."""
    if not isinstance(text, str):
        raise ValueError(f"{name}: got {type(text).__name__}, expected one text")
    return np.array(encoded(tokenizer, text, add_special_tokens, name).ids, np.int32)


def rows_of(texts: Texts, tokenizer: Tokenizer | None, name: str = "texts") -> list[np.ndarray]:
    """Token ids of each text, with special tokens, or the rows of ids that these are; int32 (t,) each. ValueError, with
    the argument's name, for what is neither."""
    texts = listed(texts)
    if are_ids(texts, name):
        return to_sequences(texts, name=name)
    if tokenizer is None:
        raise ValueError(f"{name}: this checkpoint has no tokenizer; pass rows of token ids instead of texts")
    try:
        return [np.array(encoding.ids, np.int32) for encoding in tokenizer.encode_batch(list(texts))]
    except TypeError:  # one of them: which, `encoded` says
        return [text_ids(tokenizer, text, name=f"{name}, number {i}") for i, text in enumerate(texts, 1)]


def one_row(ids: Sequence[int] | np.ndarray) -> list[int]:
    """Token ids (t,) of one text, of whatever integer type."""
    wanted = "expected the token ids of one text"
    if isinstance(ids, str) or (isinstance(ids, (list, tuple)) and len(ids) and np.ndim(ids[0])):
        raise ValueError(f"ids: got {'text' if isinstance(ids, str) else 'rows'}, {wanted}")
    array = np.asarray(ids)
    if array.ndim != 1 or (array.size and (array.dtype.kind not in "iu" or array.min() < 0)):
        raise ValueError(f"ids: got {array!r:.60}, {wanted}: integers of 0 or more")
    return array.tolist()


def to_sequences(
    input_ids: Ids, lengths: Sequence[int] | np.ndarray | None = None, name: str = "input_ids"
) -> list[np.ndarray]:
    """The rows of `input_ids`, which errors call `name`, as int32 arrays without padding.

    `input_ids`: one row, a (B, T) array (of any library that has DLPack) or a list of rows of any length; `lengths`
    (B,): how much of each row counts.
    """
    input_ids = listed(input_ids)
    first = input_ids[0] if isinstance(input_ids, (list, tuple)) and input_ids else input_ids
    if isinstance(first, str) or not (isinstance(input_ids, Sequence) or hasattr(input_ids, "__dlpack__")):
        got = "text" if isinstance(first, str) else type(input_ids).__name__
        raise ValueError(f"{name}: got {got}, expected token ids, as encode gives them for a text")
    if hasattr(input_ids, "__dlpack__"):
        input_ids = as_array(input_ids, name)
    if isinstance(input_ids, np.ndarray) and input_ids.ndim < 3:
        rows = list(np.atleast_2d(input_ids)) if input_ids.ndim else [input_ids]
    elif len(input_ids) and not hasattr(input_ids[0], "__len__"):
        rows = [np.asarray(input_ids)]
    else:
        rows = [np.asarray(row) for row in input_ids]
    for row in rows:
        if row.ndim != 1 or (row.size and row.dtype.kind not in "iu"):
            raise ValueError(
                f"{name}: got an array of {row.dtype} with shape {row.shape}, expected integers, (B, T) or rows"
            )
        if row.size and (row.min() < 0 or row.max() > np.iinfo(np.int32).max):
            raise ValueError(f"{name}: got {row.min()} to {row.max()}, expected token ids from 0")
    if lengths is not None:
        lengths = np.asarray(lengths)
        if lengths.shape != (len(rows),) or lengths.dtype.kind not in "iu":
            got = f"{lengths.dtype} with shape {lengths.shape}"
            raise ValueError(f"lengths: got {got}, expected integers with shape ({len(rows)},)")
        for row, length in zip(rows, lengths, strict=True):
            if not 0 < length <= row.size:
                raise ValueError(f"lengths: got {length} for a row of {row.size} tokens")
        rows = [row[:length] for row, length in zip(rows, lengths, strict=True)]
    if not rows:
        raise ValueError(f"{name}: no rows, expected at least one")
    if any(row.size == 0 for row in rows):
        raise ValueError(f"{name}: an empty row; every row needs at least one token")
    return [np.ascontiguousarray(row, dtype=np.int32) for row in rows]
