"""The engine of `quantlab bench` and of benchmarks/: every op at the shapes of real models, timed in interleaved
rounds, each beside the roof that this machine has for it.

A record (one JSON line) has: commit, version, compiler, machine, threads, isa, op, format, model, shape, variant, cold,
rounds, median_s, p10_s, p90_s, gb_per_s, gflop_per_s, roof ("memory" or "compute"), roof_percent, peer_ratio (None: no
peer was run), error. gb_per_s counts every array once, in 10^9 bytes. error is the largest difference from the scalar
reference at a tiny size, over the largest result.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from quantlab import _core, backend
from quantlab.bench_cases import MODELS, OPS, TINY, Case, Sizes, cases
from quantlab.io.files import write_bytes
from quantlab.progress import progress

FLUSH_BYTES = 160 << 20  # above the last-level cache of a server
SAMPLE_SECONDS = 2e-3  # a warm sample repeats the call until it lasts this long
COPY_BYTES = 256 << 20


# ---- the machine ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Roofs:
    """What this machine reaches with the ISA and threads in use: bytes/s read and copied, operations/s in registers:
    float32, and bfloat16 of tiles or pairs (where there are none: float32)."""

    read: float
    copy: float
    fma: float
    tile: float


@lru_cache
def _roofs(isa: str, threads: int) -> Roofs:
    x, out = np.ones(COPY_BYTES // 4, np.float32), np.empty(COPY_BYTES // 4, np.float32)
    _core.roof_copy(out, x)  # touches the pages
    rounds = 20_000
    flops, tile_flops = _core.roof_fma(8 * threads, rounds), _core.roof_tile(8 * threads, rounds)
    return Roofs(
        read=x.nbytes / min(_seconds(lambda: _core.roof_read(x)) for _ in range(9)),
        copy=2 * x.nbytes / min(_seconds(lambda: _core.roof_copy(out, x)) for _ in range(9)),
        fma=flops / min(_seconds(lambda: _core.roof_fma(8 * threads, rounds)) for _ in range(9)),
        tile=tile_flops / min(_seconds(lambda: _core.roof_tile(8 * threads, rounds)) for _ in range(9)),
    )


def roofs() -> Roofs:
    """Measured once for each ISA and number of threads: the best of some runs."""
    return _roofs(_core.isa_selected(), _core.threads())


def environment() -> dict[str, Any]:
    """What a record says about where it was measured."""
    return {
        "commit": _commit(),
        "version": backend.info()["version"],
        "compiler": _core.compiler,
        "machine": _processor(),
        "threads": _core.threads(),
        "isa": _core.isa_selected(),
    }


def _commit() -> str | None:
    """The commit of the source tree that this package lies in; None for an installed one."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    result = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
    return result.stdout.strip() or None


def _processor() -> str:
    """The model's name and the number of processors."""
    name = platform.processor() or platform.machine()
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    return f"{name}, {os.cpu_count()} processors"


# ---- measuring -----------------------------------------------------------------------------------------------------


def _seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


@lru_cache(maxsize=1)
def _flush_buffer() -> np.ndarray:
    return np.ones(FLUSH_BYTES // 4, np.float32)


def flush_caches() -> None:
    """Reads more memory than the caches hold, so that the next call finds none of its arrays there."""
    _core.roof_read(_flush_buffer())


def limits(case: Case) -> tuple[float, float]:
    """Seconds that memory and computation need at least for a case."""
    roof, isa = roofs(), variant(case)
    in_floats = case.op.startswith("linear") and case.format == "f32"
    # float32 on tiles: six products of bytes, each half of a bfloat16's
    factor = 3 if isa == "amx" and in_floats else 1
    narrow = isa == "amx" or (isa == "avx512_bf16" and not in_floats)
    return case.nbytes / roof.read, case.flops * factor / (roof.tile if narrow else roof.fma)


def is_cold(case: Case) -> bool:
    """Cases that memory limits are measured with their arrays out of the caches, as a model's next layer finds them."""
    memory, compute = limits(case)
    return memory > compute


def repeats(case: Case) -> int:
    """How often a sample runs the case: once if it is cold, else often enough to take SAMPLE_SECONDS."""
    if is_cold(case):
        return 1
    case.run()
    return min(1000, 1 + int(SAMPLE_SECONDS / max(_seconds(case.run), 1e-7)))


def sample(case: Case, times: int) -> float:
    """Seconds of one run, over `times` of them; a cold case has its caches flushed first."""
    if is_cold(case):
        flush_caches()
    return _seconds(lambda: [case.run() for _ in range(times)]) / times


def variant(case: Case) -> str:
    """The ISA of the kernel that runs a case."""
    table = backend.table()
    formats = table[case.op if case.op in table else f"{case.op}_forward"]
    name = "affine" if case.format.startswith("affine") else case.format
    return formats.get(name) or formats["f32"]  # embedding has one kernel for all formats


def record(case: Case, samples: Sequence[float], error: float | None) -> dict[str, Any]:
    """One JSON line: see the head of this file."""
    p10, median, p90 = (float(value) for value in np.percentile(samples, (10, 50, 90)))
    memory, compute = limits(case)
    return {
        **environment(),
        "op": case.op,
        "format": case.format,
        "model": case.model,
        "shape": case.shape,
        "variant": variant(case),
        "cold": is_cold(case),
        "rounds": len(samples),
        "median_s": median,
        "p10_s": p10,
        "p90_s": p90,
        "gb_per_s": case.nbytes / median / 1e9,
        "gflop_per_s": case.flops / median / 1e9,
        "roof": "memory" if memory > compute else "compute",
        "roof_percent": 100 * max(memory, compute) / median,
        "peer_ratio": None,
        "error": error,
    }


def errors(op: str) -> dict[str, float]:
    """{format: largest difference from the scalar reference, over its largest result}, at a tiny size."""

    def results() -> list[tuple[str, list[np.ndarray]]]:
        found = []
        for case in cases(op, TINY):  # new cases: some ops change their arrays
            result = case.run()
            parts = result if isinstance(result, tuple) else (result,)
            found.append((case.format, [part.astype(np.float64) for part in parts]))
        return found

    mine = results()
    with backend.use(isa="scalar"):
        reference = results()
    worst: dict[str, float] = {}
    for (format, parts), (_, expected) in zip(mine, reference, strict=True):
        error = max(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30) for a, b in zip(parts, expected, strict=True))
        worst[format] = max(worst.get(format, 0.0), float(error))
    return worst


def run(
    ops: Sequence[str] = (), models: Iterable[Sizes] = MODELS, rounds: int = 7, show_progress: bool = True
) -> list[dict[str, Any]]:
    """Times every case of the ops (all without names) and returns its records, in the order of OPS.

    A round of an op goes over all its cases, so that a slow moment of the machine does not fall on one of them.
    ValueError: no such op.
    """
    unknown = [op for op in ops if op not in OPS]
    if unknown:
        raise ValueError(f"op: got {unknown[0]!r}, expected one of {', '.join(OPS)}")
    models, chosen, records = tuple(models), list(ops or OPS), []
    with progress(len(chosen) * rounds, "benchmarks", "round", show_progress) as bar:
        for op in chosen:
            todo, error = cases(op, models), errors(op)
            times = [repeats(case) for case in todo]
            samples: list[list[float]] = [[] for _ in todo]
            for _ in range(rounds):
                for case, count, seconds in zip(todo, times, samples, strict=True):
                    seconds.append(sample(case, count))
                bar.advance(note=op)
            records += [
                record(case, seconds, error.get(case.format)) for case, seconds in zip(todo, samples, strict=True)
            ]
    return records


def write_jsonl(records: Iterable[dict[str, Any]], path: str | Path) -> None:
    """One record a line; the file appears whole or not at all."""
    write_bytes(path, "".join(json.dumps(one) + "\n" for one in records).encode())
