"""Networks that were not fine-tuned from one base: their symmetries, and how they are aligned."""

from mergejax.alignment.assignment import assign
from mergejax.alignment.derive import symmetries
from mergejax.alignment.permutations import apply, compose, identity, invert, random
from mergejax.alignment.structure import Group, Symmetries
from mergejax.alignment.verify import verify
from mergejax.alignment.weights import Matching, match_many, weight_matching

__all__ = [
    "Group",
    "Matching",
    "Symmetries",
    "apply",
    "assign",
    "compose",
    "identity",
    "invert",
    "match_many",
    "random",
    "symmetries",
    "verify",
    "weight_matching",
]
