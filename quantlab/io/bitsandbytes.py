"""The checkpoint layouts of bitsandbytes: 4-bit (NF4, FP4, with or without double quantization) and LLM.int8().

4-bit, a matrix of module p in blocks of b elements of the flat (n, k) tensor:
  p.weight                  uint8 (ceil(n k / 2), 1)   element 2i in the high nibble
  p.weight.absmax           float32 (blocks,), or uint8 where quantized themselves; then also
  p.weight.nested_absmax    float32 (ceil(blocks / 256),)
  p.weight.nested_quant_map float32 (256,)
  p.weight.quant_map        float32 (16,)
  p.weight.quant_state.bitsandbytes__nf4 (or __fp4)    uint8: JSON of type, block size, dtype, shape, nested fields
int8: p.weight int8 (n, k), p.SCB float32 (n,) = max|row|, p.weight_format uint8 (), always 0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from quantlab.config import BLOCK_SIZES
from quantlab.io.safetensors import LazyTensor

if TYPE_CHECKING:
    from quantlab.io.directory import Tensors
    from quantlab.weight import QuantWeight

QUANT_MAPS = {
    "nf4": np.array(
        [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
         -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
         0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
        np.float32,
    ),
    "fp4": np.array(
        [0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3], np.float32
    ) / np.float32(12),
}  # fmt: skip
NESTED_BLOCK = 256  # block scales that share one nested scale
DTYPES = ("float32", "float16", "bfloat16")
STATE_KEYS = ("quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset")
MAX_STATE = 4096  # bytes of the JSON: five to seven short fields


class FourBitLayout:
    """Reads modules in the 4-bit layout."""

    def __init__(self, where: str):
        self.where = where

    def holds(self, tensors: Tensors, module: str) -> bool:
        return f"{module}.weight.absmax" in tensors

    def check(self, tensors: Tensors, module: str, shape: tuple[int, ...]) -> set[str]:
        weight, state = f"{module}.weight", self._state(tensors, module, shape)
        elements = math.prod(shape)
        blocks = -(-elements // state["blocksize"])
        info = tensors.get(weight)
        if info is None or info.end - info.begin != (elements + 1) // 2:
            found = "is missing" if info is None else f"holds {info.end - info.begin} bytes"
            raise ValueError(
                f"{self.where}: tensor {weight!r} {found}, expected {(elements + 1) // 2} bytes for shape {shape}"
            )
        tensors.expect(f"{weight}.quant_map", ("F32",), (16,))
        names = {weight, f"{weight}.absmax", f"{weight}.quant_map", self._state_name(tensors, module)}
        if "nested_offset" not in state:
            tensors.expect(f"{weight}.absmax", ("F32",), (blocks,))
            return names
        tensors.expect(f"{weight}.absmax", ("U8",), (blocks,))
        tensors.expect(f"{weight}.nested_absmax", ("F32",), (-(-blocks // NESTED_BLOCK),))
        tensors.expect(f"{weight}.nested_quant_map", ("F32",), (256,))
        return names | {f"{weight}.nested_absmax", f"{weight}.nested_quant_map"}

    def read(self, tensors: Tensors, module: str, shape: tuple[int, ...]) -> QuantWeight:
        from quantlab.weight import DoubleQuant, QuantWeight

        weight, state = f"{module}.weight", self._state(tensors, module, shape)
        kind = state["quant_type"]
        if not np.array_equal(tensors.array(f"{weight}.quant_map"), QUANT_MAPS[kind]):
            raise ValueError(
                f"{self.where}: tensor {weight + '.quant_map'!r} is not the table of {kind}, which is not supported"
            )
        codes = tensors.array(weight).reshape(-1).view(np.uint8)
        scales, nested = None, None
        if "nested_offset" in state:
            nested = DoubleQuant(
                tensors.array(f"{weight}.absmax"), tensors.array(f"{weight}.nested_absmax"),
                tensors.array(f"{weight}.nested_quant_map"), float(state["nested_offset"]),
            )  # fmt: skip
        else:
            scales = tensors.array(f"{weight}.absmax")
        meta = {
            "method": kind,
            "block_size": state["blocksize"],
            "double_quant": nested is not None,
            "dtype": state["dtype"],
        }
        n, k = shape
        return QuantWeight(kind, 4, (n, k), state["blocksize"], codes, scales, double_quant=nested, meta=meta)

    def _state_name(self, tensors: Tensors, module: str) -> str:
        names = [f"{module}.weight.quant_state.bitsandbytes__{kind}" for kind in QUANT_MAPS]
        found = [name for name in names if name in tensors]
        if len(found) != 1:
            raise ValueError(
                f"{self.where}: module {module!r} has {len(found)} quant_state tensors of nf4 and fp4, expected one"
            )
        return found[0]

    def _state(self, tensors: Tensors, module: str, shape: tuple[int, ...]) -> dict[str, Any]:
        """The checked quant_state of a module."""
        name = self._state_name(tensors, module)
        size = tensors[name].shape
        if len(size) != 1 or size[0] > MAX_STATE:
            raise ValueError(f"{self.where}: tensor {name!r} has shape {size}, expected at most {MAX_STATE} bytes")
        tensors.expect(name, ("U8",), size)
        try:
            state = json.loads(tensors.array(name).tobytes().decode("utf-8"))
        except (ValueError, RecursionError):
            raise ValueError(f"{self.where}: tensor {name!r} is not JSON") from None
        nested = isinstance(state, dict) and "nested_offset" in state
        accepted: dict[str, Any] = {
            "quant_type": (name[-3:],), "blocksize": BLOCK_SIZES, "dtype": DTYPES, "shape": (list(shape),),
            **({"nested_blocksize": (NESTED_BLOCK,), "nested_dtype": ("float32",)} if nested else {}),
        }  # fmt: skip
        for key, values in accepted.items():
            if not isinstance(state, dict) or state.get(key) not in values:
                got = str(state.get(key) if isinstance(state, dict) else state)[:80]
                accepted_text = ", ".join(map(str, values))
                raise ValueError(f"{self.where}: tensor {name!r} has {key} {got!r}, accepted: {accepted_text}")
        offset = state.get("nested_offset", 0.0)
        if not set(state) <= set(STATE_KEYS) or not isinstance(offset, (int, float)) or not math.isfinite(offset):
            raise ValueError(f"{self.where}: tensor {name!r} has unknown fields or a nested_offset that is no number")
        return state


class Int8Layout:
    """Reads modules in the LLM.int8() layout."""

    def __init__(self, where: str):
        self.where = where

    def holds(self, tensors: Tensors, module: str) -> bool:
        return f"{module}.SCB" in tensors

    def check(self, tensors: Tensors, module: str, shape: tuple[int, ...]) -> set[str]:
        tensors.expect(f"{module}.weight", ("I8",), shape)
        tensors.expect(f"{module}.SCB", ("F32",), (shape[0],))
        names = {f"{module}.weight", f"{module}.SCB"}
        if f"{module}.weight_format" in tensors:
            tensors.expect(f"{module}.weight_format", ("U8",), tensors[f"{module}.weight_format"].shape)
            if np.any(tensors.array(f"{module}.weight_format")):
                raise ValueError(
                    f"{self.where}: tensor {module + '.weight_format'!r} is not 0 (row), the only one supported"
                )
            names.add(f"{module}.weight_format")
        return names

    def read(self, tensors: Tensors, module: str, shape: tuple[int, ...]) -> QuantWeight:
        from quantlab.weight import QuantWeight

        n, k = shape
        codes, scales = tensors.array(f"{module}.weight"), tensors.array(f"{module}.SCB")
        return QuantWeight("int8", 8, (n, k), k, codes, scales, meta={"method": "int8"})


# ---- writing -----------------------------------------------------------------------------------------------------


def stored_tensors(module: str, weight: QuantWeight, dtype: str = "float32") -> dict[str, LazyTensor]:
    """The tensors of an nf4, fp4 or int8 weight. dtype: what a reader is told to dequantize 4-bit weights to."""
    if weight.format == "int8":
        return _int8_tensors(module, weight)
    name, nested = f"{module}.weight", weight.double_quant
    tensors = {name: weight.codes.reshape(-1, 1), f"{name}.quant_map": QUANT_MAPS[weight.format]}
    if nested is None:
        tensors[f"{name}.absmax"] = np.asarray(weight.scales).reshape(-1)
    else:
        tensors[f"{name}.absmax"] = nested.codes
        tensors[f"{name}.nested_absmax"] = nested.absmax
        tensors[f"{name}.nested_quant_map"] = nested.map
    state = np.frombuffer(weight.quant_state(dtype), np.uint8)
    tensors[f"{name}.quant_state.bitsandbytes__{weight.format}"] = state
    return {key: LazyTensor.of(array) for key, array in tensors.items()}


def _int8_tensors(module: str, weight: QuantWeight) -> dict[str, LazyTensor]:
    return {
        f"{module}.weight": LazyTensor.of(weight.codes.reshape(weight.shape)),
        f"{module}.SCB": LazyTensor.of(np.asarray(weight.scales).reshape(-1)),
        f"{module}.weight_format": LazyTensor.of(np.zeros((), np.uint8)),
    }


def quantization_config(weights: Mapping[str, QuantWeight], skipped: list[str], dtype: str) -> dict[str, Any]:
    """The block for config.json: weights: the quantized ones, of one format; skipped: linear modules left as floats."""
    formats = {weight.format for weight in weights.values()}
    if len(formats) != 1:
        raise ValueError(f"weights: got {' and '.join(sorted(formats))}; one bitsandbytes checkpoint holds one of them")
    kind = formats.pop()
    nested = {weight.double_quant is not None for weight in weights.values()}
    return {
        "quant_method": "bitsandbytes", "_load_in_8bit": kind == "int8", "_load_in_4bit": kind != "int8",
        "load_in_8bit": kind == "int8", "load_in_4bit": kind != "int8",
        "llm_int8_threshold": 6.0, "llm_int8_skip_modules": skipped,
        "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False,
        "bnb_4bit_quant_type": "fp4" if kind == "int8" else kind, "bnb_4bit_use_double_quant": True in nested,
        "bnb_4bit_compute_dtype": dtype, "bnb_4bit_quant_storage": "uint8",
    }  # fmt: skip
