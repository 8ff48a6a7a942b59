"""Run directories and cells: the record of an experiment on disk.

A run directory holds `config.json` (as resolved), one `cells/<cell_id>.json` for each finished or failed cell,
`logs/metrics.jsonl`, `emissions/*.csv`, and what a report adds (`figures/`, `report.html`). A cell is one unit of
work with one resolved configuration. Its id ends in a hash of that configuration: a finished cell is skipped by the
next run, a failed one is kept with its error and run again. Every file but the log is written beside its place and
renamed, so a killed run leaves whole files only.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from quantlab import cuda
from quantlab.config import difference
from quantlab.io import files

from . import energy
from .environment import environment, peak_host_bytes, reset_peak_host_bytes

RUN_SCHEMA = "quantlab.run/1"
CELL_SCHEMA = "quantlab.cell/1"
KEY_DIGITS = 12  # of the SHA-256 of a cell's configuration: 48 bits
CELL_FIELDS = {"name": str, "status": str, "metrics": dict, "timings": dict, "memory": dict, "energy": dict,
               "env": dict, "notes": list}  # fmt: skip
# what to do about a file of a run that cannot be read
MEND = "delete it and run the study again: it makes what is missing, and keeps the rest"


class RecordError(ValueError):
    """A run directory that cannot be used: another configuration, another experiment, a damaged file, a second
    process.
    """


def write_text(path: Path, text: str) -> None:
    """Writes `text` to `path` atomically, in UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes `content` to `path` atomically: a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_bytes(path, content)


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Writes a record with one line for each top-level field: short for long lists, and still good to read and to
    compare.
    """
    lines = [f" {json.dumps(key)}: {json.dumps(plain(value), allow_nan=False)}" for key, value in record.items()]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises RecordError when the file cannot be read as one."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RecordError(f"{path}: not a readable JSON record ({error}); {MEND}") from error
    if not isinstance(record, dict):
        raise RecordError(f"{path}: expected a JSON object, got {type(record).__name__}; {MEND}")
    return record


def read_cell(path: Path) -> dict[str, Any]:
    """The record of a cell. Raises RecordError when the file cannot be read as one."""
    record = read_json(path)
    for field, kind in CELL_FIELDS.items():
        if not isinstance(record.get(field), kind):
            found = type(record[field]).__name__ if field in record else "nothing"
            raise RecordError(f"{path}: not the record of a cell, its field {field} is {found}; {MEND}")
    return record


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The configuration that a run directory holds. Raises RecordError when it holds none."""
    path = Path(directory) / "config.json"
    config = read_json(path).get("config")
    if not isinstance(config, dict):
        raise RecordError(f"{path}: not a run's configuration, its field config is {type(config).__name__}; {MEND}")
    return config


def plain(value: Any) -> Any:
    """`value` in JSON's types: NumPy scalars and arrays, tuples, paths and mappings are converted; NaN and infinity
    become null.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):  # NumPy arrays and scalars
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int, bool)):
        return value
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value)


def key_of(config: Mapping[str, Any]) -> str:
    """The key of a resolved configuration: the first digits of the SHA-256 of its canonical JSON."""
    canonical = json.dumps(plain(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:KEY_DIGITS]


def cell_id(experiment: str, name: str, config: Mapping[str, Any]) -> str:
    """The id of a cell: its name and the key of all that it depends on."""
    return f"{name}-{key_of({'experiment': experiment, 'name': name, 'config': config})}"


def metric(
    value: float,
    unit: str,
    n: int,
    higher_is_better: bool | None = None,
    ci95: Sequence[float] | None = None,
    stderr: float | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """One measured number: `n` is how many samples it rests on, `ci95` its 95 % interval where it is a sample."""
    ends = None if ci95 is None else [float(ci95[0]), float(ci95[1])]
    fields = {"value": float(value), "stderr": stderr, "ci95": ends, "n": int(n), "unit": unit}
    return {**fields, "higher_is_better": higher_is_better, **extra}


def timing(values: Sequence[float], unit: str = "s", **extra: Any) -> dict[str, Any]:
    """Raw timings with their summary. `stdev` is the sample's, null for a single value."""
    import numpy as np

    if len(values) == 0:
        raise ValueError("timing: got no values, expected at least one")
    sample = np.asarray(values, dtype=np.float64)
    p50, p90, p95, p99 = np.percentile(sample, [50, 90, 95, 99])
    stdev = float(sample.std(ddof=1)) if sample.size > 1 else None
    summary = {"mean": float(sample.mean()), "p50": float(p50), "p90": float(p90), "p95": float(p95), "p99": float(p99)}
    return {"values": sample.tolist(), "unit": unit, **summary, "stdev": stdev, "n": int(sample.size), **extra}


def read_cells(directory: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of all cells of a run directory, in the order in which they were started."""
    cells = [read_cell(path) for path in sorted((Path(directory) / "cells").glob("*.json"))]
    return sorted(cells, key=lambda cell: str(cell.get("started")))


def read_log(directory: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The events of logs/metrics.jsonl. A line that a killed process left unfinished is passed over."""
    path = Path(directory) / "logs" / "metrics.jsonl"
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return events


class Cell:
    """The record of one cell while it is being worked on. Its methods add fields; the run writes it when the work
    ends.
    """

    def __init__(self, run: Run, name: str, config: Mapping[str, Any]):
        self.run, self.name = run, name
        self.id = run.cell_id(name, config)
        self.record: dict[str, Any] = {
            "schema": CELL_SCHEMA, "cell_id": self.id, "experiment": run.experiment, "name": name,
            "config": plain(config), "status": "running", "metrics": {}, "timings": {}, "memory": {}, "energy": {},
            "env": {}, "seeds": {}, "data": {},
            "notes": [], "started": datetime.now(timezone.utc).isoformat(), "duration_s": 0.0,
        }  # fmt: skip

    def metric(self, name: str, value: float, unit: str, n: int, **fields: Any) -> None:
        self.record["metrics"][name] = metric(value, unit, n, **fields)

    def timing(self, name: str, values: Sequence[float], unit: str = "s", **extra: Any) -> None:
        self.record["timings"][name] = timing(values, unit, **extra)

    def note(self, text: str) -> None:
        """A sentence that a reader of the numbers must know."""
        self.record["notes"].append(text)

    def log(self, **event: Any) -> None:
        self.run.log(cell=self.id, name=self.name, **event)

    @contextmanager
    def phase(self, name: str) -> Iterator[energy.Reading]:
        """Measures what runs inside: seconds (timings), energy (energy, emissions/*.csv) and peak memory (memory), of
        the host and, where CUDA can be used, of its device.
        """
        exact = reset_peak_host_bytes()
        if cuda.usable():
            cuda.reset_peak()
        settings = self.run.energy
        table = self.run.path / "emissions" / f"{self.name}_{name}.csv"
        before = time.process_time()
        with energy.track(table, project=f"{self.run.experiment}/{self.name}/{name}", **settings) as reading:
            yield reading
        # Processor seconds of all threads: far below threads times wall, another process had the machine too.
        self.timing(name, [reading.duration_s], cpu_s=time.process_time() - before)
        self.record["energy"][name] = reading.to_dict()
        peak = {"value": peak_host_bytes(), "unit": "B", "scope": "phase" if exact else "process so far"}
        self.record["memory"].setdefault("peak_host", {})[name] = peak
        if cuda.usable():
            peak = {"value": cuda.memory()["peak"], "unit": "B", "scope": "phase"}
            self.record["memory"].setdefault("peak_device", {})[name] = peak


class Run:
    """A run directory, opened for writing by one process at a time.

    Args:
        path: the directory; made when it is not there.
        experiment: its name, such as "tweeteval".
        config: the resolved configuration. A directory that holds another one is refused with RecordError.
        selection: names of the fields of `config` that only choose which cells to run: they may differ between runs
            of a directory.
        energy: keyword arguments of `quantlab.experiments.energy.track`.
        on_event: called with each event that goes to logs/metrics.jsonl.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        experiment: str,
        config: Mapping[str, Any],
        selection: Sequence[str] = (),
        energy: Mapping[str, Any] | None = None,
        on_event: Callable[[dict[str, Any]], None] | None = None,
    ):
        self.path, self.experiment, self.config = Path(path), experiment, plain(config)
        self.energy = dict(energy or {})
        self._on_event = on_event
        if self.path.exists() and not self.path.is_dir():
            raise RecordError(f"{self.path}: expected a run directory, found a file")
        (self.path / "cells").mkdir(parents=True, exist_ok=True)
        self._lock = self._take_lock()
        try:
            self._settle_config(frozenset(selection))
        except BaseException:
            self.close()
            raise
        self._environment: dict[str, Any] | None = None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._lock.close()

    def _take_lock(self) -> Any:
        lock = open(self.path / ".lock", "w")  # noqa: SIM115 - held open as long as the run
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise RecordError(
                f"{self.path}: another process is writing to this run directory; wait for it or choose another"
            ) from error
        return lock

    def _settle_config(self, selection: frozenset[str]) -> None:
        path = self.path / "config.json"
        if path.exists():
            stored = read_json(path)
            if stored.get("experiment") != self.experiment:
                raise RecordError(
                    f"{self.path}: holds a run of {stored.get('experiment')!r}, not of {self.experiment!r}; "
                    "choose another directory"
                )
            differing = difference(stored.get("config", {}), self.config, selection)
            if differing:
                raise RecordError(
                    f"{self.path}: holds a run with another configuration ({differing}); "
                    "choose another directory or repeat its settings"
                )
            if stored["config"] == self.config:
                return
        write_json(path, {"schema": RUN_SCHEMA, "experiment": self.experiment, "config": self.config})

    def cell_id(self, name: str, config: Mapping[str, Any]) -> str:
        return cell_id(self.experiment, name, config)

    def forget(self, name: str, config: Mapping[str, Any]) -> None:
        """Removes the record of a cell: the next run works on it again."""
        (self.path / "cells" / f"{self.cell_id(name, config)}.json").unlink(missing_ok=True)

    def read(self, cell_id: str) -> dict[str, Any] | None:
        """The record of a cell, or None where there is none yet."""
        path = self.path / "cells" / f"{cell_id}.json"
        return read_cell(path) if path.exists() else None

    def finished(self, name: str, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """The record of this cell if it is finished."""
        record = self.read(self.cell_id(name, config))
        return record if record is not None and record.get("status") == "done" else None

    def cell(self, name: str, config: Mapping[str, Any], work: Callable[[Cell], None]) -> dict[str, Any]:
        """Runs `work` unless this cell is finished, and returns its record: status "done", or "failed" with the error.

        An interrupt (Ctrl-C) is recorded as "cancelled" and raised again.
        """
        done = self.finished(name, config)
        if done is not None:
            return done
        cell = Cell(self, name, config)
        earlier = self.read(cell.id)
        if earlier is not None:
            past = {"started": earlier.get("started"), "status": earlier.get("status"), "error": earlier.get("error")}
            cell.record["earlier"] = [*earlier.get("earlier", []), past]
        started = time.perf_counter()
        try:
            work(cell)
            status, error = "done", None
        except Exception as problem:
            status, error = "failed", problem
        except BaseException as problem:
            self._finish(cell, "cancelled", problem, started)
            raise
        return self._finish(cell, status, error, started)

    def _finish(self, cell: Cell, status: str, error: BaseException | None, started: float) -> dict[str, Any]:
        cell.record.update(status=status, duration_s=time.perf_counter() - started)
        if self._environment is None:
            self._environment = environment()
        cell.record["env"] = self._environment
        if error is not None:
            text = "".join(traceback.format_exception(error))
            cell.record["error"] = {"type": type(error).__name__, "message": str(error), "traceback": text}
        cell.log(event=status, duration_s=cell.record["duration_s"], error=str(error) if error else None)
        write_json(self.path / "cells" / f"{cell.id}.json", cell.record)
        return cell.record

    def log(self, **event: Any) -> None:
        """Appends one event to logs/metrics.jsonl, on a line of its own even after a line that was cut short."""
        event = {"time": datetime.now(timezone.utc).isoformat(), **plain(event)}
        path = self.path / "logs" / "metrics.jsonl"
        path.parent.mkdir(exist_ok=True)
        with open(path, "ab+") as file:
            end = file.seek(0, os.SEEK_END)
            whole = end == 0 or os.pread(file.fileno(), 1, end - 1) == b"\n"
            file.write((b"" if whole else b"\n") + json.dumps(event).encode() + b"\n")
        if self._on_event is not None:
            self._on_event(event)
