"""Writes tests/golden/blockwise.npz: small tensors with the codes and scales that bitsandbytes' CPU path gives them.
Needs the extra `parity`: python tests/golden/make_blockwise.py"""

from pathlib import Path

import numpy as np
import torch
from bitsandbytes import functional

TARGET = Path(__file__).with_name("blockwise.npz")


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(20)
    normal = rng.standard_normal((12, 60)).astype(np.float32)
    outlier = normal.copy()
    outlier[1, 7] = 1000.0
    return {
        "normal": normal,
        "odd": rng.standard_normal((5, 77)).astype(np.float32),
        "outlier": outlier,
        "zeros": np.zeros((3, 50), np.float32),
        "denormal": normal * np.float32(1e-40),
        "constant": np.full((4, 48), -0.7, np.float32),
    }


def main() -> None:
    arrays: dict[str, np.ndarray] = {}
    for name, values in tensors().items():
        arrays[f"{name}.x"] = values
        tensor = torch.from_numpy(values)
        for kind in ("nf4", "fp4"):
            for block_size in (32, 64, 4096):
                codes, state = functional.quantize_4bit(tensor, blocksize=block_size, quant_type=kind)
                arrays[f"{name}.{kind}.{block_size}.codes"] = codes.numpy().reshape(-1)
                arrays[f"{name}.{kind}.{block_size}.scales"] = state.absmax.numpy()
            _, state = functional.quantize_4bit(tensor, blocksize=32, quant_type=kind, compress_statistics=True)
            arrays[f"{name}.{kind}.double.codes"] = state.absmax.numpy()
            arrays[f"{name}.{kind}.double.absmax"] = state.state2.absmax.numpy()
            arrays[f"{name}.{kind}.double.offset"] = state.offset.numpy()
        codes, absmax, _ = functional.int8_vectorwise_quant(tensor.clone())
        arrays[f"{name}.int8.codes"], arrays[f"{name}.int8.scales"] = codes.numpy(), absmax.numpy()
    np.savez_compressed(TARGET, **arrays)


if __name__ == "__main__":
    main()
