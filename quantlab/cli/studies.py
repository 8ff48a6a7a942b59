"""Commands about studies: `demo`, `tweeteval`, `report`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantlab.cli.common import Device, Json, Local, print_json, print_table, wrong_call

if TYPE_CHECKING:
    from quantlab.experiments.tweeteval import TweetEvalConfig

Limit = Annotated[int | None, typer.Option(help="At most this many tweets of each split.")]
Variants = Annotated[list[str] | None, typer.Option(help="fp32 bf16 gptq-8 gptq-4 gptq-4-r nf4 fp4 int8 rtn-4 …")]


def demo(
    out: Annotated[Path, typer.Option("--out", help="The run's directory; what is finished there is kept.")] = Path(
        "quantlab-demo"
    ),
    variants: Variants = None,
    limit: Limit = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """The TweetEval study on a small model and real tweets that pip can reach: table, plots, report."""
    from quantlab.experiments.tweeteval import demo_config, limited

    with wrong_call():
        config = demo_config(device=device, **({"variants": tuple(variants)} if variants else {}))
        config = config if limit is None else limited(config, limit)
    run_study(config, out, as_json)


def tweeteval(
    out: Annotated[Path, typer.Option("--out", help="The run's directory; what is finished there is kept.")],
    config: Annotated[Path | None, typer.Option(help="A JSON file of settings.")] = None,
    preset: Annotated[str | None, typer.Option(help="seed (the published settings) or corrected.")] = None,
    variants: Variants = None,
    limit: Limit = None,
    model: Annotated[str | None, typer.Option(help='A directory, a .gguf file, a hub id, or "demo".')] = None,
    task: Annotated[str | None, typer.Option(help='A TweetEval task, or "demo".')] = None,
    data_root: Annotated[Path | None, typer.Option(help="The folder that holds the task's data.")] = None,
    perplexity_text: Annotated[str | None, typer.Option(help='A text file, or "task": the test tweets.')] = None,
    country: Annotated[str | None, typer.Option(help="Three letters: whose carbon factor.")] = None,
    device: Annotated[str | None, typer.Option(help="Where the model runs: cpu, cuda or cuda:N.")] = None,
    wandb: Annotated[str | None, typer.Option(help="off, offline or online.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cells and do nothing.")] = False,
    local_files_only: Local = False,
    as_json: Json = False,
) -> None:
    """Train a head on tweets, quantize the model in several ways, and measure every variant."""
    from quantlab.experiments.tweeteval import TweetEvalConfig, limited, listing

    given: dict[str, Any] = {
        "preset": preset, "variants": tuple(variants) if variants else None, "model": model, "task": task,
        "country": country, "data_root": str(data_root) if data_root else None, "perplexity_text": perplexity_text,
        "device": device, "wandb": wandb, "local_files_only": local_files_only or None,
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    with wrong_call():
        chosen = TweetEvalConfig.from_file(config, **given) if config else TweetEvalConfig.from_dict(given)
        chosen = chosen if limit is None else limited(chosen, limit)
    if not dry_run:
        run_study(chosen, out, as_json)
        return
    cells = listing(chosen, out)
    if as_json:
        print_json({"cells": cells})
    else:
        print_table(["cell", "status", "id"], [[cell["cell"], cell["status"], cell["cell_id"]] for cell in cells])


def run_study(config: TweetEvalConfig, out: Path, as_json: bool) -> None:
    """Runs the study, writes its report, shows the tables; a failed cell is a failed job."""
    from quantlab.experiments import tweeteval as study

    def tell(cell: str, status: str) -> None:
        if not as_json:
            print(f"{cell}: {status}", flush=True)

    outcome = study.run(config, out, on_cell=tell)
    show_report(out, as_json, force=outcome.worked > 0)
    if outcome.failed:
        error = outcome.cells[outcome.failed[0]]["error"]
        raise RuntimeError(f"{', '.join(outcome.failed)} failed: {error['type']}: {error['message']}")


def report(
    run: Annotated[Path, typer.Argument(help="The directory of a run.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Tables, plots and one HTML page, from the records of a run alone."""
    show_report(run, as_json, force=True)


def show_report(run: Path, as_json: bool, force: bool) -> None:
    from quantlab.report import build_report, tables
    from quantlab.report.study import load_study

    files = build_report(run, force=force)
    if as_json:
        study = load_study(run)
        print_json({"run": run, "files": files, "variants": tables.raw_rows(study)})
        return
    from rich.console import Console

    console = Console() if sys.stdout.isatty() else Console(width=200)  # a file or a pipe has no width
    for table in tables.all_tables(load_study(run)):
        printed = tables.terminal(table)
        for column in printed.columns:
            column.overflow = "fold"  # a narrow terminal breaks numbers; it never leaves a part out
        console.print(printed)
        console.print()
    print(f"report: {run / 'report.html'}")
