"""What the report of each experiment is made of: the one place that knows them all."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantlab.experiments.record import RecordError

from .records import experiment_of
from .table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Report:
    """study: the records. csv: rows of plain numbers by file name, the first what `--json` prints. draw, page: make the
    figures of the study, and the HTML page of the study and its figures.
    """

    study: Any
    heading: str
    tables: list[Table]
    csv: dict[str, list[dict[str, Any]]]
    draw: Callable[[Any], dict[str, Figure]]
    page: Callable[[Any, Mapping[str, Figure]], str]


def load_report(run: str | os.PathLike[str]) -> Report:
    """The report of a run directory. Raises RecordError when it holds nothing to report."""
    experiment = experiment_of(run)
    if experiment == "tweeteval":
        from . import html, plots, tables
        from .study import load_study

        study = load_study(run)
        csv = {"variants": tables.raw_rows(study), "classes": tables.class_rows(study)}
        return Report(study, tables.heading(study), tables.all_tables(study), csv, plots.draw, html.page)
    if experiment == "lima":
        from . import lima_html, lima_plots, lima_tables
        from .lima import load_lima

        lima = load_lima(run)
        csv = {"baselines": lima_tables.raw_rows(lima), "training": lima_tables.training_rows(lima)}
        found = lima_tables.all_tables(lima)
        return Report(lima, lima_tables.heading(lima), found, csv, lima_plots.draw, lima_html.page)
    raise RecordError(f"{run}: a run of {experiment!r}; reports are of 'tweeteval' and 'lima'")
