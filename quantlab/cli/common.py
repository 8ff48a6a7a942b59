"""What all commands share: the parser, how a call ends, how errors and results are shown."""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args, get_origin, get_type_hints

import typer

UsageError: Any = typer.BadParameter.__base__  # click's, which some releases of typer carry inside
# options of several words, and which words may follow
REPEATED = {
    "--bits": str.isdigit,
    "--variants": lambda word: not word.startswith("-"),
    "--baselines": lambda word: not word.startswith("-"),
    "--target-modules": lambda word: word == "all-linear" or word.endswith("_proj"),
}
EXPECTED = (ValueError, TypeError, OSError, ArithmeticError, MemoryError, RuntimeError, ImportError)

app = typer.Typer(
    name="quantlab",
    help="Quantize LLaMA models, measure what it costs and what it saves. No PyTorch needed.",
    epilog="Start here: quantlab demo",
    add_completion=False,
    pretty_exceptions_enable=False,
)


# ---- what a call names, checked before any work: what is wrong is a BadParameter, exit status 2 ---------------------


@contextmanager
def wrong_call(argument: str = "", option: str = "") -> Iterator[None]:
    """A ValueError in this block is the caller's, a file that is not there too. argument: its name in the message, in
    whose place stands `option`, or nothing, where the parser says it already."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise typer.BadParameter(option + str(error).removeprefix(f"{argument}: ")) from error


def require_source(name: str, option: str = "") -> None:
    """A model that is there, or that the hub may have."""
    from quantlab.io.checkpoint import source_kind
    from quantlab.io.directory import require_model

    with wrong_call("source", option):
        if source_kind(name) == "directory":
            require_model(Path(name))


def known_source(name: str | None) -> str | None:
    """The same; None where the call names none."""
    if name is not None:
        require_source(name)
    return name


def known_adapter(folder: Path | None) -> Path | None:
    from quantlab.io.peft import require_adapter

    if folder is not None:
        with wrong_call():
            require_adapter(folder)
    return folder


def known_dtype(name: str) -> str:
    from quantlab.llama import DTYPES

    if name not in DTYPES:
        raise typer.BadParameter(f"got {name!r}, expected one of {', '.join(DTYPES)}")
    return name


def known_device(name: str | None) -> str | None:
    from quantlab.cuda import device_number

    if name is not None:
        with wrong_call("device"):
            device_number(name)
    return name


def known_text(file: Path | None) -> Path | None:
    """A text file that holds text: told before the model is read, or hours of a study."""
    from quantlab.io.datasets import load_text

    if file is not None:
        with wrong_call("text"):
            load_text(file)
    return file


def text_or(word: str) -> Callable[[str | None], str | None]:
    """The check of an option that is `word` or names a text file."""

    def check(name: str | None) -> str | None:
        if name is not None and name != word:
            known_text(Path(name))
        return name

    return check


def number(kind: type[int] | type[float], least: float | None) -> Callable[[Any], Any]:
    """The parser of an option: what came and what is accepted, in the same words under every release of typer."""

    def parse(word: Any) -> int | float:
        with suppress(ValueError):
            value = kind(word)
            if least is None or value >= least:
                return value
        wanted = "an integer" if kind is int else "a number"
        raise typer.BadParameter(f"got {word!r}, expected {wanted}{'' if least is None else f' of at least {least:g}'}")

    parse.__name__ = kind.__name__  # stands in --help
    return parse


def with_numbers(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with `number` as the parser of its options that are numbers (or lists of them)."""
    command.__annotations__ = get_type_hints(command, include_extras=True)  # evaluated once: typer reads these too
    for hint in command.__annotations__.values():
        if get_origin(hint) is Annotated:
            of, option = get_args(hint)
            kinds = {of, *get_args(of), *(part for one in get_args(of) for part in get_args(one))} & {int, float}
            if kinds:
                option.parser = number(kinds.pop(), option.min)
    return command


MODEL = 'A directory, a .gguf file, a hub id, or "demo".'
Source = Annotated[str, typer.Argument(help=MODEL, show_default=False, callback=known_source)]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.", callback=known_dtype)]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.", callback=known_device)]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Local = Annotated[bool, typer.Option("--local-files-only", help="Never ask the hub.")]


# ---- results -------------------------------------------------------------------------------------------------------


def print_json(value: Any) -> None:
    from quantlab.experiments.record import plain

    print(json.dumps(plain(value), indent=2, ensure_ascii=False))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """First column to the left, the others to the right; never cropped, whatever the width of the terminal."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join([first.strip().ljust(widths[0]), *rest]).rstrip())


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.3f} GB" if count >= 1e9 else f"{count / 1e6:.3f} MB"


# ---- arguments -----------------------------------------------------------------------------------------------------


@contextmanager
def told_warnings() -> Iterator[None]:
    """A warning in this block is one line, as an error is."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"quantlab: {message}", file=sys.stderr)
        yield


def require_directory(folder: Path, what: str) -> None:
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise typer.BadParameter(f"{what}: {folder} is not a directory that can be written to")


def require_new(out: Path) -> None:
    """A checkpoint is written where nothing is yet, and where it can be: better said before hours of work."""
    require_directory(next(folder for folder in out.absolute().parents if folder.exists()), str(out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise typer.BadParameter(f"{out} exists and is not empty; name a new directory")


def spread(words: Sequence[str]) -> list[str]:
    """`--bits 8 4 3` as `--bits 8 --bits 4 --bits 3`, which is how the parser takes several values."""
    out: list[str] = []
    option, first = "", False  # the option of several words that is open, and whether its first word is still to come
    for word in words:
        if option and first:
            out.append(word)
            first = False
        elif option and REPEATED[option](word):
            out += [option, word]
        else:
            option, first = (word, True) if word in REPEATED else ("", False)
            out.append(word)
    return out


class Interrupted(Exception):
    """Ctrl-C, with what is kept and how to go on."""


@contextmanager
def told_what_is_kept(kept: Callable[[], str]) -> Iterator[None]:
    """Ctrl-C in this block says what `kept` returns beside "interrupted"; "": there is nothing to say."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted("; ".join(filter(None, ("interrupted", kept())))) from None


# ---- the end of a call -----------------------------------------------------------------------------------------------


def describe(error: BaseException) -> str:
    """One line: what was wrong, where, what to do."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return f"out of memory{': ' + text if text else ''}"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, EXPECTED) and not isinstance(error, NotImplementedError):
        return text or type(error).__name__
    return f"internal error, {type(error).__name__}: {text}. Please report it with the output of --debug"


def wrong(error: Any) -> str:
    """The line for a call that was wrong, with where to read how it is made."""
    command = error.ctx.command_path if error.ctx is not None else "quantlab"
    text = " ".join(error.format_message().split()).rstrip(".")
    text = re.sub(r"^Invalid value(?: for '?(.+?)'?)?: ", lambda found: f"{found[1]}: " if found[1] else "", text)
    return f"{text}{'' if text.endswith(('.', '?')) else '.'} See {command} --help"


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
    except (KeyboardInterrupt, typer.Abort, Interrupted) as error:
        status, message = 130, str(error) or "interrupted"
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
