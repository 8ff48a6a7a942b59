"""The HTML page of the TweetEval study."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from . import tables
from .numbers import p_value, percent, points
from .page import bullets, details, document, environment_html, failures, figure_grid, section, table_html
from .study import Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CAPTIONS = {
    "accuracy": "Share of the test tweets classified rightly. Intervals of single variants overlap easily: whether a "
    "variant differs from the base is what the paired test in the table says.",
    "size": "What the files hold, headers aside. Outside of the decoder layers quantized variants keep 16 bits.",
    "evaluation_time": "The same sample of tweets timed again and again, after a warm-up.",
    "quantization_time": "From the loaded fp32 model to the quantized one, calibration included.",
    "emissions": "Both phases of each variant.",
    "accuracy_by_size": "Up and to the left is better.",
    "loss": "The backbone is frozen: only the softmax head learns. The head with the least evaluation loss is kept for "
    "every variant.",
    "confusion": "Counts; the shade is the share of the true class.",
    "published": "Each relative to its own fp32 base. The models, machines and data differ: see the table.",
}


def page(study: Study, figures: Mapping[str, Figure]) -> str:
    """The whole page."""
    found = {table.name: table for table in tables.all_tables(study)}
    ours = {name: figure for name, figure in figures.items() if name != "published"}
    classes = details("Precision, recall and F1 of every class", table_html(study, found["classes"]))
    notes = bullets([*study.notes, tables.energy_note(study)])
    parts = [
        failures(study),
        bullets(findings(study)),
        section("Quality", table_html(study, found["quality"])),
        section("Size, time and energy", table_html(study, found["cost"])),
        section("Figures", figure_grid(ours, CAPTIONS)),
        published_section(study, found, figures),
        section("Classes", classes),
        section("How it was measured", notes + environment_html(study.any["env"], facts(study))),
    ]
    return document(tables.heading(study), subtitle(study), parts)


def subtitle(study: Study) -> str:
    """What was run, in a line or two."""
    data, env = study.any["data"], study.any["env"]
    how = "one at a time" if study.config["one_at_a_time"] else "in batches"
    return (
        f"A softmax head on the frozen model, then {len(study.variants)} variants on the same {data['n']:,} "
        f"{data['split']} tweets, {how}. {study.machine_line}. "
        f"{str(study.any['started'])[:10]}, preset “{study.config['preset']}”, quantlab {env['quantlab']}."
    )


def findings(study: Study) -> list[str]:
    """The result in a few sentences, each resting on a number and its test."""
    if study.base is None:
        return []
    base, accuracy = study.title(study.base), percent(study.metric(study.base, "accuracy"))
    majority = f"always answering the largest class, {100 * study.majority:.1f} %"
    lines = [f"{base} classifies {accuracy} % of the tweets rightly; {majority}."]
    for name, comparison in study.comparisons.items():
        verdict = "a difference" if comparison["mid_p"] < 0.05 else "no difference that these tweets can show"
        p = f"p = {p_value(comparison)}".replace("= <", "<")
        text = f"{study.title(name)}: {points(comparison)} points of accuracy against {base}, {verdict} ({p})"
        size, speed = study.relative(name, "size_checkpoint"), study.relative(name, "ms_per_tweet")
        text += f"; {1 / size:.1f} times smaller" if size and size < 0.98 else ""
        lines.append(text + (f"; {speed:.2f} times the time a tweet." if speed else "."))
    return lines


def facts(study: Study) -> dict[str, Any]:
    """What a reader needs to know of the data, beside the machine."""
    data = study.any["data"]
    what = f"{data['name']}, {data['split']}, n = {data['n']:,}, SHA-256 {data['sha256']}"
    return {"Test data": what, "Seed": study.config["seed"]}


def published_section(study: Study, found: Mapping[str, tables.Table], figures: Mapping[str, Figure]) -> str:
    """The published figures: ours beside theirs where both have the variant, theirs as printed always."""
    ours = table_html(study, found["published"]) if "published" in found else ""
    if "published" in figures:
        ours += figure_grid({"published": figures["published"]}, CAPTIONS)
    theirs = details("The published figures as printed (theirs)", table_html(study, tables.as_published()))
    return section("Beside the published study", ours + theirs)
