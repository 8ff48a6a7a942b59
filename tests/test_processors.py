"""Processors without AVX-512 or AVX2, by qemu's emulation: the core imports, selects what there is, and computes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap

import pytest

QEMU = shutil.which("qemu-x86_64")
WORK = """
    import numpy as np
    import quantlab as ql

    rng = np.random.default_rng(0)
    dense, x = rng.standard_normal((64, 128), dtype=np.float32), rng.standard_normal((9, 128), dtype=np.float32)
    for config in (ql.NF4Config(), ql.FP4Config(), ql.Int8Config(), ql.RTNConfig(3, 32), ql.RTNConfig(4, 32)):
        weight = ql.QuantWeight.from_float(dense, config)
        for rows in (1, 9):
            assert np.allclose(ql.linear(x[:rows], weight), x[:rows] @ weight.dequantize().T, atol=1e-3)
    hessian = ql.gptq.Hessian(128)
    hessian.add(x)
    ql.gptq.quantize(dense, hessian, ql.GPTQConfig(bits=4, group_size=32))
    print(ql.info()["isa"]["selected"])
"""


@pytest.mark.skipif(QEMU is None, reason="needs qemu-x86_64 (Debian: qemu-user)")
@pytest.mark.parametrize("processor, selected", [("Nehalem", "scalar"), ("Haswell", "avx2")])
def test_runs_without_newer_instructions(processor: str, selected: str) -> None:
    command = [QEMU, "-cpu", processor, sys.executable, "-c", textwrap.dedent(WORK)]
    environment = {name: value for name, value in os.environ.items() if name != "QL_ISA"}
    environment["OPENBLAS_CORETYPE"] = processor  # NumPy's goes by the vendor, which qemu takes from the host
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert (done.returncode, done.stdout) == (0, f"{selected}\n"), done.stderr
