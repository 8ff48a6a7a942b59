"""Parity is measured in float32 or as near to it as the kernels come: `precise`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import quantlab as ql


@pytest.fixture(autouse=True)
def precise() -> Iterator[None]:
    with ql.backend.use(precise=True):
        yield
