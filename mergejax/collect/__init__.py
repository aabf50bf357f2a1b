"""Collectors: statistics of a model on data, keyed by leaf name, that some methods need."""

from mergejax.collect.fisher import fisher
from mergejax.collect.gram import gram
from mergejax.collect.joint import joint_gram
from mergejax.collect.masks import localize
from mergejax.collect.norms import norm_square

__all__ = ["fisher", "gram", "joint_gram", "localize", "norm_square"]
