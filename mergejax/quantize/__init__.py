"""Kernels in few bits: round to nearest, GPTQ, guided by the experts of a merge; and files."""

from mergejax.quantize.files import load, save
from mergejax.quantize.trees import (
    Quantized,
    dequantize,
    expert_guided,
    gptq,
    round_to_nearest,
)

__all__ = [
    "Quantized",
    "dequantize",
    "expert_guided",
    "gptq",
    "load",
    "round_to_nearest",
    "save",
]
