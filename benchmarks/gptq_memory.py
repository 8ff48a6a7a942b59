"""Peak memory of GPTQ on a checkpoint of a large model's shapes, a decoder layer at a time; prints one JSON line.

    python benchmarks/gptq_memory.py --layers 2 --rows 4 --tokens 512

The checkpoint has random float16 weights of LLaMA-2-7B's shapes and is written to a temporary directory first, by
another process. Peak memory is the largest resident set, mapped pages of the checkpoint included.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
    "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096, "tie_word_embeddings": False, "torch_dtype": "float16",
}  # fmt: skip
SHAPES = {
    "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (4096, 4096), "self_attn.v_proj": (4096, 4096),
    "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (11008, 4096), "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}  # fmt: skip


def write(folder: Path, layers: int) -> None:
    """A checkpoint of random weights."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)

    def matrix(n: int, k: int) -> np.ndarray:
        return (0.02 * rng.standard_normal((n, k), np.float32)).astype(np.float16)

    ones = np.ones(4096, np.float16)
    tensors = {"model.embed_tokens.weight": matrix(32000, 4096), "lm_head.weight": matrix(32000, 4096)}
    tensors["model.norm.weight"] = ones
    for layer in range(layers):
        for module, shape in SHAPES.items():
            tensors[f"model.layers.{layer}.{module}.weight"] = matrix(*shape)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = ones
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))


def measure(folder: Path, layers: int, rows: int, tokens: int) -> None:
    import quantlab as ql

    ids = np.random.default_rng(1).integers(0, CONFIG["vocab_size"], (rows, tokens))
    started = time.monotonic()
    ql.quantize(folder, ql.GPTQConfig(bits=4, group_size=128), ids, progress=False)
    seconds = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    record = {"layers": layers, "rows": rows, "tokens": tokens, "seconds": round(seconds, 1), "peak_rss_bytes": peak}
    print(json.dumps({**record, "threads": ql.info()["threads"], "isa": ql.info()["isa"]["selected"]}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write is not None:
        write(arguments.write, arguments.layers)
        return
    with tempfile.TemporaryDirectory() as folder:
        again = [sys.executable, __file__, "--layers", str(arguments.layers), "--write", folder]
        subprocess.run(again, check=True)  # not in this process, whose memory is measured
        measure(Path(folder), arguments.layers, arguments.rows, arguments.tokens)


if __name__ == "__main__":
    main()
