"""Fixtures of every test: `isa` runs a test on each ISA of this machine, in the tests of single ops also on its GPU;
`rng` is seeded by the test's name."""

from __future__ import annotations

import signal
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
from reference import select

from quantlab import _core, cuda

USABLE = [isa for isa, state in _core.isa_info().items() if state["usable"]]
# the tests whose ops have CUDA kernels in the arithmetic of the CPU's: their bounds hold there too
ON_CUDA = {
    "test_attention", "test_attention_backward", "test_cross_entropy", "test_decode", "test_gradients", "test_gram",
    "test_optimizer", "test_quantize_forward", "test_rmsnorm", "test_rope", "test_swiglu",
}  # fmt: skip


def pytest_configure() -> None:
    """Ctrl-C is heard by the processes that tests start, also where they run as a job in the background:
    such a job ignores it, and so would its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "isa" in metafunc.fixturenames:
        also = metafunc.module.__name__ in ON_CUDA and cuda.usable()
        metafunc.parametrize("isa", [*USABLE, *[pytest.param("cuda", marks=pytest.mark.cuda)] * also], indirect=True)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Selects the ISA, or "cuda", for the test, and restores the one before."""
    before = _core.isa_selected(), _core.device_selected()
    select(request.param)
    yield request.param
    _core.isa_select(before[0])
    _core.device_select(before[1])


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))
