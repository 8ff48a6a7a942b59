"""quantlab: a quantization lab for LLaMA models, without PyTorch.

Every public name is imported when it is first used, so `import quantlab` costs next to nothing.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantlab import backend, cuda, gptq
    from quantlab._core import CudaError, NumericError
    from quantlab.backend import info
    from quantlab.classify import LlamaForSequenceClassification
    from quantlab.config import FP4Config, GPTQConfig, Int8Config, LoraConfig, NF4Config, RTNConfig
    from quantlab.finetune import evaluate, finetune
    from quantlab.io import Checkpoint, open_checkpoint
    from quantlab.llama import LlamaForCausalLM
    from quantlab.lora import Adapter, load_adapter
    from quantlab.quantize import quantize
    from quantlab.training import TrainingConfig
    from quantlab.weight import QuantWeight, linear

__version__ = "0.1.0"

# public name -> module that holds it; a module's own name maps to itself
_HOMES = {
    "info": "backend",
    "backend": "backend",
    "cuda": "cuda",
    "gptq": "gptq",
    "LlamaForCausalLM": "llama",
    "LlamaForSequenceClassification": "classify",
    "quantize": "quantize",
    "GPTQConfig": "config",
    "NF4Config": "config",
    "FP4Config": "config",
    "RTNConfig": "config",
    "Int8Config": "config",
    "LoraConfig": "config",
    "TrainingConfig": "training",
    "finetune": "finetune",
    "evaluate": "finetune",
    "Adapter": "lora",
    "load_adapter": "lora",
    "QuantWeight": "weight",
    "linear": "weight",
    "Checkpoint": "io",
    "open_checkpoint": "io",
    "NumericError": "_core",
    "CudaError": "_core",
}
_MODULES = {"backend", "cuda", "gptq"}

__all__ = [
    "Adapter",
    "Checkpoint",
    "CudaError",
    "FP4Config",
    "GPTQConfig",
    "Int8Config",
    "LlamaForCausalLM",
    "LlamaForSequenceClassification",
    "LoraConfig",
    "NF4Config",
    "NumericError",
    "QuantWeight",
    "RTNConfig",
    "TrainingConfig",
    "__version__",
    "backend",
    "cuda",
    "evaluate",
    "finetune",
    "gptq",
    "info",
    "linear",
    "load_adapter",
    "open_checkpoint",
    "quantize",
]


def __getattr__(name: str) -> Any:
    if name == "_core":  # whoever asks first: `from quantlab import _core` looks for the attribute before the module
        return _load_core()
    if name not in _HOMES:
        raise AttributeError(f"module 'quantlab' has no attribute {name!r}")
    home = _HOMES[name]
    module = _load_core() if home == "_core" else import_module(f"quantlab.{home}")
    value = module if name in _MODULES else getattr(module, name)
    globals()[name] = value
    return value


def _load_core() -> ModuleType:
    """quantlab._core; ImportError with what to do where it was not built, or from other sources."""
    from quantlab.sources import check

    if find_spec("quantlab._core") is None:
        raise ImportError(
            f"{__path__[0]} holds no built C core. Is it the source tree that Python was started in? "
            "Start Python elsewhere, or build the core here: pip install -e ."
        )
    core = import_module("quantlab._core")
    try:
        check(core, __path__[0])
    except ImportError:
        del sys.modules["quantlab._core"], globals()["_core"]  # the next import says so too
        raise
    return core


def __dir__() -> list[str]:
    return sorted({*__all__, "__doc__", "__file__", "__name__", "__path__"})


class _Package(ModuleType):
    """`quantlab.quantize` and `finetune` are the functions, although modules have these names: the import system's
    binding of the submodule is not taken."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("quantize", "finetune") or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
