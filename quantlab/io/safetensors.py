"""safetensors files: a hardened reader of memory-mapped, zero-copy views, and an atomic writer.

The format (https://huggingface.co/docs/safetensors): 8 bytes little-endian length of the header, the header as JSON
{name: {"dtype", "shape", "data_offsets": [begin, end]}}, then the bytes of the tensors. The `safetensors` library
copies each tensor it gives to NumPy and has no bfloat16 there; both matter for a checkpoint larger than memory.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from quantlab.io.files import atomic_writer

MAX_HEADER = 32 << 20  # bytes; the header of a 405B model in one file has less than 1 MB
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"), "U32": np.dtype("<u4"), "U16": np.dtype("<u2"), "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"), "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is: its dtype's name in the format, its shape, its bytes [begin, end) of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """The tensors of one file. ValueError, with the file's name, where the file breaks the format.

    `tensors`: {name: TensorInfo}; `metadata`: {str: str}; `array(name)`: a read-only view of the memory map.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        with open(self.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            header_size = self._header_size(file.read(8), size)
            header = self._parse(file.read(header_size))
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.metadata: dict[str, str] = self._metadata(header.pop("__metadata__", {}))
        start = 8 + header_size
        self.tensors = {name: self._info(name, entry, start, size) for name, entry in header.items()}
        self._check_tiling(start, size)

    def array(self, name: str) -> np.ndarray:
        """The tensor as a read-only view of the file (a copy where the file does not align it)."""
        info = self.tensors[name]
        dtype = DTYPES[info.dtype]
        if info.begin == info.end:
            return np.empty(info.shape, dtype)
        flat = np.frombuffer(self._map, dtype, (info.end - info.begin) // dtype.itemsize, info.begin)
        return np.require(flat, requirements="A").reshape(info.shape)

    def _fail(self, what: str) -> ValueError:
        return ValueError(f"{self.path}: not a valid safetensors file: {what}")

    def _header_size(self, prefix: bytes, size: int) -> int:
        if len(prefix) < 8:
            raise self._fail(f"{size} bytes, expected at least 8")
        (header_size,) = struct.unpack("<Q", prefix)
        if header_size > size - 8:
            raise self._fail(f"its header claims {header_size} bytes, {size - 8} are there")
        if header_size > MAX_HEADER:
            raise self._fail(f"its header claims {header_size} bytes, at most {MAX_HEADER} are accepted")
        return header_size

    def _parse(self, raw: bytes) -> dict[str, Any]:
        twice: list[str] = []

        def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            result = dict(pairs)
            if len(result) != len(pairs):
                names = [name for name, _ in pairs]
                twice.append(next(name for name in names if names.count(name) > 1))
            return result

        try:
            header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
        except (ValueError, RecursionError) as error:
            raise self._fail(f"its header is not JSON ({type(error).__name__})") from None
        if twice:
            raise self._fail(f"its header names {twice[0]!r} twice")
        if not isinstance(header, dict):
            raise self._fail(f"its header is a {type(header).__name__}, expected an object")
        return header

    def _metadata(self, metadata: Any) -> dict[str, str]:
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self._fail("its __metadata__ is not an object of strings")
        return metadata

    def _info(self, name: str, entry: Any, start: int, size: int) -> TensorInfo:
        def naturals(values: Any) -> bool:
            return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)

        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
            raise self._fail(f"tensor {name!r} lacks dtype, shape or data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise self._fail(f"tensor {name!r} has dtype {dtype!r}, accepted: {' '.join(DTYPES)}")
        if not naturals(shape) or len(shape) > 8:
            raise self._fail(f"tensor {name!r} has shape {str(shape)[:80]}, expected up to 8 sizes")
        if not naturals(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
            raise self._fail(f"tensor {name!r} has data_offsets {str(offsets)[:80]}, expected [begin, end]")
        begin, end = start + offsets[0], start + offsets[1]
        expected = math.prod(shape) * DTYPES[dtype].itemsize
        if end > size:
            raise self._fail(f"tensor {name!r} ends at byte {end}, the file at {size} (a download cut short?)")
        if end - begin != expected:
            raise self._fail(f"tensor {name!r} of dtype {dtype} and shape {shape} holds {end - begin} bytes, "
                             f"expected {expected}")  # fmt: skip
        return TensorInfo(dtype, tuple(shape), begin, end)

    def _check_tiling(self, start: int, size: int) -> None:
        """The format asks that the tensors tile the data: no overlap, no hole, nothing after the last."""
        position, before = start, "the header"
        for name, info in sorted(self.tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
            if info.begin != position:
                kind = "overlaps" if info.begin < position else "leaves a hole after"
                raise self._fail(f"tensor {name!r} {kind} {before}")
            position, before = info.end, f"tensor {name!r}"
        if position != size:
            raise self._fail(f"{size - position} bytes follow its last tensor")


@dataclass(frozen=True)
class LazyTensor:
    """A tensor to write: `make()` gives its array (of this dtype and shape) when its turn comes, so that one tensor at
    a time is in memory."""

    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @classmethod
    def of(cls, array: np.ndarray) -> LazyTensor:
        return cls(array.dtype, array.shape, lambda: array)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, LazyTensor | np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Writes a file (under a temporary name, then renamed); returns its size in bytes. OSError on a full disk."""
    lazy = {name: LazyTensor.of(item) if isinstance(item, np.ndarray) else item for name, item in tensors.items()}
    # wide dtypes first: each tensor then is aligned to its items, as in the library's own writer
    order = sorted(lazy, key=lambda name: (-lazy[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    position = 0
    for name in order:
        item = lazy[name]
        if item.dtype not in NAMES:
            raise ValueError(f"{path}: tensor {name!r} has dtype {item.dtype}, accepted: {' '.join(map(str, NAMES))}")
        offsets = [position, position + item.nbytes]
        header[name] = {"dtype": NAMES[item.dtype], "shape": list(item.shape), "data_offsets": offsets}
        position += item.nbytes
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    with atomic_writer(path) as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for name in order:
            file.write(_bytes_of(name, lazy[name]).data)
    return 8 + len(raw) + position


def _bytes_of(name: str, item: LazyTensor) -> np.ndarray:
    array = np.ascontiguousarray(item.make())
    if array.dtype != item.dtype or math.prod(array.shape) != math.prod(item.shape):
        raise RuntimeError(f"{name}: made {array.dtype} {array.shape}, announced {item.dtype} {item.shape}")
    return array.reshape(-1).view(np.uint8)


def shard(tensors: Mapping[str, LazyTensor], max_bytes: int) -> Iterable[tuple[str, dict[str, LazyTensor]]]:
    """Splits tensors, in their order, into files of at most `max_bytes` (one tensor may be larger than that):
    pairs of a file name (`model.safetensors`, or `model-00001-of-0000N.safetensors`) and its tensors."""
    shards: list[dict[str, LazyTensor]] = [{}]
    used = 0
    for name, item in tensors.items():
        if shards[-1] and used + item.nbytes > max_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = item
        used += item.nbytes
    if len(shards) == 1:
        return [("model.safetensors", shards[0])]
    return [(f"model-{i:05d}-of-{len(shards):05d}.safetensors", part) for i, part in enumerate(shards, 1)]
