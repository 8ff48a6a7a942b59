"""Commands about studies: `demo`, `tweeteval`, `lima`, `report`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from quantlab.cli.common import Device, Json, Local, print_json, print_table, wrong_call

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import ModuleType

    from quantlab.experiments.study import StudyConfig

    C = TypeVar("C", bound=StudyConfig)

Limit = Annotated[int | None, typer.Option(help="At most this many tweets of each split.")]
StudyDevice = Annotated[str | None, typer.Option(help="Where the model runs: cpu, cuda or cuda:N.")]
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
    from quantlab.experiments import tweeteval as study

    with wrong_call():
        config = study.demo_config(device=device, **({"variants": tuple(variants)} if variants else {}))
        config = config if limit is None else study.limited(config, limit)
    run_study(study, config, out, as_json)


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
    device: StudyDevice = None,
    wandb: Annotated[str | None, typer.Option(help="off, offline or online.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cells and do nothing.")] = False,
    local_files_only: Local = False,
    as_json: Json = False,
) -> None:
    """Train a head on tweets, quantize the model in several ways, and measure every variant."""
    from quantlab.experiments import tweeteval as study

    given: dict[str, Any] = {
        "preset": preset, "variants": tuple(variants) if variants else None, "model": model, "task": task,
        "country": country, "data_root": str(data_root) if data_root else None, "perplexity_text": perplexity_text,
        "device": device, "wandb": wandb, "local_files_only": local_files_only or None,
    }  # fmt: skip
    with wrong_call():
        chosen = configured(study.TweetEvalConfig, config, given)
        chosen = chosen if limit is None else study.limited(chosen, limit)
    start(study, chosen, out, dry_run, as_json)


def lima(
    out: Annotated[Path, typer.Option("--out", help="The run's directory; what is finished there is kept.")],
    config: Annotated[Path | None, typer.Option(help="A JSON file of settings.")] = None,
    preset: Annotated[str | None, typer.Option(help="seed (the published settings) or corrected.")] = None,
    baselines: Annotated[
        list[str] | None, typer.Option(help="Tuned over - inferred in: bnb-bnb gptq-gptq bnb-gptq gptq-bnb fp16 …")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="At most this many conversations, held-out ones included.")] = None,
    model: Annotated[str | None, typer.Option(help='A directory, a .gguf file, a hub id, or "demo".')] = None,
    data: Annotated[Path | None, typer.Option(help="LIMA's train.jsonl, or its folder.")] = None,
    perplexity_text: Annotated[Path | None, typer.Option(help="A text file: its perplexity too.")] = None,
    country: Annotated[str | None, typer.Option(help="Three letters: whose carbon factor.")] = None,
    device: StudyDevice = None,
    wandb: Annotated[str | None, typer.Option(help="off, offline or online.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cells and do nothing.")] = False,
    local_files_only: Local = False,
    as_json: Json = False,
) -> None:
    """Tune LoRA adapters over quantized models, take each to inference in either format, and measure all of it."""
    from quantlab.experiments import lima as study

    given: dict[str, Any] = {
        "preset": preset, "baselines": tuple(baselines) if baselines else None, "limit": limit, "model": model,
        "data": str(data) if data else None, "perplexity_text": str(perplexity_text) if perplexity_text else None,
        "country": country, "device": device, "wandb": wandb, "local_files_only": local_files_only or None,
    }  # fmt: skip
    with wrong_call():
        chosen = configured(study.LimaConfig, config, given)
    start(study, chosen, out, dry_run, as_json)


def configured(kind: type[C], file: Path | None, given: Mapping[str, Any]) -> C:
    """The configuration of a file or a preset, with what the call says in place of its own."""
    given = {name: value for name, value in given.items() if value is not None}
    return kind.from_file(file, **given) if file else kind.from_dict(given)


def start(study: ModuleType, config: StudyConfig, out: Path, dry_run: bool, as_json: bool) -> None:
    """Runs a study, or lists its cells."""
    if not dry_run:
        run_study(study, config, out, as_json)
        return
    cells = study.listing(config, out)
    if as_json:
        print_json({"cells": cells})
    else:
        print_table(["cell", "status", "id"], [[cell["cell"], cell["status"], cell["cell_id"]] for cell in cells])


def run_study(study: ModuleType, config: StudyConfig, out: Path, as_json: bool) -> None:
    """Runs the study, writes its report, shows the tables; a failed cell is a failed job."""

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
    from quantlab.report import build_report
    from quantlab.report.kinds import load_report
    from quantlab.report.table import terminal

    files, found = build_report(run, force=force), load_report(run)
    if as_json:
        name, rows = next(iter(found.csv.items()))
        print_json({"run": run, "files": files, name: rows})
        return
    from rich.console import Console

    console = Console() if sys.stdout.isatty() else Console(width=200)  # a file or a pipe has no width
    for table in found.tables:
        printed = terminal(table)
        for column in printed.columns:
            column.overflow = "fold"  # a narrow terminal breaks numbers; it never leaves a part out
        console.print(printed)
        console.print()
    print(f"report: {run / 'report.html'}")
