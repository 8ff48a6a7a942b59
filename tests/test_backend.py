"""quantlab.backend: the choice of kernels, threads and device."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

import quantlab as ql
from quantlab import _core


def test_use_restores_and_nests() -> None:
    before = _core.isa_selected(), _core.threads()
    with ql.backend.use(precise=True), ql.backend.use(threads=1):
        assert _core.precise()
        with ql.backend.use(precise=False):
            assert not _core.precise()
        assert _core.precise()
    assert not _core.precise()
    with ql.backend.use(isa="scalar", threads=3):
        assert (_core.isa_selected(), _core.threads()) == ("scalar", 3)
        with ql.backend.use(threads=1):
            assert (_core.isa_selected(), _core.threads()) == ("scalar", 1)
        assert _core.threads() == 3
        assert set(ql.backend.table()["rmsnorm_forward"].values()) == {"scalar"}
    assert (_core.isa_selected(), _core.threads()) == before
    with pytest.raises(KeyError), ql.backend.use(isa="scalar", device="cpu"):
        raise KeyError
    assert (_core.isa_selected(), _core.threads()) == before


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"isa": "sse"}, ValueError, "isa: got 'sse', expected scalar, avx2, avx512, avx512_vnni, avx512_bf16 or amx"),
        ({"threads": 0}, ValueError, "threads: got 0, expected 1 to 4096"),
        ({"threads": 10**30}, ValueError, f"threads: got {10**30}, expected 1 to 4096"),
        ({"threads": 2.0}, TypeError, "threads: got float, expected an int"),
        ({"isa": 3}, TypeError, "isa: got int, expected scalar, avx2, avx512, avx512_vnni, avx512_bf16 or amx"),
        ({"precise": 1}, TypeError, "precise: got int, expected a bool"),
        ({"device": "tpu"}, ValueError, "device: got 'tpu', accepted are cpu, cuda, cuda:N"),
    ],
)
def test_use_refuses(arguments: dict, error: type, message: str) -> None:
    before = _core.isa_selected(), _core.threads()
    with pytest.raises(error, match=message), ql.backend.use(**arguments):
        pass
    assert (_core.isa_selected(), _core.threads()) == before


def test_unusable_isa_says_why() -> None:
    for isa, state in _core.isa_info().items():
        if not state["usable"]:
            with pytest.raises(ValueError, match=f"isa: {isa} is not usable here: {state['why_not']}"):
                _core.isa_select(isa)


@pytest.mark.skipif(ql.cuda.usable(), reason="CUDA can be used here")
def test_cuda_says_why_not() -> None:
    message = f"device: 'cuda' cannot be used here: {ql.cuda.why_not()}"
    with pytest.raises(ql.CudaError, match=re.escape(message)), ql.backend.use(device="cuda"):
        pass


def test_table_names_a_variant_for_every_slot() -> None:
    names = set(_core.isa_info())
    table = ql.backend.table()
    assert {"attention_forward", "linear_forward", "gram_forward"} <= set(table)
    assert all(variant in names for formats in table.values() for variant in formats.values())
    assert set(table["linear_forward"]) == {"f32", "f16", "bf16", "int8", "affine", "nf4", "fp4"}


def test_info() -> None:
    info = ql.info()
    assert info["isa"]["built"]["scalar"] and info["isa"]["usable"]["scalar"]
    assert info["isa"]["usable"][info["isa"]["selected"]]
    assert info["threads"] >= 1 and info["compiler"] and info["version"]
    assert set(info["cuda"]) == {"built", "usable", "why_not", "device", "libraries"}
    assert info["cuda"]["usable"] or info["cuda"]["why_not"]


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=60
    )


def test_environment() -> None:
    code = "from quantlab import _core; print(_core.isa_selected(), _core.threads())"
    assert run_python(code, QL_ISA="scalar", QL_THREADS="3").stdout == "scalar 3\n"
    wrong = run_python(code, QL_ISA="mmx")
    assert wrong.returncode == 0
    assert (
        "QL_ISA: 'mmx' is not used: expected scalar, avx2, avx512, avx512_vnni, avx512_bf16 or amx; using "
        in wrong.stderr
    )
    cores = run_python(code, QL_ISA="scalar", QL_THREADS="").stdout
    for threads in ("four", "0", "4097", "2 "):
        wrong = run_python(code, QL_ISA="scalar", QL_THREADS=threads)
        assert wrong.returncode == 0 and wrong.stdout == cores
        assert f"QL_THREADS: '{threads}' is not used: expected 1 to 4096; using " in wrong.stderr
