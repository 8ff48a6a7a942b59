"""quantize_forward on the GPU: codes and scales are those of the CPU, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from quantlab import _core


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    _core.device_select(0)
    yield
    _core.device_select(-1)


def same_as_cpu(x: np.ndarray, format: str, group: int) -> None:
    codes, scales = _core.quantize(x, format, group)
    _core.device_select(-1)
    expected = _core.quantize(x, format, group)
    _core.device_select(0)
    assert np.array_equal(codes, expected[0]), (format, x.size, group)
    assert np.array_equal(scales.view(np.uint32), expected[1].view(np.uint32)), (format, x.size, group)


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("group", [1, 2, 7, 8, 16, 32, 33, 64, 128, 256, 512, 2048, 4096])
def test_blocks(rng: np.random.Generator, format: str, group: int) -> None:
    for count in (1, 2, 3, 7, 8, 31, 33, 64, 257, 4096, 40_001, 262_144):
        x = rng.standard_normal(count, dtype=np.float32)
        same_as_cpu(x, format, group)
    x = np.zeros(4 * group + 3, np.float32)  # blocks of zeros, denormals, and one element that is all of a block
    x[2 * group :] = 1e-42
    x[-1] = -3e38
    same_as_cpu(x, format, group)


@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_thresholds(format: str) -> None:
    """Values on, just below and just above the places where one code gives way to the next."""
    grid = np.linspace(-1, 1, 100_001, dtype=np.float32)
    x = np.concatenate([grid, np.nextafter(grid, np.float32(2)), np.nextafter(grid, np.float32(-2))])
    x = np.pad(np.clip(x, -1, 1), (0, -x.size % 64), constant_values=1).reshape(-1, 64)
    x[:, 0] = 1
    same_as_cpu(x.reshape(-1), format, 64)


def test_int8(rng: np.random.Generator) -> None:
    for rows, k in ((1, 1), (3, 7), (17, 33), (5, 256), (64, 4096), (2, 11008)):
        x = rng.standard_normal((rows, k), dtype=np.float32)
        x[0] = 0
        same_as_cpu(x, "int8", k)
