"""Collectors: statistics of a model on data, keyed by leaf name, that some methods need."""

from mergejax.collect.fisher import block_fisher, fisher
from mergejax.collect.gram import gram
from mergejax.collect.joint import joint_gram
from mergejax.collect.masks import localize
from mergejax.collect.norms import norm_square
from mergejax.collect.outputs import output_gram

__all__ = [
    "block_fisher",
    "fisher",
    "gram",
    "joint_gram",
    "localize",
    "norm_square",
    "output_gram",
]
