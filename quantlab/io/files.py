"""Files that appear whole or not at all: written under a temporary name, flushed to the disk, then renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

MAX_JSON = 64 << 20  # bytes; a tokenizer.json of 256,000 tokens has about 35 MB
MAX_TEXT = 1 << 30  # bytes of a text file


def path_of(value: object, name: str, wanted: str) -> Path:
    """The path that an argument gives: TypeError for what is none, ValueError for an empty one (Path("") is ".")."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name}: got {type(value).__name__}, expected {wanted}")
    if os.fspath(value) == "":
        raise ValueError(f"{name}: got '', expected {wanted}")
    return Path(value)


def output_directory(value: object, name: str, what: str) -> Path:
    """The same of a directory that `what` is written to, there or not; NotADirectoryError for a file."""
    wanted = f"a directory to write {what} to"
    path = path_of(value, name, wanted)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{name}: {path} is a file, expected {wanted}")
    return path


@contextmanager
def atomic_writer(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """`with atomic_writer(path) as file: file.write(…)`: the file at `path` is replaced only if the block succeeds."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_bytes(path: str | os.PathLike[str], data: bytes) -> int:
    """Writes `data` atomically; returns its size in bytes."""
    with atomic_writer(path) as file:
        file.write(data)
    return len(data)


def read_text(path: str | os.PathLike[str], at_most: int = MAX_TEXT) -> str:
    """A UTF-8 text file, without the byte order mark that Windows writes; ValueError with the file's name where it is
    none or has more than `at_most` bytes."""
    path = Path(path)
    size = path.stat().st_size
    if size > at_most:
        raise ValueError(f"{path}: {size} bytes, at most {at_most} are accepted")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start})") from None


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON object from a file; ValueError with the file's name where it is none, FileNotFoundError where missing."""
    path = Path(path)
    size = path.stat().st_size
    if size > MAX_JSON:
        raise ValueError(f"{path}: {size} bytes, at most {MAX_JSON} are accepted in a JSON file")
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a JSON {type(value).__name__}, expected an object")
    return value
