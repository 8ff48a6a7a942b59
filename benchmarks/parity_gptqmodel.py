"""Loads checkpoints that quantlab wrote in GPTQModel and compares the logits, one JSON line a checkpoint.

    python benchmarks/parity_gptqmodel.py write checkpoints     # with quantlab
    python benchmarks/parity_gptqmodel.py compare checkpoints   # with GPTQModel, in an environment of its own

GPTQModel's CPU kernel takes float16 and bfloat16 only, which rounds what is not quantized (the embedding, the norms)
and each dequantized weight. `as_loaded` is that: its own rounding. `float32` is the same module tree after `.float()`,
with the file's own float tensors: what its reading of codes, scales, zeros and order makes of the file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

TEXT = "The capital of France is Paris, and the capital of Italy is Rome. Quantization maps many values to few."


def write(folder: Path, model: str) -> None:
    import quantlab as ql

    configs = {
        "sym-4": ql.RTNConfig(bits=4, group_size=64, sym=True),
        "asym-4": ql.RTNConfig(bits=4, group_size=64, sym=False),
        "sym-3": ql.RTNConfig(bits=3, group_size=64, sym=True),
        "sym-8": ql.RTNConfig(bits=8, group_size=64, sym=True),
    }
    base = ql.LlamaForCausalLM.from_pretrained(model)
    ids = base.encode(TEXT)
    with ql.backend.use(precise=True):
        for name, config in configs.items():
            quantized = ql.quantize(base, config)
            quantized.save_pretrained(folder / name)
            np.savez(folder / f"{name}.npz", ids=ids, logits=quantized(ids)[0])


def compare(folder: Path) -> None:
    import gptqmodel
    import torch
    from safetensors.torch import load_file

    for stored in sorted(folder.glob("*.npz")):
        expected = np.load(stored)
        model = gptqmodel.GPTQModel.load(
            str(stored.with_suffix("")), backend=gptqmodel.BACKEND.TORCH, device="cpu", dtype=torch.float16
        ).model
        ids = torch.tensor(expected["ids"][None].astype(np.int64))
        record = {"checkpoint": stored.stem, "gptqmodel": gptqmodel.__version__, "std": float(expected["logits"].std())}
        with torch.no_grad():
            record["as_loaded"] = difference(model(ids).logits, expected["logits"])
            model.float()
            floats = load_file(stored.with_suffix("") / "model.safetensors")
            for name, parameter in model.named_parameters():
                if name in floats and floats[name].is_floating_point():
                    parameter.copy_(floats[name].float())
            record["float32"] = difference(model(ids).logits, expected["logits"])
        print("RESULT", json.dumps(record), flush=True)


def difference(logits, expected: np.ndarray) -> dict[str, float]:
    apart = np.abs(logits[0].float().numpy() - expected)
    return {"max": float(apart.max()), "mean": float(apart.mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["write", "compare"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="demo")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.step == "write":
        write(arguments.folder, arguments.model)
    else:
        compare(arguments.folder)


if __name__ == "__main__":
    main()
