"""Everything here runs on a GPU: each test has the mark `cuda`, and is skipped where CUDA cannot be used."""

from __future__ import annotations

import pytest

from quantlab import cuda


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/cuda/" in item.path.as_posix():
            item.add_marker(pytest.mark.cuda)
            if not cuda.usable():
                item.add_marker(pytest.mark.skip(reason=f"CUDA cannot be used: {cuda.why_not()}"))
