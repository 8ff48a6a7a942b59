"""Which kernels run: the instruction set, the threads, the device, the precision.

Environment, read once when quantlab is imported: QL_ISA (scalar, avx2, avx512, avx512_vnni, avx512_bf16, amx) and
QL_THREADS. Without them: the best instruction set that this machine has, and one thread for each core that this process
may use.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from quantlab import _core, cuda


@contextmanager
def use(
    isa: str | None = None, threads: int | None = None, device: str | None = None, precise: bool | None = None
) -> Iterator[None]:
    """`with use(isa="avx2", threads=1): …` changes what is named for the block, and puts it back after it; blocks nest.

    isa: "scalar", "avx2", "avx512", "avx512_vnni" (and byte products), "avx512_bf16" (and bfloat16 products) or "amx".
    threads: at least 1. device: "cpu", "cuda" or "cuda:N": where single ops (`linear`, `dequantize`, …) run; a model
    has a device of its own. precise: on avx512_bf16 and amx products of many rows with weights that are not float32
    take bfloat16, which leaves an error of about 2^-8 of a result. Where it is set, those on avx512_bf16 take float32
    in twice the time (2^-21), those on amx integers of 24 bits (a scale for some hundred values of a row) in up to four
    times the time (2^-20, more where a few values of a row are a thousand times the rest; an infinity makes its row
    NaN); and on amx those with float32 weights take float32, not such integers. Not set: False. The choice holds for
    the whole process, so two Python threads should not make different ones at the same time.

    ValueError: a name that is not known, an ISA that this machine cannot use, or a count of threads below 1.
    CudaError: device="cuda" where CUDA cannot be used, with the reason.
    """
    before = _core.isa_selected(), _core.threads(), _core.precise(), _core.device_selected()
    number = before[3] if device is None else cuda.device_number(device)
    try:
        if isa is not None:
            _core.isa_select(isa)
        if threads is not None:
            _core.set_threads(threads)
        if precise is not None:
            _core.set_precise(precise)
        _core.device_select(number)
        yield
    finally:
        _core.isa_select(before[0])
        _core.set_threads(before[1])
        _core.set_precise(before[2])
        _core.device_select(before[3])


def table() -> dict[str, dict[str, str]]:
    """{op: {format: variant in use}}; the variant is the ISA that its kernel was written for, or "cuda"; "" where a
    device has none."""
    return _core.op_table()


def info() -> dict[str, Any]:
    """What is built, what this machine can use, and why the rest cannot be.

    version, compiler, isa {built, usable, why_not: {name: …}, selected}, threads,
    cuda {built, usable, why_not, device, libraries}.
    """
    states = _core.isa_info()
    return {
        "version": _version(),
        "compiler": _core.compiler,
        "isa": {
            "built": {name: state["built"] for name, state in states.items()},
            "usable": {name: state["usable"] for name, state in states.items()},
            "why_not": {name: state["why_not"] for name, state in states.items()},
            "selected": _core.isa_selected(),
        },
        "threads": _core.threads(),
        "cuda": cuda.describe(),
    }


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("quantlab-llm")
    except PackageNotFoundError:  # a source tree that was built in place and not installed
        from quantlab import __version__

        return __version__
