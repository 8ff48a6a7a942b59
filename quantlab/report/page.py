"""What the HTML pages of every study share: no script, no request, light and dark, for a phone, a desk and paper."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping
from html import escape
from typing import TYPE_CHECKING, Any

from .figure import GRID, INK, MUTED, STYLE
from .records import Records
from .table import Table, error_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


def document(heading: str, subtitle: str, parts: Iterable[str]) -> str:
    """The whole page of these parts."""
    head = "<meta charset='utf-8'><meta name='viewport' content='width=device-width, initial-scale=1'>"
    head += f"<meta name='color-scheme' content='light dark'><title>{escape(heading)}</title>"
    top = f"<h1>{escape(heading)}</h1>\n<p class='lead'>{escape(subtitle)}</p>"
    body = "\n".join([top, *(part for part in parts if part)])
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


def failures(study: Records) -> str:
    """What did not finish, with its error: at the top, not hidden."""
    lines = [f"{study.title(cell['name'])} {cell['status']}: {error_of(cell)}" for cell in study.unfinished]
    return f"<p class='warn'>Not finished:</p>{bullets(lines)}" if lines else ""


def table_html(study: Records, table: Table) -> str:
    """A table that scrolls sideways on a small screen, with the colours of its rows."""
    names = {study.title(name): name for name in study.cells}

    def first(text: str) -> str:
        dot = f"<span class='dot' style='background:{study.colour(names[text])}'></span>" if text in names else ""
        return f"<td>{dot}{escape(text)}</td>"

    head = "".join(f"<th scope='col'>{escape(column)}</th>" for column in table.columns)
    rows = "".join(
        f"<tr>{first(row[0])}{''.join(f'<td>{escape(text)}</td>' for text in row[1:])}</tr>" for row in table.rows
    )
    body = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f"<div class='scroll'>{body}</div><p class='caption'>{escape(table.caption)}</p>"


def figure_grid(figures: Mapping[str, Figure], captions: Mapping[str, str]) -> str:
    cards = ""
    for name, figure in figures.items():
        cards += f"<figure>{svg(name, figure)}<figcaption>{escape(captions[name])}</figcaption></figure>"
    return f"<div class='figures'>{cards}</div>"


def environment_html(env: Mapping[str, Any], more: Mapping[str, Any]) -> str:
    """Machine, software and checksums."""
    changed = " (changed)" if env["dirty"] else ""
    facts: dict[str, Any] = {
        "Processor": f"{env['cpu']}, {env['cores']} cores",
        **({"GPU": f"{env['gpu']}, CUDA {env['cuda']}, driver {env['driver']}"} if env["gpu"] else {}),
        "Memory": f"{env['ram']['value'] / 1e9:.1f} GB",
        "System": env["os"],
        "Python": env["python"],
        "quantlab": f"{env['quantlab']} {env['git'] or ''}{changed}".strip(),
        "Compiler": env["compiler"],
        "Libraries": ", ".join(f"{name} {version}" for name, version in env["libraries"].items()),
        **more,
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
