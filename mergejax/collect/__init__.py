"""Collectors: statistics of a model on data, keyed by leaf name, that some methods need."""

from mergejax.collect.affine import affine_gram
from mergejax.collect.cross import cross_gram, representations
from mergejax.collect.files import load, save
from mergejax.collect.fisher import block_fisher, fisher
from mergejax.collect.gram import gram, gram_sums
from mergejax.collect.joint import drift, joint_gram, joint_gram_sums
from mergejax.collect.masks import localize
from mergejax.collect.moments import moments, token_share
from mergejax.collect.norms import norm_moments, norm_square
from mergejax.collect.outputs import output_gram
from mergejax.collect.statistics import Statistics, add, means

__all__ = [
    "Statistics",
    "add",
    "affine_gram",
    "block_fisher",
    "cross_gram",
    "drift",
    "fisher",
    "gram",
    "gram_sums",
    "joint_gram",
    "joint_gram_sums",
    "load",
    "localize",
    "means",
    "moments",
    "norm_moments",
    "norm_square",
    "output_gram",
    "representations",
    "save",
    "token_share",
]
