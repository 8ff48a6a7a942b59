"""Writes the results section of README.md from the records under benchmarks/results/: no result is typed by hand.

    python benchmarks/update_readme.py            # rewrites README.md
    python benchmarks/update_readme.py --check    # exit status 1 if README.md is not what the records say

A folder of benchmarks/results/ that holds a config.json is a run of a study (`quantlab demo --out …`), a .jsonl file
holds the lines of `quantlab bench --json`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
NOTHING = "No run is recorded in `benchmarks/results/` yet."


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def study_section(run: Path) -> str:
    """The quality and cost tables of a study, and what it ran on."""
    from quantlab.report import tables
    from quantlab.report.study import load_study

    study = load_study(run)
    found = [tables.quality(study), tables.cost(study)]
    parts = [f"### {study.model} on {study.task}\n"]
    parts += [f"**{table.heading}**\n\n{table.markdown().strip()}\n" for table in found]
    parts.append(f"From the records in `{run.relative_to(ROOT)}`.")
    return "\n".join(parts)


def bench_section(path: Path) -> str:
    """One line a case: time, rate, share of the roof of the machine that ran it."""
    records: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    rows = [
        [
            record["op"], record["format"] or "", str(record["shape"]), record["variant"],
            f"{1e3 * record['median_s']:.3f}", f"{record['gb_per_s']:.1f}",
            f"{record['roof_percent']:.0f} ({record['roof']})",
        ]
        for record in records
    ]  # fmt: skip
    header = ["op", "format", "shape", "variant", "median, ms", "GB/s", "% of the roof"]
    machine = f"{records[0]['machine']}, {records[0]['threads']} threads, commit {records[0]['commit']}"
    return f"### Kernels: {machine}\n\n{markdown_table(header, rows)}\n\nFrom `{path.relative_to(ROOT)}`."


def results_section(results: Path) -> str:
    """All recorded results, in the order of their names."""
    runs = sorted(path.parent for path in results.glob("*/config.json"))
    sections = [study_section(run) for run in runs]
    sections += [bench_section(path) for path in sorted(results.glob("*.jsonl"))]
    return "\n\n".join(sections) or NOTHING


def updated(readme: str, section: str) -> str:
    """`readme` with `section` between its markers."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md lacks the markers {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{section}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the results section of README.md from the records.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if README.md would change")
    check = parser.parse_args().check
    old = README.read_text(encoding="utf-8")
    new = updated(old, results_section(RESULTS))
    if old == new:
        return 0
    if check:
        print("README.md is not what benchmarks/results/ says: run python benchmarks/update_readme.py", file=sys.stderr)
        return 1
    README.write_text(new, encoding="utf-8")
    print("README.md: results updated")
    return 0


if __name__ == "__main__":
    sys.exit(main())
