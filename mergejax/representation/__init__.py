"""Corrections of a merged model's final representation, by what its experts give."""

from mergejax.representation.react import Corrections, absorb, correct, correction, front
from mergejax.representation.surgery import Adapter, adapt, operate

__all__ = [
    "Adapter",
    "Corrections",
    "absorb",
    "adapt",
    "correct",
    "correction",
    "front",
    "operate",
]
