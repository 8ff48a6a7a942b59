"""The published study that the TweetEval study follows, as its README prints it: shown beside ours, never mixed with
it.
"""

from __future__ import annotations

from collections.abc import Mapping

SOURCE = "Published study (its README): GPTQ on Llama-2-7B for TweetEval sentiment"
SETTING = (
    "Llama-2-7B with a trained 3-class head, one A100-PCIE-40GB and a Xeon Silver 4316; the 12,284 tweets of "
    "TweetEval's sentiment test, one at a time; base in fp32; GPTQ by optimum with group 128, damping 0.1, symmetric, "
    "128 rows of 4,028 tokens of c4; codecarbon with Spain's 174.05 g CO2e/kWh."
)
TWEETS = 12_284
# size: GB (decimal). evaluation, quantization: seconds. kg: of CO2e. accuracy_change: relative to the base, percent.
FIGURES: Mapping[str, Mapping[str, float | None]] = {
    "fp32": {"size": 26.43, "evaluation": 641.39, "evaluation_kg": 0.013502, "quantization": None,
             "quantization_kg": None, "accuracy_change": 0.0},
    "gptq-8": {"size": 6.90, "evaluation": 2242.21, "evaluation_kg": 0.044686, "quantization": 12876.53,
               "quantization_kg": 0.133476, "accuracy_change": -0.13},
    "gptq-4": {"size": 3.63, "evaluation": 2017.88, "evaluation_kg": 0.040202, "quantization": 12974.85,
               "quantization_kg": 0.132307, "accuracy_change": -0.79},
    "gptq-3": {"size": 2.82, "evaluation": 3736.60, "evaluation_kg": 0.074038, "quantization": 12883.12,
               "quantization_kg": 0.132594, "accuracy_change": -7.77},
}  # fmt: skip


def relative(name: str, field: str) -> float | None:
    """A published figure divided by the published base's; None where there is none."""
    value, base = FIGURES.get(name, {}).get(field), FIGURES["fp32"][field]
    return value / base if value is not None and base else None
