"""The plots of the LIMA study, from records alone. A baseline has one colour in all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from . import lima_published as published
from .figure import INK, MUTED, WIDTH, bars, draw_all, name_rows, row_figure, smooth
from .lima import Lima

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MERGES = {"merged": "merged, floats", "requantized": "merged, quantized", "onto_floats": "onto the floats"}


def plain_figure(height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height))
    axes = figure.add_subplot()
    axes.grid(axis="y")
    return figure, axes


def sizes_axis(axes: Axes, sizes: list[int]) -> np.ndarray:
    """Batch sizes as categories, as the published plot has them."""
    places = np.arange(len(sizes))
    axes.set_xticks(places, [str(size) for size in sizes])
    axes.set_xlabel("batch size")
    return places


def generation(study: Lima) -> Figure:
    """The study's plot: seconds of one generation by batch size, with the range of the repeats."""
    sizes = study.batches
    figure, axes = plain_figure(4.3)
    places = sizes_axis(axes, sizes)
    for name in study.baselines:
        found = [study.need(f"infer-{name}", f"generate_{size}") for size in sizes]
        colour, dash = study.colour(name), "-" if "-" in name else (0, (4, 2))
        low, high = zip(*(item["range"] for item in found), strict=True)
        axes.fill_between(places, low, high, color=colour, alpha=0.18, linewidth=0)
        values = [item["value"] for item in found]
        axes.plot(places, values, "o", linestyle=dash, color=colour, markersize=4.5, label=study.title(name))
    axes.set_ylim(bottom=0)
    axes.set_ylabel(f"s for {study.config['new_tokens']} tokens a row")
    repeats = study.any["generation"]["repeats"]
    axes.set_title(f"Generation time (median and range of {repeats})")
    figure.legend(fontsize=8.5, ncols=2, loc="outside lower center")
    return figure


def rate(study: Lima) -> Figure:
    """Tokens a second of decoding by batch size."""
    sizes = study.batches
    figure, axes = plain_figure(4.1)
    places = sizes_axis(axes, sizes)
    for name in study.baselines:
        values = [study.amount(f"infer-{name}", f"decode_{size}") for size in sizes]
        dash = "-" if "-" in name else (0, (4, 2))
        axes.plot(
            places, values, "o", linestyle=dash, color=study.colour(name), markersize=4.5, label=study.title(name)
        )
    axes.set_ylim(bottom=0)
    axes.set_ylabel("tokens/s, all rows")
    axes.set_title("Decoding speed")
    figure.legend(fontsize=8.5, ncols=2, loc="outside lower center")
    return figure


def beside_published(study: Lima) -> Figure | None:
    """Generation time against that of batch 1: ours (full lines) and as published (dashed)."""
    sizes = [size for size in study.batches if size in published.BATCHES]
    names = [name for name in study.baselines if name in published.GENERATION]
    if 1 not in sizes or len(sizes) < 2 or not names:
        return None
    figure, axes = plain_figure(4.1)
    places = sizes_axis(axes, sizes)
    for name in names:
        ours = [study.amount(f"infer-{name}", f"generate_{size}") for size in sizes]
        theirs = [published.GENERATION[name][published.BATCHES.index(size)] for size in sizes]
        axes.plot(places, np.divide(ours, ours[0]), "o-", color=study.colour(name), markersize=4.5, label=name)
        axes.plot(
            places, np.divide(theirs, theirs[0]), "D", linestyle=(0, (4, 2)), color=study.colour(name), markersize=4.5,
            markerfacecolor="none", label=f"{name}, theirs",
        )  # fmt: skip
    axes.set_yscale("log", base=2)
    axes.set_yticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
    axes.set_ylabel("time against batch 1 (log scale)")
    axes.set_title("Growth with the batch, beside the published")
    figure.legend(fontsize=8.5, ncols=3, loc="outside lower center")
    return figure


def training(study: Lima) -> Figure | None:
    """Tokens a second and peak memory of each tuning."""
    if not study.tuned:
        return None
    cells = [f"tune-{part}" for part in study.tuned]
    figure, (speed, memory) = row_figure(len(cells), 2)
    rates = [study.amount(cell, "tokens_per_s") for cell in cells]
    samples = [study.amount(cell, "samples_per_s") for cell in cells]
    texts = [f"{rate:,.0f} ({each:.2f} samples/s)" for rate, each in zip(rates, samples, strict=True)]
    bars(speed, study, cells, rates, texts)
    speed.set_xlim(0, 1.6 * max(rates))
    speed.set_xlabel("tokens/s")
    speed.set_title("Training speed")
    peaks = [(study.peak(cell, "training") or 0.0) / 1e6 for cell in cells]
    bars(memory, study, cells, peaks, [f"{peak:,.0f}" for peak in peaks])
    memory.set_xlabel(f"{study.peak_name}, MB")
    memory.set_title("Training memory")
    return figure


def loss(study: Lima) -> Figure | None:
    """Training loss (smoothed) and held-out loss, step by step."""
    tuned = [part for part in study.tuned if study.cells[f"tune-{part}"].get("history")]
    if not tuned:
        return None
    figure, axes = plain_figure(4.1)
    for part in tuned:
        record, colour = study.cells[f"tune-{part}"], study.colour(part)
        steps = [row["step"] for row in record["history"]]
        losses = [row["loss"] for row in record["history"]]
        axes.plot(steps, smooth(losses), color=colour, linewidth=1.5, alpha=0.6)
        before = study.value(f"base-{part}", "eval_loss")
        points = [] if before is None else [(0, before)]
        points += [(row["step"], row["eval_loss"]) for row in record["evaluations"]]
        label = study.part_title(part)
        axes.plot(*zip(*points, strict=True), "o-", color=colour, linewidth=2.2, markersize=5, label=label)
    n = study.cells[f"tune-{tuned[0]}"]["data"]["held_out"]["n"]
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nat a token")
    axes.set_title("Loss: training (thin, smoothed), held out (dots)")
    axes.legend(loc="upper right", fontsize=9, title=f"held out: n = {n:,}", title_fontsize=8.5)
    return figure


def quality_by_speed(study: Lima) -> Figure:
    """Held-out loss against decoding speed of the largest batch: what each baseline buys."""
    size = study.batches[-1]
    figure, axes = plain_figure(4.2)
    for name in study.baselines:
        found, cell = study.loss(f"infer-{name}"), f"infer-{name}"
        if found is None:
            continue
        ends = np.abs(np.array(found[1] or (found[0], found[0])) - found[0])[:, None]
        rate, label = study.amount(cell, f"decode_{size}"), study.title(name)
        fields: dict[str, Any] = {"color": study.colour(name), "markersize": 8, "elinewidth": 1.4}
        axes.errorbar([rate], [found[0]], yerr=ends, fmt="o" if "-" in name else "D", label=label, **fields)
    axes.margins(x=0.12)
    axes.set_xlabel(f"decoding, tokens/s at batch {size}")
    axes.set_ylabel("held-out loss, nat a token")
    axes.set_title("Quality against speed")
    figure.legend(fontsize=8.5, ncols=2, loc="outside lower center")
    return figure


def tuning_gain(study: Lima) -> Figure | None:
    """The change of the held-out loss by tuning, paired with the same format untuned."""
    names = [name for name in study.baselines if "-" in name and study.difference(f"infer-{name}", study.before(name))]
    if not names:
        return None
    figure, (axes,) = row_figure(len(names) + 0.4)
    for place, name in zip(name_rows(axes, study, names), names, strict=True):
        interval(axes, place, study.difference(f"infer-{name}", study.before(name)), study.colour(name))
    axes.axvline(0, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    axes.set_xlabel("nat a token (95 % interval)")
    axes.set_title("What tuning changes")
    return figure


def merging(study: Lima) -> Figure | None:
    """The loss that each way of merging adds to the adapter beside its base."""
    rows = [
        (part, kind)
        for part in study.tuned
        for kind in MERGES
        if study.difference(f"merge-{part}", f"tune-{part}", kind) is not None
    ]
    if not rows:
        return None
    figure, (axes,) = row_figure(len(rows) + 0.4)
    places = np.arange(len(rows))[::-1]
    axes.set_yticks(places, [f"{study.part_title(part)}: {MERGES[kind]}" for part, kind in rows], fontsize=9)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    for place, (part, kind) in zip(places, rows, strict=True):
        interval(axes, place, study.difference(f"merge-{part}", f"tune-{part}", kind), study.colour(part))
    axes.axvline(0, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    axes.set_xlabel("nat a token (95 % interval)")
    axes.set_title("Loss added by merging")
    return figure


def interval(axes: Axes, place: float, found: Any, colour: str) -> None:
    """A dot with its interval and its value."""
    value, ends = found
    if ends is not None:
        axes.plot(ends, [place, place], color=colour, linewidth=2.4, solid_capstyle="round")
    axes.plot([value], [place], "o", color=colour, markersize=8)
    axes.annotate(
        f"{value:+.3f}", (value, place), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8.5, color=INK
    )


PLOTS: Mapping[str, Callable[[Lima], Any]] = {
    "generation": generation, "rate": rate, "training": training, "loss": loss, "quality_by_speed": quality_by_speed,
    "tuning_gain": tuning_gain, "merging": merging, "published": beside_published,
}  # fmt: skip


def draw(study: Lima) -> dict[str, Figure]:
    """Every plot that the study has the numbers for."""
    return draw_all(PLOTS, study)
