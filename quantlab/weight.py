"""One weight matrix in any format: codes, scales, zeros; made from floats, decoded to floats, multiplied by."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np

from quantlab import _core
from quantlab.arrays import as_array, as_float32
from quantlab.config import GPTQConfig, Int8Config, NF4Config, QuantizationConfig, RTNConfig

DTYPE_NAMES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
FLOAT_BITS = {"f32": 32, "f16": 16, "bf16": 16}
FORMATS = (*FLOAT_BITS, "int8", "affine", "nf4", "fp4")
SCALE_BLOCK = 256  # block scales that share one nested scale in double quantization
FLOAT16_MAX = 65504  # also the largest scale of an affine weight: checkpoints hold float16


@dataclass(frozen=True, eq=False)
class DoubleQuant:
    """Block scales in 8 bits: scale(b) = map[codes[b]] * absmax[b // 256] + offset (QLoRA, section 3)."""

    codes: np.ndarray  # uint8 (blocks,)
    absmax: np.ndarray  # float32 (ceil(blocks / 256),)
    map: np.ndarray  # float32 (256,)
    offset: float

    def scales(self) -> np.ndarray:
        """The block scales they stand for, float32 (blocks,)."""
        return self.map[self.codes] * np.repeat(self.absmax, SCALE_BLOCK)[: self.codes.size] + np.float32(self.offset)


@dataclass(frozen=True, eq=False, repr=False)
class QuantWeight:
    """W, shape (n, k) = (outputs, inputs): W[i, j] = scale(i, j) * value(code[i, j], zero(i, j)).

    format: f32 f16 bf16 int8 affine nf4 fp4. bits: per code. group: columns that share a scale (nf4, fp4: elements of
    the flat tensor), k where a whole row does. The layouts of codes, scales and zeros are those of `ql_weight` in
    csrc/quantlab.h. perm: stored column j is column perm[j] of W. meta: how it was made, for records.
    """

    format: str
    bits: int
    shape: tuple[int, int]
    group: int
    codes: np.ndarray
    scales: np.ndarray | None = None
    zeros: np.ndarray | None = None
    perm: np.ndarray | None = None
    double_quant: DoubleQuant | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format: got {self.format!r}, expected one of {', '.join(FORMATS)}")
        _ = self.handle  # validates the arrays

    @cached_property
    def handle(self) -> _core.Weight:
        """The validated view that the ops of `_core` take."""
        nested = self.double_quant
        return _core.Weight(
            self.format, self.bits, *self.shape, self.group, self.codes, self.scales, self.zeros, self.perm,
            *((nested.codes, nested.absmax, nested.map, nested.offset) if nested is not None else ()),
        )  # fmt: skip

    def __reduce__(self) -> tuple[Any, ...]:
        """For copy and pickle: the arrays, of which a copy makes its own handle."""
        values = {part.name: getattr(self, part.name) for part in fields(self)}
        return type(self), tuple({**values, "meta": dict(self.meta)}.values())

    # ---- made from floats -----------------------------------------------------------------------------------------

    @classmethod
    def from_array(cls, array: Any, name: str = "weight") -> QuantWeight:
        """A float weight over `array`, (n, k) of float32, float16 or bfloat16, without a copy if it is C-contiguous."""
        array = as_array(array, name)
        formats = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
        if array.dtype.name not in formats:
            raise TypeError(f"{name}: got dtype {array.dtype}, expected float32, float16 or bfloat16")
        _check_matrix(array, name)
        array = np.ascontiguousarray(array)
        if not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        format = formats[array.dtype.name]
        codes = array if format == "f32" else array.view(np.uint16)
        return cls(format, FLOAT_BITS[format], _shape(array), array.shape[1], codes)

    @classmethod
    def from_float(cls, w: Any, config: QuantizationConfig, name: str = "weight") -> QuantWeight:
        """Quantizes `w`, (n, k) of any float type, as `config` says: NF4Config, FP4Config, RTNConfig, Int8Config.

        NF4 and FP4 give bitsandbytes' codes and scales to the last bit, Int8 those of LLM.int8(). GPTQ needs inputs:
        use `quantlab.quantize` (a model) or `quantlab.gptq.quantize` (one matrix and its Hessian).
        Raises quantlab.NumericError where `w` holds NaN or infinity, or numbers too large for the scales of `config`
        (float16 for RTN: a group may span less than 65504 * (2^bits - 1))."""
        array = as_float32(w, name)
        _check_matrix(array, name)
        if isinstance(config, GPTQConfig):
            raise ValueError(
                "config: GPTQConfig needs the matrix's inputs: use quantlab.quantize(model, config, calibration) for a "
                "model, or quantlab.gptq.quantize(w, hessian, config) for one matrix"
            )
        check_finite(array, name)
        if isinstance(config, NF4Config):  # FP4Config is one
            return _quantize_4bit(array, config, name)
        if isinstance(config, Int8Config):
            return _quantize_int8(array, config)
        if isinstance(config, RTNConfig):
            return _quantize_rtn(array, config, name)
        raise TypeError(f"config: got {type(config).__name__}, expected NF4Config, FP4Config, RTNConfig or Int8Config")

    # ---- used -----------------------------------------------------------------------------------------------------

    def dequantize(self, rows: slice | None = None) -> np.ndarray:
        """W, or a slice of its rows with step 1, as float32 (rows, k), columns in the order of W."""
        return _core.decode(self.handle, *self._row_range(rows))

    def stored_codes(self, rows: slice | None = None) -> np.ndarray:
        """The integer codes of a slice of rows, (rows, k) in stored order: int8 for int8, else uint8."""
        n, k = self.shape
        first, last = self._row_range(rows)
        if self.format in FLOAT_BITS:
            raise ValueError(f"format: {self.format} has no integer codes")
        if self.format == "int8":
            return self.codes.reshape(n, k)[first:last]
        if self.format == "affine":
            stream = np.unpackbits(self.codes.reshape(n, -1)[first:last].view(np.uint8), axis=1, bitorder="little")
            code_bits = stream[:, : k * self.bits].reshape(-1, k, self.bits)
            return np.packbits(code_bits, axis=2, bitorder="little")[:, :, 0]
        pairs = self.codes.reshape(-1)[first * k // 2 : (last * k + 1) // 2]
        flat = np.stack([pairs >> 4, pairs & 15], axis=1).reshape(-1)[first * k % 2 :]
        return flat[: (last - first) * k].reshape(-1, k)

    def _row_range(self, rows: slice | None) -> tuple[int, int]:
        """The first of `rows` (None: all) and where they end."""
        wanted = "expected a slice of rows with step 1, such as slice(0, 4)"
        if rows is not None and not isinstance(rows, slice):
            raise TypeError(f"rows: got {type(rows).__name__}, {wanted}")
        try:
            first, last, step = (rows or slice(None)).indices(self.shape[0])
        except (TypeError, ValueError):  # bounds that are no integers, a step of 0
            raise ValueError(f"rows: got {rows}, {wanted}") from None
        if step != 1:
            raise ValueError(f"rows: got step {step}, {wanted}")
        return first, max(first, last)

    def equals(self, other: QuantWeight) -> bool:
        """Whether all of both but `meta` is the same to the last bit."""
        mine, theirs = self._arrays(), other._arrays()
        same_header = (self.format, self.bits, self.shape, self.group) == (
            other.format, other.bits, other.shape, other.group,
        )  # fmt: skip
        return same_header and mine.keys() == theirs.keys() and all(
            mine[name].shape == theirs[name].shape and mine[name].tobytes() == theirs[name].tobytes() for name in mine
        )  # fmt: skip

    def _arrays(self) -> dict[str, np.ndarray]:
        parts = {name: getattr(self, name) for name in ("codes", "scales", "zeros", "perm")}
        if self.double_quant is not None:
            parts |= {f"double_quant.{name}": np.asarray(part) for name, part in vars(self.double_quant).items()}
        return {name: part for name, part in parts.items() if part is not None}

    # ---- sizes ----------------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays in memory."""
        return sum(part.nbytes for part in self._arrays().values() if part.ndim > 0)

    def quant_state(self, dtype: str = "float32") -> bytes:
        """The JSON that bitsandbytes keeps beside a 4-bit weight; `dtype` is what it decodes to there."""
        if self.format not in ("nf4", "fp4"):
            raise ValueError(f"format: got {self.format}, expected nf4 or fp4")
        state: dict[str, Any] = {"quant_type": self.format, "blocksize": self.group, "dtype": dtype}
        state["shape"] = list(self.shape)
        if self.double_quant is not None:
            offset = float(self.double_quant.offset)
            state |= {"nested_blocksize": SCALE_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
        return json.dumps(state).encode()

    # ---- shown ----------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        extras = [f"group={self.group}"] if self.format in ("affine", "nf4", "fp4") else []
        extras += ["asymmetric"] * (self.zeros is not None) + ["reordered"] * (self.perm is not None)
        extras += ["double_quant"] * (self.double_quant is not None)
        kind = f"{self.format} {self.bits}-bit" if self.format == "affine" else self.format
        return f"QuantWeight({', '.join([kind, f'shape={self.shape}', *extras, f'{self.nbytes} bytes'])})"

    def _repr_html_(self) -> str:
        """A line of facts and a small histogram: of the codes, or of the values where the codes are floats."""
        sample = slice(0, min(self.shape[0], -(-(1 << 16) // self.shape[1])))
        if self.format in FLOAT_BITS or self.format == "int8":
            values = self.stored_codes(sample) if self.format == "int8" else self.dequantize(sample)
            counts, label = np.histogram(values, bins=32)[0], "codes" if self.format == "int8" else "values"
        else:
            counts, label = np.bincount(self.stored_codes(sample).reshape(-1), minlength=1 << self.bits), "codes"
        facts = f"{self!r}, {8 * self.nbytes / (self.shape[0] * self.shape[1]):.3f} bits a weight"
        return f"<div><code>{facts}</code><br>{_histogram_svg(counts, f'{label} of {sample.stop} rows')}</div>"


def _histogram_svg(counts: np.ndarray, title: str, width: int = 320, height: int = 64) -> str:
    step, tallest = width / len(counts), max(int(counts.max()), 1)
    bars = "".join(
        f'<rect x="{i * step:.2f}" y="{height - bar:.2f}" width="{0.9 * step:.2f}" height="{bar:.2f}"/>'
        for i, bar in enumerate((counts * (height / tallest)).tolist())
    )
    return (
        f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" fill="currentColor" role="img">'
        f"<title>{title}</title>{bars}</svg>"
    )


def linear(x: Any, w: QuantWeight) -> np.ndarray:
    """x W^T: x (..., k) of any float type, w (n, k) -> float32 (..., n)."""
    if not isinstance(w, QuantWeight):
        raise TypeError(f"w: got {type(w).__name__}, expected a QuantWeight")
    array = as_float32(x, "x")
    n, k = w.shape
    if array.ndim < 1 or array.shape[-1] != k:
        raise ValueError(f"x: got shape {array.shape}, expected (..., {k}) for a weight of shape {w.shape}")
    return _core.linear(array.reshape(-1, k), w.handle).reshape(*array.shape[:-1], n)


def cast_weight(weight: QuantWeight, dtype: str, name: str = "weight") -> QuantWeight:
    """A float matrix in `dtype`; a quantized one, or any with dtype "auto", as it is."""
    if dtype == "auto" or DTYPE_NAMES.get(weight.format, dtype) == dtype:
        return weight
    return QuantWeight.from_array(cast(weight.dequantize(), dtype, name))


def cast(values: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """float32 values in float32, bfloat16 or float16, rounded to nearest even; NumericError where a finite one would
    become infinite in float16."""
    import ml_dtypes

    try:
        with np.errstate(over="raise"):
            return values.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    except FloatingPointError:
        most = np.abs(values[np.isfinite(values)]).max()
        wanted = "expected 65504 at most; hold the model in bfloat16 or float32"
        raise _core.NumericError(f"{name}: got {most:g}, which float16 does not hold: {wanted}") from None


def _shape(array: np.ndarray) -> tuple[int, int]:
    return int(array.shape[0]), int(array.shape[1])


def _check_matrix(array: np.ndarray, name: str) -> None:
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"{name}: got shape {array.shape}, expected a matrix (n, k) with at least one element")


def check_finite(array: np.ndarray, name: str = "weight") -> None:
    """quantlab.NumericError naming the place of the first NaN or infinity of a float32 array."""
    index = _core.first_nonfinite(array)
    if index >= 0:
        place = ", ".join(str(int(i)) for i in np.unravel_index(index, array.shape))
        raise _core.NumericError(f"{name}: {array.flat[index]} at [{place}]; every element must be a finite number")


def check_scales(scales: np.ndarray, bits: int, name: str) -> None:
    """quantlab.NumericError naming the row where the scale of an affine weight, (n, groups), went as far as it goes:
    the codes of larger weights are cut."""
    if scales.max() >= FLOAT16_MAX:
        row, most = int(scales.max(axis=1).argmax()), FLOAT16_MAX * ((1 << bits) - 1)
        raise _core.NumericError(
            f"{name}: a group of row {row} spans {most:,} or more, which at {bits} bits takes a scale beyond float16's "
            f"{FLOAT16_MAX}; the scales of NF4Config, FP4Config and Int8Config are float32"
        )


def _quantize_4bit(w: np.ndarray, config: NF4Config, name: str) -> QuantWeight:
    codes, scales = _core.quantize(w, config.method, config.block_size)
    meta = config.to_dict()
    nested = DoubleQuant(*_core.double_quantize(scales)) if config.double_quant else None
    if nested is not None and not math.isfinite(np.float32(nested.absmax.max()) + np.float32(nested.offset)):
        raise _core.NumericError(
            f"{name}: got block scales up to {scales.max():g}, whose float32 mean or nested scales overflow with "
            "double_quant=True; expected smaller weights, or double_quant=False"
        )
    plain = None if config.double_quant else scales
    return QuantWeight(config.method, 4, _shape(w), config.block_size, codes, plain, double_quant=nested, meta=meta)


def _quantize_int8(w: np.ndarray, config: Int8Config) -> QuantWeight:
    n, k = w.shape
    codes, scales = _core.quantize(w, "int8", k)
    return QuantWeight("int8", 8, (n, k), k, codes.reshape(n, k), scales, meta=config.to_dict())


def _quantize_rtn(w: np.ndarray, config: RTNConfig, name: str) -> QuantWeight:
    n, k = w.shape
    group = k if config.group_size == -1 else config.group_size
    codes, scales, zeros = _core.quantize_rtn(w, config.bits, group, config.sym)
    check_scales(scales, config.bits, name)
    return QuantWeight("affine", config.bits, (n, k), group, codes, scales, zeros, meta=config.to_dict())


def linear_of_any_rows(x: np.ndarray, weight: QuantWeight) -> np.ndarray:
    """x W^T, float32 (m, n), of which a row has the same bits whatever m is: few rows are filled up with zeros."""
    if len(x) > _core.gemv_rows():
        return _core.linear(np.ascontiguousarray(x), weight.handle)
    filled = np.zeros((_core.gemv_rows() + 1, x.shape[1]), np.float32)
    filled[: len(x)] = x
    return _core.linear(filled, weight.handle)[: len(x)]
