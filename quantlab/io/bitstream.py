"""Rows of n-bit codes as little-endian bit streams in 32-bit words (csrc/core/bits.h), in NumPy."""

from __future__ import annotations

import numpy as np

CHUNK_BITS = 1 << 26  # bits spread over bytes at once: 64 MB


def words_per_row(count: int, bits: int) -> int:
    """32-bit words that hold `count` codes."""
    return -(-count * bits // 32)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 codes (rows, count), each below 2^bits -> uint32 (rows, words)."""
    rows, count = codes.shape
    out = np.zeros((rows, 4 * words_per_row(count, bits)), np.uint8)
    step = max(1, CHUNK_BITS // max(1, count * bits))
    for i in range(0, rows, step):
        spread = np.unpackbits(codes[i : i + step, :, None], axis=2, count=bits, bitorder="little")
        packed = np.packbits(spread.reshape(len(spread), -1), axis=1, bitorder="little")
        out[i : i + step, : packed.shape[1]] = packed
    return out.view("<u4")


def unpack(words: np.ndarray, count: int, bits: int) -> np.ndarray:
    """uint32 (rows, words) -> uint8 codes (rows, count)."""
    rows = words.shape[0]
    raw = np.ascontiguousarray(words, "<u4").view(np.uint8)
    out = np.empty((rows, count), np.uint8)
    step = max(1, CHUNK_BITS // max(1, count * bits))
    for i in range(0, rows, step):
        spread = np.unpackbits(raw[i : i + step], axis=1, count=count * bits, bitorder="little")
        out[i : i + step] = np.packbits(spread.reshape(-1, count, bits), axis=2, bitorder="little")[:, :, 0]
    return out
