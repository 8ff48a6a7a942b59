"""Commands about models: `fetch`, `size`, `quantize`, `perplexity`, `generate`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
    known_source,
    known_text,
    print_json,
    print_table,
    require_new,
    text_or,
    told_warnings,
    told_what_is_kept,
    wrong_call,
)

if TYPE_CHECKING:
    import numpy as np

    from quantlab.config import QuantizationConfig


def fetch(
    source: Annotated[
        str, typer.Argument(help='"demo", the hub id of a model, or a task of TweetEval.', show_default=False)
    ],
    as_json: Json = False,
) -> None:
    """Put a model or data set in the cache, and check it."""
    from quantlab.io import open_checkpoint
    from quantlab.io.cache import ITEMS, sha256
    from quantlab.io.cache import fetch as fetch_item
    from quantlab.io.datasets import SPLITS, TASKS, hub_file

    if source == "demo" or source in ITEMS:
        names = list(ITEMS) if source == "demo" else [source]
        paths = {fetch_item(name, verify=True): ITEMS[name].sha256 for name in names}
    elif source in TASKS:
        paths = {path: sha256(path) for path in (hub_file(source, split) for split in SPLITS)}
    else:
        known_source(source)
        folder = Path(open_checkpoint(source).path)
        files = [folder] if folder.is_file() else sorted(path for path in folder.iterdir() if path.is_file())
        paths = {path: sha256(path) for path in files}
    found = [{"path": path, "bytes": path.stat().st_size, "sha256": digest} for path, digest in paths.items()]
    if as_json:
        print_json({"source": source, "files": found})
        return
    for file in found:
        print(f"{file['path']}: {file['bytes']:,} bytes, SHA-256 {file['sha256']}")


def known_config(name: str) -> str:
    from quantlab.size import KNOWN_CONFIGS

    file = Path(name, "config.json") if Path(name).is_dir() else Path(name)
    if name.lower() not in KNOWN_CONFIGS and not (file.suffix == ".json" and file.is_file()):
        try:
            known_source(name)
        except typer.BadParameter as error:
            raise typer.BadParameter(f"{error}; configs known by name: {', '.join(KNOWN_CONFIGS)}") from None
    return name


def size(
    config: Annotated[
        str,
        typer.Argument(
            help="A known name (llama-2-7b), a model directory, a config.json, a .gguf file, a hub id.",
            callback=known_config,
        ),
    ],
    bits: Annotated[list[int] | None, typer.Option(help="32, 16, or GPTQ's 8 4 3 2 (all, of float weights).")] = None,
    group_size: Annotated[int, typer.Option(help="Weights that share a scale; -1: a whole row.")] = 128,
    head: Annotated[
        str | None,
        typer.Option(
            help="causal (for a model's files), or classifier: three labels, no lm_head (for a config alone)."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """The size of a checkpoint: as its files hold it, and by its config at other widths."""
    from quantlab.size import KNOWN_CONFIGS, open_config, size_from_config, size_of_checkpoint

    values, checkpoint = open_config(config)
    quantization = values.get("quantization_config") if checkpoint is None else checkpoint.quantization
    alone = checkpoint is None and (config.lower() in KNOWN_CONFIGS or Path(config).exists())
    head = head or ("classifier" if alone else "causal")
    stored, kept = (None, None) if checkpoint is None else (size_of_checkpoint(checkpoint), checkpoint.kept_dtype)
    if not bits:  # what is quantized already is not quantized again
        bits = [] if stored and quantization else [32, 16, 8, 4, 3, 2]
    with wrong_call():
        size_from_config(values, 4, group_size, head)  # whatever the rows, the options are checked
        sizes = [size_from_config(values, count, group_size, head) for count in bits]
    if as_json:
        print_json({"config": config, "stored": stored, "quantization": quantization, "kept": kept, "sizes": sizes})
        return
    groups = "groups of whole rows" if group_size == -1 else f"groups of {group_size}"
    counted = f"{HEADS[head]}; 8 bits and less: {groups}" if sizes else None
    for line in size_notes(stored is not None, quantization, kept, counted):
        print(line)
    named = [("stored", stored)] if stored else []
    named += [(str(one["bits"]), one) for one in sizes]
    parts = list(named[0][1]["parts"])
    rows = [[name, *(gigabytes(one["parts"][part]) for part in parts), gigabytes(one["total"])] for name, one in named]
    print_table(["bits", *parts, "total"], rows)


HEADS = {
    "classifier": "with a classifier of 3 labels, no lm_head (else --head causal)",
    "causal": "with the lm_head, if it is not tied",
}


def size_notes(
    stored: bool, quantization: Mapping[str, Any] | None, kept: str | None, counted: str | None
) -> Iterator[str]:
    """What the rows of `size` count. counted: of the rows by bits; None: there are none."""
    already = f"quantized already ({quantization.get('quant_method', 'gptq')})" if quantization else ""
    if stored:
        yield f"stored: the tensors of its files{', ' if already else ''}{already}; a tokenizer comes on top"
    elif already:
        yield f"{already}: its size as it is stored is told where its files are"
    if counted:
        yield f"{counted}, all else in {kept or '16 bits'}"


def quantization_config(
    method: str,
    bits: int | None,
    options: Mapping[str, Any],
    option: str = "--method",
    accepted: Sequence[str] | None = None,
) -> QuantizationConfig:
    """The configuration of `method`, which `option` names; an option that it does not have is the caller's error.
    accepted: what `option` takes, for the message; None: every method."""
    from quantlab.config import CONFIGS, GPTQConfig

    if method not in CONFIGS:
        raise typer.BadParameter(f"{option}: got {method!r}, expected one of {', '.join(accepted or CONFIGS)}")
    given = {name: value for name, value in options.items() if value is not None}
    with wrong_call():
        if given.pop("recommended", False):
            if method != "gptq":
                raise ValueError("--recommended: only gptq has recommended settings")
            GPTQConfig.from_dict({**given, "bits": bits or 4})  # an option that gptq does not have is told as such
            decided = sorted(set(given) - {"group_size", "sym"})
            if decided:
                raise ValueError(f"--{decided[0].replace('_', '-')}: --recommended decides it")
            return GPTQConfig.recommended(bits or 4, **given)
        fixed = {"nf4": 4, "fp4": 4, "int8": 8}.get(method)
        if fixed is None:
            given["bits"] = bits or 4
        elif bits not in (None, fixed):
            raise ValueError(f"--bits: {method} always has {fixed}, got {bits}")
        return CONFIGS[method].from_dict(given)


def calibration_rows(source: str | None, tokenizer: Any, samples: int, context: int) -> np.ndarray:
    """Token ids (samples, context), int32: rows spread evenly over a text file, or over the demo's tweets one after the
    other."""

    from quantlab.calibration import spread_rows
    from quantlab.io.datasets import load_demo_tweets, load_text
    from quantlab.token_rows import text_ids

    if source is None:
        raise typer.BadParameter('--calibration: gptq needs a text file, or "demo" for the demo\'s tweets')
    if samples < 1 or context < 1:
        raise typer.BadParameter(f"--samples {samples} --context {context}: expected at least 1 of each")
    if tokenizer is None:
        raise ValueError("the model has no tokenizer; calibrate it from Python with token ids")
    text = "\n".join(load_demo_tweets()[0]) if source == "demo" else load_text(source)
    ids = text_ids(tokenizer, text)
    if len(ids) < context:
        raise typer.BadParameter(
            f"--calibration: {source} has {len(ids)} tokens, fewer than one row of --context {context}"
        )
    return spread_rows(ids, samples, context)


def quantize(
    source: Source,
    out: Annotated[Path, typer.Argument(help="The new checkpoint's directory.", show_default=False)],
    method: Annotated[str, typer.Option(help="gptq, nf4, fp4, rtn or int8.")] = "gptq",
    bits: Annotated[int | None, typer.Option(help="gptq, rtn: 8, 4, 3 or 2 (default 4).")] = None,
    group_size: Annotated[
        int | None, typer.Option(help="gptq, rtn: weights that share a scale (128); -1: a row.")
    ] = None,
    block_size: Annotated[int | None, typer.Option(help="nf4, fp4: weights that share a scale (64).")] = None,
    double_quant: Annotated[bool | None, typer.Option("--double-quant", help="nf4, fp4: 8-bit scales.")] = None,
    sym: Annotated[bool | None, typer.Option("--sym/--asym", help="gptq, rtn: with or without zero points.")] = None,
    desc_act: Annotated[bool | None, typer.Option("--desc-act", help="gptq: columns by falling activation.")] = None,
    damp_percent: Annotated[float | None, typer.Option(help="gptq: damping (0.01).")] = None,
    recommended: Annotated[bool | None, typer.Option("--recommended", help="gptq: the best settings known.")] = None,
    calibration: Annotated[
        str | None, typer.Option(help='gptq: a text file, or "demo" for the tweets.', callback=text_or("demo"))
    ] = None,
    samples: Annotated[int, typer.Option(help="gptq: rows of calibration text.")] = 32,
    context: Annotated[int, typer.Option(help="gptq: tokens a row.")] = 512,
    resume_dir: Annotated[
        Path | None, typer.Option(help="gptq: keep finished layers here, and continue from them.", file_okay=False)
    ] = None,
    device: Device = "cpu",
    local_files_only: Local = False,
    as_json: Json = False,
) -> None:
    """Quantize a model and write the checkpoint that other tools read."""
    import quantlab as ql
    from quantlab.quantize import FIRST_MATRIX, require_float

    options: dict[str, Any] = {"group_size": group_size, "block_size": block_size, "double_quant": double_quant}
    options |= {"sym": sym, "desc_act": desc_act, "damp_percent": damp_percent, "recommended": recommended}
    config = quantization_config(method, bits, options)
    if resume_dir is not None and method != "gptq":
        raise typer.BadParameter(f"--resume-dir: only gptq keeps finished layers, not {method}")
    if calibration is not None and method != "gptq":
        raise typer.BadParameter(f"--calibration: only gptq reads calibration text, not {method}")
    if device != "cpu" and method != "gptq":
        raise typer.BadParameter(f"--device: only gptq computes on a GPU, not {method}")
    require_new(out)
    checkpoint = ql.open_checkpoint(source, local_files_only=local_files_only)
    checkpoint.weight(FIRST_MATRIX)  # what is damaged fails here: then it is not the call that is wrong
    with wrong_call():
        require_float(checkpoint)
    rows = calibration_rows(calibration, checkpoint.tokenizer, samples, context) if method == "gptq" else None
    where = device if method == "gptq" else None
    with told_what_is_kept(lambda: kept_layers(method, resume_dir)):
        model = ql.quantize(checkpoint, config, calibration=rows, resume_dir=resume_dir, device=where)
    files = model.save_pretrained(out)
    report = {"out": out, "config": config.to_dict(), "files": files, "size": model.size_report()}
    if as_json:
        print_json({**report, "matrices": model.quantization_report})
    else:
        print(f"{out}: {gigabytes(sum(files.values()))} in {len(files)} files")


def kept_layers(method: str, resume_dir: Path | None) -> str:
    """What an interrupted `quantize` leaves."""
    from quantlab.resume import finished_layers

    if method != "gptq":  # takes seconds
        return ""
    if resume_dir is None:
        return "nothing is kept: with --resume-dir, finished layers would be"
    return f"finished layers kept in {resume_dir}: {finished_layers(resume_dir)}; the same call goes on from there"


def perplexity(
    source: Source,
    text: Annotated[Path, typer.Option(help="A text file.", exists=True, dir_okay=False, callback=known_text)],
    context: Annotated[int, typer.Option(help="Tokens a chunk.", min=2)] = 2048,
    max_tokens: Annotated[int | None, typer.Option(help="Read no more than this.", min=2)] = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    local_files_only: Local = False,
    as_json: Json = False,
) -> None:
    """Perplexity of a model on a text."""
    import quantlab as ql
    from quantlab.io.datasets import load_text

    content = load_text(text)
    model = ql.LlamaForCausalLM.from_pretrained(source, dtype, device, local_files_only)
    with wrong_call("text_or_ids", "--text: "), told_warnings():
        result = model.perplexity(content, context=context, max_tokens=max_tokens)
    if as_json:
        print_json(result)
    else:
        error = f" ± {result['stderr']:.4f}" if result["chunks"] > 1 else ""  # one chunk has no spread
        print(f"perplexity {result['ppl']:.4f}{error} over {result['tokens']} tokens")


def generate(
    source: Source,
    prompt: Annotated[str, typer.Argument(help="The text to continue, or with --chat what the user says.")],
    max_new_tokens: Annotated[int, typer.Option(help="Stop after so many tokens.")] = 64,
    chat: Annotated[bool, typer.Option("--chat", help="Answer, in the model's chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="With --chat: the system's message.")] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(help="The directory of a LoRA adapter.", exists=True, file_okay=False, callback=known_adapter),
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop after this text; may be given again.")] = None,
    do_sample: Annotated[bool, typer.Option("--do-sample", help="Draw tokens; else take the likeliest.")] = False,
    temperature: Annotated[float | None, typer.Option(help="With --do-sample (1.0).")] = None,
    top_k: Annotated[int | None, typer.Option(help="With --do-sample; 0: all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="With --do-sample (1.0).")] = None,
    seed: Annotated[int | None, typer.Option(help="With --do-sample (0).")] = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    local_files_only: Local = False,
    as_json: Json = False,
) -> None:
    """Continue a text, or answer it; tokens are shown as they come."""
    import quantlab as ql

    options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    options = {name: value for name, value in options.items() if value is not None}
    if options and not do_sample:
        raise typer.BadParameter(f"--{next(iter(options)).replace('_', '-')}: it needs --do-sample beside it")
    if system is not None and not chat:
        raise typer.BadParameter("--system: it needs --chat beside it")
    model = ql.LlamaForCausalLM.from_pretrained(source, dtype, device, local_files_only)
    with told_warnings():
        model = model if adapter is None else ql.load_adapter(model, adapter)
    ids, stops = prompt_ids(model, prompt, chat, system)
    tokens: list[int] = []
    shown = ""

    def show(row: int, token: int) -> None:
        nonlocal shown
        tokens.append(token)
        text = model.decode(tokens)
        if not as_json and not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character may need several tokens
            print(text[len(shown) :], end="", flush=True)
            shown = text

    options |= {"do_sample": do_sample, "on_token": show, "stop_strings": stop, "eos_token_id": stops}
    try:
        with wrong_call(), told_warnings():
            model.generate(ids, max_new_tokens=max_new_tokens, **options)
    except BaseException:  # what is told of it begins a line of its own
        if shown:
            print(flush=True)
        raise
    text = model.decode(tokens)
    if as_json:
        print_json({"prompt": prompt, "text": text, "tokens": tokens})
    else:
        print(text[len(shown) :])


def prompt_ids(model: Any, prompt: str, chat: bool, system: str | None) -> tuple[np.ndarray, list[int] | None]:
    """The ids of a text, or of a user's message up to where the assistant speaks; and the tokens that end what follows
    (None: the model's)."""
    from quantlab.conversations import chat_template, stop_ids

    model.require_tokenizer()  # without one, the call is not wrong
    with wrong_call("text", "prompt: "):
        ids = model.encode(prompt)
    if chat:
        messages = [{"role": "system", "content": system}] if system else []
        with wrong_call():
            ids = model.apply_chat_template([*messages, {"role": "user", "content": prompt}])
    if len(ids) == 0:
        raise typer.BadParameter(f"prompt: got {prompt!r}, which holds no token to continue")
    return ids, stop_ids(model, chat_template(model)) if chat else None
