"""Rotary position embedding tables for the rope types of the LLaMA family.

Source: Su et al. 2021 (RoFormer); the scaled types as Hugging Face transformers defines them (`modeling_rope_utils`),
yarn after Peng et al. 2023 (arXiv 2309.00071).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
NEEDED = {
    "linear": ("factor",), "dynamic": ("factor",), "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}  # fmt: skip
OPTIONAL = {"yarn": ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")}


def rope_parameters(config: Any) -> dict[str, Any]:
    """The rope settings of a config in one spelling: `rope_theta`, `rope_type`, and what the type needs.

    Accepts both the older `rope_theta` + `rope_scaling` and the newer `rope_parameters`: where both are there, the kind
    of the older, as in transformers, and the theta of the newer. A mapping or an object.
    """
    get = config.get if isinstance(config, Mapping) else lambda name, default=None: getattr(config, name, default)
    newer = dict(get("rope_parameters") or {})
    settings = dict(get("rope_scaling") or newer)
    settings.setdefault("rope_theta", newer.get("rope_theta", get("rope_theta") or 10000.0))
    settings["rope_type"] = settings.pop("rope_type", None) or settings.pop("type", None) or "default"
    kind = settings["rope_type"]
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope_type: got {kind!r}, accepted are {', '.join(ROPE_TYPES)}")
    if kind in ("llama3", "yarn"):
        original = settings.get("original_max_position_embeddings", get("max_position_embeddings"))
        settings["original_max_position_embeddings"] = get("original_max_position_embeddings") or original
    given = (name for name in OPTIONAL.get(kind, ()) if settings.get(name) is not None)
    for name in ("rope_theta", *NEEDED.get(kind, ()), *given):
        value = settings.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"{name}: got {value!r}, expected a positive number for the rope type {kind!r}")
    return settings


def inverse_frequencies(config: Any, length: int) -> np.ndarray:
    """Radians a position for each pair of elements, float32 (head_dim / 2,). `length` matters to the dynamic type
    only."""
    settings = rope_parameters(config)
    kind, theta, d = settings["rope_type"], float(settings["rope_theta"]), int(config.head_dim)
    if kind == "dynamic":  # NTK-aware: the base grows with the length beyond what the model was trained for
        trained = int(config.max_position_embeddings)
        factor = float(settings["factor"])
        theta *= ((factor * max(length, trained) / trained) - (factor - 1)) ** (d / (d - 2))
    frequencies = 1.0 / theta ** (np.arange(0, d, 2, dtype=np.float64) / d)
    if kind == "linear":
        frequencies /= float(settings["factor"])
    if kind == "llama3":
        frequencies = _llama3(frequencies, settings)
    if kind == "yarn":
        frequencies = _yarn(frequencies, settings)
    return frequencies.astype(np.float32)


def _llama3(frequencies: np.ndarray, settings: Mapping[str, Any]) -> np.ndarray:
    """Long waves are slowed by `factor`, short ones kept, those between blended (Llama 3.1)."""
    low, high = float(settings["low_freq_factor"]), float(settings["high_freq_factor"])
    factor, original = float(settings["factor"]), float(settings["original_max_position_embeddings"])
    turns = original * frequencies / (2 * np.pi)  # full turns within the original context
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - keep) * frequencies / factor + keep * frequencies


def _yarn(frequencies: np.ndarray, settings: Mapping[str, Any]) -> np.ndarray:
    """As for llama3, but blended along the elements: from where a wave turns `beta_fast` times within the context that
    the model was trained for to where it turns `beta_slow` times."""
    pairs, theta, trained = len(frequencies), settings["rope_theta"], settings["original_max_position_embeddings"]

    def pair(turns: float) -> float:
        return pairs * math.log(trained / (turns * 2 * math.pi)) / math.log(theta)

    first, last = pair(float(settings.get("beta_fast") or 32)), pair(float(settings.get("beta_slow") or 1))
    if settings.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    slowed = np.clip((np.arange(pairs) - first) / (last - first or 1e-3), 0.0, 1.0)
    return slowed * frequencies / float(settings["factor"]) + (1 - slowed) * frequencies


def amplitude(config: Any) -> float:
    """What cos and sin are multiplied by: more than 1 for yarn, so that attention gets sharper over long contexts."""
    settings = rope_parameters(config)
    if settings["rope_type"] != "yarn":
        return 1.0
    if settings.get("attention_factor") is not None:
        return float(settings["attention_factor"])
    grown = 0.1 * math.log(max(float(settings["factor"]), 1.0))
    over, under = settings.get("mscale"), settings.get("mscale_all_dim")
    return (grown * over + 1) / (grown * under + 1) if over and under else grown + 1


def rope_tables(config: Any, length: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of every position below `length`, each float32 (length, head_dim / 2), times the type's amplitude.

    `config` has `head_dim`, `max_position_embeddings` and the rope settings. The angle is a float32 product, as in
    transformers, so that long positions agree with it.
    """
    angles = np.arange(length, dtype=np.float32)[:, None] * inverse_frequencies(config, length)[None, :]
    scale = np.float32(amplitude(config))
    return np.cos(angles) * scale, np.sin(angles) * scale


def stepwise_rope_tables(config: Any, given: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The tables of a generation after `given` tokens: a later position has the angles of a sequence that ends there,
    as transformers computes them token by token. Differs from `rope_tables` for the dynamic type only."""
    tables = rope_tables(config, given)
    later = [np.float32(position) * inverse_frequencies(config, position + 1) for position in range(given, length)]
    angles = np.array(later, np.float32).reshape(-1, config.head_dim // 2)
    return np.concatenate([tables[0], np.cos(angles)]), np.concatenate([tables[1], np.sin(angles)])
