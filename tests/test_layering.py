"""The rules of the house, read from the source text: which layer may include or import which, and how long things get.

C:       core -> formats -> {ops, x86} -> quant -> model -> python; each may use what stands before it.
Python:  quantlab -> quantlab.io -> the model -> experiments -> report, cli; torch and transformers nowhere.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "csrc").is_dir():
    pytest.skip("no source tree beside the tests", allow_module_level=True)

C_FILES = sorted(path for folder in ("csrc", "cuda") for path in (ROOT / folder).rglob("*.[ch]*"))
PYTHON_FILES = sorted((ROOT / "quantlab").rglob("*.py"))
ALL_PYTHON = sorted(path for folder in ("quantlab", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py"))

# folder of csrc -> the folders (and single headers) it may include, itself among them
MAY_INCLUDE = {
    "core": {"core", "quantlab.h"},
    "formats": {"core", "formats", "quantlab.h"},
    "ops": {"core", "formats", "ops", "quantlab.h"},
    "x86": {"core", "formats", "x86", "quantlab.h"},
    "quant": {"core", "formats", "ops", "quant", "quantlab.h"},
    "model": {"core", "formats", "quant", "model", "quantlab.h"},
    "dispatch.c": {"core", "x86/overlay.h", "quantlab.h"},
    "quantlab.h": set(),
    "python": {"core", "formats", "quant", "model", "python", "quantlab.h"},
}
C_LIBRARY = {
    *("assert", "errno", "float", "inttypes", "limits", "math", "stdalign", "stdarg", "stdatomic", "stdbool", "stddef"),
    *("stdint", "stdio", "stdlib", "string", "time", "pthread", "unistd"),
}
SYSTEM_HEADERS = {
    "core": C_LIBRARY | {"cpuid", "immintrin", "malloc", "sched", "signal", "sys/syscall", "sys/mman", "linux/futex"},
    "formats": {"math", "stdint", "stddef", "string"},
    "x86": C_LIBRARY - {"stdio", "stdlib", "pthread"} | {"immintrin"},
    "python": C_LIBRARY | {"Python", "numpy/arrayobject", "structmember"},
    "quant": C_LIBRARY | {"dlfcn"},
}
# calls that a kernel never makes (kernels allocate nothing, print nothing, never exit)
KERNEL_FORBIDDEN = re.compile(r"\b(malloc|calloc|realloc|free|printf|fprintf|puts|exit|abort)\s*\(")

# Python layers, lowest first; a module may import its own layer and those below it
PYTHON_LAYERS = [
    {"_core", "arrays", "config", "cuda", "errors", "progress", "sources"},
    {"token_rows", "backend", "weight", "rope", "llama_config", "tracking"},
    {"io", "gptq"},
    {"calibration", "device_calibration", "resume"},
    {"llama", "quantize", "generate", "perplexity", "classify", "size", "lora", "conversations"},
    {"training", "examples", "checkpoints", "finetune"},
    {"bench", "bench_cases", "bench_cuda"},
    {"experiments"},
    {"report"},
    {"cli", "__main__"},
]
FORBIDDEN_IMPORTS = {"torch", "transformers", "bitsandbytes", "peft", "gptqmodel", "accelerate", "tensorflow", "jax"}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def c_layer(path: Path) -> str:
    """`ops` for csrc/ops/linear.c, `dispatch.c` for csrc/dispatch.c."""
    return path.relative_to(ROOT / "csrc").parts[0]


def includes(path: Path) -> list[tuple[str, str]]:
    """(bracket, name) of each #include line."""
    return re.findall(r'^[ \t]*#[ \t]*include[ \t]+([<"])([^>"]+)[>"]', path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", [path for path in C_FILES if "csrc" in path.parts], ids=relative)
def test_c_includes_point_down(path):
    layer = c_layer(path)
    for bracket, name in includes(path):
        if bracket == "<":
            allowed = SYSTEM_HEADERS.get(layer, C_LIBRARY)
            assert name.removesuffix(".h") in allowed, f"{relative(path)}: <{name}> does not belong in {layer}"
            continue
        target = (path.parent / name).resolve()
        assert target.exists(), f"{relative(path)}: {name} does not exist"
        inside = target.relative_to(ROOT / "csrc")
        assert inside.parts[0] in MAY_INCLUDE[layer] or str(inside) in MAY_INCLUDE[layer], (
            f"{relative(path)}: includes {inside}, which is not below {layer}"
        )


@pytest.mark.parametrize("path", [path for path in C_FILES if "cuda" in path.parts], ids=relative)
def test_cuda_sees_no_other_backend(path):
    for bracket, name in includes(path):
        target = (path.parent / name).resolve()
        if bracket == '"' and ROOT / "csrc" in target.parents:
            inside = target.relative_to(ROOT / "csrc")
            below = ("quantlab.h", "core", "formats", "quant")
            assert inside.parts[0] in below, f"{relative(path)}: includes {inside}"


def code_only(text: str) -> str:
    """C without comments and without the insides of strings; line numbers stay."""
    pattern = re.compile(r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'', re.DOTALL)
    return pattern.sub(lambda found: '""' if found[0][0] in "\"'" else "\n" * found[0].count("\n"), text)


@pytest.mark.parametrize("path", [p for p in C_FILES if {"ops", "x86", "formats"} & set(p.parts)], ids=relative)
def test_kernels_allocate_and_print_nothing(path):
    found = KERNEL_FORBIDDEN.search(code_only(path.read_text()))
    assert found is None, f"{relative(path)}: a kernel calls {found and found[1]}"


@pytest.mark.parametrize("path", [path for path in C_FILES if "model" in path.parts], ids=relative)
def test_model_names_no_backend(path):
    found = re.search(r"\w*_(scalar|avx2|avx512|avx512_vnni|avx512_bf16|amx)\b|\bcuda\w*", code_only(path.read_text()))
    assert found is None, f"{relative(path)}: the model names a backend: {found and found[0]}"


def imported(path: Path) -> set[str]:
    """Absolute names of the modules a file imports, anywhere in it, relative ones resolved."""
    package = list(path.relative_to(ROOT).with_suffix("").parts[:-1])
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from quantlab import io` names the module quantlab.io
            names |= {f"{module}.{alias.name}" for alias in node.names} if module == "quantlab" else {module}
    return names


def python_layer(module: str) -> int | None:
    """Index into PYTHON_LAYERS of `quantlab.io.gguf` and the like; None for the package itself."""
    parts = module.split(".")
    if len(parts) < 2:
        return None
    found = [i for i, layer in enumerate(PYTHON_LAYERS) if parts[1] in layer]
    return found[0] if found else None


@pytest.mark.parametrize("path", PYTHON_FILES, ids=relative)
def test_python_imports_point_down(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    if module == "quantlab":
        return  # the face of all layers, lazy
    own = python_layer(module)
    assert own is not None, f"{relative(path)}: give the module a layer in PYTHON_LAYERS"
    for name in imported(path):
        other = python_layer(name) if name.startswith("quantlab.") else None
        if other is not None:
            assert other <= own, f"{relative(path)}: imports {name}, which stands above it"


@pytest.mark.parametrize("path", PYTHON_FILES, ids=relative)
def test_package_imports_no_framework(path):
    found = {name.split(".")[0] for name in imported(path)} & FORBIDDEN_IMPORTS
    assert not found, f"{relative(path)}: imports {found}"


def test_report_reads_records_only():
    """The report is made from records: it knows their format and the statistics, never the model or an experiment."""
    allowed = {"quantlab.experiments.record", "quantlab.experiments.statistics"}
    for path in (ROOT / "quantlab" / "report").glob("*.py"):
        names = {name for name in imported(path) if name.startswith("quantlab.")}
        wrong = {name for name in names if not name.startswith("quantlab.report") and name not in allowed}
        assert not wrong, f"{relative(path)}: imports {wrong}"


# ---- lengths ----


@pytest.mark.parametrize("path", [*C_FILES, *ALL_PYTHON], ids=relative)
def test_file_length(path):
    tuned = "x86" in path.parts or path.suffix in (".cu", ".cuh")
    limit = 850 if tuned else 500
    lines = path.read_text().count("\n")
    assert lines <= limit, f"{relative(path)}: {lines} lines, at most {limit}"


def python_functions(path: Path):
    """(name, code lines) of each function: its lines less its docstring, comments and blank lines."""
    text = path.read_text()
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        first = node.body[0]
        documented = (
            isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
        )
        doc = set(range(first.lineno, first.end_lineno + 1)) if documented else set()
        body = [n for n in range(node.lineno, node.end_lineno + 1) if n not in doc]
        yield node.name, sum(1 for n in body if lines[n - 1].strip() and not lines[n - 1].strip().startswith("#"))


@pytest.mark.parametrize("path", ALL_PYTHON, ids=relative)
def test_python_function_length(path):
    for name, count in python_functions(path):
        assert count <= 60, f"{relative(path)}: {name} has {count} lines of code, at most 60"


def c_functions(path: Path):
    """(line, code lines) of each function body: a block in no other block, right after a parameter list."""
    text = code_only(path.read_text())
    depth, start = 0, None
    for found in re.finditer(r"[{}]", text):
        if found[0] == "{":
            if depth == 0 and text[: found.start()].rstrip().endswith(")"):
                start = found.start()
            depth += 1
        else:
            depth -= 1
            if depth == 0 and start is not None:
                body = text[start : found.end()].splitlines()
                yield text.count("\n", 0, start) + 1, sum(1 for line in body if line.strip())
                start = None


@pytest.mark.parametrize("path", C_FILES, ids=relative)
def test_c_function_length(path):
    for line, count in c_functions(path):
        assert count <= 60, f"{relative(path)}:{line}: {count} lines of code, at most 60"
