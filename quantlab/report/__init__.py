"""Reports from records alone: tables (Markdown, CSV), PNG plots and one self-contained HTML page."""

from __future__ import annotations

import io
import os
from pathlib import Path

PNG_DPI = 160


def build_report(run: str | os.PathLike[str], force: bool = True) -> dict[str, Path]:
    """Writes the report of a run directory from its records: `report.html`, `report.md`, `tables/*.csv`,
    `figures/*.png`.

    force: False leaves a report that is newer than every record as it is. Returns the paths by name.
    Raises `quantlab.experiments.record.RecordError` when `run` holds nothing to report.
    """
    from quantlab.experiments.record import write_bytes, write_text

    path = Path(run)
    if not force and is_current(path):
        return written(path)
    from .figure import style
    from .kinds import load_report
    from .table import document, to_csv

    report = load_report(path)
    figures = report.draw(report.study)
    for name, figure in figures.items():
        image = io.BytesIO()
        with style():
            figure.savefig(image, format="png", dpi=PNG_DPI, facecolor="white")
        write_bytes(path / "figures" / f"{name}.png", image.getvalue())
    for name, rows in report.csv.items():
        write_text(path / "tables" / f"{name}.csv", to_csv(rows))
    write_text(path / "report.md", document(report.study, report.heading, report.tables))
    write_text(path / "report.html", report.page(report.study, figures))
    return written(path)


def is_current(path: Path) -> bool:
    """Whether the report of a run directory is newer than all of its records."""
    page = path / "report.html"
    records = [path / "config.json", *(path / "cells").glob("*.json")]
    return page.exists() and all(
        record.exists() and record.stat().st_mtime <= page.stat().st_mtime for record in records
    )


def written(path: Path) -> dict[str, Path]:
    """The files of a report that are there, by name."""
    files = [path / "report.html", path / "report.md", *sorted((path / "tables").glob("*.csv"))]
    return {file.name: file for file in [*files, *sorted((path / "figures").glob("*.png"))] if file.exists()}
