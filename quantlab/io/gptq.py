"""The GPTQ checkpoint layout of AutoGPTQ, GPTQModel, transformers and vLLM, versions 1 and 2.

A matrix (n, k) = (outputs, inputs) of module p with groups of g columns is four tensors:
  p.qweight  int32 (ceil(k * bits / 32), n)         codes, packed along k
  p.qzeros   int32 (ceil(k / g), ceil(n * bits / 32))  zero points, packed along n: zero - 1 in v1, zero in v2
  p.scales   float16 (ceil(k / g), n)
  p.g_idx    int32 (k,)                             the group of each column
Packed numbers are little-endian bit streams, so qweight is the transpose of a QuantWeight's codes.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from quantlab.io.bitstream import pack, unpack, words_per_row
from quantlab.io.safetensors import LazyTensor

if TYPE_CHECKING:
    from quantlab.io.directory import Tensors
    from quantlab.weight import QuantWeight

BITS = (2, 3, 4, 8)
V1, V2 = "gptq", "gptq_v2"
SYNONYMS = {
    "bits": ("bits", "w_bit", "wbits"),
    "group_size": ("group_size", "q_group_size"),
    "format": ("checkpoint_format", "format", "version"),
}
SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class Settings:
    """What the packed tensors of a module mean. group_size: -1 for a whole row."""

    bits: int
    group_size: int
    sym: bool


class GPTQLayout:
    """Reads modules in the GPTQ layout, as a quantization_config (or a quantize_config.json) describes them."""

    def __init__(self, quantization: Mapping[str, Any], where: str):
        self.where = where
        self.version = self._version(quantization)
        self.desc_act = bool(quantization.get("desc_act", False))
        if quantization.get("pack_dtype", "int32") not in ("int32", "torch.int32"):
            raise ValueError(f"{where}: pack_dtype {quantization['pack_dtype']!r} is not supported; supported: 'int32'")
        self.settings = self._settings(quantization, Settings(0, 0, True))
        self._told = False  # of zero points that are not used
        self._sym_stated = "sym" in quantization or "zero_point" in quantization  # else the zero points tell
        dynamic = quantization.get("dynamic") or {}
        if not isinstance(dynamic, dict) or not all(isinstance(value, dict) for value in dynamic.values()):
            raise ValueError(f"{where}: dynamic is {dynamic!r}, expected an object of patterns and objects")
        self._dynamic = [(self._pattern(pattern), value) for pattern, value in dynamic.items() if pattern[:2] != "-:"]

    def _version(self, quantization: Mapping[str, Any]) -> str:
        version = _first(quantization, "format", V1)
        if version not in (V1, V2):
            raise ValueError(f"{self.where}: checkpoint_format {version!r} is not supported; supported: {V1!r}, {V2!r}")
        return version

    def _settings(self, source: Mapping[str, Any], default: Settings) -> Settings:
        bits = _first(source, "bits", default.bits)
        group_size = _first(source, "group_size", default.group_size)
        sym = source.get("sym", not source["zero_point"] if "zero_point" in source else default.sym)
        if type(bits) is not int or bits not in BITS:
            raise ValueError(f"{self.where}: bits is {bits!r}, supported for GPTQ: {', '.join(map(str, BITS))}")
        if type(group_size) is not int or (group_size < 1 and group_size != -1):
            raise ValueError(f"{self.where}: group_size is {group_size!r}, expected -1 or a positive integer")
        if not isinstance(sym, bool):
            raise ValueError(f"{self.where}: sym is {sym!r}, expected true or false")
        return Settings(bits, group_size, sym)

    def _pattern(self, pattern: str) -> re.Pattern[str]:
        try:
            return re.compile(pattern.removeprefix("+:"))
        except re.error as error:
            raise ValueError(f"{self.where}: dynamic has the pattern {pattern!r}: {error}") from None

    def settings_of(self, module: str) -> Settings:
        """Those of this module: the first pattern of `dynamic` that matches its name overrides the rest."""
        for pattern, override in self._dynamic:
            if pattern.match(module):
                return self._settings(override, self.settings)
        return self.settings

    def holds(self, tensors: Tensors, module: str) -> bool:
        return f"{module}.qweight" in tensors

    def check(self, tensors: Tensors, module: str, shape: tuple[int, ...]) -> set[str]:
        n, k = shape
        bits, group = self.settings_of(module).bits, self._group(module, k)
        groups = -(-k // group)
        tensors.expect(f"{module}.qweight", ("I32",), (words_per_row(k, bits), n))
        tensors.expect(f"{module}.qzeros", ("I32",), (groups, words_per_row(n, bits)))
        tensors.expect(f"{module}.scales", ("F16", "BF16", "F32"), (groups, n))
        names = {f"{module}.{suffix}" for suffix in SUFFIXES}
        if f"{module}.g_idx" in tensors:
            tensors.expect(f"{module}.g_idx", ("I32", "I64"), (k,))
        elif self.desc_act:
            raise ValueError(f"{self.where}: lacks tensor {module + '.g_idx'!r}, which desc_act = true needs")
        return names

    def read(self, tensors: Tensors, module: str, shape: tuple[int, ...]) -> QuantWeight:
        from quantlab.weight import QuantWeight

        n, k = shape
        settings, group = self.settings_of(module), self._group(module, k)
        codes = np.ascontiguousarray(tensors.array(f"{module}.qweight").view(np.uint32).T)
        scales = tensors.array(f"{module}.scales").astype(np.float32)
        if not np.isfinite(scales).all():
            raise ValueError(f"{self.where}: tensor {module + '.scales'!r} holds NaN or infinity")
        zeros = self._read_zeros(tensors, module, n, settings)
        perm = None
        if f"{module}.g_idx" in tensors:
            g_idx = tensors.array(f"{module}.g_idx").astype(np.int64)
            if g_idx.min() < 0 or g_idx.max() >= len(scales):
                found = f"groups {g_idx.min()} to {g_idx.max()}, expected 0 to {len(scales) - 1}"
                raise ValueError(f"{self.where}: tensor {module + '.g_idx'!r} holds {found}")
            if not np.array_equal(g_idx, np.arange(k) // group):
                perm, group, rows = regroup(g_idx, group)
                codes = pack(unpack(codes, k, settings.bits)[:, perm], settings.bits)
                scales, zeros = scales[rows], None if zeros is None else zeros[rows]
        meta = {"method": "gptq", "bits": settings.bits, "group_size": settings.group_size, "sym": zeros is None,
                "desc_act": perm is not None, "checkpoint_format": self.version}  # fmt: skip
        return QuantWeight(
            "affine", settings.bits, (n, k), group, codes, np.ascontiguousarray(scales.T),
            None if zeros is None else np.ascontiguousarray(zeros.T), perm, meta=meta,
        )  # fmt: skip

    def _read_zeros(self, tensors: Tensors, module: str, n: int, settings: Settings) -> np.ndarray | None:
        """None: symmetric. A stated sym goes before other zero points, as files of 3 bits by older writers want it."""
        stated = settings.sym and self._sym_stated
        if stated and (settings.bits == 3 or self._told):
            return None
        zeros = self._zeros(tensors.array(f"{module}.qzeros"), n, settings.bits)
        if not settings.sym:
            return zeros
        if (zeros == 1 << (settings.bits - 1)).all():
            return None
        if not stated:
            return zeros
        self._told = True
        text = f"{self.where}: sym is true, and the zero points of {module}, which say otherwise, are not used"
        warnings.warn(text, UserWarning, stacklevel=2)
        return None

    def _group(self, module: str, k: int) -> int:
        size = self.settings_of(module).group_size
        return k if size == -1 else min(size, k)

    def _zeros(self, qzeros: np.ndarray, n: int, bits: int) -> np.ndarray:
        """Zero points, uint8 (groups, n)."""
        stored = unpack(qzeros.view(np.uint32), n, bits)
        return stored if self.version == V2 else (stored + 1) & np.uint8(2**bits - 1)


def _first(source: Mapping[str, Any], field: str, default: Any) -> Any:
    return next((source[name] for name in SYNONYMS[field] if source.get(name) is not None), default)


def regroup(g_idx: np.ndarray, group: int) -> tuple[np.ndarray, int, np.ndarray]:
    """Any assignment of columns to groups as (perm int32 (k,), group, rows): stored column j is column perm[j] of W,
    stored group i takes its scale from row rows[i]. Where the groups differ in size, they are cut into equal parts."""
    perm = np.argsort(g_idx, kind="stable")
    ordered = g_idx[perm]
    if not np.array_equal(ordered, np.arange(len(g_idx)) // group):
        counts = np.bincount(g_idx)
        group = int(np.gcd.reduce(counts[counts > 0]))
    return perm.astype(np.int32), group, ordered[::group]


# ---- writing -----------------------------------------------------------------------------------------------------


def stored_tensors(module: str, weight: QuantWeight, version: str = V1) -> dict[str, LazyTensor]:
    """The tensors of an affine weight in this layout. v1 cannot hold a zero point of 0."""
    (n, k), bits = weight.shape, weight.bits
    groups = -(-k // weight.group)
    if bits not in BITS:
        raise ValueError(
            f"{module}: {bits} bits cannot be written in the GPTQ layout; accepted: {', '.join(map(str, BITS))}"
        )
    return {
        f"{module}.qweight": LazyTensor(np.dtype(np.int32), (words_per_row(k, bits), n), lambda: _qweight(weight)),
        f"{module}.qzeros": LazyTensor(
            np.dtype(np.int32), (groups, words_per_row(n, bits)), lambda: _qzeros(module, weight, version)
        ),
        f"{module}.scales": LazyTensor(np.dtype(np.float16), (groups, n), lambda: _scales(module, weight)),
        f"{module}.g_idx": LazyTensor(np.dtype(np.int32), (k,), lambda: _g_idx(weight)),
    }


def _qweight(weight: QuantWeight) -> np.ndarray:
    n, k = weight.shape
    words = weight.codes.reshape(n, -1)
    if weight.perm is not None:  # the file keeps the columns in their own order
        words = pack(unpack(words, k, weight.bits)[:, np.argsort(weight.perm)], weight.bits)
    return np.ascontiguousarray(words.T).view(np.int32)


def _qzeros(module: str, weight: QuantWeight, version: str) -> np.ndarray:
    n, k = weight.shape
    groups = -(-k // weight.group)
    if weight.zeros is None:
        zeros: np.ndarray = np.full((groups, n), 2 ** (weight.bits - 1), np.uint8)
    else:
        zeros = np.ascontiguousarray(weight.zeros.reshape(n, groups).T)
    if version == V1:
        if not zeros.all():
            raise ValueError(
                f"{module}: a zero point is 0, which checkpoint_format 'gptq' (v1) cannot hold; use 'gptq_v2'"
            )
        zeros = zeros - np.uint8(1)
    return pack(zeros, weight.bits).view(np.int32)


def _scales(module: str, weight: QuantWeight) -> np.ndarray:
    with np.errstate(over="ignore"):
        scales = np.asarray(weight.scales).reshape(weight.shape[0], -1).T.astype(np.float16)
    if not np.isfinite(scales).all():
        raise ValueError(f"{module}: a scale of {np.asarray(weight.scales).max()} cannot be written as float16")
    return scales


def _g_idx(weight: QuantWeight) -> np.ndarray:
    stored = np.arange(weight.shape[1], dtype=np.int32) // np.int32(weight.group)
    if weight.perm is None:
        return stored
    g_idx = np.empty_like(stored)
    g_idx[weight.perm] = stored
    return g_idx


def quantization_config(weights: Mapping[str, QuantWeight], version: str | None = None) -> dict[str, Any]:
    """The block for config.json and quantize_config.json that describes these affine weights. version: v1 unless a
    weight is asymmetric, if None. Modules whose settings are not the most common ones go to `dynamic`."""
    if version is None:
        asked = {weight.meta.get("checkpoint_format") for weight in weights.values()} - {None}
        asymmetric = any(weight.zeros is not None for weight in weights.values())
        version = asked.pop() if len(asked) == 1 else V2 if asymmetric or asked else V1
    if version not in (V1, V2):
        raise ValueError(f"checkpoint_format: got {version!r}, accepted: {V1!r}, {V2!r}")
    settings = {module: _settings_of(weight) for module, weight in weights.items()}
    common = Counter(settings.values()).most_common(1)[0][0]
    meta = next(iter(weights.values())).meta
    desc_act = any(weight.perm is not None for weight in weights.values()) or bool(meta.get("desc_act", False))
    config: dict[str, Any] = {
        "quant_method": "gptq", "bits": common.bits, "group_size": common.group_size, "desc_act": desc_act,
        "sym": common.sym, "lm_head": "lm_head" in weights, "checkpoint_format": version, "pack_dtype": "int32",
        "true_sequential": bool(meta.get("true_sequential", True)),
        "static_groups": bool(meta.get("static_groups", False)),
        "damp_percent": float(meta.get("damp_percent", 0.01)),
    }  # fmt: skip
    dynamic = {
        f"+:^{re.escape(module)}$": {"bits": own.bits, "group_size": own.group_size, "sym": own.sym}
        for module, own in settings.items()
        if own != common
    }
    if dynamic:
        config["dynamic"] = dynamic
    config["meta"] = {"quantizer": ["quantlab"], "method": str(meta.get("method", "gptq"))}
    return config


def _settings_of(weight: QuantWeight) -> Settings:
    k = weight.shape[1]
    asked = weight.meta.get("group_size", weight.group)
    fits = weight.group >= k if asked == -1 else min(asked, k) == min(weight.group, k)
    group_size = asked if fits else -1 if weight.group >= k else weight.group
    return Settings(weight.bits, int(group_size), weight.zeros is None)
