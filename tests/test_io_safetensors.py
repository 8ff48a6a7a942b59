"""quantlab.io.safetensors against the safetensors library, and atomic writing."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from quantlab.io.files import atomic_writer
from quantlab.io.safetensors import DTYPES, LazyTensor, SafetensorsFile, shard, write_safetensors


def sample(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """One tensor a dtype, of odd sizes, a scalar and an empty one."""
    tensors = {}
    for name, dtype in DTYPES.items():
        raw = rng.integers(0, 2 if name == "BOOL" else 100, (3, 5))
        tensors[f"tensor.{name}"] = raw.astype(dtype)
    tensors["scalar"] = np.array(7, np.int64)
    tensors["empty"] = np.zeros((0, 4), np.float32)
    tensors["ünï 🤗"] = np.arange(3, dtype=np.uint8)
    return tensors


def test_round_trip(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = sample(rng)
    size = write_safetensors(tmp_path / "a.safetensors", tensors, {"format": "pt", "note": "x"})
    assert size == (tmp_path / "a.safetensors").stat().st_size
    file = SafetensorsFile(tmp_path / "a.safetensors")
    assert file.metadata == {"format": "pt", "note": "x"}
    assert file.tensors.keys() == tensors.keys()
    for name, array in tensors.items():
        got = file.array(name)
        assert got.dtype == array.dtype and got.shape == array.shape
        assert got.tobytes() == array.tobytes()


def test_library_reads_ours(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = {k: v for k, v in sample(rng).items() if not k.endswith(("F8_E4M3", "F8_E5M2"))}
    write_safetensors(tmp_path / "a.safetensors", tensors)
    with safetensors.safe_open(tmp_path / "a.safetensors", "np") as file:
        assert set(file.keys()) == set(tensors)
        assert file.metadata() == {"format": "pt"}
        for name, array in tensors.items():
            if array.dtype != ml_dtypes.bfloat16:
                np.testing.assert_array_equal(file.get_tensor(name), array)


def test_we_read_the_librarys(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = {"a": rng.normal(size=(4, 6)).astype(np.float16), "b": rng.integers(0, 9, 5, dtype=np.int32)}
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors")
    file = SafetensorsFile(tmp_path / "a.safetensors")
    for name, array in tensors.items():
        np.testing.assert_array_equal(file.array(name), array)


def test_views_share_the_map(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", {"a": np.arange(1 << 16, dtype=np.float32)})
    file = SafetensorsFile(tmp_path / "a.safetensors")
    one, two = file.array("a"), file.array("a")
    assert np.shares_memory(one, two)
    assert not one.flags.writeable and one.flags.aligned


def test_unaligned_tensor_is_copied(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    header += b" " * ((-len(header) % 8) + 1)
    data = np.array([1.5, -2.5], np.float32)
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data.tobytes())
    got = SafetensorsFile(tmp_path / "a.safetensors").array("a")
    assert got.flags.aligned
    np.testing.assert_array_equal(got, data)


def test_shards_keep_order_and_limit() -> None:
    tensors = {f"t{i}": LazyTensor.of(np.zeros(10 * (i + 1), np.uint8)) for i in range(6)}
    parts = list(shard(tensors, 60))
    assert [name for _, part in parts for name in part] == list(tensors)
    assert parts[0][0] == f"model-00001-of-{len(parts):05d}.safetensors"
    assert all(sum(t.nbytes for t in part.values()) <= 60 for _, part in parts)
    assert [name for name, _ in shard(tensors, 1 << 20)] == ["model.safetensors"]
    assert len(list(shard(tensors, 1))) == 6  # a tensor larger than the limit has a file of its own


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": np.zeros(3, np.float32)})
    before = path.read_bytes()

    def fail() -> np.ndarray:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        write_safetensors(path, {"b": LazyTensor(np.dtype(np.float32), (3,), fail)})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk shows at a write or, as here, at the flush: the error is the system's, and nothing is left."""
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), atomic_writer(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_refuses_unknown_dtype(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="complex64"):
        write_safetensors(tmp_path / "a.safetensors", {"a": np.zeros(2, np.complex64)})
    assert os.listdir(tmp_path) == []
