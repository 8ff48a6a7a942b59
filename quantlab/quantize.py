"""Quantizes a whole model: matrix by matrix where a method needs no data, by a stream of decoder layers for GPTQ."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np

from quantlab import _core, device_calibration, gptq
from quantlab.calibration import ADDED_TO_RESIDUAL, STAGES, Activations, Inputs, advance, chunks_of
from quantlab.config import GPTQConfig, QuantizationConfig
from quantlab.cuda import device_number
from quantlab.device_calibration import DeviceActivations
from quantlab.llama import Llama, LlamaConfig, LlamaForCausalLM, layer_modules
from quantlab.progress import Progress
from quantlab.progress import progress as progress_bar
from quantlab.resume import LayerStore, fingerprint, settings_of
from quantlab.token_rows import Texts, rows_of
from quantlab.weight import FLOAT_BITS, QuantWeight, cast_weight

if TYPE_CHECKING:
    from quantlab.io import Checkpoint

FIRST_MATRIX = "model.layers.0.self_attn.q_proj"

Model = TypeVar("Model", bound=Llama)


@overload
def quantize(
    model: Model,
    config: QuantizationConfig,
    calibration: Texts | None = None,
    progress: bool = True,
    resume_dir: str | os.PathLike[str] | None = None,
    device: str | None = None,
) -> Model: ...
@overload
def quantize(
    model: str | Path | Checkpoint,
    config: QuantizationConfig,
    calibration: Texts | None = None,
    progress: bool = True,
    resume_dir: str | os.PathLike[str] | None = None,
    device: str | None = None,
) -> LlamaForCausalLM: ...
def quantize(
    model: Any,
    config: QuantizationConfig,
    calibration: Texts | None = None,
    progress: bool = True,
    resume_dir: str | os.PathLike[str] | None = None,
    device: str | None = None,
) -> Any:
    """Quantizes the seven matrices of every decoder layer; norms and score stay as they are.

    model: a loaded model, a Checkpoint, or a source for `open_checkpoint`. A model gives one of its own class, whose
    embedding and lm_head stay as they are; anything else gives a LlamaForCausalLM with these two in the source's
    `kept_dtype` (16 bits). config: GPTQConfig, NF4Config, FP4Config, RTNConfig or Int8Config. calibration, for GPTQ:
    texts, or rows of token ids; rows longer than the model's context are cut to it.

    GPTQ reads one decoder layer at a time (from a memory map, if that is where the weights are) and writes each
    finished one to `resume_dir`, if given: a run with the same arguments goes on where it stopped and ends with the
    same codes. The result's `quantization_report` has one dictionary a matrix.

    device: where GPTQ computes: "cpu", "cuda" or "cuda:N", by default where the model is ("cpu" for a source). On
    "cuda" the layers are copied there one at a time, so a model larger than its memory can be quantized; the inputs of
    a layer are bfloat16 there, the rest is as exact as on the CPU. The result is where the model is, of a source on
    the CPU: `.to("cuda")` moves it.

    Raises ValueError for what is not accepted, quantlab.NumericError, naming the matrix, where numbers are not finite,
    or too large for the scales of the format.
    """
    if not isinstance(config, QuantizationConfig):
        raise TypeError(
            f"config: got {type(config).__name__}, expected GPTQConfig, NF4Config, FP4Config, RTNConfig or Int8Config"
        )
    source = _open(model)
    llama = source.config if isinstance(source.config, LlamaConfig) else LlamaConfig(source.config)
    require_float(source)
    if isinstance(config, GPTQConfig):
        rows = calibration_rows(source, llama, calibration)
        number = device_number(getattr(source, "device", "cpu") if device is None else device)
        run = _LayerStream(source, llama, config, rows, resume_dir, number)
        with progress_bar(len(list(layer_modules(llama))), f"GPTQ {config.bits} bits", "matrix", progress) as bar:
            weights, reports = run.quantize(bar)
    else:
        if device is not None:
            raise ValueError(f"device: got {device!r}, but only GPTQ has a choice: other methods run where ops do")
        if resume_dir is not None:
            raise ValueError(f"resume_dir: got {str(resume_dir)!r}, but only GPTQ keeps finished layers")
        weights, reports = _matrix_by_matrix(source, llama, config, progress)
    quantized = _build(source, llama, weights)
    quantized.quantization_report = reports
    return quantized


def _open(model: Any) -> Any:
    if isinstance(model, (str, Path)):
        from quantlab.io import open_checkpoint

        return open_checkpoint(model)
    if not all(hasattr(model, name) for name in ("config", "weight", "vector")):
        raise TypeError(f"model: got {type(model).__name__}, expected a model, a Checkpoint, or a path or name of one")
    return model


def require_float(source: Any) -> None:
    """ValueError for what `quantize` does not take: weights that are no floats, an adapter, a Checkpoint that is no
    language model."""
    from quantlab.io import Checkpoint

    if isinstance(source, Checkpoint):
        if source.has("score"):
            wanted = "load it with LlamaForSequenceClassification.from_pretrained, and quantize that"
            raise ValueError(f"model: {source.path} holds a classifier: {wanted}")
        source.require_language_model()
    if getattr(source, "adapter", None) is not None:
        raise ValueError("model: it has an adapter; quantize model.merge(), or model.without_adapter()")
    weight = source.weight(FIRST_MATRIX)
    if weight.format not in FLOAT_BITS:
        raise ValueError(f"model: its {FIRST_MATRIX} is {weight.format} already; quantize a model with float weights")


def _build(source: Any, llama: LlamaConfig, weights: Mapping[str, QuantWeight]) -> Any:
    if hasattr(source, "replace"):
        return source.replace(weights)
    outer = [module for module in ("model.embed_tokens", "lm_head") if source.has(module)]
    rest = {module: cast_weight(source.weight(module), source.kept_dtype, module) for module in outer}
    norms = [f"model.layers.{i}.{name}" for i in range(llama.num_hidden_layers) for name in _NORMS]
    vectors = {module: source.vector(module) for module in (*norms, "model.norm")}
    return LlamaForCausalLM(llama, {**rest, **weights}, vectors, source.tokenizer, source)


def _matrix_by_matrix(
    source: Any, llama: LlamaConfig, config: QuantizationConfig, show: bool
) -> tuple[dict[str, QuantWeight], list[dict[str, Any]]]:
    weights, reports = {}, []
    modules = list(layer_modules(llama))
    with progress_bar(len(modules), config.method, "matrix", show) as bar:
        for module in modules:
            started = time.perf_counter()
            weights[module] = QuantWeight.from_float(source.weight(module).dequantize(), config, name=module)
            seconds = time.perf_counter() - started
            reports.append(
                {"module": module, "method": config.method, "bits": weights[module].bits, "seconds": seconds}
            )
            bar.advance(note=module)
    return weights, reports


# ---- calibration data ----------------------------------------------------------------------------------------------


def calibration_rows(source: Any, llama: LlamaConfig, calibration: Texts | None) -> list[np.ndarray]:
    """Rows of int32 token ids, checked against the vocabulary and cut to the model's context."""
    wanted = "expected a list of texts, or rows of token ids"
    if calibration is None or isinstance(calibration, (str, bytes)) or not hasattr(calibration, "__len__"):
        got = {"NoneType": "nothing", "str": "one text"}.get(type(calibration).__name__, type(calibration).__name__)
        raise ValueError(f"calibration: got {got}, {wanted}")
    if len(calibration) == 0:
        raise ValueError(f"calibration: it is empty, {wanted}")
    rows = [row for row in rows_of(calibration, getattr(source, "tokenizer", None), "calibration") if len(row)]
    if not rows:
        raise ValueError("calibration: the texts have no tokens")
    for row in rows:
        if row.max() >= llama.vocab_size:
            raise ValueError(
                f"calibration: token id {row.max()}, expected less than the vocabulary of {llama.vocab_size}"
            )
    return [row[: llama.max_position_embeddings] for row in rows]


# ---- GPTQ, one decoder layer at a time -----------------------------------------------------------------------------

_NORMS = ("input_layernorm", "post_attention_layernorm")


class _LayerStream:
    """One pass over the layers. With `true_sequential`, every matrix is quantized before the inputs of the next stage
    are computed with it, and each product is computed once; without, a layer's inputs are those of its float weights,
    and the layer runs a second time with the quantized ones."""

    def __init__(
        self,
        source: Any,
        llama: LlamaConfig,
        config: GPTQConfig,
        rows: list[np.ndarray],
        resume_dir: str | os.PathLike[str] | None,
        device: int,
    ):
        self.source, self.llama, self.config, self.device = source, llama, config, device
        self.store = None
        if resume_dir is not None:
            modules = ["model.embed_tokens", *layer_modules(llama)]
            kind = "cpu" if device < 0 else "cuda"
            self.store = LayerStore(resume_dir, settings_of(config, rows, fingerprint(source, llama, modules), kind))
        embedding = source.weight("model.embed_tokens").handle
        if device < 0:
            self.quantized = Activations(llama, chunks_of(rows), embedding)
        else:
            chunks = chunks_of(rows, device_calibration.CHUNK_TOKENS)
            self.quantized = DeviceActivations(llama, chunks, embedding, device)
        corrected = config.drift_correction or config.residual_correction
        self.full = self.quantized.copy() if corrected else None

    def quantize(self, bar: Progress) -> tuple[dict[str, QuantWeight], list[dict[str, Any]]]:
        weights: dict[str, QuantWeight] = {}
        reports: list[dict[str, Any]] = []
        for layer in range(self.llama.num_hidden_layers):
            finished = self.store.load(layer) if self.store is not None else None
            if finished is None:
                finished = self._quantize_layer(layer, bar)
                if self.store is not None:
                    self.store.save(layer, *finished)
            else:
                self._pass_layer(layer, finished[0])
                bar.skip(sum(map(len, STAGES)))
            weights.update(finished[0])
            reports += finished[1]
        return weights, reports

    def _norms(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        first, second = (self.source.vector(f"model.layers.{layer}.{name}") for name in _NORMS)
        return first, second

    def _placed(self, weight: QuantWeight) -> Any:
        """What the ops of this run take for it."""
        return weight.handle if self.device < 0 else _core.DeviceWeight(self.device, weight.handle)

    def _floats(self, module: str) -> gptq.Array:
        """float32 (n, k), where this run computes."""
        weight = self.source.weight(module)
        return weight.dequantize() if self.device < 0 else self._placed(weight).floats()

    def _handles(self, layer: int, stages: Sequence[Sequence[str]]) -> dict[str, Any]:
        """Float weights of these stages."""
        modules = [module for stage in stages for module in stage]
        return {module: self._placed(self.source.weight(f"model.layers.{layer}.{module}")) for module in modules}

    def _own(self, layer: int, weights: Mapping[str, QuantWeight]) -> dict[str, Any]:
        """The layer's quantized weights, by module."""
        prefix = f"model.layers.{layer}."
        return {name.removeprefix(prefix): self._placed(weight) for name, weight in weights.items()}

    def _pass_layer(self, layer: int, weights: Mapping[str, QuantWeight]) -> None:
        norms = self._norms(layer)
        self.quantized.run(norms, self._own(layer, weights))
        if self.full is not None:
            self.full.run(norms, self._handles(layer, STAGES))

    def _quantize_layer(self, layer: int, bar: Progress) -> tuple[dict[str, QuantWeight], list[dict[str, Any]]]:
        norms, sequential = self._norms(layer), self.config.true_sequential
        run = self.quantized if sequential else self.quantized.copy()
        steps = run.layer(norms)
        full_steps = self.full.layer(norms) if self.full is not None else None
        inputs, full_inputs = next(steps), next(full_steps) if full_steps is not None else None
        weights: dict[str, QuantWeight] = {}
        reports: list[dict[str, Any]] = []
        for index, stage in enumerate(STAGES):
            names = [f"model.layers.{layer}.{module}" for module in stage]
            results = self._quantize_stage(index, names, run, inputs, full_inputs, bar)
            weights.update({name: weight for name, (weight, _) in results.items()})
            reports += [{"method": "gptq", **report.to_dict()} for _, report in results.values()]
            float_handles = self._handles(layer, [stage]) if full_steps is not None or not sequential else {}
            own = self._own(layer, {name: weights[name] for name in names}) if sequential else float_handles
            inputs = advance(steps, own)
            full_inputs = advance(full_steps, float_handles) if full_steps is not None else None
        if not sequential:
            self.quantized.run(norms, self._own(layer, weights))
        return weights, reports

    def _add_chunk(
        self, i: int, run: Activations, inputs: Inputs, full_inputs: Inputs | None, hessian: gptq.Hessian,
        drift: gptq.Array | None, residual: gptq.Array | None,
    ) -> None:  # fmt: skip
        x = inputs(i)
        hessian.add(x)
        if full_inputs is not None and drift is not None:
            gptq.add_moments(drift, full_inputs(i), x, x)
        if self.full is not None and residual is not None:
            gptq.add_moments(residual, self.full.residual[i], run.residual[i], x)

    def _quantize_stage(
        self, index: int, names: list[str], run: Activations, inputs: Inputs, full_inputs: Inputs | None, bar: Progress
    ) -> dict[str, tuple[QuantWeight, gptq.GPTQReport]]:
        """Moments of the stage's inputs over all chunks, then its matrices."""
        n, k = self.source.weight(names[0]).shape
        hessian = gptq.Hessian(k, self.device)
        drift = gptq.zeros(k, k, self.device) if self.config.drift_correction else None
        residual = None
        if self.config.residual_correction and index in ADDED_TO_RESIDUAL:
            residual = gptq.zeros(n, k, self.device)
        for i in range(len(run.chunks)):
            self._add_chunk(i, run, inputs, full_inputs, hessian, drift, residual)
        loads = {name: (lambda name=name: self._floats(name)) for name in names}
        return gptq.quantize_shared(loads, hessian, self.config, drift, residual, lambda name: bar.advance(note=name))
