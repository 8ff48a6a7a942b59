"""LLaMA models: the config, the weights, and the forward pass of `_core.Llama` over packed, ragged batches."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from quantlab import _core
from quantlab.config import Int8Config, is_integer
from quantlab.cuda import device_number
from quantlab.llama_config import ATTENTION, MLP, LlamaConfig, layer_modules, token_ids
from quantlab.progress import progress
from quantlab.rope import rope_parameters, rope_tables, stepwise_rope_tables
from quantlab.token_rows import Ids, one_row, text_ids, to_sequences
from quantlab.weight import DTYPE_NAMES, QuantWeight, cast, cast_weight, linear_of_any_rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokenizers import Tokenizer

    from quantlab.config import QuantizationConfig
    from quantlab.io import Checkpoint
    from quantlab.lora import Adapter

DTYPES = (*DTYPE_NAMES.values(), "auto")
BATCH_TOKENS = 4096  # tokens that one C call works on: bounds the workspace
# what from_pretrained of transformers takes, and what does the same here
ELSEWHERE = {
    "torch_dtype": 'its name here is dtype, such as dtype="bfloat16"',
    "device_map": 'a model is on one device here, such as device="cuda"',
    "load_in_4bit": "load the model, then quantlab.quantize(model, quantlab.NF4Config())",
    "load_in_8bit": "load the model, then quantlab.quantize(model, quantlab.Int8Config())",
    "quantization_config": "load the model, then quantlab.quantize(model, config)",
}

Packed = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]
Self = TypeVar("Self", bound="Llama")


class KVCache:
    """Keys and values of `batch` sequences of up to `capacity` tokens; float32 (layers, batch * capacity, kv heads, d).

    For `packed_hidden`, where a caller goes on from tokens that it gave before; `generate` has one of its own.
    """

    def __init__(self, config: LlamaConfig, batch: int, capacity: int):
        shape = (config.num_hidden_layers, batch * capacity, config.num_key_value_heads, config.head_dim)
        self.k, self.v = np.empty(shape, np.float32), np.empty(shape, np.float32)
        self.capacity = capacity
        self.lengths = np.zeros(batch, np.int64)  # tokens held of each sequence


class Llama:
    """A LLaMA backbone: config, weights by module name, tokenizer. Base of the causal and the classification model.

    `weights` holds a `QuantWeight` a matrix and `vectors` a float32 array a norm, under Hugging Face's module names.
    """

    architecture = "LlamaModel"
    options: tuple[str, ...] = ()  # of the constructor, that from_pretrained takes too

    def __init__(
        self,
        config: LlamaConfig | Mapping[str, Any],
        weights: Mapping[str, QuantWeight],
        vectors: Mapping[str, np.ndarray],
        tokenizer: Tokenizer | None = None,
        checkpoint: Checkpoint | None = None,
        device: str = "cpu",
        adapter: Adapter | None = None,
    ):
        self._device_number = device_number(device)
        self.device, self.adapter = device, adapter
        self.config = config if isinstance(config, LlamaConfig) else LlamaConfig(config)
        self.weights, self.vectors = dict(weights), dict(vectors)
        self.tokenizer, self.checkpoint = tokenizer, checkpoint
        self.quantization_report: list[dict[str, Any]] = []
        self.merge_report: list[dict[str, Any]] = []
        self.training_log: list[dict[str, Any]] = []
        self._core = self._build_core()
        self._rope: tuple[np.ndarray, np.ndarray] | None = None
        self._dynamic = rope_parameters(config)["rope_type"] == "dynamic"

    def _build_core(self) -> _core.Llama:
        config = self.config

        def layer(index: int) -> tuple[Any, ...]:
            name = f"model.layers.{index}."
            attention = (self.weight(name + module).handle for module in ATTENTION)
            mlp = (self.weight(name + module).handle for module in MLP)
            norms = (self.vector(name + "input_layernorm"), self.vector(name + "post_attention_layernorm"))
            return (norms[0], *attention, norms[1], *mlp)

        return _core.Llama(
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.intermediate_size,
            config.rms_norm_eps,
            self.weight("model.embed_tokens").handle,
            self.vector("model.norm"),
            tuple(layer(index) for index in range(config.num_hidden_layers)),
            self._device_number,
            None if self.adapter is None else self.adapter.handle,
        )

    # ---- loading and saving ----------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls: type[Self],
        source: str | os.PathLike[str],
        dtype: str = "float32",
        device: str = "cpu",
        local_files_only: bool = False,
        **extra: Any,
    ) -> Self:
        """Loads a model from a directory (plain, GPTQ or bitsandbytes safetensors), a `.gguf` file, a hub id, or
        "demo".

        dtype: what float matrices are held in: float32, bfloat16, float16 (rounded to nearest even), or auto (as
        stored, without a copy where the file allows it). Quantized matrices stay as they are.

        device: "cpu", where arithmetic is float32, or "cuda" ("cuda:N"), where products take bfloat16 and add in
        float32; the weights are copied there once, straight from the file where they are stored as they are used.
        CudaError where CUDA cannot be used, with the reason.
        """
        from quantlab.io import open_checkpoint

        device_number(device)  # better said before the weights are read
        for name in extra:
            if name not in cls.options:
                accepted = ", ".join(("dtype", "device", "local_files_only", *cls.options))
                hint = ELSEWHERE.get(name, "from_pretrained has no such argument")
                raise TypeError(f"{name}: {hint}; accepted are {accepted}")
        checkpoint = open_checkpoint(source, local_files_only=local_files_only)
        return cls.from_checkpoint(checkpoint, dtype=dtype, device=device, **extra)

    def to(self: Self, device: str) -> Self:
        """The same model on another device ("cpu", "cuda", "cuda:N"): itself where it is there already. Its memory on
        the old device is free once this model is no longer used."""
        if device_number(device) == self._device_number:
            return self
        return self._with(self.weights, device, self.adapter)

    @classmethod
    def from_checkpoint(cls: type[Self], checkpoint: Checkpoint, dtype: str = "float32", **extra: Any) -> Self:
        if dtype not in DTYPES:
            raise ValueError(f"dtype: got {dtype!r}, accepted are {', '.join(DTYPES)}")
        weights, vectors = {}, {}
        with progress(len(checkpoint.modules), "loading", "module") as bar:
            for module in checkpoint.modules:
                if module.endswith("norm"):
                    vectors[module] = checkpoint.vector(module)
                else:
                    weights[module] = cast_weight(checkpoint.weight(module), dtype, module)
                bar.advance()
        return cls(checkpoint.config, weights, vectors, checkpoint.tokenizer, checkpoint, **extra)

    def replace(self: Self, weights: Mapping[str, QuantWeight]) -> Self:
        """A new model with these weights in place of ours, sharing everything else."""
        unknown = set(weights) - set(self.weights)
        if unknown:
            raise ValueError(f"weights: no module named {sorted(unknown)[0]!r} in this model")
        for module, weight in weights.items():
            wanted = f"expected a QuantWeight of shape {self.weights[module].shape}"
            if not isinstance(weight, QuantWeight):
                raise TypeError(f"weights: got {type(weight).__name__} for {module}, {wanted}")
            if weight.shape != self.weights[module].shape:
                raise ValueError(f"weights: got shape {weight.shape} for {module}, {wanted}")
        return self._with({**self.weights, **weights}, self.device, self.adapter)

    def _with(self: Self, weights: Mapping[str, QuantWeight], device: str, adapter: Adapter | None) -> Self:
        parts = (self.config, weights, self.vectors, self.tokenizer, self.checkpoint)
        return type(self)(*parts, device=device, adapter=adapter)

    def _options(self) -> dict[str, Any]:
        """What the constructor takes by name."""
        return {"device": self.device, "adapter": self.adapter}

    def __reduce__(self) -> tuple[Any, ...]:
        """For copy and pickle: the parts, of which the other model is built; its checkpoint is opened again by path."""
        parts = (self.config, self.weights, self.vectors, self.tokenizer, self.checkpoint)
        reports = ("quantization_report", "merge_report", "training_log")
        return _rebuilt, (type(self), parts, self._options()), {name: getattr(self, name) for name in reports}

    # ---- LoRA adapters -----------------------------------------------------------------------------------------

    def with_adapter(self: Self, adapter: Adapter) -> Self:
        """The same model, its weights shared, with a LoRA adapter at work beside them; on a GPU, a copy of it."""
        from quantlab.lora import Adapter

        if not isinstance(adapter, Adapter):
            raise TypeError(f"adapter: got {type(adapter).__name__}, expected an Adapter; load_adapter reads one")
        adapter.check(self)
        return self._with({**self.weights, **adapter.trained_weights()}, self.device, adapter)

    def without_adapter(self: Self) -> Self:
        """The same model, its weights shared, without its adapter."""
        return self._with(self.weights, self.device, None)

    def save_adapter(self, path: str | os.PathLike[str]) -> dict[str, int]:
        """Writes the adapter as PEFT does (adapter_config.json, adapter_model.safetensors); returns bytes by file."""
        from quantlab.lora import save_adapter

        return save_adapter(self, path)

    def require_adapter(self) -> Adapter:
        """`adapter`; ValueError where there is none."""
        if self.adapter is None:
            raise ValueError("adapter: this model has none; finetune and load_adapter give one")
        return self.adapter

    def merge(self: Self, requantize: Literal["same"] | QuantizationConfig | None = None) -> Self:
        """The model with its adapter added into its weights; see `quantlab.lora.merge`."""
        from quantlab.lora import merge

        return merge(self, requantize)

    def weight(self, module: str) -> QuantWeight:
        """The matrix of a module; KeyError with its name where there is none."""
        return self.weights[module]

    def vector(self, module: str) -> np.ndarray:
        """The gain of a norm, float32 (hidden_size,)."""
        return self.vectors[module]

    @property
    def saved_dtype(self) -> str:
        """The embedding's: what `save_pretrained` writes all floats in, since readers compute with one type."""
        return DTYPE_NAMES[self.weight("model.embed_tokens").format]

    def saved_weights(self) -> dict[str, QuantWeight]:
        """The matrices that `save_pretrained` writes."""
        return {module: cast_weight(weight, self.saved_dtype, module) for module, weight in self.weights.items()}

    def saved_vectors(self) -> dict[str, np.ndarray]:
        """The gains of norms that `save_pretrained` writes."""
        return {module: cast(vector, self.saved_dtype, module) for module, vector in self.vectors.items()}

    def save_pretrained(self, path: str | os.PathLike[str]) -> dict[str, int]:
        """Writes a checkpoint directory in the layout that the weights ask for, floats in `saved_dtype`; returns the
        bytes of each file."""
        from quantlab.io import save_checkpoint
        from quantlab.io.tokenizer import files_to_save

        if self.adapter is not None:
            raise ValueError("adapter: save_pretrained writes a model without one; use merge() first, or save_adapter")
        files = files_to_save(self.checkpoint, self.tokenizer)
        return save_checkpoint(path, self.saved_config(), self.saved_weights(), self.saved_vectors(), files)

    def saved_config(self) -> dict[str, Any]:
        """The config.json that `save_pretrained` writes, but for the quantization_config, which follows from the
        weights."""
        config = {**self.config.to_dict(), "architectures": [self.architecture], "model_type": "llama"}
        for name in ("quantization_config", "dtype"):  # the latter is a newer name of torch_dtype
            config.pop(name, None)
        config["torch_dtype"] = self.saved_dtype
        return config

    def size_report(self) -> dict[str, Any]:
        """Bytes by part as the checkpoint on disk holds them, their total, and the bytes of the weights in memory."""
        from quantlab.size import size_of_model

        report = size_of_model(self)
        report["memory"] += self.adapter.nbytes if self.adapter is not None else 0
        return report

    # ---- forward ---------------------------------------------------------------------------------------------

    def rope(self, length: int, given: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin of `length` positions, of which the first `given` (None: all) are seen at once."""
        if self._dynamic and given is not None:
            return stepwise_rope_tables(self.config, given, length)
        if self._dynamic or self._rope is None or len(self._rope[0]) < length:
            self._rope = rope_tables(self.config, length if self._dynamic else max(256, 1 << (length - 1).bit_length()))
        return self._rope[0][:length], self._rope[1][:length]

    def packed(
        self, sequences: Sequence[np.ndarray], before: np.ndarray | None = None, capacity: int | None = None
    ) -> Packed:
        """What `_core` takes for int32 sequences laid end to end: ids, positions, q_start, kv_start, kv_len, cos, sin.

        before (B,): tokens of each that a cache holds, in rows of `capacity`.
        """
        counts = np.array([len(sequence) for sequence in sequences], np.int64)
        q_start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        before = np.zeros_like(counts) if before is None else before
        positions = np.concatenate([np.arange(b, b + n, dtype=np.int32) for b, n in zip(before, counts, strict=True)])
        kv_start = q_start[:-1].copy() if capacity is None else np.arange(len(counts), dtype=np.int64) * capacity
        tables = self.rope(int((before + counts).max()))
        return np.concatenate(sequences), positions, q_start, kv_start, before + counts, *tables

    def packed_hidden(
        self, sequences: Sequence[np.ndarray], cache: KVCache | None = None, keep: np.ndarray | None = None
    ) -> np.ndarray:
        """Hidden states after the final norm of int32 sequences laid end to end, float32 (tokens, hidden_size), or
        the rows `keep` of them.

        With a cache, sequence b continues row b of it, and the cache grows by what was given. One C call: bound the
        tokens before you call.
        """
        keep = None if keep is None else np.ascontiguousarray(keep, np.int32)
        if cache is None:
            return self._core.forward(*self.packed(sequences), None, None, keep)
        batch = self.packed(sequences, cache.lengths, cache.capacity)
        if batch[4].max() > cache.capacity:
            raise ValueError(f"cache: {batch[4].max()} tokens, its capacity is {cache.capacity}")
        hidden = self._core.forward(*batch, cache.k, cache.v, keep)
        cache.lengths = batch[4]
        return hidden

    def batches(self, sequences: Sequence[np.ndarray], batch_tokens: int) -> Iterator[list[int]]:
        """Indices of sequences in groups of at most `batch_tokens` tokens (a longer one alone), sorted by length."""
        group: list[int] = []
        tokens = 0
        for index in sorted(range(len(sequences)), key=lambda i: len(sequences[i])):
            if group and tokens + len(sequences[index]) > batch_tokens:
                yield group
                group, tokens = [], 0
            group.append(index)
            tokens += len(sequences[index])
        if group:
            yield group

    def hidden_states(self, input_ids: Ids, lengths: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """Hidden states after the final norm, float32 (B, T, hidden_size); zero beyond a row's length.

        input_ids: (B, T) right-padded with `lengths` (B,), or rows of any length. A row's result does not depend on the
        rows beside it (but for the dynamic rope type beyond its trained length, whose angles follow the longest row).
        """
        sequences = to_sequences(input_ids, lengths)
        padded = getattr(input_ids, "shape", None)
        width = int(padded[-1]) if padded else max(len(row) for row in sequences)
        out = np.zeros((len(sequences), width, self.config.hidden_size), np.float32)
        for group in self.batches(sequences, BATCH_TOKENS):
            hidden, start = self.packed_hidden([sequences[index] for index in group]), 0
            for index in group:
                out[index, : len(sequences[index])] = hidden[start : start + len(sequences[index])]
                start += len(sequences[index])
        return out

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text with the tokenizer's special tokens, int32."""
        return text_ids(self.require_tokenizer(), text)

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special_tokens: bool = True) -> str:
        """The text of token ids (t,)."""
        return self.require_tokenizer().decode(one_row(ids), skip_special_tokens)

    @property
    def eos_token_ids(self) -> list[int]:
        """The tokens that end a text: generation_config.json's, as in transformers, else the config's."""
        named = self.checkpoint.eos_token_ids if self.checkpoint is not None else None
        return token_ids(self.config, "eos_token_id") if named is None else named

    def require_tokenizer(self) -> Tokenizer:
        """`tokenizer`; ValueError where there is none."""
        if self.tokenizer is None:
            raise ValueError("tokenizer: this checkpoint has none; use token ids instead of texts")
        return self.tokenizer

    def apply_chat_template(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> np.ndarray:
        """Token ids, int32 (t,), of messages {"role", "content"} in the model's chat template (ChatML where it has
        none), by default up to where the assistant begins to speak."""
        from quantlab.conversations import chat_ids

        return chat_ids(self, messages, add_generation_prompt)

    def __repr__(self) -> str:
        beside = f", {self.adapter!r}" if self.adapter is not None else ""
        return f"{type(self).__name__}({self.config!r}, weights {' '.join(self.formats)}{beside})"

    @property
    def formats(self) -> list[str]:
        """The formats of the decoder layers' matrices, each once: f32, nf4, affine-4, …"""
        weights = [self.weights[module] for module in layer_modules(self.config)]
        return sorted({f"affine-{one.bits}" if one.format == "affine" else one.format for one in weights})

    def _repr_html_(self) -> str:
        size = self.size_report()
        counts = {**size["parts"], "total": size["total"], "in memory": size["memory"]}
        rows = (
            f"<tr><td>{part}</td><td style='text-align:right'>{count:,}</td></tr>" for part, count in counts.items()
        )
        return f"<b>{self!r}</b><table><tr><th>part</th><th>bytes</th></tr>{''.join(rows)}</table>"


def _rebuilt(kind: type[Self], parts: tuple[Any, ...], options: dict[str, Any]) -> Self:
    config, weights, *others = parts
    adapter = options["adapter"]
    return kind(config, weights if adapter is None else {**weights, **adapter.trained_weights()}, *others, **options)


class LlamaForCausalLM(Llama):
    """A LLaMA language model: `model(ids)` gives logits; `generate` and `perplexity` build on it.

    lm_head="int8" (of the constructor and of `from_pretrained`) holds the output matrix a second time in 8 bits, row by
    row as LLM.int8() does: a step of generation reads all of it, and the embedding it may be tied to stays as it is.
    Only in memory: `save_pretrained` writes what was loaded.
    """

    architecture = "LlamaForCausalLM"
    options = ("lm_head",)

    def __init__(self, *parts: Any, lm_head: Literal["int8"] | QuantWeight | None = None, **more: Any):
        if not (lm_head is None or lm_head == "int8" or isinstance(lm_head, QuantWeight)):
            raise ValueError(f"lm_head: got {lm_head!r}, accepted are None (as it is), 'int8'")
        super().__init__(*parts, **more)
        self._lm_head = lm_head if isinstance(lm_head, QuantWeight) else None
        if lm_head == "int8":
            self._lm_head = QuantWeight.from_float(self.lm_head.dequantize(), Int8Config())

    def _with(self, weights: Mapping[str, QuantWeight], device: str, adapter: Adapter | None) -> LlamaForCausalLM:
        head: Literal["int8"] | QuantWeight | None = self._lm_head
        if head is not None and weights[self._head_name] is not self.weights[self._head_name]:
            head = "int8"  # of the new one
        parts = (self.config, weights, self.vectors, self.tokenizer, self.checkpoint)
        return type(self)(*parts, device=device, adapter=adapter, lm_head=head)

    def _options(self) -> dict[str, Any]:
        return {**super()._options(), "lm_head": self._lm_head}

    @classmethod
    def from_checkpoint(cls: type[Self], checkpoint: Checkpoint, dtype: str = "float32", **extra: Any) -> Self:
        checkpoint.require_language_model()
        return super().from_checkpoint(checkpoint, dtype, **extra)

    @property
    def _head_name(self) -> str:
        return "lm_head" if "lm_head" in self.weights else "model.embed_tokens"

    @property
    def lm_head(self) -> QuantWeight:
        """The output matrix (vocabulary, hidden_size): the embedding where the two are tied."""
        return self._lm_head if self._lm_head is not None else self.weights[self._head_name]

    def size_report(self) -> dict[str, Any]:
        report = super().size_report()
        report["memory"] += self._lm_head.nbytes if self._lm_head is not None else 0
        return report

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """float32 (tokens, vocabulary) of hidden states (tokens, hidden_size)."""
        return self._core.linear(np.ascontiguousarray(hidden), self.lm_head.handle)

    def losses(self, ids: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """-log p(targets[i] | ids[: i + 1]) in nats of one sequence, float32 (T,); 0 where the target is -100."""
        targets = np.ascontiguousarray(targets, np.int32)
        return self._core.losses(*self.packed([np.ascontiguousarray(ids, np.int32)]), self.lm_head.handle, targets)

    def __call__(
        self, input_ids: Ids, lengths: Sequence[int] | np.ndarray | None = None, logits_to_keep: int = 0
    ) -> np.ndarray:
        """Logits, float32 (B, T, vocabulary); with `logits_to_keep` > 0 those of each row's last tokens only.

        Beyond a row's length the logits are zero. Raises ValueError for ids outside of the vocabulary.
        """
        if not is_integer(logits_to_keep) or logits_to_keep < 0:
            raise ValueError(f"logits_to_keep: got {logits_to_keep!r}, expected an integer of 0 (all) or more")
        hidden = self.hidden_states(input_ids, lengths)
        sequences = to_sequences(input_ids, lengths)
        keep = min(logits_to_keep, min(len(row) for row in sequences))
        if keep:
            rows = np.array([len(row) for row in sequences])[:, None] - keep + np.arange(keep)
            hidden = np.take_along_axis(hidden, rows[:, :, None], axis=1)
        batch, width, channels = hidden.shape
        return linear_of_any_rows(hidden.reshape(-1, channels), self.lm_head).reshape(batch, width, -1)

    def generate(
        self,
        input_ids: Ids,
        max_new_tokens: int = 64,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        eos_token_id: int | Sequence[int] | None = None,
        on_token: Callable[[int, int], None] | None = None,
        stop_strings: Sequence[str] | str | None = None,
    ) -> list[np.ndarray]:
        """Continues each row; see `quantlab.generate.generate`."""
        from quantlab.generate import generate

        sampling = (do_sample, temperature, top_k, top_p, seed)
        return generate(self, input_ids, max_new_tokens, *sampling, eos_token_id, on_token, stop_strings)

    def perplexity(
        self, text_or_ids: str | Ids, context: int = 2048, max_tokens: int | None = None
    ) -> dict[str, float]:
        """Perplexity of a text; see `quantlab.perplexity.perplexity`."""
        from quantlab.perplexity import perplexity

        return perplexity(self, text_or_ids, context, max_tokens)
