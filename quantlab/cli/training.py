"""Commands about adapters: `finetune`, `merge`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantlab.cli.common import (
    Device,
    Dtype,
    Json,
    Local,
    Source,
    gigabytes,
    known_adapter,
    print_json,
    require_new,
    told_warnings,
    told_what_is_kept,
    wrong_call,
)
from quantlab.cli.models import quantization_config

if TYPE_CHECKING:
    from quantlab.config import QuantizationConfig

Bits = Annotated[int | None, typer.Option(help="rtn: 8, 4, 3 or 2 (default 4).")]


def finetune(
    source: Source,
    out: Annotated[
        Path, typer.Argument(help="The run's directory: adapter, metrics, checkpoints.", show_default=False)
    ],
    data: Annotated[
        Path, typer.Option(help='JSON lines with "conversations", "messages" or "text".', exists=True, dir_okay=False)
    ],
    eval_data: Annotated[Path | None, typer.Option(help="The same, held out.", exists=True, dir_okay=False)] = None,
    base: Annotated[str | None, typer.Option(help="Quantize the source first: nf4, fp4, int8 or rtn.")] = None,
    bits: Bits = None,
    r: Annotated[int, typer.Option(help="Rank of the adapter.")] = 8,
    lora_alpha: Annotated[float, typer.Option(help="The adapter counts lora_alpha / r times.")] = 16,
    lora_dropout: Annotated[float, typer.Option(help="Share of its inputs that a step leaves out.")] = 0.0,
    target_modules: Annotated[list[str] | None, typer.Option(help="q_proj v_proj …, or all-linear.")] = None,
    learning_rate: Annotated[float, typer.Option(help="The highest.")] = 2e-4,
    lr_scheduler_type: Annotated[str, typer.Option(help="linear, cosine, constant, constant_with_warmup.")] = "linear",
    warmup_ratio: Annotated[float, typer.Option(help="Share of the steps in which the rate rises.")] = 0.0,
    num_train_epochs: Annotated[float, typer.Option(help="Times through the data.")] = 1.0,
    max_steps: Annotated[int, typer.Option(help="So many steps in place of the epochs; -1: the epochs.")] = -1,
    per_device_train_batch_size: Annotated[int, typer.Option("--batch-size", help="Rows at a time.")] = 1,
    gradient_accumulation_steps: Annotated[int, typer.Option(help="Batches a step.")] = 1,
    max_length: Annotated[int | None, typer.Option(help="Longer rows are cut to so many tokens.")] = None,
    packing: Annotated[bool, typer.Option("--packing", help="Batches of up to --max-length tokens.")] = False,
    assistant_only_loss: Annotated[
        bool, typer.Option("--assistant-only-loss", help="Learn only what the assistant says.")
    ] = False,
    chat_template: Annotated[str, typer.Option(help="auto, chatml, joined, or a Jinja template.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of the adapter, the order of the data, the dropout.")] = 42,
    logging_steps: Annotated[int, typer.Option(help="Steps between entries of metrics.jsonl.")] = 10,
    eval_steps: Annotated[int | None, typer.Option(help="Steps between evaluations (an epoch's).")] = None,
    save_steps: Annotated[int | None, typer.Option(help="Steps between checkpoints (none).")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in OUT.")] = False,
    limit: Annotated[int | None, typer.Option(help="At most so many rows of the data.", min=1)] = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    local_files_only: Local = False,
    as_json: Json = False,
) -> None:
    """Train a LoRA adapter beside a model, float or quantized; the model stays as it is."""
    settings = {
        "learning_rate": learning_rate, "lr_scheduler_type": lr_scheduler_type, "warmup_ratio": warmup_ratio,
        "num_train_epochs": num_train_epochs, "max_steps": max_steps, "max_length": max_length, "packing": packing,
        "per_device_train_batch_size": per_device_train_batch_size, "chat_template": chat_template, "seed": seed,
        "gradient_accumulation_steps": gradient_accumulation_steps, "assistant_only_loss": assistant_only_loss,
        "logging_steps": logging_steps, "eval_steps": eval_steps, "save_steps": save_steps, "output_dir": str(out),
        "resume_from_checkpoint": resume or None,
    }  # fmt: skip
    targets: Any = target_modules or ["q_proj", "v_proj"]
    targets = "all-linear" if targets == ["all-linear"] else targets
    adapter = {"r": r, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout, "target_modules": targets}
    _train(source, data, eval_data, (base, bits), adapter, settings, limit, (dtype, device, local_files_only), as_json)


def _train(
    source: str, data: Path, eval_data: Path | None, base: tuple[str | None, int | None], adapter: dict[str, Any],
    settings: dict[str, Any], limit: int | None, loading: tuple[str, str, bool], as_json: bool,
) -> None:  # fmt: skip
    import quantlab as ql
    from quantlab.checkpoints import checkpoints_in
    from quantlab.conversations import chat_template, read_json_lines
    from quantlab.lora import target_modules
    from quantlab.quantize import require_float

    with wrong_call():
        lora, training = ql.LoraConfig(**adapter), ql.TrainingConfig(**settings)
    out = Path(settings["output_dir"])
    if not settings["resume_from_checkpoint"]:
        require_new(out)
    elif not out.is_dir():
        raise typer.BadParameter(f"--resume: {out}: there is no such directory to go on from")
    quantization = base_config("--base", *base)
    dtype, device, local = loading
    model = ql.LlamaForCausalLM.from_pretrained(source, dtype, local_files_only=local)
    with wrong_call():  # what fits this model or does not, before hours of work
        target_modules(lora, model.config)
        if training.chat_template not in ("auto", "joined"):
            chat_template(model, training.chat_template)
        if quantization is not None:
            require_float(model)
    if quantization is not None:
        model = ql.quantize(model, quantization)
    rows = data if limit is None else read_json_lines(data)[:limit]

    def kept() -> str:
        found = checkpoints_in(out)
        return f"{found[-1].name} is kept in {out}: the same call with --resume goes on from it" if found else ""

    with told_warnings(), told_what_is_kept(kept):
        tuned = ql.finetune(model.to(device), lora, rows, training, eval_data)
    parameters = tuned.require_adapter().parameters.size
    if as_json:
        print_json({"out": settings["output_dir"], "parameters": parameters, "log": tuned.training_log})
        return
    trained = [entry for entry in tuned.training_log if "loss" in entry]
    print(f"{settings['output_dir']}: {parameters:,} parameters, {trained[-1]['step']} steps")
    ends = trained if len(trained) == 1 else [trained[0], trained[-1]]  # each the mean of some steps
    print(f"loss {' -> '.join(format(entry['loss'], '.4f') for entry in ends)}")
    evaluations = [entry["eval_loss"] for entry in tuned.training_log if "eval_loss" in entry]
    if evaluations:
        print(f"held out: loss {' -> '.join(f'{loss:.4f}' for loss in evaluations)}")


def base_config(
    option: str, method: str | None, bits: int | None, also: tuple[str, ...] = ()
) -> QuantizationConfig | None:
    """The configuration of weights that are quantized on the way, by the method that `option` names; None: they are
    not. also: what else `option` takes, for the message."""
    from quantlab.config import CONFIGS

    if method is None:
        if bits is not None:
            raise typer.BadParameter(f"--bits: it belongs to a method that has a choice: give {option} rtn")
        return None
    if method == "gptq":
        raise typer.BadParameter(f"{option}: gptq needs calibration text: use quantlab quantize for it")
    accepted = (*also, *(name for name in CONFIGS if name != "gptq"))
    return quantization_config(method, bits, {}, option, accepted)


def merge(
    source: Source,
    adapter: Annotated[
        Path,
        typer.Argument(
            help="The adapter's directory.", show_default=False, exists=True, file_okay=False, callback=known_adapter
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The new checkpoint's directory.", show_default=False)],
    requantize: Annotated[
        str | None, typer.Option(help="same (the format each matrix had), nf4, fp4, int8 or rtn; else floats.")
    ] = None,
    bits: Bits = None,
    dtype: Dtype = "float32",
    local_files_only: Local = False,
    as_json: Json = False,
) -> None:
    """Add an adapter into the weights of its base, and write the checkpoint."""
    import quantlab as ql

    same = requantize == "same"
    config = base_config("--requantize", None if same else requantize, bits, ("same",))
    require_new(out)
    model = ql.LlamaForCausalLM.from_pretrained(source, dtype, local_files_only=local_files_only)
    with told_warnings():
        tuned = ql.load_adapter(model, adapter)
    merged = tuned.merge("same" if same else config)
    files = merged.save_pretrained(out)
    report = merged.merge_report
    if as_json:
        print_json({"out": out, "files": files, "matrices": report})
        return
    print(f"{out}: {gigabytes(sum(files.values()))} in {len(files)} files")
    ratios = [entry["error_ratio"] for entry in report if entry["delta_norm"] > 0]
    if any(ratios):  # none, where the adapter adds nothing yet
        print(f"rounding: its error is up to {max(ratios):.3g} times what the adapter adds (of {len(ratios)} matrices)")
