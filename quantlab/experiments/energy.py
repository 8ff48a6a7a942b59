"""Energy and CO2e of a phase through codecarbon's offline tracker: no network, one CSV a phase, and how it was
measured in words.
"""

from __future__ import annotations

import csv
import io
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SAMPLE_SECONDS = 2.0


@dataclass
class Reading:
    """What a phase took; filled when the phase ends. Energies in kWh, `kg` of CO2 equivalents, intensity in g CO2e
    per kWh.

    `method` says for each part whether it is a counter's or an estimate; energies are None where nothing could be
    measured.
    """

    duration_s: float = 0.0
    cpu_kwh: float | None = None
    gpu_kwh: float | None = None
    ram_kwh: float | None = None
    kwh: float | None = None
    kg: float | None = None
    intensity_g_kwh: float | None = None
    country: str | None = None
    method: dict[str, str] = field(default_factory=dict)
    counter: bool = False  # True where every part that counts was read from a counter

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@contextmanager
def track(
    table: Path | None = None,
    project: str = "quantlab",
    country: str = "ESP",
    intensity_g_kwh: float | None = None,
    enabled: bool = True,
) -> Iterator[Reading]:
    """Measures what runs inside the `with` block.

    Args:
        table: the CSV to write (codecarbon's columns, one row), atomically; None writes none.
        country: ISO 3166 three-letter code that gives the carbon intensity, from codecarbon's own table.
        intensity_g_kwh: an intensity in g CO2e per kWh in place of the country's.
        enabled: False measures the duration only.
    """
    reading = Reading(country=country)
    tracker, reason = start(project, country, intensity_g_kwh) if enabled else (None, "switched off")
    started = time.perf_counter()
    try:
        yield reading
    finally:
        reading.duration_s = time.perf_counter() - started
        if tracker is None:
            reading.method = {"all": f"not measured: {reason}"}
        else:
            finish(tracker, reading, table)


class Complaints(logging.Filter):
    """Lets nothing of codecarbon's log through, and keeps its last exception: codecarbon swallows its own."""

    last = "it gave no reason"

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1] is not None:
            self.last = f"{type(record.exc_info[1]).__name__}: {record.exc_info[1]}"
        return False


def start(project: str, country: str, intensity_g_kwh: float | None) -> tuple[Any, str]:
    """A started codecarbon tracker and "", or None and the reason after a second try.

    codecarbon is imported here: late, and once.
    """
    logger, complaints = logging.getLogger("codecarbon"), Complaints()
    logger.addFilter(complaints)
    try:
        from codecarbon import OfflineEmissionsTracker

        for _ in range(2):
            tracker = OfflineEmissionsTracker(
                country_iso_code=country, project_name=project, measure_power_secs=SAMPLE_SECONDS, log_level="warning",
                tracking_mode="machine", output_methods=[], output_handlers=[], allow_multiple_runs=True,
                force_carbon_intensity_g_co2e_kwh=intensity_g_kwh,
                # A user's ~/.codecarbon.config could name services; offline means none of them.
                emissions_endpoint=None, electricitymaps_api_token=None,
            )  # fmt: skip
            tracker.start()
            if getattr(tracker, "_start_time", None) is not None and getattr(tracker, "_hardware", None):
                return tracker, ""
            stop_threads(tracker)
    finally:
        logger.removeFilter(complaints)
        logger.setLevel(logging.CRITICAL)
    return None, f"codecarbon's tracker did not start ({complaints.last})"


def stop_threads(tracker: Any) -> None:
    """Ends the timers of a tracker that started by half."""
    for name in ("_scheduler", "_scheduler_monitor_power"):
        scheduler = getattr(tracker, name, None)
        if scheduler is not None:
            scheduler.stop()


def finish(tracker: Any, reading: Reading, table: Path | None) -> None:
    """Stops the tracker and its threads, fills `reading`, and writes the CSV."""
    timers = [
        getattr(getattr(tracker, name, None), "_timer", None) for name in ("_scheduler", "_scheduler_monitor_power")
    ]
    try:
        tracker.stop()
    except Exception as error:  # a meter that breaks must not cost the measurement that it accompanies
        reading.method = {"all": f"not measured: codecarbon's tracker broke ({type(error).__name__}: {error})"}
        stop_threads(tracker)
        return
    for timer in timers:
        if isinstance(timer, threading.Timer):
            timer.cancel()
            timer.join(timeout=5)
    data = getattr(tracker, "final_emissions_data", None)
    if data is None:
        reading.method = {"all": "not measured: codecarbon's tracker gave no result"}
        return
    reading.cpu_kwh, reading.gpu_kwh, reading.ram_kwh = data.cpu_energy, data.gpu_energy, data.ram_energy
    reading.kwh, reading.kg = data.energy_consumed, data.emissions
    forced = getattr(tracker, "force_carbon_intensity_g_co2e_kwh", None)
    table_value = country_intensity(reading.country) if forced is None else forced
    if table_value is None and data.energy_consumed:
        table_value = 1000 * data.emissions / data.energy_consumed
    reading.intensity_g_kwh = table_value
    reading.method = methods(tracker)
    reading.counter = all(text.startswith("counter") for part, text in reading.method.items() if part != "ram")
    if table is not None:
        write_table(table, dict(data.values))


def methods(tracker: Any) -> dict[str, str]:
    """How codecarbon got each part: a hardware counter or an estimate, in words."""
    found = {}
    for part in getattr(tracker, "_hardware", []):
        kind, mode = type(part).__name__, str(getattr(part, "_mode", ""))
        if kind == "GPU":
            found["gpu"] = "counter (NVML or AMD SMI)"
        elif kind == "RAM":
            found["ram"] = "estimate (codecarbon's constant power by memory size)"
        elif kind == "CPU" and mode in ("intel_rapl", "windows_emi"):
            found["cpu"] = "counter (RAPL)"
        elif kind == "CPU" and mode == "cpu_load":
            found["cpu"] = f"estimate (whole machine's CPU load on a {getattr(part, '_tdp', None) or '?'} W processor)"
        else:
            found[kind.lower()] = f"estimate ({mode or 'constant power'})"
    return found


def country_intensity(country: str | None) -> float | None:
    """Grams of CO2e per kWh of a country in codecarbon's table; None for one that it lacks."""
    from codecarbon.input import DataSource

    row = DataSource().get_global_energy_mix_data().get((country or "").upper())
    return None if row is None else float(row["carbon_intensity"])


def require_country(country: str) -> None:
    """ValueError where codecarbon's table lacks a country: it would then count with the world's mean, unsaid."""
    if country_intensity(country) is None:
        raise ValueError(f"country: got {country!r}, which codecarbon has no carbon intensity of; ESP is Spain's code")


def write_table(path: Path, row: dict[str, Any]) -> None:
    """One row in codecarbon's columns."""
    from .record import write_text

    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(row), lineterminator="\n")
    writer.writeheader()
    writer.writerow(row)
    write_text(path, text.getvalue())
