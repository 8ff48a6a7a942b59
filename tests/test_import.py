"""`import quantlab` is light, and what it offers is described: the stub of the core names what the core has."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import quantlab
from quantlab import _core

HEAVY = ("torch", "transformers", "scipy", "matplotlib", "pandas", "sklearn", "rich", "typer", "pyarrow", "tokenizers")
PACKAGE = Path(quantlab.__file__).parent


def modules_after(statement: str) -> set[str]:
    """The top-level names in sys.modules after `statement` in a fresh interpreter."""
    code = f"{statement}\nimport sys, json\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout.splitlines()[-1]))


def test_import_loads_nothing_heavy():
    assert not modules_after("import quantlab") & set(HEAVY)


def test_using_the_library_never_loads_torch():
    names = modules_after("import quantlab as ql\nfor name in ql.__all__: getattr(ql, name)")
    assert "numpy" in names
    assert not names & {"torch", "transformers"}


def stub_names() -> set[str]:
    tree = ast.parse((PACKAGE / "_core.pyi").read_text())
    names = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names - {"IsaInfo"}  # the shape of a dict, for type checkers only


def test_stub_names_what_the_core_has():
    assert stub_names() == {name for name in dir(_core) if not name.startswith("__")}


def stub_functions() -> dict[str, int]:
    """How many arguments each takes at most."""
    tree = ast.parse((PACKAGE / "_core.pyi").read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {node.name: len(node.args.posonlyargs) + len(node.args.args) for node in functions}


@pytest.mark.parametrize(("name", "count"), stub_functions().items())
def test_stub_counts_the_arguments_of_the_core(name, count):
    said = {0: "no", 1: "exactly (one|1)"}.get(count, f"(exactly|at most) {count}")
    with pytest.raises(TypeError, match=f"takes {said} argument"):
        getattr(_core, name)(*[None] * 99)


def test_package_is_typed():
    assert (PACKAGE / "py.typed").exists()


# an editable install's finder would answer for quantlab._core with the core of the tree that it was made from
NO_FINDER = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in f.__module__]"


def imported_in(folder: Path, statement: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"{NO_FINDER}; {statement}"]
    environment = {**os.environ, "PYTHONPATH": ""}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_a_source_tree_without_the_core_says_so(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "quantlab", ignore=shutil.ignore_patterns("_core*", "__pycache__"))
    done = imported_in(tmp_path, "import quantlab; quantlab.LlamaForCausalLM")
    assert done.returncode == 1
    assert "holds no built C core" in done.stderr and "pip install -e ." in done.stderr


@pytest.mark.skipif(not (PACKAGE.parent / "csrc").exists(), reason="the package is not in a source tree")
@pytest.mark.parametrize("statement", ["from quantlab import _core", "import quantlab.llama", "quantlab.NumericError"])
def test_a_core_of_other_sources_says_so(tmp_path, statement):
    shutil.copytree(PACKAGE, tmp_path / "quantlab", ignore=shutil.ignore_patterns("__pycache__"))
    statement = f"import quantlab; {statement}"
    assert imported_in(tmp_path, statement).returncode == 0  # as where it is installed: no sources beside it
    shutil.copytree(PACKAGE.parent / "csrc", tmp_path / "csrc")
    assert imported_in(tmp_path, statement).returncode == 0
    with open(tmp_path / "csrc/quantlab.h", "a") as header:
        header.write("/* another */")
    done = imported_in(tmp_path, statement)
    assert done.returncode == 1
    assert "built from other sources" in done.stderr and "pip install -e ." in done.stderr
