"""quantize_forward: every ISA bit for bit against scalar; test_quantize_blockwise.py holds scalar to the rules."""

from __future__ import annotations

import numpy as np
import pytest
import reference as ref

from quantlab import _core

COUNTS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 1000, 4097, 140_001)


def hard_inputs(rng: np.random.Generator, count: int) -> dict[str, np.ndarray]:
    normal = rng.standard_normal(count).astype(np.float32)
    return {
        "normal": normal,
        "denormal": normal * np.float32(1e-42),
        "zero": np.zeros(count, np.float32),
        "ties": np.round(normal * 4) / 4,
        "wide": (normal * 10.0 ** rng.integers(-30, 30, count)).astype(np.float32),
        "constant": np.full(count, -0.3, np.float32),
    }


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
def test_equals_scalar(isa: str, rng: np.random.Generator, format: str) -> None:
    for count in COUNTS:
        for group in (2, 7, 32, 34, 64, 4096) if format != "int8" else {count, 7 if count % 7 == 0 else 1}:
            for name, x in hard_inputs(rng, count).items():
                codes, scales = _core.quantize(x, format, group)
                ref.select("scalar")
                expected_codes, expected_scales = _core.quantize(x, format, group)
                ref.select(isa)
                assert codes.tobytes() == expected_codes.tobytes(), (count, group, name)
                assert scales.tobytes() == expected_scales.tobytes(), (count, group, name)


@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_next_to_every_threshold(isa: str, format: str) -> None:
    """Codes change at the midpoints of neighbouring values; a tie takes the lower."""
    grid = np.unique(
        _core.decode(
            _core.Weight(format, 4, 1, 16, 16, np.arange(0x01, 0x100, 0x22, dtype=np.uint8), np.ones(1, np.float32)),
            0,
            1,
        )
    )
    middle = ((grid[1:] + grid[:-1]) / 2).astype(np.float32)
    x = np.concatenate([[1], middle, np.nextafter(middle, np.float32(2)), np.nextafter(middle, np.float32(-2))]).astype(
        np.float32
    )
    x = np.pad(x, (0, -len(x) % 64))
    codes, scales = _core.quantize(x, format, 64)
    values = _core.decode(_core.Weight(format, 4, 1, len(x), 64, codes, scales), 0, 1)[0]
    count = len(middle)
    np.testing.assert_array_equal(values[1 : 1 + count], grid[:-1])
    np.testing.assert_array_equal(values[1 + count : 1 + 2 * count], grid[1:])
    np.testing.assert_array_equal(values[1 + 2 * count : 1 + 3 * count], grid[:-1])
