"""What the plots of every study share: the style, rows and bars, and how a set of plots is drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .records import Records

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#1b1d21", "#6a7079", "#dfe2e6"  # the HTML report replaces these three by its own
STYLE: Any = {
    "font.size": 10.5, "axes.titlesize": 11.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.labelsize": 10.5, "axes.labelcolor": MUTED, "text.color": INK, "axes.edgecolor": GRID, "xtick.color": MUTED,
    "ytick.color": INK, "ytick.labelcolor": INK, "axes.spines.top": False, "axes.spines.right": False,
    "axes.spines.left": False, "axes.grid": True, "axes.grid.axis": "x", "axes.axisbelow": True, "grid.color": GRID,
    "grid.linewidth": 0.8, "ytick.left": False,
    "xtick.bottom": False, "legend.frameon": False, "figure.facecolor": "none", "axes.facecolor": "none",
    "savefig.facecolor": "none", "svg.fonttype": "none", "figure.constrained_layout.use": True,
}  # fmt: skip
WIDTH = 5.4  # inches: about a phone's width at the report's scale


def row_figure(rows: float, panels: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of horizontal rows, one a name, with as many panels below each other as asked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, panels * (0.36 * rows + 1.0)))
    return figure, [figure.add_subplot(panels, 1, panel + 1) for panel in range(panels)]


def name_rows(axes: Axes, study: Records, names: Sequence[str]) -> np.ndarray:
    """Labels the rows with the names, the first on top, and returns their positions."""
    places = np.arange(len(names))[::-1]
    axes.set_yticks(places, [study.title(name) for name in names])
    axes.set_ylim(-0.6, len(names) - 0.4)
    return places


def bars(
    axes: Axes,
    study: Records,
    names: Sequence[str],
    values: Sequence[float],
    texts: Sequence[str],
    ends: Sequence[float] | None = None,
) -> None:
    """Horizontal bars from zero in the variants' colours, a text at the end of each (or at `ends`, where more is
    drawn).
    """
    places = name_rows(axes, study, names)
    ends = values if ends is None else ends
    axes.barh(places, values, height=0.62, color=[study.colour(name) for name in names])
    axes.set_xlim(0, max([*ends, 1e-12]) * 1.28)
    for place, end, text in zip(places, ends, texts, strict=True):
        axes.annotate(text, (end, place), xytext=(5, 0), textcoords="offset points", va="center")


def smooth(values: Sequence[float], span: int = 15) -> np.ndarray:
    """A centred moving mean; the ends average what there is."""
    width = max(1, min(span, len(values) // 4))
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def style() -> Any:
    """A context in which matplotlib has the report's style."""
    from matplotlib import rc_context

    return rc_context(STYLE)


def draw_all(plots: Mapping[str, Callable[[Any], Figure | None]], study: Records) -> dict[str, Figure]:
    """Every plot that the study has the numbers for."""
    with style():
        figures = {name: figure for name, plot in plots.items() if (figure := plot(study)) is not None}
        for figure in figures.values():
            figure.draw_without_rendering()  # lays it out, once for PNG and SVG
            figure.set_layout_engine("none")
    return figures
