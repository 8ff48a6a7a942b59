"""Writes the results section of README.md, and all tables into benchmarks/results/README.md, from the records under
benchmarks/results/: no result is typed by hand.

    python benchmarks/update_readme.py            # rewrites both
    python benchmarks/update_readme.py --check    # exit status 1 if one of them is not what the records say

A folder of benchmarks/results/ that holds a config.json is a run of a study (`quantlab demo --out …`, `quantlab lima
--out …`), a .jsonl file holds the lines of `quantlab bench --json`, bench_quality.py, bench_peers.py or
bench_gptq_cuda.py, bench_training_cuda.py, parity_cuda.py, or differences of logits beside GPTQModel.
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
SHOWN = ("quality", "merging", "training", "generation", "cost")  # tables of a study, by name
DETAILS = "# All recorded results\n\nWritten by `benchmarks/update_readme.py` from the records beside this file.\n\n"
NOTHING = "No run is recorded in `benchmarks/results/` yet."


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def study_section(run: Path) -> str:
    """The tables of a study that a first reader wants, and what they rest on."""
    from quantlab.report.kinds import load_report

    report = load_report(run)
    parts = [f"### {report.heading.partition(':')[0]}, {report.study.machine}\n"]
    parts += [f"**{table.heading}**\n\n{table.markdown().strip()}\n" for table in report.tables if table.name in SHOWN]
    parts.append(f"From the records in `{run.relative_to(ROOT)}`.")
    return "\n".join(parts)


def quality_section(path: Path, records: list[dict[str, Any]]) -> str:
    """One line a variant: perplexity on each text, bytes of the checkpoint, seconds."""
    texts = list(records[0]["perplexity"])
    rows = [
        [
            record["variant"], *(f"{record['perplexity'][text]['ppl']:.2f}" for text in texts),
            f"{record['bytes'] / 1e6:.1f}", f"{record['quantize_s']:.1f}",
        ]
        for record in records
    ]  # fmt: skip
    header = ["variant", *(f"perplexity, {text} text" for text in texts), "MB", "quantization, s"]
    first = records[0]
    rows_of, tokens, context = first["calibration"]["rows"], first["calibration"]["tokens"], first["context"]
    about = f"{first['model']}, calibration {rows_of} x {tokens} tokens, context {context}, {first['threads']} threads"
    return f"### Perplexity: {about}\n\n{markdown_table(header, rows)}\n\nFrom `{path.relative_to(ROOT)}`."


def lines_section(path: Path, details: bool) -> str:
    """The section of a .jsonl file: of `quantlab bench`, bench_quality.py, bench_peers.py or bench_*_cuda.py; ""
    where it is a detail that is not asked for."""
    records: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    if not records:
        raise ValueError(f"{path}: holds no record")
    if "perplexity" in records[0]:
        return quality_section(path, records)
    if "gptqmodel" in records[0]:
        return logits_section(path, records) if details else ""
    if "matrices" in records[0]:
        return codes_section(path, records) if details else ""
    if records[0].get("op") in ("training", "generation"):
        return training_section(path, records)
    if "peak_bytes" in records[0]:
        return gptq_section(path, records)
    if "driver" in records[0]:
        return cuda_section(path, records, details)
    if "peer" in records[0]:
        return peers_section(path, records)
    return bench_section(path, records) if details else ""


def logits_section(path: Path, records: list[dict[str, Any]]) -> str:
    """One line a checkpoint of ours: how far the logits that GPTQModel computes from it are from ours."""
    pairs = [(how, kind) for how in ("as_loaded", "float32") for kind in ("max", "mean")]
    rows = [
        [
            record["checkpoint"],
            *(f"{record[how][kind]:.2g}" for how, kind in pairs),
        ]
        for record in records
    ]
    header = ["checkpoint", "as loaded: largest", "mean", "in float32: largest", "mean"]
    spread = max(record["std"] for record in records)
    return (
        f"### Our GPTQ checkpoints in GPTQModel {records[0]['gptqmodel']}: differences of logits\n\n"
        f"{markdown_table(header, rows)}\n\nStandard deviation of the logits: up to {spread:.1f}. "
        f"From `{path.relative_to(ROOT)}`."
    )


def rate(record: dict[str, Any], seconds: float) -> str:
    """What a case's facts make of its time: tokens, floating-point operations or bytes a second."""
    if "tokens" in record:
        return f"{record['tokens'] / seconds:,.0f} tok/s"
    memory, compute = record.get("bytes", 0), record.get("flops", 0)
    roof = record["roofs"]
    if compute and compute / roof["fma_gflop_per_s"] > memory / roof["read_gb_per_s"]:
        return f"{compute / seconds / 1e9:,.0f} GFLOP/s"
    return f"{memory / seconds / 1e9:.1f} GB/s"


def peers_section(path: Path, records: list[dict[str, Any]]) -> str:
    """One line a case and peer: both medians, and the ratio of the interleaved rounds with its spread."""
    rows = [
        [
            record["case"], record["peer"], str(record["threads"]), f"{1e3 * record['quantlab_s']['median']:.2f}",
            f"{1e3 * record['peer_s']['median']:.2f}", rate(record, record["quantlab_s"]["median"]),
            "{median:.2f} ({min:.2f} to {max:.2f})".format(**record["ratio"]), str(record["rounds"]),
        ]
        for record in records
    ]  # fmt: skip
    header = [
        "case",
        "peer",
        "threads",
        "quantlab, ms",
        "peer, ms",
        "quantlab",
        "times faster (least to largest)",
        "rounds",
    ]
    roofs = {record["threads"]: record["roofs"] for record in records}
    measured = "; ".join(
        f"{threads} thread{'s' * (threads > 1)}: {roof['read_gb_per_s']:.1f} GB/s read, "
        f"{roof['fma_gflop_per_s']:.0f} GFLOP/s in float32"
        for threads, roof in sorted(roofs.items())
    )
    table = markdown_table(header, rows)
    return (
        f"### Beside the peers: {records[0]['isa']}\n\n{table}\n\n"
        f"Roofs in the same run: {measured}. From `{path.relative_to(ROOT)}`."
    )


def bench_section(path: Path, records: list[dict[str, Any]]) -> str:
    """One line a case: time, rate, share of the roof of the machine that ran it."""
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


def cell(record: dict[str, Any]) -> str:
    """The time of a case on a GPU and its share of the roof; of a model, the tokens a second where it has them."""
    if record["op"].startswith("model"):
        tokens = f" ({record['tokens_per_s']:,.0f} tok/s)" if "tokens_per_s" in record else ""
        return f"{1e3 * record['median_s']:,.2f} ms{tokens}"
    return f"{1e6 * record['median_s']:,.1f} ({record['roof_percent']:.0f} %)"


def pivot(records: list[dict[str, Any]], row: Any, column: Any) -> str:
    """A table of cells; row and column give a record's heading."""
    columns = list(dict.fromkeys(column(record) for record in records))
    cells: dict[str, dict[str, str]] = {}
    for record in records:
        cells.setdefault(row(record), {})[column(record)] = cell(record)
    rows = [[name, *(found.get(heading, "") for heading in columns)] for name, found in cells.items()]
    return markdown_table(["", *columns], rows)


CUDA_TABLES = {  # by op and roof
    "product read": "Few tokens: microseconds of a layer's fused products (share of the time to read the weight once); "
    "activations are in the L2 cache, weights are not",
    "product matmul": "Many tokens: the same (share of cuBLAS' product of all its matrices in bfloat16 alone)",
    "linear matmul": "A product of float32 rows, rounded on the way: microseconds (share of cuBLAS' in bfloat16)",
    "linear_backward_input matmul": "The same for the gradient of the input",
}


def cuda_section(path: Path, records: list[dict[str, Any]], details: bool) -> str:
    """The model and, of the details, the products by tokens and the other ops, on a GPU."""
    by_op: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        table = f"{record['op']} {record['roof']}"
        op = table if table in CUDA_TABLES else record["op"]
        by_op.setdefault("model" if op.startswith("model") else op, []).append(record)
    first, commits = records[0], ", ".join(dict.fromkeys(record["commit"] for record in records))
    parts = [f"### On a GPU: {first['machine']}, {first['model']}, random weights, commits {commits}"]
    if "model" in by_op:
        model = pivot(
            by_op.pop("model"), lambda r: f"{r['op'].removeprefix('model_')} {r['shape']}", lambda r: r["format"]
        )
        parts.append(f"The whole model: a forward pass, a tweet, 30 tokens in all or a step of generation\n\n{model}")
    if not details:
        by_op.clear()
    for op, heading in CUDA_TABLES.items():
        if op in by_op:
            table = pivot(
                by_op.pop(op), lambda r: f"{r['format']} {r['shape'].split()[0]}", lambda r: r["shape"].split()[1][1:]
            )
            parts.append(f"{heading}\n\n{table}")
    rest = [
        [record["op"], record["format"], record["shape"], cell(record), record["roof"]]
        for found in by_op.values()
        for record in found
    ]
    if rest:
        table = markdown_table(["op", "format", "shape", "microseconds (share of the roof)", "roof"], rest)
        parts.append(f"Others\n\n{table}")
    parts.append(f"From `{path.relative_to(ROOT)}`.")
    return "\n\n".join(parts)


def gptq_section(path: Path, records: list[dict[str, Any]]) -> str:
    """One line a run of GPTQ on a GPU, from host memory to codes."""
    rows = [
        [
            f"{record['config']['bits']} bits, groups of {record['config']['group_size']}"
            + (", recommended" if record["config"]["drift_correction"] else ""),
            str(record["layers"]), f"{record['tokens']:,}",
            f"{record['seconds']:.1f}", f"{record['peak_bytes'] / 1e9:.1f}",
        ]
        for record in records
    ]  # fmt: skip
    table = markdown_table(["config", "layers", "tokens", "seconds", "peak device memory, GB"], rows)
    first = records[0]
    return (
        f"### GPTQ on a GPU: {first['device']}, shapes of {first['model']}, commit {first['commit']}\n\n{table}\n\n"
        f"From `{path.relative_to(ROOT)}`."
    )


def training_section(path: Path, records: list[dict[str, Any]]) -> str:
    """One line a case of LoRA training on a GPU, then of generation beside what was trained."""
    generated = [record for record in records if record["op"] == "generation"]
    first = records[0]
    records = [record for record in records if record["op"] == "training"]
    rows = [
        [
            record["base"], f"1 x {record['tokens']}", record["recompute"], f"{1e3 * record['seconds']['median']:.1f}",
            f"{record['tokens_per_second']:,.0f}", f"{record['peak_bytes'] / 1e9:.2f}",
        ]
        for record in records
    ]  # fmt: skip
    table = markdown_table(["base", "batch", "recomputed", "ms a step", "tok/s", "peak device memory, GB"], rows)
    return (
        f"### LoRA training on a GPU: {first['device']}, shapes of {first['model']}, r {first['r']} on q, k, v, o, "
        f"commit {first['commit']}\n\n{table}\n\nMedian of a step: gradient and AdamW."
        f"{beside_section(generated)}From `{path.relative_to(ROOT)}`."
    )


def codes_section(path: Path, records: list[dict[str, Any]]) -> str:
    """One line a method: what differs between the codes of a GPU and those of the CPU."""
    kinds = ("matrices", "values", "codes", "rows")
    rows = [[record["method"], *(f"{record[kind]:,}" for kind in kinds)] for record in records]
    table = markdown_table(["method", "matrices", "codes", "codes that differ", "rows that they are in"], rows)
    first = records[0]
    machine = f"{first['device']}, {first['model']}, commit {first['commit']}"
    return (
        f"### Codes of a GPU beside the CPU's: {machine}\n\n{table}\n\n"
        f"GPTQ from the same Hessian; a tie may go either way. From `{path.relative_to(ROOT)}`."
    )


def beside_section(records: list[dict[str, Any]]) -> str:
    """One line a base and batch: a step of generation without an adapter and beside one; a space without records."""
    milliseconds = {(r["base"], r["batch"], r["adapter"]): 1e3 * r["seconds"]["median"] for r in records}
    rows = [
        [base, str(batch), f"{without:.2f}", f"{beside:.2f}", f"{beside / without:.2f}"]
        for (base, batch, adapter), without in milliseconds.items()
        if not adapter and (beside := milliseconds.get((base, batch, True)))
    ]
    if not rows:
        return " "
    table = markdown_table(["base", "rows", "without an adapter, ms a step", "beside it, ms a step", "times"], rows)
    return f"\n\nGeneration, a token more for each row, commit {records[0]['commit']}:\n\n{table}\n\n"


def results_section(results: Path, details: bool = False) -> str:
    """The recorded results, in the order of their names."""
    runs = sorted(path.parent for path in results.glob("*/config.json"))
    sections = [study_section(run) for run in runs]
    sections += [lines_section(path, details) for path in sorted(results.glob("*.jsonl"))]
    return "\n\n".join(section for section in sections if section) or NOTHING


def updated(readme: str, section: str) -> str:
    """`readme` with `section` between its markers."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md lacks the markers {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{section}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the tables of results from the records.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file would change")
    check = parser.parse_args().check
    wanted = {
        README: updated(README.read_text(encoding="utf-8"), results_section(RESULTS)),
        RESULTS / "README.md": f"{DETAILS}{results_section(RESULTS, details=True)}\n",
    }
    for path, new in wanted.items():
        name = path.relative_to(ROOT)
        if path.exists() and path.read_text(encoding="utf-8") == new:
            continue
        if check:
            print(f"{name} is not what the records say: run python benchmarks/update_readme.py", file=sys.stderr)
            return 1
        path.write_text(new, encoding="utf-8")
        print(f"{name}: results updated")
    return 0


if __name__ == "__main__":
    sys.exit(main())
