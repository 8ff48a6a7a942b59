"""Fixtures of every test: `isa` runs a test on each ISA of this machine, `rng` is seeded by the test's name."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import numpy as np
import pytest

from quantlab import _core

USABLE = [isa for isa, state in _core.isa_info().items() if state["usable"]]


@pytest.fixture(params=USABLE)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Selects the ISA for the test, and restores the one before."""
    before = _core.isa_selected()
    _core.isa_select(request.param)
    yield request.param
    _core.isa_select(before)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))
