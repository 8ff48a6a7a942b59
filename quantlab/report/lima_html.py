"""The HTML page of the LIMA study."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any

from . import lima_tables as tables
from .lima import Lima
from .numbers import ABSENT
from .page import bullets, details, document, environment_html, failures, figure_grid, section, table_html

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CAPTIONS = {
    "generation": "The published study's plot. A line that stays flat serves a larger batch for nothing.",
    "rate": "Without the prompt: what each row gets after its first token, of all rows together.",
    "training": "Evaluations in between are not counted.",
    "loss": "The held-out conversations are never trained on.",
    "quality_by_speed": "Down and to the right is better. The intervals are of single baselines; differences are "
    "paired, in the table.",
    "tuning_gain": "Held-out loss, paired with the same format without an adapter: left of the line is better.",
    "merging": "The adapter was trained beside its base's quantized weights: other weights make another model of it.",
    "published": "Each relative to its own batch 1. The models and machines differ: see the table.",
}


def page(study: Lima, figures: Mapping[str, Figure]) -> str:
    """The whole page."""
    found = {table.name: table for table in tables.all_tables(study)}
    ours = {name: figure for name, figure in figures.items() if name != "published"}
    parts = [failures(study), bullets(findings(study))]
    for name in ("quality", "merging", "training", "generation", "cost"):
        if name in found:
            parts.append(section(found[name].heading, table_html(study, found[name])))
    parts += [
        section("Figures", figure_grid(ours, CAPTIONS)),
        section("Sample answers", answers_html(study)),
        published_section(study, found, figures),
        section("How it was measured", bullets(study.notes) + environment_html(study.any["env"], facts(study))),
    ]
    return document(tables.heading(study), subtitle(study), parts)


def subtitle(study: Lima) -> str:
    """What was run, in a line or two."""
    env, config = study.any["env"], study.config
    count = sum("-" in name for name in study.baselines)
    parts = ", ".join(f"{part} is {study.part_title(part)}" for part in ("bnb", "gptq", "fp16"))
    return (
        f"LoRA adapters on conversations, {count} baselines of tuning and inference ({parts}). "
        f"{study.machine_line}. {str(study.any['started'])[:10]}, preset “{config['preset']}”, "
        f"quantlab {env['quantlab']}."
    )


def findings(study: Lima) -> list[str]:
    """The result in a few sentences, each resting on a number."""
    lines = []
    for name in study.baselines:
        change = study.difference(f"infer-{name}", study.before(name)) if "-" in name else None
        if change is not None:
            low, high = change[1] or (change[0], change[0])
            verdict = "falls" if high < 0 else "rises" if low > 0 else "does not move beyond its interval"
            lines.append(
                f"{study.title(name)}: the held-out loss {verdict} by tuning: {tables.change_text(change)} nat."
            )
    for part in study.tuned:
        change = study.difference(f"merge-{part}", f"tune-{part}", "requantized")
        if change is not None:
            lines.append(
                f"The adapter of {study.part_title(part)}, merged into its base and quantized again as it was: "
                f"{tables.change_text(change)} nat against the adapter beside the weights."
            )
    ratio = tables.training_ratio(study, "gptq")
    if ratio is not None:
        lines.append(
            f"Tuning over {study.part_title('gptq')} runs at {ratio:.2f} times the speed of tuning over "
            f"{study.part_title('bnb')} (published: {tables.published_training_ratio():.2f} times)."
        )
    sizes = study.batches
    for name in study.baselines:
        ratio = tables.relative(study, name, sizes[-1], name, sizes[0])
        if ratio is not None and name in ("bnb-bnb", "gptq-gptq"):
            lines.append(f"{study.title(name)}: batch {sizes[-1]} takes {ratio:.1f} times as long as batch {sizes[0]}.")
    return lines


def answers_html(study: Lima) -> str:
    """Answers to the same questions, side by side."""
    blocks = []
    for question, answers in study.answers().items():
        items = "".join(
            f"<dt><span class='dot' style='background:{study.colour(name)}'></span>{escape(study.title(name))}</dt>"
            f"<dd>{escape(answer) or ABSENT}</dd>"
            for name, answer in answers.items()
        )
        blocks.append(details(question, f"<dl>{items}</dl>"))
    note = f"Greedy, at most {study.config['answer_tokens']} tokens. The questions are not of the data."
    return "".join(blocks) + f"<p class='caption'>{escape(note)}</p>"


def published_section(study: Lima, found: Mapping[str, tables.Table], figures: Mapping[str, Figure]) -> str:
    """The published figures: ours beside theirs where both have the baseline, theirs as printed always."""
    ours = table_html(study, found["published"]) if "published" in found else ""
    if "published" in figures:
        ours += figure_grid({"published": figures["published"]}, CAPTIONS)
    theirs = details("The published figures as printed (theirs)", table_html(study, tables.as_published()))
    return section("Beside the published study", ours + theirs)


def facts(study: Lima) -> dict[str, Any]:
    """What a reader needs to know of the data, beside the machine."""
    data = study.any["data"]["held_out"]
    what = f"{data['name']}, n = {data['n']:,}, SHA-256 {data['sha256']}"
    return {"Held-out conversations": what, "Seed": study.config["seed"]}
