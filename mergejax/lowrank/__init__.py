"""Merging of low-rank adapters: factors in, factors out, exact on their product."""

from mergejax.lowrank.factors import Adapter, Factors, apply, dense, refactor
from mergejax.lowrank.knots import knots
from mergejax.lowrank.methods import METHODS, cat, concatenate, merge, svd

__all__ = [
    "METHODS",
    "Adapter",
    "Factors",
    "apply",
    "cat",
    "concatenate",
    "dense",
    "knots",
    "merge",
    "refactor",
    "svd",
]
