"""LoRA adapters: one vector of parameters, the matrices as views of it, put beside a model's weights or into them."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, Literal, TypeVar

import numpy as np

from quantlab import _core
from quantlab.config import (
    FP4Config,
    GPTQConfig,
    Int8Config,
    LoraConfig,
    NF4Config,
    QuantizationConfig,
    RTNConfig,
    TaskType,
)
from quantlab.io import peft
from quantlab.llama import Llama
from quantlab.llama_config import LINEARS, layer_modules
from quantlab.weight import FLOAT_BITS, QuantWeight, cast_weight

Model = TypeVar("Model", bound=Llama)


def target_modules(config: LoraConfig, model_config: Any) -> list[str]:
    """The linear modules of a model that an adapter has matrices for, in the order of the layers; ValueError where one
    of the names stands for none."""
    modules = list(layer_modules(model_config))
    if config.target_modules == "all-linear":
        return modules
    for name in config.target_modules:
        if not any(module == name or module.endswith(f".{name}") for module in modules):
            accepted = ", ".join(linear.rsplit(".", 1)[1] for linear in LINEARS)
            raise ValueError(f"target_modules: {name!r} is no linear module of this model; accepted are {accepted}")
    return [m for m in modules if any(m == name or m.endswith(f".{name}") for name in config.target_modules)]


class Adapter:
    """LoRA matrices of some modules: module(x) += scale * (x A^T) B^T.

    config: the LoraConfig. parameters: float32, all matrices end to end (and the head of a classifier, where it was
    trained with them). `adapter[module]`: (A (r, k), B (n, r)), views of it. score: the head (labels, c) or None.
    base_format: that of the weights it was trained beside (`base_format`), where that is known.
    """

    def __init__(
        self,
        config: LoraConfig,
        matrices: Mapping[str, tuple[np.ndarray, np.ndarray]],
        score: np.ndarray | None = None,
        base_format: str | None = None,
    ):
        self.config, self.base_format = config, base_format
        self.shapes = {module: (a.shape, b.shape) for module, (a, b) in matrices.items()}
        self.score_shape = None if score is None else score.shape
        arrays = [array for pair in matrices.values() for array in pair] + ([] if score is None else [score])
        self.parameters = np.concatenate([np.asarray(array, np.float32).reshape(-1) for array in arrays])

    @classmethod
    def fresh(cls, config: LoraConfig, model: Llama, seed: int = 0, train_score: bool = False) -> Adapter:
        """An adapter that changes nothing yet: A drawn from U(-1/sqrt(k), 1/sqrt(k)) as peft does, B zero."""
        rng = np.random.default_rng(seed)
        matrices = {}
        for module in target_modules(config, model.config):
            n, k = model.weight(module).shape
            bound = 1 / math.sqrt(k)
            r = config.rank(module)
            a = rng.uniform(-bound, bound, (r, k)).astype(np.float32)
            matrices[module] = (a, np.zeros((n, r), np.float32))
        score = model.weight("score").dequantize() if train_score else None
        return cls(dataclasses.replace(config, task_type=task_type(model)), matrices, score)

    def copy(self) -> Adapter:
        return Adapter(self.config, dict(self.items()), self.score, self.base_format)

    def __reduce__(self) -> tuple[Any, ...]:
        """For copy and pickle: of a copy too the matrices are views of its own parameters."""
        return Adapter, (self.config, dict(self.items()), self.score, self.base_format)

    def _offsets(self) -> Iterator[tuple[str, int, int, int]]:
        """module, where its A, its B begin and where they end in `parameters`."""
        start = 0
        for module, (a, b) in self.shapes.items():
            middle = start + math.prod(a)
            yield module, start, middle, middle + math.prod(b)
            start = middle + math.prod(b)

    @cached_property
    def _views(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        views = {}
        for module, start, middle, end in self._offsets():
            a, b = self.shapes[module]
            views[module] = (self.parameters[start:middle].reshape(a), self.parameters[middle:end].reshape(b))
        return views

    def __getitem__(self, module: str) -> tuple[np.ndarray, np.ndarray]:
        return self._views[module]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def items(self) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray]]]:
        return iter(self._views.items())

    @property
    def score(self) -> np.ndarray | None:
        """The trained head of a classifier, a view of `parameters`."""
        if self.score_shape is None:
            return None
        return self.parameters[-math.prod(self.score_shape) :].reshape(self.score_shape)

    @property
    def nbytes(self) -> int:
        return self.parameters.nbytes

    @cached_property
    def handle(self) -> _core.Adapter:
        """What `_core.Llama` takes: it reads `parameters` where they are, so what training writes there counts."""
        rows = []
        for module, start, middle, _ in self._offsets():
            _, _, layer, linear = module.split(".", 3)
            rows.append((int(layer), LINEARS.index(linear), self.config.rank(module), start, middle))
        scales = np.array([self.config.scale(module) for module in self], np.float32)
        return _core.Adapter(self.parameters, np.array(rows, np.int64), scales)

    def delta(self, module: str) -> np.ndarray:
        """What is added to W, float32 (n, k)."""
        a, b = self[module]
        return np.float32(self.config.scale(module)) * (b @ a)

    def check(self, model: Llama) -> None:
        """ValueError where this adapter does not fit the model, naming the module."""
        wanted = target_modules(self.config, model.config)
        other = sorted(set(self) ^ set(wanted))
        if other:
            problem = "has no matrices for" if other[0] in wanted else "has matrices for"
            raise ValueError(f"adapter: it {problem} {other[0]}, which its target_modules and this model do not say")
        for module, (a, b) in self.shapes.items():
            n, k = model.weight(module).shape
            if a[1] != k or b[0] != n:
                raise ValueError(f"adapter: {module} is ({b[0]}, {a[1]}) in it and ({n}, {k}) in this model")
            if not a[0] == b[1] == self.config.rank(module):
                got = f"ranks {a[0]} and {b[1]}"
                raise ValueError(f"adapter: A and B of {module} have {got}, expected {self.config.rank(module)}")
        head = model.weights.get("score")
        if self.score_shape is not None and (head is None or head.shape != self.score_shape):
            found = "none" if head is None else head.shape
            raise ValueError(f"adapter: it has a classification head {self.score_shape}, this model has {found}")
        kind = self.config.task_type
        if kind is not None and kind != task_type(model):
            raise ValueError(f"adapter: its task_type is {kind}, this model is a {type(model).__name__}")

    def trained_weights(self) -> dict[str, QuantWeight]:
        """The whole matrices that come with it: the head of a classifier, over `parameters` without a copy."""
        return {} if self.score is None else {"score": QuantWeight.from_array(self.score, "score")}

    def __repr__(self) -> str:
        ranks = sorted({a[0] for a, _ in self.shapes.values()})
        return f"Adapter(r={' '.join(map(str, ranks))}, {len(self)} modules, {self.parameters.size:,} parameters)"


def require_model(model: object) -> None:
    """TypeError for what is no loaded model."""
    if not isinstance(model, Llama):
        wanted = "expected a loaded model, as LlamaForCausalLM.from_pretrained gives one"
        raise TypeError(f"model: got {type(model).__name__}, {wanted}")


def task_type(model: Llama) -> TaskType:
    """peft's name of what a model is for."""
    return "SEQ_CLS" if "score" in model.weights else "CAUSAL_LM"


def base_format(model: Llama) -> str:
    """What an adapter is trained beside: the formats of the decoder layers' weights, floats of any width as one."""
    return " ".join(sorted({"float" if name in FLOAT_BITS else name for name in model.formats}))


# ---- files ---------------------------------------------------------------------------------------------------------


def save_adapter(model: Llama, path: str | os.PathLike[str]) -> dict[str, int]:
    """Writes the adapter of a model in peft's layout; returns {file name: bytes}."""
    adapter, source = model.require_adapter(), model.checkpoint
    base = None if source is None else str(source.path)
    return peft.write_adapter(path, adapter.config, dict(adapter.items()), adapter.score, base, adapter.base_format)


def load_adapter(model: Model, path: str | os.PathLike[str]) -> Model:
    """The model, its weights shared, with an adapter of peft's layout (a directory) at work beside them.

    FileNotFoundError, or ValueError where the adapter is damaged, not supported or of another model's shape. A warning
    where it was trained beside weights of another format: it made up for their rounding, not for this model's.
    """
    require_model(model)
    adapter = read_adapter(path)
    beside, here = adapter.base_format, base_format(model)
    tuned = model.with_adapter(adapter)
    if beside is not None and beside != here:
        told = f"was trained beside {beside} weights, whose rounding it made up for; this model's are {here}"
        warnings.warn(f"adapter: {path} {told}", stacklevel=2)
    return tuned


def read_adapter(path: str | os.PathLike[str]) -> Adapter:
    """The adapter in a directory of peft's layout."""
    return Adapter(*peft.read_adapter(path), base_format=peft.read_base_format(path))


# ---- merging -------------------------------------------------------------------------------------------------------


def config_of(weight: QuantWeight) -> QuantizationConfig | None:
    """What would give floats the format of a weight; None for float weights. An affine weight's is round to nearest,
    with groups in the order of its columns: GPTQ cannot be done again without data."""
    if weight.format in FLOAT_BITS:
        return None
    if weight.format in ("nf4", "fp4"):
        kind = NF4Config if weight.format == "nf4" else FP4Config
        return kind(weight.group, weight.double_quant is not None)
    if weight.format == "int8":
        return Int8Config()
    group = -1 if weight.group == weight.shape[1] else weight.group
    return RTNConfig(weight.bits, group, sym=weight.zeros is None)


def merge(model: Model, requantize: Literal["same"] | QuantizationConfig | None = None) -> Model:
    """The model with W + scale * B A in place of each adapted W, and no adapter.

    requantize: None: every matrix of the decoder layers is a float matrix then (those of a quantized base float32, so
    that `quantize` can take it; those of a float base keep their dtype). "same": adapted matrices are quantized again
    in the format they had, the others stay as they are; a GPTQ matrix is rounded to nearest, without a second GPTQ.
    NF4Config, FP4Config, RTNConfig or Int8Config: all are quantized so.

    The base is not what the adapter was trained beside once it is rounded again. The result's `merge_report` tells what
    that costs, a dictionary a matrix: module, format, `delta_norm` (Frobenius norm of what the adapter adds),
    `error_norm` (of what rounding changes in the sum), `error_ratio` (the second by the first; inf where nothing is
    added).
    """
    adapter = model.require_adapter()
    _check_requantize(requantize)
    weights, report = {}, []
    for module in layer_modules(model.config):
        old, adapted = model.weight(module), module in set(adapter)
        config = config_of(old) if isinstance(requantize, str) else requantize
        if not adapted and (requantize == "same" or config == config_of(old)):
            continue
        dense = old.dequantize()
        delta_norm = 0.0
        if adapted:
            delta = adapter.delta(module)
            dense += delta
            delta_norm = float(np.linalg.norm(delta))
        weights[module] = new = _stored(dense, old, config, module)
        error = float(np.linalg.norm(new.dequantize() - dense))
        ratio = error / delta_norm if delta_norm else math.inf if error else 0.0
        kind = {"module": module, "format": new.format, "bits": new.bits, "method": config.method if config else None}
        report.append({**kind, "delta_norm": delta_norm, "error_norm": error, "error_ratio": ratio})
    merged = model.without_adapter().replace(weights)
    merged.merge_report = report
    return merged


def _check_requantize(requantize: object) -> None:
    if isinstance(requantize, GPTQConfig):
        raise ValueError("requantize: GPTQ needs data: use quantize(model.merge(), GPTQConfig(…), calibration)")
    if requantize not in (None, "same") and not isinstance(requantize, QuantizationConfig):
        accepted = "None, 'same', NF4Config, FP4Config, RTNConfig or Int8Config"
        raise ValueError(f"requantize: got {requantize!r}, accepted are {accepted}")


def _stored(dense: np.ndarray, old: QuantWeight, config: QuantizationConfig | None, module: str) -> QuantWeight:
    """float32 (n, k) as `config` says; None: as floats, of the old weight's dtype if it has one."""
    if config is not None:
        return QuantWeight.from_float(dense, config, name=module)
    dtype = {"f16": "float16", "bf16": "bfloat16"}.get(old.format, "float32")
    return cast_weight(QuantWeight.from_array(dense, module), dtype, module)
