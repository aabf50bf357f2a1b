"""The table of methods.

One line in `_FACTS` gives a method its place in the command line and the config language, the
documentation's table, the contract tests and the benchmark's list.
"""

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

from mergejax import chains, methods, varying
from mergejax.errors import MergeError


@dataclasses.dataclass(frozen=True)
class Entry:
    """A method's row: how to make it, and what the contract tests may expect of it.

    Attributes:
        make: (hyper-parameters) -> stage or chain.
        experts: how many experts it takes; None for any number.
        at_least: how many experts it takes at the least.
        ordered: whether the order of the experts matters.
        homogeneous: whether deltas c times as large give a merged delta c times as large.
        exact: whether equal models are returned to the bit, or only up to rounding.
        modifier: whether it stands behind another method rather than alone.
        neutral: hyper-parameters with which a single expert is returned unchanged, or None where
            there are none.
    """

    make: Callable[..., Any]
    experts: int | None = None
    at_least: int = 1
    ordered: bool = False
    homogeneous: bool = True
    exact: bool = True
    modifier: bool = False
    neutral: Mapping[str, Any] | None = None


def _declared() -> dict[str, Callable[..., Any]]:
    """Whatever the modules of `mergejax.methods` declare, by name."""
    names = [
        f"{methods.__name__}.{module.name}" for module in pkgutil.iter_modules(methods.__path__)
    ]
    modules = [importlib.import_module(name) for name in names]
    return {
        name: make
        for module in modules
        for name, make in vars(module).items()
        if hasattr(make, "factory") and make.__module__ == module.__name__
    }


_DECLARED = _declared()
_FACTS: dict[str, dict[str, Any]] = {
    # Averages
    "average": {"neutral": {}},
    "linear": {"neutral": {}},
    "metrics_weighted": {"neutral": {}},
    "ema": {"ordered": True, "neutral": {}},
    "window_average": {"ordered": True, "neutral": {}},
    "slerp": {"experts": 2, "ordered": True},
    "nuslerp": {"experts": 2},
    "multislerp": {"neutral": {}},
    "karcher": {"neutral": {}, "exact": False},
    "passthrough": {"experts": 1, "neutral": {}},
    # Arithmetic on deltas
    "task_arithmetic": {"neutral": {"scaling": 1.0}},
    "chat_vector": {"experts": 2, "ordered": True},
    "analogy": {"experts": 3, "ordered": True},
    "ties": {"neutral": {"density": 1.0}},
    "dare": {"neutral": {"rate": 0.0, "scaling": 1.0}},
    "della": {"neutral": {"density": 1.0, "spread": 0.0, "scaling": 1.0}},
    "breadcrumbs": {"neutral": {"density": 1.0, "top": 0.0, "scaling": 1.0}},
    "pcb": {"homogeneous": False},
    "localize_and_stitch": {"neutral": {"density": 1.0}},
    "localize_and_stitch_trained": {},
    "magmax": {"ordered": True, "neutral": {"scaling": 1.0}},
    "trust_region": {"neutral": {"scaling": 1.0}},
    "ram": {"neutral": {"epsilon": 0.0}},
    "ram_plus": {"neutral": {"epsilon": 0.0}},
    "sce": {"neutral": {}},
    "varm": {"neutral": {}},
    "delta_guided": {"neutral": {}},
    "frobenius_weighted": {"neutral": {}},
    "nan": {},
    "widen": {"neutral": {}, "homogeneous": False},
    "model_stock": {"at_least": 2},
    "nearswap": {"experts": 1, "neutral": {"t": 1e6}, "homogeneous": False},
    "arcee_fusion": {"homogeneous": False},
    "lines": {"modifier": True, "neutral": {"alpha": 1.0, "beta": 0.0}},
    "lines_multi_task": {"modifier": True, "neutral": {"beta": 0.0}},
    # One model for each expert
    "tall_masks": {"neutral": {}},
    "consensus": {"neutral": {"agreement": 0, "scaling": 1.0}},
    "emr": {"neutral": {}},
    # With statistics of data
    "fisher": {"neutral": {}},
    "regmean": {"neutral": {}},
    "mats": {"neutral": {}},
    "lot": {"neutral": {"scaling": 1.0}},
    "cat": {"ordered": True, "neutral": {"scaling": 1.0}},
    "bayesian": {"neutral": {"anchor_scaling": 1.0}},
    "bayesian_data_free": {"neutral": {"anchor_scaling": 1.0}},
    "featcal": {"neutral": {"scaling": 1.0, "extrapolation": 1.0}, "exact": False},
    # Spectral
    "opcm": {"ordered": True, "neutral": {}},
    "tsv_merge": {"neutral": {}},
    "r_tsvm": {"neutral": {"outlier_weight": 1.0}},
    "iso_c": {},
    "iso_cts": {},
    "cart": {"neutral": {}},
    "svc": {"modifier": True, "neutral": {}},
    "subspace_boosting": {"modifier": True, "neutral": {"beta": 1.0}},
    "dc_merge": {"neutral": {"density": 1.0}},
    "wudi": {"neutral": {}, "homogeneous": False},
    "opt_merge": {"neutral": {}},
    "swudi": {"neutral": {}},
    "aswudi": {"neutral": {}},
    "doge_ta": {"homogeneous": False},
    "dop": {"ordered": True, "neutral": {}, "homogeneous": False},
}
METHODS: dict[str, Entry] = {
    name: Entry(_DECLARED[name], **facts) for name, facts in _FACTS.items()
}
# Chains for aligned networks; their statistics come with permutations and not from a collector.
_COMPOSED = ("permute", "least_squares", "pleas")
PIECES: dict[str, Callable[..., Any]] = {
    name: make
    for name, make in _DECLARED.items()
    if name in _COMPOSED or (name not in METHODS and make.factory.kind != "method")  # type: ignore[attr-defined]
}

_RULES: dict[str, Callable[..., Any]] = {
    "by_name": varying.by_name,
    "by_depth": varying.by_depth,
    "by_role": chains.by_role,
    "by_stats": chains.by_stats,
    "within": chains.within,
}


def register(name: str, make: Callable[..., Any], **facts: Any) -> None:
    """Adds a method from outside the package.

    Args:
        name: of the method in the string language.
        make: a function declared with `@mj.method`, or with a stage's decorator.
        **facts: fields of `Entry`.

    Raises:
        MergeError: the name is taken, or is no identifier, or `make` is no declared method.

    Example:
        >>> import mergejax as mj
        >>> @mj.method
        ... def half_sum():
        ...     return mj.task_arithmetic(scaling=0.5)
        >>> mj.register('half_sum', half_sum)
        >>> mj.parse('drop(rate=0.5)|half_sum()'), mj.half_sum()
        (drop(rate=0.5)|half_sum(), half_sum())
        >>> del mj.METHODS['half_sum']
    """
    if name in words() or not name.isidentifier():
        raise MergeError(f"register: the name '{name}' is taken or no identifier; choose another")
    if not hasattr(make, "factory"):
        raise MergeError(f"register: declare '{name}' with @mj.method or a stage's decorator first")
    METHODS[name] = Entry(make, **facts)


def words() -> dict[str, Callable[..., Any]]:
    """Whatever a chain may be written with: methods, pieces and rules by their names."""
    return {**PIECES, **_RULES, **{name: entry.make for name, entry in METHODS.items()}}


def known_statistics() -> list[str]:
    """The statistics that any method or piece reads.

    Example:
        >>> {'fisher', 'gram', 'permutation'} <= set(known_statistics())
        True
    """
    makers = [*PIECES.values(), *(entry.make for entry in METHODS.values())]
    return sorted(frozenset().union(*map(_reads, makers)))


@functools.cache  # every merge with statistics asks, and making all stages takes longer than it
def _reads(make: Callable[..., Any]) -> frozenset[str]:
    return frozenset(need for stage in chains.walk(make()) for need in stage.factory.needs)
