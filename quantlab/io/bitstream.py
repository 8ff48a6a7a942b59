"""Rows of n-bit codes as little-endian bit streams in 32-bit words (csrc/core/bits.h), in NumPy.

Eight codes of b bits fill b bytes, so every width goes through one 64-bit number for eight codes.
"""

from __future__ import annotations

import numpy as np

CHUNK = 1 << 22  # codes handled at once


def words_per_row(count: int, bits: int) -> int:
    """32-bit words that hold `count` codes."""
    return -(-count * bits // 32)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 codes (rows, count), each below 2^bits -> uint32 (rows, words)."""
    rows, count = codes.shape
    octets = -(-count // 8)
    words = words_per_row(count, bits)
    out = np.zeros((rows, 4 * words), np.uint8)
    step = max(1, CHUNK // max(1, count))
    for i in range(0, rows, step):
        part = codes[i : i + step]
        wide = np.zeros((len(part), octets), np.uint64)
        for j in range(8):
            column = part[:, j::8]
            wide[:, : column.shape[1]] |= column.astype(np.uint64) << np.uint64(bits * j)
        stream = wide.astype("<u8").view(np.uint8).reshape(len(part), octets, 8)[:, :, :bits].reshape(len(part), -1)
        used = min(stream.shape[1], 4 * words)
        out[i : i + step, :used] = stream[:, :used]
    return out.view("<u4")


def unpack(words: np.ndarray, count: int, bits: int) -> np.ndarray:
    """uint32 (rows, words) -> uint8 codes (rows, count)."""
    rows = words.shape[0]
    octets = -(-count // 8)
    raw = np.ascontiguousarray(words, "<u4").view(np.uint8)
    used = min(octets * bits, raw.shape[1])
    out = np.empty((rows, count), np.uint8)
    step = max(1, CHUNK // max(1, count))
    for i in range(0, rows, step):
        part = raw[i : i + step, :used]
        stream = np.zeros((len(part), octets * bits), np.uint8)
        stream[:, :used] = part
        spread = np.zeros((len(part), octets, 8), np.uint8)
        spread[:, :, :bits] = stream.reshape(len(part), octets, bits)
        wide = spread.view("<u8")[:, :, 0]
        for j in range(8):
            column = out[i : i + step, j::8]
            column[...] = (wide[:, : column.shape[1]] >> np.uint64(bits * j)) & np.uint64(2**bits - 1)
    return out
