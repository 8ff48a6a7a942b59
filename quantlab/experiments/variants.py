"""The variants of a study by name: fp32 bf16 gptq-4 gptq-4-r nf4 fp4 int8 rtn-3 …"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

KNOWN = "fp32 fp16 bf16 gptq-B gptq-B-r (recommended options) rtn-B nf4 nf4-dq fp4 fp4-dq int8, with B of 2 3 4 8"
FLOATS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_PATTERN = re.compile(
    r"(?P<float>fp32|fp16|bf16)|(?P<block>nf4|fp4)(?P<dq>-dq)?|(?P<int8>int8)|(?P<method>gptq|rtn)-(?P<bits>[2348])(?P<r>-r)?"
)


@dataclass(frozen=True)
class Variant:
    """One column of the study: a float type, or a quantization config."""

    name: str
    method: str  # float gptq rtn nf4 fp4 int8
    bits: int
    dtype: str | None = None  # of a float variant
    config: Any = None  # quantlab's configuration of the method, None for a float variant

    def to_dict(self) -> dict[str, Any]:
        """The resolved settings that the weights depend on."""
        settings = {} if self.config is None else self.config.to_dict()
        return {"name": self.name, "method": self.method, "bits": self.bits, "dtype": self.dtype, "settings": settings}


def parse_variant(
    name: str, group_size: int = 64, sym: bool = True, desc_act: bool = False, damp_percent: float = 0.01
) -> Variant:
    """The variant called `name`. Group size, symmetry, order and damping apply to GPTQ (and the first two to RTN).

    Raises ValueError for a name that is none of `KNOWN`.
    """
    match = _PATTERN.fullmatch(name)
    if match is None or (match["r"] and match["method"] != "gptq"):
        raise ValueError(f"variant {name!r}: accepted are {KNOWN}")
    if match["float"]:
        return Variant(name, "float", 32 if name == "fp32" else 16, dtype=FLOATS[name])
    from quantlab.config import FP4Config, GPTQConfig, Int8Config, NF4Config, RTNConfig

    if match["int8"]:
        return Variant(name, "int8", 8, config=Int8Config())
    if match["block"]:
        block = NF4Config if match["block"] == "nf4" else FP4Config
        return Variant(name, match["block"], 4, config=block(double_quant=match["dq"] is not None))
    bits = int(match["bits"])
    if match["method"] == "rtn":
        return Variant(name, "rtn", bits, config=RTNConfig(bits=bits, group_size=group_size, sym=sym))
    if match["r"]:
        return Variant(name, "gptq", bits, config=GPTQConfig.recommended(bits, group_size=group_size))
    config = GPTQConfig(bits=bits, group_size=group_size, sym=sym, desc_act=desc_act, damp_percent=damp_percent)
    return Variant(name, "gptq", bits, config=config)
