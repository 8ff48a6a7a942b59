"""What a measurement ran on: machine, software, revision; and the peak memory of this process."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import resource
import subprocess
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

LIBRARIES = ("numpy", "scipy", "scikit-learn", "tokenizers", "safetensors", "gguf", "codecarbon", "matplotlib")


def environment() -> dict[str, Any]:
    """The machine and the software, for a record. Fields that this machine has nothing for are None."""
    import quantlab

    git, dirty = revision(Path(quantlab.__file__).parent)
    info = quantlab.info()
    gpu = (info.get("cuda") or {}).get("device") or {}
    return {
        "cpu": cpu_model(), "cores": os.cpu_count(), "threads": info.get("threads"),
        "isa": (info.get("isa") or {}).get("selected"),
        "ram": {"value": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "unit": "B"},
        "gpu": gpu.get("name"), "driver": gpu.get("driver"), "cuda": gpu.get("runtime"),
        "os": platform.platform(), "python": platform.python_version(), "compiler": info.get("compiler"),
        "quantlab": info.get("version"), "git": git, "dirty": dirty, "libraries": libraries(),
        "load_average": list(os.getloadavg()),
    }  # fmt: skip


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def libraries() -> dict[str, str]:
    """Versions of the libraries that the results rest on, of those installed."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def revision(package: Path) -> tuple[str | None, bool | None]:
    """Git commit of the checkout that `package` lies in and whether it was changed; (None, None) for an installed
    package.
    """
    if not (package.parent / ".git").exists():
        return None, None
    try:
        command = ["git", "-C", str(package.parent), "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
        lines = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None, None
    commit = next((line.split()[-1] for line in lines if line.startswith("# branch.oid")), None)
    return commit, any(not line.startswith("#") for line in lines)


def reset_peak_host_bytes() -> bool:
    """Starts the kernel's peak of this process' resident memory afresh, after freed memory has been given back.

    False where the kernel does not allow it: then the peak is the process' so far.
    """
    gc.collect()
    with suppress(AttributeError, OSError):  # another C library gives memory back in its own way
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_host_bytes() -> int:
    """Peak resident memory of this process since the last reset, in bytes."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
