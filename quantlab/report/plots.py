"""The plots of a study, from records alone. Each function returns a matplotlib Figure; a variant has one colour in
all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from . import published
from .figure import INK, MUTED, WIDTH, bars, draw_all, name_rows, row_figure, smooth
from .study import Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def accuracy(study: Study) -> Figure:
    """Accuracy of every variant with its 95 % interval, the base's value and the largest class's share."""
    names = list(study.variants)
    figure, (axes,) = row_figure(len(names) + 0.6)
    places = name_rows(axes, study, names)
    for place, name in zip(places, names, strict=True):
        found = study.need(name, "accuracy")
        value, (low, high) = 100 * found["value"], (100 * end for end in found["ci95"])
        axes.plot([low, high], [place, place], color=study.colour(name), linewidth=2.4, solid_capstyle="round")
        axes.plot([value], [place], "o", color=study.colour(name), markersize=8)
        axes.annotate(
            f"{value:.1f}", (value, place), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=9
        )
    if study.base is not None:
        axes.axvline(
            100 * study.amount(study.base, "accuracy"), color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=0
        )
    axes.axvline(100 * study.majority, color=MUTED, linewidth=1, linestyle=":", zorder=0)
    edge = -0.55
    axes.annotate(
        "largest class",
        (100 * study.majority, edge),
        xytext=(3, 0),
        textcoords="offset points",
        color=MUTED,
        fontsize=8.5,
    )
    axes.set_ylim(-0.75, len(names) - 0.25)
    axes.set_xlabel(f"accuracy, % (95 % Wilson interval, n = {study.any['data']['n']:,})")
    axes.set_title("Accuracy")
    return figure


def size(study: Study) -> Figure:
    """Bytes of the checkpoint, and a mark for the bytes of the weights in memory."""
    names = list(study.variants)
    values = [study.amount(name, "size_checkpoint") / 1e6 for name in names]
    memory = [study.amount(name, "size_memory") / 1e6 for name in names]
    ratios = [study.relative(name, "size_checkpoint") for name in names]
    texts = [
        f"{value:,.1f}" + (f" (1/{1 / ratio:.1f})" if ratio and name != study.base else "")
        for name, value, ratio in zip(names, values, ratios, strict=True)
    ]
    figure, (axes,) = row_figure(len(names))
    bars(axes, study, names, values, texts, [max(pair) for pair in zip(values, memory, strict=True)])
    places = np.arange(len(names))[::-1]
    axes.plot(memory, places, "|", color=INK, markersize=13, markeredgewidth=1.6)
    axes.set_xlabel("checkpoint, MB (10⁶ bytes); mark: weights in memory")
    axes.set_title("Size")
    return figure


def evaluation_time(study: Study) -> Figure:
    """Median milliseconds a tweet with the fastest and slowest repeat."""
    names = [name for name in study.variants if study.metric(name, "ms_per_tweet")]
    found = [study.need(name, "ms_per_tweet") for name in names]
    values = [item["value"] for item in found]
    figure, (axes,) = row_figure(len(names))
    places = name_rows(axes, study, names)
    single = study.config["one_at_a_time"]
    ends = [(item["value"], item["p95"]) if single else item["range"] for item in found]
    errors = np.abs(np.array(ends).T - np.array(values))
    axes.barh(places, values, height=0.62, color=[study.colour(name) for name in names])
    axes.errorbar(values, places, xerr=errors, fmt="none", ecolor=INK, elinewidth=1.2, capsize=3)
    for place, value, (_, high) in zip(places, values, ends, strict=True):
        axes.annotate(f"{value:.3g}", (max(value, high), place), xytext=(6, 0), textcoords="offset points", va="center")
    axes.set_xlim(0, max(high for _, high in ends) * 1.2)
    spread = "whisker: 95th percentile" if single else f"whiskers: range of {found[0]['n']} repeats"
    axes.set_xlabel(f"median ms a tweet ({spread})")
    axes.set_title("Evaluation time" + (", one tweet at a time" if single else ", in batches"))
    return figure


def quantization_time(study: Study) -> Figure | None:
    """Seconds that each quantization took."""
    names = [name for name in study.variants if study.metric(name, "quantization_time")]
    if not names:
        return None
    values = [study.amount(name, "quantization_time") for name in names]
    partly = [bool(study.variants[name].get("quantization_resumed")) for name in names]
    figure, (axes,) = row_figure(len(names))
    bars(
        axes,
        study,
        names,
        values,
        [("≥ " if part else "") + f"{value:.3g}" for value, part in zip(values, partly, strict=True)],
    )
    axes.set_xlabel("seconds, one run" + (" (≥: went on after a stop)" if any(partly) else ""))
    axes.set_title("Quantization time")
    return figure


def emissions(study: Study) -> Figure | None:
    """Grams of CO2e of both phases, one panel each."""
    phases = {"quantization": "Emissions of quantizing", "evaluation": "Emissions of evaluating"}
    held = {phase: [name for name in study.variants if study.energy(name, phase)] for phase in phases}
    held = {phase: names for phase, names in held.items() if names}
    if not held:
        return None
    from matplotlib.figure import Figure

    heights = [0.36 * len(names) + 1.1 for names in held.values()]
    figure = Figure(figsize=(WIDTH, sum(heights)))
    panels = figure.subplots(len(held), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axes, (phase, names) in zip(panels, held.items(), strict=True):
        found = [item for name in names if (item := study.energy(name, phase)) is not None]
        grams = [1000 * item["kg"] for item in found]
        bars(axes, study, names, grams, [f"{gram:.3g}" for gram in grams])
        how = "counter" if all(item["counter"] for item in found) else "estimate"
        axes.set_xlabel(f"g CO2e ({how}, {found[0]['intensity_g_kwh']:g} g/kWh, {found[0]['country']})")
        axes.set_title(phases[phase])
    return figure


def loss(study: Study) -> Figure | None:
    """Training and evaluation loss of the head, step by step, and the step that was kept."""
    if study.head is None or not study.head.get("history"):
        return None
    from matplotlib.figure import Figure

    history = study.head["history"]
    steps = [row["step"] for row in history]
    figure = Figure(figsize=(WIDTH, 3.3))
    axes = figure.add_subplot()
    axes.plot(steps, [row["train_loss"] for row in history], color="#3d8bd4", linewidth=0.9, alpha=0.45)
    axes.plot(
        steps,
        smooth([row["train_loss"] for row in history]),
        color="#1f5fa8",
        linewidth=1.8,
        label="training (batch, smoothed)",
    )
    axes.plot(
        steps,
        [row["eval_loss"] for row in history],
        color="#d1603d",
        linewidth=2,
        label=f"evaluation (n = {study.head['data']['val']['n']:,})",
    )
    best = min(history, key=lambda row: row["eval_loss"])
    axes.plot([best["step"]], [best["eval_loss"]], "o", color="#d1603d", markersize=7)
    kept = f"best {best['eval_loss']:.3f}"
    axes.annotate(
        kept, (best["step"], best["eval_loss"]), xytext=(0, 10), textcoords="offset points", ha="right", fontsize=9
    )
    axes.grid(axis="y")
    axes.margins(y=0.14)
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy, nat")
    axes.set_title("Loss of the head")
    axes.legend(loc="upper right", fontsize=9)
    return figure


def confusions(study: Study) -> Figure:
    """A confusion matrix for every variant: counts, shaded by the share of the true class."""
    from matplotlib.figure import Figure

    names = list(study.variants)
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    size = len(study.any["classification"]["labels"])
    figure = Figure(figsize=(WIDTH, rows * (WIDTH / columns + 0.25) + 0.3))
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    for index, (axes, name) in enumerate(zip(panels, names, strict=False)):
        confusion_panel(axes, study, name, index % columns == 0, written=size <= 6)
    figure.supxlabel("predicted", fontsize=9.5, color=MUTED)
    figure.supylabel("true", fontsize=9.5, color=MUTED)
    return figure


def confusion_panel(axes: Axes, study: Study, name: str, first: bool, written: bool) -> None:
    """One confusion matrix: rectangles in the variant's colour, the counts in them where they can be read."""
    from matplotlib.patches import Rectangle

    result = study.variants[name]["classification"]
    counts = np.array(result["confusion"])
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    for (row, column), share in np.ndenumerate(shares):
        axes.add_patch(Rectangle((column, row), 1, 1, facecolor=study.colour(name), alpha=float(share), linewidth=0))
        if written:
            axes.text(column + 0.5, row + 0.5, f"{counts[row, column]:,}", ha="center", va="center", fontsize=9)
    size = len(counts)
    axes.set(xlim=(0, size), ylim=(size, 0), aspect="equal")
    short = [label[:3] for label in result["labels"]] if written else [""] * size
    axes.set_xticks(np.arange(size) + 0.5, short, fontsize=8.5)
    axes.set_yticks(np.arange(size) + 0.5, short if first else [""] * size, fontsize=8.5)
    axes.grid(False)
    for side in axes.spines.values():
        side.set_visible(True)
    axes.set_title(study.title(name), fontsize=9.5, fontweight="normal")


def accuracy_by_size(study: Study) -> Figure:
    """Accuracy against the size of the checkpoint: what each byte buys."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 4.0))
    axes = figure.add_subplot()
    for name in study.variants:
        found = study.need(name, "accuracy")
        x, y = study.amount(name, "size_checkpoint") / 1e6, 100 * found["value"]
        ends = np.abs(100 * np.array(found["ci95"]) - y)[:, None]
        axes.errorbar(
            [x],
            [y],
            yerr=ends,
            fmt="o",
            color=study.colour(name),
            markersize=8,
            elinewidth=1.6,
            label=study.title(name),
        )
    axes.set_xscale("log")
    sizes = sorted({round(study.amount(name, "size_checkpoint") / 1e6) for name in study.variants})
    ticks = [value for index, value in enumerate(sizes) if index == 0 or value / sizes[index - 1] > 1.13]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.grid(axis="y")
    axes.margins(x=0.12)
    axes.set_xlabel("checkpoint, MB (log scale)")
    axes.set_ylabel("accuracy, %")
    axes.set_title("Accuracy against size")
    figure.legend(fontsize=8.5, ncols=4, loc="outside lower center", handletextpad=0.2, columnspacing=0.8)
    return figure


def beside_published(study: Study) -> Figure | None:
    """Ours (filled) and the published figures (hollow), each relative to its own fp32 base."""
    names = [name for name in study.variants if name in published.FIGURES and name != "fp32"]
    if study.base != "fp32" or not names:
        return None
    figure, panels = row_figure(len(names), 3)
    measures: list[tuple[str, Callable[[str], float | None], Callable[[str], float | None]]] = [
        (
            "Size, relative to fp32",
            lambda name: study.relative(name, "size_checkpoint"),
            lambda name: published.relative(name, "size"),
        ),
        (
            "Time a tweet, relative to fp32",
            lambda name: study.relative(name, "ms_per_tweet"),
            lambda name: published.relative(name, "evaluation"),
        ),
        (
            "Accuracy, relative change in %",
            lambda name: change(study, name),
            lambda name: published.FIGURES[name]["accuracy_change"],
        ),
    ]
    for axes, (text, ours, theirs) in zip(panels, measures, strict=True):
        places = name_rows(axes, study, names)
        for place, name in zip(places, names, strict=True):
            for value, face, mark in ((ours(name), study.colour(name), "o"), (theirs(name), "none", "D")):
                if value is not None:
                    axes.plot(
                        [value],
                        [place],
                        mark,
                        markersize=8,
                        markerfacecolor=face,
                        markeredgecolor=study.colour(name),
                        markeredgewidth=1.6,
                    )
        axes.axvline(0 if "%" in text else 1, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        axes.margins(x=0.1)
        axes.set_title(text)
    panels[-1].set_xlabel("● ours   ◇ published: Llama-2-7B on an A100, other data")
    return figure


def change(study: Study, name: str) -> float | None:
    ratio = study.relative(name, "accuracy")
    return None if ratio is None else 100 * (ratio - 1)


PLOTS: Mapping[str, Callable[[Study], Any]] = {
    "accuracy": accuracy, "size": size, "evaluation_time": evaluation_time, "quantization_time": quantization_time,
    "emissions": emissions, "accuracy_by_size": accuracy_by_size, "loss": loss, "confusion": confusions,
    "published": beside_published,
}  # fmt: skip


def draw(study: Study) -> dict[str, Figure]:
    """Every plot that the study has the numbers for."""
    return draw_all(PLOTS, study)
