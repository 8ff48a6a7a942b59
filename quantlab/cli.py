"""The shell: `quantlab <command>`. Each command turns words into one call of the library and shows its result.

Exit status: 0 done, 1 the job failed, 2 the call was wrong, 130 interrupted. An error is one line; `--debug` adds the
traceback. Heavy modules are imported inside the commands, so that `quantlab --help` is quick.
"""

from __future__ import annotations

import json
import math
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    import numpy as np

    from quantlab.config import QuantizationConfig

UsageError = typer.BadParameter.__base__  # click's, which some releases of typer carry inside
REPEATED = {"--bits": str.isdigit, "--variants": lambda word: not word.startswith("-")}  # take several words
EXPECTED = (ValueError, TypeError, OSError, ArithmeticError, MemoryError, RuntimeError, ImportError)

app = typer.Typer(
    name="quantlab",
    help="Quantize LLaMA models, measure what it costs and what it saves. No PyTorch needed.",
    epilog="Start here: quantlab demo",
    add_completion=False,
    pretty_exceptions_enable=False,
)

Source = Annotated[str, typer.Argument(help='A directory, a .gguf file, a hub id, or "demo".', show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Local = Annotated[bool, typer.Option("--local-files-only", help="Never ask the hub.")]
Out = Annotated[Path, typer.Option("--out", help="The run's directory; a run that is there is continued.")]


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    if version:
        import quantlab

        print(f"quantlab {quantlab.__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


# ---- what the commands share ---------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """`value` in types that JSON knows: NumPy scalars and arrays as numbers and lists, paths as text, nan as null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_json(value: Any) -> None:
    print(json.dumps(plain(value), indent=2, ensure_ascii=False))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Left-aligned first column, right-aligned others; never cropped, whatever the width of the terminal."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.3f} GB" if count >= 1e9 else f"{count / 1e6:.3f} MB"


@contextmanager
def wrong_call() -> Iterator[None]:
    """A ValueError in this block is the caller's: exit status 2."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def require_new(out: Path) -> None:
    """A checkpoint is written where nothing is yet."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise typer.BadParameter(f"{out} exists and is not empty; name a new directory")


def read_text(path: Path) -> str:
    if not path.is_file():
        raise typer.BadParameter(f"{path}: there is no such file")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: byte {error.start} is 0x{error.object[error.start]:02x}") from error


# ---- the machine ---------------------------------------------------------------------------------------------------


@app.command(epilog="Example: quantlab info --json")
def info(as_json: Json = False) -> None:
    """What is built, what this machine can use, and why the rest cannot be."""
    import quantlab

    found = quantlab.info()
    if as_json:
        print_json(found)
        return
    isa, cuda = found["isa"], found["cuda"]
    print(f"quantlab {found['version']}, built by {found['compiler']}, {found['threads']} threads\n")
    rows = []
    for name in isa["built"]:
        state = "in use" if name == isa["selected"] else "usable" if isa["usable"][name] else "not usable"
        rows.append((name, "built" if isa["built"][name] else "not built", state, isa["why_not"][name]))
    rows.append(
        (
            "cuda",
            "built" if cuda["built"] else "not built",
            "usable" if cuda["usable"] else "not usable",
            cuda["why_not"],
        )
    )
    for name, built, state, why_not in rows:
        print(f"{name:8}{built:11}{state:12}{why_not}".rstrip())


# ---- models ----------------------------------------------------------------------------------------------------------


@app.command(epilog="Example: quantlab fetch demo")
def fetch(
    source: Annotated[
        str, typer.Argument(help='"demo" (model and tweets), or the hub id of a model.', show_default=False)
    ],
    as_json: Json = False,
) -> None:
    """Put a model or data set in the cache, and check it."""
    from quantlab.io import open_checkpoint
    from quantlab.io.cache import ITEMS
    from quantlab.io.cache import fetch as fetch_item

    if source == "demo" or source in ITEMS:
        names = list(ITEMS) if source == "demo" else [source]
        paths = {fetch_item(name, verify=True): ITEMS[name].sha256 for name in names}
    else:
        folder = Path(open_checkpoint(source).path)
        files = [folder] if folder.is_file() else sorted(path for path in folder.iterdir() if path.is_file())
        paths = {path: sha256(path) for path in files}
    found = [{"path": path, "bytes": path.stat().st_size, "sha256": digest} for path, digest in paths.items()]
    if as_json:
        print_json({"source": source, "files": found})
        return
    for file in found:
        print(f"{file['path']}: {file['bytes']:,} bytes, SHA-256 {file['sha256']}")


def sha256(path: Path) -> str:
    import hashlib

    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@app.command(epilog="Example: quantlab size llama-2-7b --bits 8 4 3")
def size(
    config: Annotated[
        str, typer.Argument(help="A known name (llama-2-7b), a model directory, a config.json or a hub id.")
    ],
    bits: Annotated[list[int] | None, typer.Option(help="32, 16, or GPTQ's 8 4 3 2; all without this.")] = None,
    group_size: Annotated[int, typer.Option(help="Weights that share a scale; -1: a whole row.")] = 128,
    head: Annotated[str, typer.Option(help="classifier (three labels, no lm_head) or causal.")] = "classifier",
    as_json: Json = False,
) -> None:
    """The size of a checkpoint, from its config alone."""
    from quantlab.size import size_from_config

    values = load_config(config)
    with wrong_call():
        sizes = [size_from_config(values, count, group_size, head=head) for count in bits or (32, 16, 8, 4, 3, 2)]
    if as_json:
        print_json({"config": config, "sizes": sizes})
        return
    parts = list(sizes[0]["parts"])
    rows = [
        [str(one["bits"]), *(gigabytes(one["parts"][part]) for part in parts), gigabytes(one["total"])] for one in sizes
    ]
    print_table(["bits", *parts, "total"], rows)


def load_config(name: str) -> Mapping[str, Any]:
    """The config of a known model, a config.json, or whatever a model can be loaded from."""
    from quantlab.size import KNOWN_CONFIGS

    if name.lower() in KNOWN_CONFIGS:
        return KNOWN_CONFIGS[name.lower()]
    if name.endswith(".json"):
        try:
            return json.loads(read_text(Path(name)))
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}: not JSON: {error}") from error
    from quantlab.io import open_checkpoint

    return open_checkpoint(name).config


def quantization_config(method: str, bits: int | None, options: Mapping[str, Any]) -> QuantizationConfig:
    """The configuration of `method`; an option that it does not have is the caller's error."""
    from quantlab.config import CONFIGS

    if method not in CONFIGS:
        raise typer.BadParameter(f"--method: got {method!r}, expected one of {', '.join(CONFIGS)}")
    given = {name: value for name, value in options.items() if value is not None}
    with wrong_call():
        if given.pop("recommended", False):
            if method != "gptq":
                raise ValueError("--recommended: only gptq has recommended settings")
            return CONFIGS[method].recommended(bits or 4, **given)
        fixed = {"nf4": 4, "fp4": 4, "int8": 8}.get(method)
        if fixed is None:
            given["bits"] = bits or 4
        elif bits not in (None, fixed):
            raise ValueError(f"--bits: {method} always has {fixed}, got {bits}")
        return CONFIGS[method].from_dict(given)


def calibration_rows(source: str | None, tokenizer: Any, samples: int, context: int) -> np.ndarray:
    """Token ids (samples, context), int32: the head of a text file, or the demo's tweets one after the other."""
    import numpy as np

    if source is None:
        raise typer.BadParameter('--calibration: gptq needs a text file, or "demo" for the demo\'s tweets')
    if samples < 1 or context < 1:
        raise typer.BadParameter(f"--samples {samples} --context {context}: expected at least 1 of each")
    if tokenizer is None:
        raise ValueError("the model has no tokenizer; calibrate it from Python with token ids")
    if source == "demo":
        from quantlab.io.datasets import load_demo_tweets

        text = "\n".join(load_demo_tweets()[0])
    else:
        text = read_text(Path(source))
    ids = np.array(tokenizer.encode(text).ids, np.int32)
    rows = min(samples, len(ids) // context)
    if rows == 0:
        raise ValueError(f"--calibration: {source} has {len(ids)} tokens, fewer than one row of --context {context}")
    return ids[: rows * context].reshape(rows, context)


@app.command(epilog="Example: quantlab quantize demo smollm2-gptq4 --method gptq --bits 4 --calibration demo")
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
    calibration: Annotated[str | None, typer.Option(help='gptq: a text file, or "demo" for the tweets.')] = None,
    samples: Annotated[int, typer.Option(help="gptq: rows of calibration text.")] = 32,
    context: Annotated[int, typer.Option(help="gptq: tokens a row.")] = 512,
    resume_dir: Annotated[
        Path | None, typer.Option(help="gptq: keep finished layers here, and continue from them.")
    ] = None,
    local_files_only: Local = False,
    as_json: Json = False,
) -> None:
    """Quantize a model and write the checkpoint that other tools read."""
    import quantlab as ql

    options = {"group_size": group_size, "block_size": block_size, "double_quant": double_quant, "sym": sym}
    options |= {"desc_act": desc_act, "damp_percent": damp_percent, "recommended": recommended}
    config = quantization_config(method, bits, options)
    require_new(out)
    checkpoint = ql.open_checkpoint(source, local_files_only=local_files_only)
    rows = calibration_rows(calibration, checkpoint.tokenizer, samples, context) if method == "gptq" else None
    model = ql.quantize(checkpoint, config, calibration=rows, resume_dir=resume_dir)
    files = model.save_pretrained(out)
    report = {"out": out, "config": config.to_dict(), "files": files, "size": model.size_report()}
    if as_json:
        print_json({**report, "matrices": model.quantization_report})
    else:
        print(f"{out}: {gigabytes(sum(files.values()))} in {len(files)} files")


@app.command(epilog="Example: quantlab perplexity demo --text wiki.test.txt --context 512")
def perplexity(
    source: Source,
    text: Annotated[Path, typer.Option(help="A text file.")],
    context: Annotated[int, typer.Option(help="Tokens a chunk.")] = 2048,
    max_tokens: Annotated[int | None, typer.Option(help="Read no more than this.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "float32",
    local_files_only: Local = False,
    as_json: Json = False,
) -> None:
    """Perplexity of a model on a text."""
    import quantlab as ql

    content = read_text(text)
    model = ql.LlamaForCausalLM.from_pretrained(source, dtype=dtype, local_files_only=local_files_only)
    result = model.perplexity(content, context=context, max_tokens=max_tokens)
    if as_json:
        print_json(result)
    else:
        print(f"perplexity {result['ppl']:.4f} ± {result['stderr']:.4f} over {result['tokens']} tokens")


@app.command(epilog='Example: quantlab generate demo "The capital of France is" --max-new-tokens 20')
def generate(
    source: Source,
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Stop after so many tokens.")] = 64,
    do_sample: Annotated[bool, typer.Option("--do-sample", help="Draw tokens; else take the likeliest.")] = False,
    temperature: Annotated[float, typer.Option(help="With --do-sample.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="With --do-sample; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="With --do-sample.")] = 1.0,
    seed: Annotated[int, typer.Option(help="With --do-sample.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "float32",
    local_files_only: Local = False,
    as_json: Json = False,
) -> None:
    """Continue a text; tokens are shown as they come."""
    import quantlab as ql

    model = ql.LlamaForCausalLM.from_pretrained(source, dtype=dtype, local_files_only=local_files_only)
    ids = model.encode(prompt)
    tokens: list[int] = []
    shown = ""

    def show(row: int, token: int) -> None:
        nonlocal shown
        tokens.append(token)
        text = model.tokenizer.decode(tokens)
        if not as_json and not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character may need several tokens
            print(text[len(shown) :], end="", flush=True)
            shown = text

    options = {"do_sample": do_sample, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    with wrong_call():
        model.generate(ids, max_new_tokens=max_new_tokens, on_token=show, **options)
    text = model.tokenizer.decode(tokens)
    if as_json:
        print_json({"prompt": prompt, "text": text, "tokens": tokens})
    else:
        print(text[len(shown) :])


# ---- studies ---------------------------------------------------------------------------------------------------------


# ---- main ------------------------------------------------------------------------------------------------------------


def spread(words: Sequence[str]) -> list[str]:
    """`--bits 8 4 3` as `--bits 8 --bits 4 --bits 3`, which is how the parser takes several values."""
    out: list[str] = []
    option = ""
    for word in words:
        if option and out[-1] != option and REPEATED[option](word):
            out += [option, word]
            continue
        if not (option and out[-1] == option):
            option = word if word in REPEATED else ""
        out.append(word)
    return out


def describe(error: BaseException) -> str:
    """One line: what was wrong, where, what to do."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return f"out of memory{': ' + text if text else ''}"
    if isinstance(error, EXPECTED) and not isinstance(error, NotImplementedError):
        return text or type(error).__name__
    return f"internal error, {type(error).__name__}: {text}. Please report it with the output of --debug"


def wrong(error: Any) -> str:
    """The line for a call that was wrong, with where to read how it is made."""
    command = error.ctx.command_path if error.ctx is not None else "quantlab"
    text = " ".join(error.format_message().split()).removeprefix("Invalid value: ").rstrip(".")
    return f"{text}. See {command} --help"


def run(words: Sequence[str]) -> int:
    command = typer.main.get_command(app)
    status = command.main(args=spread(words), prog_name="quantlab", standalone_mode=False)
    return status if isinstance(status, int) else 0


def main(words: Sequence[str] | None = None) -> int:
    """Runs one command line; returns the exit status."""
    words = list(sys.argv[1:] if words is None else words)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        status, message = run(words), "interrupted"
        sys.stdout.flush()
        if status != 130:  # what typer makes of Ctrl-C
            return status
    except UsageError as error:
        status, message = 2, wrong(error)
    except (KeyboardInterrupt, typer.Abort):
        status, message = 130, "interrupted"
    except BrokenPipeError:  # `quantlab … | head`: nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        status, message = 1, describe(error)
        if debug:
            traceback.print_exc()
    print(f"quantlab: {message}", file=sys.stderr)
    return status


def entry() -> NoReturn:
    sys.exit(main())


if __name__ == "__main__":
    entry()
