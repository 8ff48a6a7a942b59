"""What to do with a weight: one frozen configuration a method, checked when it is made; and what a LoRA adapter is."""

from __future__ import annotations

import dataclasses
import math
import numbers
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

BITS = (2, 3, 4, 8)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
MAX_RANK = 4096  # of a LoRA adapter

TaskType = Literal["CAUSAL_LM", "SEQ_CLS"]

_Number = TypeVar("_Number", int, float)
_Config = TypeVar("_Config", bound="QuantizationConfig")


def is_integer(value: object) -> bool:
    """Whether it is an integer of Python or NumPy; a bool is none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether it is an integer or a float of Python or NumPy; a bool is none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def plain_number(value: Any) -> Any:
    """An integer or float of NumPy as Python's, which JSON knows; all else as it is."""
    if not is_number(value) or type(value) in (int, float):
        return value
    return int(value) if is_integer(value) else float(value)


def plain_numbers(config: Any) -> None:
    """The same for the fields of a frozen configuration."""
    for field in dataclasses.fields(config):
        object.__setattr__(config, field.name, plain_number(getattr(config, field.name)))


def check_flag(name: str, value: object) -> None:
    """ValueError unless it is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: got {value!r}, expected True or False")


def check_choice(name: str, value: object, choices: tuple[Any, ...]) -> None:
    """ValueError unless it is one of `choices`, of the same type: 4.0 and True are no integers."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}")


def check_number(name: str, value: object, least: float, below: float = math.inf) -> None:
    """ValueError unless it is a number of `least` or more, and less than `below`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < below:
        wanted = f"a number of {least:g} or more" + ("" if below == math.inf else f", less than {below:g}")
        raise ValueError(f"{name}: got {value!r}, expected {wanted}")


def check_group_size(value: object) -> None:
    """ValueError unless it is -1 or a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or (value < 1 and value != -1):
        raise ValueError(f"group_size: got {value!r}, expected -1 (the whole row) or a positive integer")


def check_rank(name: str, value: object) -> None:
    """ValueError unless it is the rank of a LoRA adapter."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RANK:
        raise ValueError(f"{name}: got {value!r}, expected an integer of 1 to {MAX_RANK}")


def checked_patterns(name: str, patterns: object) -> dict[str, Any]:
    """A dictionary of regular expressions and ranks (name: rank_pattern) or alphas; ValueError for what is none."""
    if not isinstance(patterns, Mapping):
        raise ValueError(f"{name}: got {patterns!r}, expected a dictionary of module names and numbers")
    plain = {key: plain_number(value) for key, value in patterns.items()}
    for key, value in plain.items():
        if name == "rank_pattern":
            check_rank(f"{name}, {key!r}", value)
        else:
            check_number(f"{name}, {key!r}", value, 0.0)
        try:
            re.compile(key)
        except (re.error, TypeError) as error:
            raise ValueError(f"{name}: {key!r} is no regular expression: {error}") from None
    return plain


@dataclass(frozen=True)
class QuantizationConfig:
    """What all configurations share: a `method` name, and plain dictionaries in and out."""

    method: ClassVar[str] = ""

    def to_dict(self) -> dict[str, Any]:
        """All fields, and `method`, in types that JSON knows."""
        return {"method": self.method, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls: type[_Config], fields: Mapping[str, Any]) -> _Config:
        """The inverse of `to_dict`. An unknown field or another method's name is a ValueError."""
        fields = dict(fields)
        method = fields.pop("method", cls.method)
        if method != cls.method:
            raise ValueError(f"method: got {method!r}, expected {cls.method!r} for {cls.__name__}")
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise ValueError(f"{name}: {cls.__name__} has no such field; it has {', '.join(known) or 'none'}")
        return cls(**fields)


@dataclass(frozen=True)
class GPTQConfig(QuantizationConfig):
    """GPTQ (Frantar et al. 2022, arXiv:2210.17323): second-order rounding to n-bit integers.

    bits: 2, 3, 4 or 8. group_size: columns that share a scale, -1 for the whole row. sym: zero point fixed at
    2^(bits-1). desc_act: columns in order of falling Hessian diagonal. damp_percent: share of the Hessian's mean
    diagonal added to it. static_groups: scales of the original groups, found before the columns are reordered.
    true_sequential: within a layer, later matrices see the quantized earlier ones. block_stale_scales: scales from
    weights without the updates of their own 128-column block, as the reference has it for groups under 128 (so its
    published figures come out); False takes the weights as they stand.

    Beyond the reference, off by default: act_group_aware: act-order that keeps every group's members, so the file
    needs no g_idx. scale_search: None, "mse" (the reference's, at 1.3 to 2 times the time, most with small groups) or
    "hessian" (error weighted by the Hessian diagonal, at next to no cost).
    drift_correction, residual_correction: aim at the outputs of the unquantized model.
    checkpoint_format: "gptq" (v1) or "gptq_v2"; None: v1 for sym, v2 for asym.
    """

    method: ClassVar[str] = "gptq"

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    desc_act: bool = False
    damp_percent: float = 0.01
    static_groups: bool = False
    true_sequential: bool = True
    act_group_aware: bool = False
    scale_search: Literal["mse", "hessian"] | None = None
    drift_correction: bool = False
    residual_correction: bool = False
    block_stale_scales: bool = True
    checkpoint_format: Literal["gptq", "gptq_v2"] | None = None

    def __post_init__(self) -> None:
        plain_numbers(self)
        check_choice("bits", self.bits, BITS)
        check_group_size(self.group_size)
        for name in (
            "sym", "desc_act", "static_groups", "true_sequential", "act_group_aware", "drift_correction",
            "residual_correction", "block_stale_scales",
        ):  # fmt: skip
            check_flag(name, getattr(self, name))
        check_number("damp_percent", self.damp_percent, 0.0, 1.0)
        check_choice("scale_search", self.scale_search, (None, "mse", "hessian"))
        check_choice("checkpoint_format", self.checkpoint_format, (None, "gptq", "gptq_v2"))
        if self.act_group_aware and self.desc_act:
            raise ValueError("act_group_aware: got True beside desc_act=True, expected one of the two orders")

    @classmethod
    def recommended(cls, bits: int, group_size: int = 64, sym: bool = False) -> GPTQConfig:
        """The settings measured best on SmolLM2: asymmetric, Hessian-weighted scales, group-aware order; at 3 and 2
        bits also drift and residual correction. sym=True for readers that take only symmetric codes."""
        check_choice("bits", bits, BITS)
        return cls(
            bits=bits, group_size=group_size, sym=sym, act_group_aware=True, scale_search="hessian",
            drift_correction=bits <= 3, residual_correction=bits <= 3, block_stale_scales=False,
        )  # fmt: skip


@dataclass(frozen=True)
class NF4Config(QuantizationConfig):
    """4-bit NormalFloat (QLoRA, Dettmers et al. 2023, arXiv:2305.14314), blocks of `block_size` elements of the flat
    tensor. double_quant: the block scales are kept in 8 bits too."""

    method: ClassVar[str] = "nf4"

    block_size: int = 64
    double_quant: bool = False

    def __post_init__(self) -> None:
        plain_numbers(self)
        check_choice("block_size", self.block_size, BLOCK_SIZES)
        check_flag("double_quant", self.double_quant)


@dataclass(frozen=True)
class FP4Config(NF4Config):
    """bitsandbytes' 4-bit float; fields as in NF4Config."""

    method: ClassVar[str] = "fp4"


@dataclass(frozen=True)
class RTNConfig(QuantizationConfig):
    """Round to nearest: the baseline without calibration data. Fields as in GPTQConfig."""

    method: ClassVar[str] = "rtn"

    bits: int = 4
    group_size: int = 128
    sym: bool = True

    def __post_init__(self) -> None:
        plain_numbers(self)
        check_choice("bits", self.bits, BITS)
        check_group_size(self.group_size)
        check_flag("sym", self.sym)


@dataclass(frozen=True)
class Int8Config(QuantizationConfig):
    """Row-wise int8 weights as LLM.int8() keeps them (Dettmers et al. 2022, arXiv:2208.07339)."""

    method: ClassVar[str] = "int8"


@dataclass(frozen=True)
class LoraConfig:
    """A LoRA adapter (Hu et al. 2021, arXiv:2106.09685), with peft's names: W + lora_alpha / r * B A.

    r: rank; A is (r, k), B (n, r). lora_dropout: share of the inputs of A that training zeroes. target_modules: names
    of linear modules ("q_proj", "self_attn.q_proj", "model.layers.0.self_attn.q_proj"), or "all-linear": all seven of
    every layer. use_rslora: the factor is lora_alpha / sqrt(r) (arXiv:2312.03732). task_type: CAUSAL_LM or SEQ_CLS;
    None: the model's. rank_pattern, alpha_pattern: another r, another lora_alpha of modules, by regular expressions of
    which the first counts that is a module's name or its end after a dot: {"layers.0.mlp.up_proj": 32, "o_proj": 4}.
    """

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: Collection[str] | Literal["all-linear"] = ("q_proj", "v_proj")
    use_rslora: bool = False
    bias: Literal["none"] = "none"
    task_type: TaskType | None = None
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict, hash=False)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        plain_numbers(self)
        check_rank("r", self.r)
        for name in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, name, checked_patterns(name, getattr(self, name)))
        check_number("lora_alpha", self.lora_alpha, 0.0)
        check_number("lora_dropout", self.lora_dropout, 0.0, 1.0)
        check_flag("use_rslora", self.use_rslora)
        check_choice("bias", self.bias, ("none",))
        check_choice("task_type", self.task_type, (None, "CAUSAL_LM", "SEQ_CLS"))
        targets = self.target_modules
        if targets == "all-linear":
            return
        listed = isinstance(targets, Collection) and not isinstance(targets, str) and len(targets) > 0
        if not listed or not all(isinstance(name, str) and name for name in targets):
            raise ValueError(f"target_modules: got {targets!r}, expected a list of module names or 'all-linear'")
        object.__setattr__(self, "target_modules", tuple(dict.fromkeys(targets)))

    def rank(self, module: str) -> int:
        """The r of a module."""
        return _by_pattern(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """What B A of a module is multiplied by."""
        alpha, r = _by_pattern(self.alpha_pattern, module, self.lora_alpha), self.rank(module)
        return alpha / (math.sqrt(r) if self.use_rslora else r)


def _by_pattern(patterns: Mapping[str, _Number], module: str, otherwise: _Number) -> _Number:
    """The value of the first pattern that fits a module, as peft's get_pattern_key finds it."""
    return next((patterns[key] for key in patterns if re.match(rf"(.*\.)?({key})$", module)), otherwise)


CONFIGS: dict[str, type[QuantizationConfig]] = {
    config.method: config for config in (GPTQConfig, NF4Config, FP4Config, RTNConfig, Int8Config)
}


def config_from_dict(fields: Mapping[str, Any]) -> QuantizationConfig:
    """The configuration that `to_dict` wrote, of whichever method."""
    method = fields.get("method")
    if method not in CONFIGS:
        raise ValueError(f"method: got {method!r}, expected one of {', '.join(CONFIGS)}")
    return CONFIGS[method].from_dict(fields)


def difference(stored: Mapping[str, Any], asked: Mapping[str, Any], ignored: frozenset[str] = frozenset()) -> str:
    """The fields in which two configurations differ, in words; empty when they agree."""
    names = [name for name in {**stored, **asked} if name not in ignored and stored.get(name) != asked.get(name)]
    return ", ".join(f"{name}: {_short(stored.get(name))} there, {_short(asked.get(name))} asked" for name in names)


def other_parts(stored: Any, asked: Mapping[str, Any]) -> str:
    """The parts of a run's settings, objects and digests, that are not those of another: "training (max_steps: 9 there,
    3 asked) and data"; empty when they agree."""
    stored = stored if isinstance(stored, Mapping) else {}
    told = []
    for name in sorted({*stored, *asked}):
        there, here = stored.get(name), asked.get(name)
        if there != here:
            if isinstance(there, Mapping) and isinstance(here, Mapping):
                name = f"{name} ({difference(there, here)})"
            told.append(name)
    return " and ".join(told)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
