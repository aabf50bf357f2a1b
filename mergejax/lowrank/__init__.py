"""Merging of low-rank adapters: factors in, factors out, exact on their product."""

from mergejax.lowrank.dc_merge import dc_merge
from mergejax.lowrank.do_merging import do_merging
from mergejax.lowrank.factors import Adapter, Factors, apply, dense, refactor
from mergejax.lowrank.knots import knots
from mergejax.lowrank.lego import lego
from mergejax.lowrank.methods import METHODS, cat, concatenate, linear, merge, svd
from mergejax.lowrank.pairs import from_pairs
from mergejax.lowrank.peft import from_peft, to_peft
from mergejax.lowrank.rmm import Shared, recover, recovery_errors, rmm

__all__ = [
    "METHODS",
    "Adapter",
    "Factors",
    "Shared",
    "apply",
    "cat",
    "concatenate",
    "dc_merge",
    "dense",
    "do_merging",
    "from_pairs",
    "from_peft",
    "knots",
    "lego",
    "linear",
    "merge",
    "recover",
    "recovery_errors",
    "refactor",
    "rmm",
    "svd",
    "to_peft",
]
