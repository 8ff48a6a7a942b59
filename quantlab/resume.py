"""Finished layers of an interrupted quantization: one safetensors file a layer, and a manifest of what made them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from quantlab.config import QuantizationConfig, other_parts
from quantlab.io.files import output_directory, read_json, write_bytes
from quantlab.weight import QuantWeight

MANIFEST = "manifest.json"
SAMPLE_BYTES = 4096  # of each end of a matrix, for the fingerprint of a model
_ARRAYS = ("codes", "scales", "zeros", "perm")


def fingerprint(model: Any, config: Any, modules: Iterable[str]) -> str:
    """SHA-256 over the config, and over the shape, format and both ends of every matrix."""
    digest = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True, default=str).encode())
    for module in modules:
        weight = model.weight(module)
        data = np.ascontiguousarray(weight.codes).reshape(-1).view(np.uint8)
        digest.update(f"{module} {weight.format} {weight.shape}".encode())
        digest.update(data[:SAMPLE_BYTES].tobytes() + data[-SAMPLE_BYTES:].tobytes())
    return digest.hexdigest()


def hash_rows(rows: Iterable[np.ndarray]) -> str:
    """SHA-256 over token rows."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(np.int64(len(row)).tobytes() + np.ascontiguousarray(row, "<i4").tobytes())
    return digest.hexdigest()


def finished_layers(folder: str | os.PathLike[str]) -> int:
    """How many layers a `resume_dir` holds."""
    return sum(1 for _ in Path(folder).glob("layer-*.safetensors"))


class LayerStore:
    """A `resume_dir`. Files appear whole or not at all, so that a run may be killed at any moment."""

    def __init__(self, folder: str | os.PathLike[str], settings: Mapping[str, Any]):
        self.folder = output_directory(folder, "resume_dir", "finished layers")
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".layer-*.tmp"):  # of a run that was killed while it wrote
            leftover.unlink(missing_ok=True)
        wanted = json.loads(json.dumps(dict(settings)))
        path = self.folder / MANIFEST
        if not path.exists():
            write_bytes(path, json.dumps(wanted, indent=1).encode())
            return
        other = other_parts(read_json(path), wanted)
        if other:
            raise ValueError(
                f"resume_dir: {self.folder} holds a run with another {other}: "
                "use the same settings to go on with it, or another folder"
            )

    def _path(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:05d}.safetensors"

    def save(self, layer: int, weights: Mapping[str, QuantWeight], reports: list[dict[str, Any]]) -> None:
        from safetensors.numpy import save

        arrays = {
            f"{module}.{part}": np.ascontiguousarray(getattr(weight, part))
            for module, weight in weights.items()
            for part in _ARRAYS
            if getattr(weight, part) is not None
        }
        fields = {
            module: {"bits": w.bits, "shape": w.shape, "group": w.group, "meta": dict(w.meta)}
            for module, w in weights.items()
        }
        metadata = {"weights": json.dumps(fields), "reports": json.dumps(reports)}
        write_bytes(self._path(layer), save(arrays, metadata))

    def load(self, layer: int) -> tuple[dict[str, QuantWeight], list[dict[str, Any]]] | None:
        """The layer's weights and reports, None where it is not finished."""
        from safetensors import SafetensorError, safe_open

        path = self._path(layer)
        if not path.exists():
            return None
        try:
            with safe_open(path, "numpy") as file:
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = file.metadata() or {}
            fields, reports = json.loads(metadata["weights"]), json.loads(metadata["reports"])
            weights = {module: _weight(module, values, arrays) for module, values in fields.items()}
            for weight in weights.values():
                _ = weight.handle  # checks shapes
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"resume_dir: {path} is damaged ({error}): delete it to quantize its layer again"
            ) from None
        return weights, reports


def _weight(module: str, values: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> QuantWeight:
    codes, *others = (f"{module}.{part}" for part in _ARRAYS)
    scales, zeros, perm = map(arrays.get, others)
    (n, k), meta = values["shape"], MappingProxyType(values["meta"])
    return QuantWeight("affine", values["bits"], (n, k), values["group"], arrays[codes], scales, zeros, perm, meta=meta)


def settings_of(
    config: QuantizationConfig, rows: list[np.ndarray], model_fingerprint: str, device: str = "cpu"
) -> dict[str, Any]:
    """What a resumed run must share with the run that it goes on with. device: the kind, since the codes depend on its
    arithmetic; not written for the CPU."""
    return {
        **({} if device == "cpu" else {"device": device}),
        "config": dataclasses.asdict(config),
        "calibration": {"sha256": hash_rows(rows), "rows": len(rows), "tokens": sum(map(len, rows))},
        "model": model_fingerprint,
    }
