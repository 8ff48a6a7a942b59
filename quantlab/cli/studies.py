"""Commands about studies: `demo`, `tweeteval`, `lima`, `report`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from quantlab.cli.common import (
    MODEL,
    Device,
    Json,
    Local,
    gigabytes,
    known_device,
    known_source,
    known_text,
    print_json,
    print_table,
    require_source,
    text_or,
    told_what_is_kept,
    wrong_call,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import ModuleType

    from quantlab.experiments.study import StudyConfig

    C = TypeVar("C", bound=StudyConfig)

# None leaves a setting to the file, then to the preset: the defaults shown are those of "corrected"
Out = Annotated[Path, typer.Option(help="The run's directory; what is finished there is kept.", file_okay=False)]
Config = Annotated[Path | None, typer.Option(help="A JSON file of settings.", exists=True, dir_okay=False)]
Preset = Annotated[
    str | None, typer.Option(help="seed (the published settings) or corrected.", show_default="corrected")
]
Model = Annotated[str | None, typer.Option(help=MODEL, callback=known_source, show_default="demo")]
Country = Annotated[str | None, typer.Option(help="Three letters: whose carbon factor.", show_default="ESP")]
StudyDevice = Annotated[
    str | None,
    typer.Option(help="Where the model runs: cpu, cuda or cuda:N.", callback=known_device, show_default="cpu"),
]
Wandb = Annotated[str | None, typer.Option(help="off, offline or online.", show_default="off")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Tell what the run would do, and do none of it.")]
VARIANTS = "fp32 fp16 bf16 gptq-B gptq-B-r rtn-B nf4 nf4-dq fp4 fp4-dq int8, with B of 2 3 4 8."


def demo(
    out: Out = Path("quantlab-demo"),
    variants: Annotated[
        list[str] | None, typer.Option(help=VARIANTS, show_default="fp32 gptq-8 gptq-4 gptq-3 nf4")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            help="At most this many tweets of each split.", min=1, show_default="800 train, 200 val, 300 test"
        ),
    ] = None,
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
    out: Out,
    config: Config = None,
    preset: Preset = None,
    variants: Annotated[
        list[str] | None,
        typer.Option(
            help=VARIANTS, show_default="fp32 bf16 gptq-8 gptq-4 gptq-4-r gptq-3 gptq-3-r nf4 int8 rtn-4 rtn-3"
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="At most this many tweets of each split.", min=1, show_default="all")
    ] = None,
    model: Model = None,
    task: Annotated[str | None, typer.Option(help='A TweetEval task, or "demo".', show_default="demo")] = None,
    data_root: Annotated[
        Path | None,
        typer.Option(
            help="The folder of the task's data.", exists=True, file_okay=False, show_default="QUANTLAB_DATA, the hub"
        ),
    ] = None,
    perplexity_text: Annotated[
        str | None,
        typer.Option(
            help='A text file, or "task": the test tweets.', callback=text_or("task"), show_default="task; seed: none"
        ),
    ] = None,
    country: Country = None,
    device: StudyDevice = None,
    wandb: Wandb = None,
    dry_run: DryRun = False,
    local_files_only: Local = False,
    as_json: Json = False,
) -> None:
    """Train a head on tweets, quantize the model in several ways, and measure every variant."""
    from quantlab.experiments import tweeteval as study
    from quantlab.io.datasets import tweeteval_files

    given: dict[str, Any] = {
        "preset": preset, "variants": tuple(variants) if variants else None, "model": model, "task": task,
        "country": country, "data_root": str(data_root) if data_root else None, "perplexity_text": perplexity_text,
        "device": device, "wandb": wandb, "local_files_only": local_files_only or None,
    }  # fmt: skip
    with wrong_call():
        chosen = configured(study.TweetEvalConfig, config, given)
        chosen = chosen if limit is None else study.limited(chosen, limit)
    if chosen.data_root is not None and chosen.task != "demo":
        with wrong_call("root", "--data-root: "):
            tweeteval_files(chosen.task, "test", chosen.data_root)
    start(study, chosen, out, dry_run, as_json)


def lima(
    out: Out,
    config: Config = None,
    preset: Preset = None,
    baselines: Annotated[
        list[str] | None,
        typer.Option(
            help="Tuned over - inferred in; of one part: untuned.",
            show_default="fp16 bnb-bnb gptq-gptq bnb-gptq gptq-bnb",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            help="At most this many conversations, held-out ones included, and rows of a batch of generation.",
            min=2,
            show_default="all",
        ),
    ] = None,
    model: Model = None,
    data: Annotated[
        Path | None,
        typer.Option(help="LIMA's train.jsonl, or its folder.", exists=True, show_default="QUANTLAB_DATA, the hub"),
    ] = None,
    perplexity_text: Annotated[
        Path | None,
        typer.Option(
            help="A text file: its perplexity too.",
            exists=True,
            dir_okay=False,
            callback=known_text,
            show_default="none",
        ),
    ] = None,
    country: Country = None,
    device: StudyDevice = None,
    wandb: Wandb = None,
    dry_run: DryRun = False,
    local_files_only: Local = False,
    as_json: Json = False,
) -> None:
    """Tune LoRA adapters over quantized models, take each to inference in either format, and measure all of it."""
    from quantlab.experiments import lima as study
    from quantlab.io.datasets import lima_file

    given: dict[str, Any] = {
        "preset": preset, "baselines": tuple(baselines) if baselines else None, "model": model,
        "data": str(data) if data else None, "perplexity_text": str(perplexity_text) if perplexity_text else None,
        "country": country, "device": device, "wandb": wandb, "local_files_only": local_files_only or None,
    }  # fmt: skip
    with wrong_call():
        chosen = configured(study.LimaConfig, config, given)
        chosen = chosen if limit is None else study.limited(chosen, limit)
    if chosen.data is not None:
        with wrong_call("data", "--data: "):
            lima_file(chosen.data)
    start(study, chosen, out, dry_run, as_json)


def configured(kind: type[C], file: Path | None, given: Mapping[str, Any]) -> C:
    """The configuration of a file or a preset, with what the call says in place of its own."""
    given = {name: value for name, value in given.items() if value is not None}
    return kind.from_file(file, **given) if file else kind.from_dict(given)


def start(study: ModuleType, config: StudyConfig, out: Path, dry_run: bool, as_json: bool) -> None:
    """Runs a study, or tells what it would do."""
    require_source(config.model, "model: ")  # of a file of settings, which the parser has not looked into
    if not dry_run:
        run_study(study, config, out, as_json)
        return
    found = study.foresee(config, out)
    if as_json:
        print_json(found)
        return
    model = found["model"]
    size = f", {gigabytes(model['bytes'])}" if model["bytes"] is not None else ""
    print(f"model: {model['source']}{size}{'' if model['here'] else ', to be downloaded'}\ndata: {found['data']}")
    rows = [
        [cell["cell"], cell["status"], gigabytes(cell["weights"]) if cell["weights"] else "", cell["cell_id"]]
        for cell in found["cells"]
    ]
    print_table(["cell", "status", "weights, about", "id"], rows)


def run_study(study: ModuleType, config: StudyConfig, out: Path, as_json: bool) -> None:
    """Runs the study, writes its report, shows the tables; a failed cell is a failed job."""

    def tell(cell: str, status: str) -> None:
        if not as_json:
            print(f"{cell}: {status}", flush=True)

    def kept() -> str:
        return f"what is finished is kept in {out}: the same call goes on from there" if out.is_dir() else ""

    with told_what_is_kept(kept):
        outcome = study.run(config, out, on_cell=tell)
    show_report(out, as_json, force=outcome.worked > 0)
    if outcome.failed:
        error = outcome.cells[outcome.failed[0]]["error"]
        raise RuntimeError(f"{', '.join(outcome.failed)} failed: {error['type']}: {error['message']}")


def known_run(folder: Path) -> Path:
    """A run directory; one that is damaged is no wrong call."""
    from quantlab.report.records import NoRun, experiment_of

    try:
        experiment_of(folder)
    except NoRun as error:
        raise typer.BadParameter(str(error)) from error
    return folder


def report(
    run: Annotated[
        Path,
        typer.Argument(
            help="The directory of a run.", show_default=False, exists=True, file_okay=False, callback=known_run
        ),
    ],
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
