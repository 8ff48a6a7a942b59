"""One self-contained HTML page of a study: no script, no request, light and dark, for a phone, a desk and paper."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping
from html import escape
from typing import TYPE_CHECKING, Any

from . import tables
from .numbers import p_value, percent, points
from .plots import GRID, INK, MUTED, STYLE, colour
from .study import Study, title

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
STYLE_SHEET = """
:root { --ink: #1b1d21; --muted: #626871; --grid: #dfe2e6; --ground: #ffffff; --card: #f6f7f9; --warn: #a33b1f; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --muted: #a2a8b1; --grid: #3a3e45; --ground: #16181b; --card: #1e2125; --warn: #f0906f; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", sans-serif; }
main { max-width: 74rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: clamp(1.5rem, 5vw, 2.1rem); line-height: 1.2; margin: .5rem 0 .25rem; letter-spacing: -.01em; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--grid); }
p { margin: .5rem 0; max-width: 46rem; }
.lead { color: var(--muted); }
ul { padding-left: 1.1rem; max-width: 46rem; }
li { margin: .3rem 0; }
.scroll { overflow-x: auto; margin: .75rem 0 .25rem; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; min-width: 100%; }
th, td { padding: .4rem .55rem; text-align: right; border-bottom: 1px solid var(--grid); white-space: nowrap; }
th { font-weight: 600; color: var(--muted); vertical-align: bottom; white-space: normal; min-width: 4.4rem; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--ground); }
td:first-child { font-weight: 600; }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .5em; }
.caption, figcaption { color: var(--muted); font-size: .82rem; max-width: 46rem; }
.figures { display: grid; gap: 1rem; margin-top: 1rem; align-items: start; }
.figures { grid-template-columns: repeat(auto-fill, minmax(min(100%, 28rem), 1fr)); }
figure { margin: 0; padding: .9rem; background: var(--card); border-radius: .6rem; break-inside: avoid; }
figure svg { width: 100%; height: auto; display: block; }
figcaption { margin-top: .5rem; }
details { margin: .75rem 0; }
summary { cursor: pointer; color: var(--muted); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; font-size: .88rem; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
.warn { color: var(--warn); font-weight: 600; }
@media (max-width: 30rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .4rem; } }
@media print {
  :root { --ink: #000; --muted: #444; --grid: #ccc; --ground: #fff; --card: #fff; --warn: #7a2a12; }
  body { font-size: 10pt; }
  main { max-width: none; padding: 0; }
  .scroll { overflow: visible; }
  table { font-size: 7.5pt; }
  th, td { padding: .2rem .3rem; white-space: normal; min-width: 0; }
  th:first-child, td:first-child { position: static; }
  tr { break-inside: avoid; }
  h2 { break-after: avoid; }
  .figures { grid-template-columns: 1fr 1fr; }
  figure { padding: .3rem; }
  table { break-inside: avoid; }
  details::details-content { content-visibility: visible; }
}
"""


def page(study: Study, figures: Mapping[str, Figure]) -> str:
    """The whole page."""
    heading = f"{study.model} on {study.task}: what quantization costs"
    found = {table.name: table for table in tables.all_tables(study)}
    ours = {name: figure for name, figure in figures.items() if name != "published"}
    classes = details("Precision, recall and F1 of every class", table_html(study, found["classes"]))
    notes = bullets([*study.notes, tables.energy_sentence(study)])
    parts = [
        f"<h1>{escape(heading)}</h1>",
        f"<p class='lead'>{escape(subtitle(study))}</p>",
        failures(study),
        bullets(findings(study)),
        section("Quality", table_html(study, found["quality"])),
        section("Size, time and energy", table_html(study, found["cost"])),
        section("Figures", figure_grid(ours)),
        published_section(study, found, figures),
        section("Classes", classes),
        section("How it was measured", notes + environment_html(study)),
    ]
    head = "<meta charset='utf-8'><meta name='viewport' content='width=device-width, initial-scale=1'>"
    head += f"<meta name='color-scheme' content='light dark'><title>{escape(heading)}</title>"
    body = "\n".join(part for part in parts if part)
    return (
        f"<!doctype html>\n<html lang='en'><head>{head}<style>{STYLE_SHEET}</style></head>\n"
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


def section(heading: str, content: str) -> str:
    return f"<section><h2>{escape(heading)}</h2>\n{content}</section>"


def details(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def bullets(lines: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def subtitle(study: Study) -> str:
    """What was run, in a line or two."""
    data, env = study.any["data"], study.any["env"]
    how = "one at a time" if study.config["one_at_a_time"] else "in batches"
    return (
        f"A softmax head on the frozen model, then {len(study.variants)} variants on the same {data['n']:,} "
        f"{data['split']} tweets, {how}. {env['cpu']}, {env['threads']} threads ({env['isa']}). "
        f"{str(study.any['started'])[:10]}, preset “{study.config['preset']}”, quantlab {env['quantlab']}."
    )


def findings(study: Study) -> list[str]:
    """The result in a few sentences, each resting on a number and its test."""
    if study.base is None:
        return []
    base, accuracy = title(study.base), percent(study.metric(study.base, "accuracy"))
    majority = f"always answering the largest class, {100 * study.majority:.1f} %"
    lines = [f"{base} classifies {accuracy} % of the tweets rightly; {majority}."]
    for name, comparison in study.comparisons.items():
        verdict = "a difference" if comparison["mid_p"] < 0.05 else "no difference that these tweets can show"
        p = f"p = {p_value(comparison)}".replace("= <", "<")
        text = f"{title(name)}: {points(comparison)} points of accuracy against {base}, {verdict} ({p})"
        size, speed = study.relative(name, "size_checkpoint"), study.relative(name, "ms_per_tweet")
        text += f"; {1 / size:.1f} times smaller" if size and size < 0.98 else ""
        lines.append(text + (f"; {speed:.2f} times the time a tweet." if speed else "."))
    return lines


def failures(study: Study) -> str:
    """What did not finish, with its error: at the top, not hidden."""
    lines = [f"{title(cell['name'])} {cell['status']}: {tables.error_of(cell)}" for cell in study.unfinished]
    return f"<p class='warn'>Not finished:</p>{bullets(lines)}" if lines else ""


def table_html(study: Study, table: tables.Table) -> str:
    """A table that scrolls sideways on a small screen, with its variants' colours."""
    names = {title(name): name for name in study.variants}

    def first(text: str) -> str:
        dot = f"<span class='dot' style='background:{colour(names[text])}'></span>" if text in names else ""
        return f"<td>{dot}{escape(text)}</td>"

    head = "".join(f"<th scope='col'>{escape(column)}</th>" for column in table.columns)
    rows = "".join(
        f"<tr>{first(row[0])}{''.join(f'<td>{escape(text)}</td>' for text in row[1:])}</tr>" for row in table.rows
    )
    body = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f"<div class='scroll'>{body}</div><p class='caption'>{escape(table.caption)}</p>"


def figure_grid(figures: Mapping[str, Figure]) -> str:
    cards = ""
    for name, figure in figures.items():
        cards += f"<figure>{svg(name, figure)}<figcaption>{escape(CAPTIONS[name])}</figcaption></figure>"
    return f"<div class='figures'>{cards}</div>"


def published_section(study: Study, found: Mapping[str, tables.Table], figures: Mapping[str, Figure]) -> str:
    """The published figures: ours beside theirs where both have the variant, theirs as printed always."""
    ours = table_html(study, found["published"]) if "published" in found else ""
    if "published" in figures:
        ours += figure_grid({"published": figures["published"]})
    theirs = details("The published figures as printed (theirs)", table_html(study, tables.as_published()))
    return section("Beside the published study", ours + theirs)


def environment_html(study: Study) -> str:
    """Machine, software and checksums."""
    env, data = study.any["env"], study.any["data"]
    changed = " (changed)" if env["dirty"] else ""
    facts: dict[str, Any] = {
        "Processor": f"{env['cpu']}, {env['cores']} cores",
        "Memory": f"{env['ram']['value'] / 1e9:.1f} GB",
        "System": env["os"],
        "Python": env["python"],
        "quantlab": f"{env['quantlab']} {env['git'] or ''}{changed}".strip(),
        "Compiler": env["compiler"],
        "Libraries": ", ".join(f"{name} {version}" for name, version in env["libraries"].items()),
        "Test data": f"{data['name']}, {data['split']}, n = {data['n']:,}, SHA-256 {data['sha256']}",
        "Seed": study.config["seed"],
        "Records": "config.json, cells/*.json, logs/metrics.jsonl, emissions/*.csv",
    }
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items())
    return details("Machine, software, data", f"<dl>{items}</dl>")


def svg(name: str, figure: Figure) -> str:
    """A figure as inline SVG whose ink, muted and grid colours are the page's, so that it follows light, dark and
    print.
    """
    from matplotlib import rc_context

    text = io.StringIO()
    with rc_context({**STYLE, "svg.hashsalt": name}):  # a salt of its own: ids must not meet on one page
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    found = text.getvalue()
    found = found[found.index("<svg") :]
    for fixed, variable in ((INK, "--ink"), (MUTED, "--muted"), (GRID, "--grid")):
        found = found.replace(fixed, f"var({variable})")
    found = re.sub(r"<metadata>.*?</metadata>", "", found, flags=re.DOTALL)
    found = re.sub(r"('DejaVu Sans'[^;\"]*|\bsans-serif\b)", "system-ui, sans-serif", found)
    found = re.sub(
        r'(<svg [^>]*?)width="[^"]*" height="[^"]*"', rf'\1role="img" aria-label="{escape(name)}"', found, count=1
    )
    return re.sub(r'(<svg[^>]*?) height="[^"]*"([^>]*?) width="[^"]*"', r"\1\2", found, count=1)
