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
    from quantlab.config import FP4Config, GPTQConfig, Int8Config, NF4Config, RTNConfig
    from quantlab.io import Checkpoint, open_checkpoint
    from quantlab.llama import LlamaForCausalLM
    from quantlab.quantize import quantize
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
    "QuantWeight": "weight",
    "linear": "weight",
    "Checkpoint": "io",
    "open_checkpoint": "io",
    "NumericError": "_core",
    "CudaError": "_core",
}
_MODULES = {"backend", "cuda", "gptq"}

__all__ = [
    "Checkpoint",
    "CudaError",
    "FP4Config",
    "GPTQConfig",
    "Int8Config",
    "LlamaForCausalLM",
    "LlamaForSequenceClassification",
    "NF4Config",
    "NumericError",
    "QuantWeight",
    "RTNConfig",
    "__version__",
    "backend",
    "cuda",
    "gptq",
    "info",
    "linear",
    "open_checkpoint",
    "quantize",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'quantlab' has no attribute {name!r}")
    try:
        module = import_module(f"quantlab.{_HOMES[name]}")
    except ImportError:
        if find_spec("quantlab._core") is not None:
            raise
        raise ImportError(
            f"quantlab: {__path__[0]} holds no built C core. Is it the source tree that Python was started in? "
            "Start Python elsewhere, or build the core here: pip install -e ."
        ) from None
    value = module if name in _MODULES else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, "__doc__", "__file__", "__name__", "__path__"})


class _Package(ModuleType):
    """`quantlab.quantize` is the function, although a module has that name: the import system's binding of the
    submodule is not taken."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "quantize" or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
