"""The published study that the LIMA study follows, as its README and its result files print it: shown beside ours,
never mixed with it.
"""

from __future__ import annotations

from collections.abc import Mapping

SOURCE = "Published study (gauss5930/Quantization): QLoRA and GPTQ-LoRA of Llama-2-7B on LIMA"
SETTING = (
    "Llama-2-7B, GPU not stated, LIMA's 1,030 conversations; \u201cbnb\u201d ran as FP4 with float32 compute (its "
    "script misspells two settings), GPTQ 4-bit by auto-gptq 0.4.2 with exllama; one run, no spread."
)
BATCHES = (1, 2, 4, 8, 16, 32)
# seconds of one `generate` of 30 tokens after "hello", at each of BATCHES
GENERATION: Mapping[str, tuple[float, ...]] = {
    "bnb-bnb": (1.236, 5.545, 5.514, 5.822, 5.879, 6.065),
    "gptq-gptq": (1.810, 1.842, 1.842, 1.969, 1.978, 2.039),
    "bnb-gptq": (1.155, 1.151, 1.157, 1.295, 1.298, 1.314),
}
TRAINING: Mapping[str, float] = {"bnb": 2.18, "gptq": 1.45}  # samples (batches of one) a second
NEW_TOKENS = 30
