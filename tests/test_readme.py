"""The README is true: its Python runs, its shell lines parse, its results are the records', its links exist."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from checkpoints import save_tiny

from quantlab import cli
from quantlab.cli.common import spread

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
if not README.exists():
    pytest.skip("no source tree beside the tests", allow_module_level=True)
TEXT = README.read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.strip().splitlines()[-1][:40])
def test_python_runs(tmp_path, monkeypatch, code):
    """Each block by itself, on a tiny model in the place of the demo's."""
    tiny = save_tiny(tmp_path / "tiny", max_position_embeddings=512)
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace('"demo"', repr(str(tiny))), "README.md", "exec"), {})


def shell_calls() -> list[str]:
    """Every `quantlab …` of the shell blocks, without what is said beside it (two spaces or more)."""
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    parts = [part.strip() for line in lines for part in re.split(r" {2,}", line)]
    return [part for part in parts if part.startswith("quantlab ")]


@pytest.mark.parametrize("call", shell_calls())
def test_shell_line_parses(call, tmp_path, monkeypatch):
    words = spread(shlex.split(call)[1:])
    monkeypatch.chdir(tmp_path)
    for name in {word for word in words if not word.startswith("-")}:  # what a call names must be there
        if "." in name:
            (tmp_path / name).write_text("words")
            continue
        (tmp_path / name).mkdir()  # a model, an adapter and a run
        for file in ("model.safetensors", "adapter_config.json", "adapter_model.safetensors"):
            (tmp_path / name / file).touch()
        (tmp_path / name / "config.json").write_text('{"experiment": "lima"}')
    command = typer.main.get_command(cli.app)
    context = command.make_context("quantlab", list(words))
    name, found, rest = command.resolve_command(context, [*context._protected_args, *context.args])
    found.make_context(name, rest, parent=context)  # raises where a word is not understood


def test_shell_lines_are_there():
    names = {shlex.split(call)[1] for call in shell_calls()}
    assert names == {command.callback.__name__ for command in cli.app.registered_commands}


def test_results_are_the_records():
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "update_readme.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_recorded_lines_become_tables(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import update_readme

    monkeypatch.setattr(update_readme, "ROOT", tmp_path)
    kernel = {"op": "linear", "format": "nf4", "shape": "m1 n2 k3", "variant": "avx2", "median_s": 1e-3}
    kernel |= {"gb_per_s": 2.0, "roof_percent": 50.0, "roof": "memory", "machine": "it", "threads": 2, "commit": "abc"}
    quality = {"variant": "gptq-4", "model": "demo", "calibration": {"rows": 32, "tokens": 512}, "context": 512}
    quality |= {"threads": 2, "quantize_s": 9.0, "perplexity": {"test": {"ppl": 12.25}}, "bytes": 1_500_000}
    peer = {"case": "prompt", "peer": "it", "threads": 2, "isa": "amx", "rounds": 5, "tokens": 100}
    peer |= {"quantlab_s": {"median": 0.5}, "peer_s": {"median": 1.0}, "ratio": {"median": 2.0, "min": 1.5, "max": 2.5}}
    peer["roofs"] = {"read_gb_per_s": 10.0, "fma_gflop_per_s": 100.0}
    product = {**peer, "case": "linear", "flops": 10**9, "bytes": 10**6}
    del product["tokens"]
    (tmp_path / "peers.jsonl").write_text(f"{json.dumps(peer)}\n{json.dumps(product)}\n")
    (tmp_path / "cpu.jsonl").write_text(json.dumps(kernel) + "\n")
    (tmp_path / "quality.jsonl").write_text(json.dumps(quality) + "\n")
    section = update_readme.results_section(tmp_path, details=True)
    assert "m1 n2 k3" not in update_readme.results_section(tmp_path)
    assert "| linear | nf4 | m1 n2 k3 | avx2 | 1.000 | 2.0 | 50 (memory) |" in section
    assert "| gptq-4 | 12.25 | 1.5 | 9.0 |" in section
    assert "| prompt | it | 2 | 500.00 | 1000.00 | 200 tok/s | 2.00 (1.50 to 2.50) | 5 |" in section
    assert "| linear | it | 2 | 500.00 | 1000.00 | 2 GFLOP/s | 2.00 (1.50 to 2.50) | 5 |" in section
    text = f"a\n{update_readme.BEGIN}\nold\n{update_readme.END}\nb\n"
    once = update_readme.updated(text, section)
    assert "old" not in once and update_readme.updated(once, section) == once


PATHS = sorted(set(re.findall(r"`((?:csrc|quantlab|tests|benchmarks|cuda|\.ci)/[\w./]*)`", TEXT)))


@pytest.mark.parametrize("path", PATHS)
def test_paths_exist(path):
    assert (ROOT / path).exists()
