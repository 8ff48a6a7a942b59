"""LoRA adapters in the layout of peft: adapter_config.json beside adapter_model.safetensors.

Keys: base_model.model.<module>.lora_A.weight (r, k) and .lora_B.weight (n, r); a trained classification head is
base_model.model.score.weight. The format of the weights that it was trained beside is a string in the metadata of the
tensors' file, which peft leaves alone (it would complain of a strange key in adapter_config.json). What adapters may
hold beyond that (DoRA, biases, other trained modules) is refused with the field's name. Source:
peft, docs/source/developer_guides/checkpoint.md.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from quantlab.config import LoraConfig
from quantlab.io.files import output_directory, path_of, read_json, write_bytes
from quantlab.io.safetensors import LazyTensor, SafetensorsFile, write_safetensors
from quantlab.io.tokenizer import dump_config

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
BASE_FORMAT = "quantlab.base_format"  # in the metadata: "nf4", "affine-4", "float", …
PREFIX = "base_model.model."
SCORE = f"{PREFIX}score.weight"
MODULE_KEY = re.compile(re.escape(PREFIX) + r"(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
USED = ("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "bias", "task_type",
        "modules_to_save", "init_lora_weights", "rank_pattern", "alpha_pattern")  # fmt: skip
# fields that change nothing about an adapter that is there, whatever they hold
WITHOUT_EFFECT = (
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "inference_mode", "layers_pattern", "megatron_core", "peft_version", "qalora_group_size", "revision",
)  # fmt: skip
# fields that leave out some of the modules that target_modules names: which ones, the tensors tell
NARROWING = ("exclude_modules", "layers_to_transform")
# ways to begin that leave the base as it is; others (pissa, olora, loftq, corda) change the weights beside the adapter
BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")
HEADS = ({"score"}, {"classifier", "score"})  # what peft saves beside the adapter of a sequence classifier

Matrices = Mapping[str, tuple[np.ndarray, np.ndarray]]


def write_adapter(
    path: str | os.PathLike[str],
    config: LoraConfig,
    matrices: Matrices,
    score: np.ndarray | None = None,
    base: str | None = None,
    base_format: str | None = None,
) -> dict[str, int]:
    """Writes an adapter directory that peft loads; returns {file name: bytes}.

    matrices: {module: (A float32 (r, k), B float32 (n, r))}. score: the trained head (labels, hidden). base: the name
    of the model it belongs to. base_format: that of the weights it was trained beside. Both files are written beside
    `path` first, so what was there stays if that fails.
    """
    target = output_directory(path, "path", "the adapter")
    tensors = {
        f"{PREFIX}{module}.lora_{part}.weight": LazyTensor.of(np.ascontiguousarray(array))
        for module, pair in matrices.items()
        for part, array in zip("AB", pair, strict=True)
    }
    if score is not None:
        tensors[SCORE] = LazyTensor.of(np.ascontiguousarray(score))
    target.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".adapter.", suffix=".tmp", dir=target))
    try:
        metadata = {"format": "pt", **({} if base_format is None else {BASE_FORMAT: base_format})}
        sizes = {TENSORS: write_safetensors(staging / TENSORS, tensors, metadata)}
        sizes[CONFIG] = write_bytes(staging / CONFIG, dump_config(_fields(config, score is not None, base)))
        for name in sizes:
            os.replace(staging / name, target / name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return sizes


def _fields(config: LoraConfig, has_score: bool, base: str | None) -> dict[str, Any]:
    """adapter_config.json."""
    targets = config.target_modules
    return {
        "peft_type": "LORA",
        "task_type": config.task_type,
        "base_model_name_or_path": base,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "use_rslora": config.use_rslora,
        "bias": "none",
        "modules_to_save": ["classifier", "score"] if has_score else None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_dora": False,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "layers_to_transform": None,
        "revision": None,
    }


def require_adapter(folder: Path) -> None:
    """FileNotFoundError where a directory holds no adapter; what its files hold is not looked at."""
    for name in (CONFIG, TENSORS):
        if not (folder / name).is_file():
            found = " (its adapter_model.bin is a pickle, which is not read)" * (folder / "adapter_model.bin").is_file()
            raise FileNotFoundError(f"{folder}: holds no {name}{found}, expected an adapter's directory")


def read_adapter(
    path: str | os.PathLike[str],
) -> tuple[LoraConfig, dict[str, tuple[np.ndarray, np.ndarray]], np.ndarray | None]:
    """config, {module: (A, B)} as float32, and the trained head or None, of an adapter directory.

    FileNotFoundError where a file is missing, ValueError naming what is not supported or does not fit together.
    """
    folder = path_of(path, "path", "an adapter's directory")
    require_adapter(folder)
    fields = read_json(folder / CONFIG)
    _require_supported(fields, str(folder / CONFIG))
    file = SafetensorsFile(folder / TENSORS)
    pairs: dict[str, dict[str, np.ndarray]] = {}
    score = None
    for name, info in file.tensors.items():
        if info.dtype not in ("F32", "F16", "BF16") or len(info.shape) != 2:
            raise ValueError(f"{file.path}: tensor {name!r} is {info.dtype} {info.shape}, expected a float matrix")
        found_key = MODULE_KEY.fullmatch(name)
        array = file.array(name).astype(np.float32)
        if found_key is not None:
            pairs.setdefault(found_key["module"], {})[found_key["part"]] = array
        elif name == SCORE:
            score = array
        else:
            raise ValueError(f"{file.path}: tensor {name!r} is not supported, only lora_A, lora_B and score are")
    if not pairs:
        raise ValueError(f"{file.path}: holds no lora_A and lora_B")
    config = _config(fields, list(pairs), str(folder / CONFIG))
    matrices = {module: _pair(module, pair, config.rank(module), file.path) for module, pair in pairs.items()}
    return config, matrices, score


def read_base_format(path: str | os.PathLike[str]) -> str | None:
    """The format of the weights that an adapter was trained beside; None where its directory does not say."""
    return SafetensorsFile(Path(path) / TENSORS).metadata.get(BASE_FORMAT)


def _pair(module: str, pair: Mapping[str, np.ndarray], r: int, path: Path) -> tuple[np.ndarray, np.ndarray]:
    if set(pair) != {"A", "B"}:
        raise ValueError(f"{path}: module {module!r} has lora_{next(iter(pair))} alone, expected lora_A and lora_B")
    a, b = pair["A"], pair["B"]
    if a.shape[0] != r or b.shape[1] != r:
        raise ValueError(f"{path}: module {module!r} has lora_A {a.shape} and lora_B {b.shape}, expected rank {r}")
    return a, b


def _require_supported(fields: Mapping[str, Any], where: str) -> None:
    """ValueError for what in an adapter_config.json would make another model of it."""
    if fields.get("peft_type") != "LORA":
        raise ValueError(f"{where}: peft_type is {fields.get('peft_type')!r}, supported: 'LORA'")
    if "target_modules" not in fields:
        raise ValueError(f"{where}: lacks target_modules")
    for name, value in fields.items():
        if name not in (*USED, *WITHOUT_EFFECT, *NARROWING) and value:
            raise ValueError(f"{where}: {name} is {value!r}, which is not supported")
    if fields.get("init_lora_weights") not in BEGINNINGS:
        raise ValueError(f"{where}: init_lora_weights is {fields['init_lora_weights']!r}, which changes the base model")
    saved = fields.get("modules_to_save")
    if saved and (not isinstance(saved, list) or set(map(str, saved)) not in HEADS):
        raise ValueError(f"{where}: modules_to_save is {saved!r}, supported: 'score'")


def _config(fields: Mapping[str, Any], modules: list[str], where: str) -> LoraConfig:
    """The LoraConfig of an adapter_config.json. modules: those of the tensors, which stand for targets that are given
    as a regular expression or narrowed by another field."""
    targets = fields["target_modules"]
    narrowed = any(fields.get(name) not in (None, []) for name in NARROWING)  # layers_to_transform may be the number 0
    if narrowed or (isinstance(targets, str) and targets != "all-linear"):
        targets = modules
    defaults = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False, "bias": "none", "task_type": None}
    given = {name: fields.get(name, default) for name, default in defaults.items()}
    given |= {name: fields.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    try:
        return LoraConfig(**given, target_modules=sorted(targets) if isinstance(targets, list) else targets)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None
