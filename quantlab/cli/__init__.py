"""The shell: `quantlab <command>`. Each command turns words into one call of the library and shows its result.

Exit status: 0 done, 1 the job failed, 2 the call was wrong (an option's value, two that do not go together, a file or
directory that is not there or is of another kind, a text file without text), 130 interrupted; what is damaged has
failed. An error is one line; `--debug` adds the traceback. Heavy modules are imported inside the commands, so that
`quantlab --help` is quick.
"""

from __future__ import annotations

from typing import Annotated

import typer

from quantlab.cli import machine, models, studies, training
from quantlab.cli.common import app, entry, main, with_numbers

__all__ = ["app", "entry", "main"]

# command, in the order of the help, and its example
COMMANDS = (
    (machine.info, "quantlab info --json"),
    (studies.demo, "quantlab demo"),
    (models.fetch, "quantlab fetch demo"),
    (models.size, "quantlab size llama-2-7b --bits 8 4 3"),
    (models.quantize, "quantlab quantize demo smollm2-gptq4 --method gptq --bits 4 --calibration demo"),
    (models.perplexity, "quantlab perplexity demo --text wiki.test.txt --context 512"),
    (models.generate, 'quantlab generate demo "The capital of France is" --max-new-tokens 20'),
    (training.finetune, "quantlab finetune demo adapter --data talk.jsonl --base nf4 --target-modules q_proj v_proj"),
    (training.merge, "quantlab merge demo adapter merged"),
    (studies.tweeteval, "quantlab tweeteval --preset corrected --variants fp32 gptq-4 nf4 --out run"),
    (studies.lima, "quantlab lima --data train.jsonl --limit 200 --out run"),
    (studies.report, "quantlab report run"),
    (machine.bench, "quantlab bench linear --json linear.jsonl"),
)
for function, example in COMMANDS:
    app.command(epilog=f"Example: {example}")(with_numbers(function))


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
