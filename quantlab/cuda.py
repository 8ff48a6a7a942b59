"""CUDA: what is there, and why not; the memory of a device."""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

from quantlab import _core

LIBRARIES = ("cublas", "cusolver")
# where the NVIDIA wheels put them: CUDA 13's in one folder, CUDA 12's in one a library
_WHEELS = ("nvidia/cu13/lib", "nvidia/cublas/lib", "nvidia/cusolver/lib")


@lru_cache
def _probe() -> str:
    """Why device 0 cannot be used, "" where it can. Looked for once."""
    if not _core.cuda_built():
        return "this build holds no CUDA kernels"
    folders = [str(Path(entry) / wheel) for entry in sys.path for wheel in _WHEELS if (Path(entry) / wheel).is_dir()]
    _core.cuda_set_folders(":".join(folders))
    try:
        _core.cuda_info(0)
    except _core.CudaError as error:
        return str(error)
    return ""


def built() -> bool:
    """Whether this build of `quantlab._core` holds CUDA kernels."""
    return _core.cuda_built()


def usable() -> bool:
    """Whether `device="cuda"` works here."""
    return not _probe()


def why_not() -> str:
    """Why CUDA cannot be used; "" where it can."""
    return _probe()


def device_number(device: str) -> int:
    """Number of the CUDA device that "cuda" or "cuda:N" names; -1 for "cpu".

    ValueError: a name nobody knows. CudaError: the device cannot be used, with the reason.
    """
    if device == "cpu":
        return -1
    kind, _, number = str(device).partition(":")
    if kind != "cuda" or (number and not number.isdecimal()) or str(device).endswith(":"):
        raise ValueError(f"device: got {device!r}, accepted are cpu, cuda, cuda:N")
    if not usable():
        raise _core.CudaError(f"device: {device!r} cannot be used here: {why_not()}")
    return int(number or 0)


def memory(device: int = 0) -> dict[str, int]:
    """Bytes of a device: in use by quantlab (current), the most since the last reset (peak), kept by its pool (held),
    free and in total on the device. CudaError where it cannot be used."""
    device_number(f"cuda:{device}")
    info = _core.cuda_info(device)
    return {name: info[name] for name in ("current", "peak", "held", "free", "total")}


def reset_peak(device: int = 0) -> None:
    """The peak of `memory` starts anew from what is in use now."""
    device_number(f"cuda:{device}")
    _core.cuda_reset_peak(device)


def describe() -> dict[str, Any]:
    """What `quantlab.info()` says: built, usable, why_not, device, libraries (name -> file, or why it is not there)."""
    found: dict[str, Any] = {
        "built": built(),
        "usable": usable(),
        "why_not": why_not(),
        "device": None,
        "libraries": {},
    }
    if found["usable"]:
        info = _core.cuda_info(0)
        versions = {name: f"{info[name] // 1000}.{info[name] % 1000 // 10}" for name in ("driver", "runtime")}
        found["device"] = {
            "name": info["name"],
            "count": info["count"],
            "capability": "{}.{}".format(*info["capability"]),
            "multiprocessors": info["multiprocessors"],
            "memory": info["total"],
            **versions,
        }
        found["libraries"] = {name: _library(name) for name in LIBRARIES}
    return found


def _library(name: str) -> str:
    try:
        return _core.cuda_library(name)
    except _core.CudaError as error:
        return f"not found: {error}"
