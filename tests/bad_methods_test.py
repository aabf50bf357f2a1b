"""What every method refuses, whatever it computes: the table of methods says what to try."""

import inspect
import math
import typing

import numpy as np
import pytest
import trees

import mergejax as mj
from mergejax import hyper

METHODS = list(mj.METHODS)
SHAPES = {"block_0": {"kernel": (4, 6), "bias": (6,)}}


def hints_of(name):
    make = inspect.unwrap(mj.METHODS[name].make)
    return typing.get_type_hints(make, include_extras=True)


def data_of(name):
    """The numbers of a method and their intervals."""
    found = {n: hyper.interval_of(hint) for n, hint in hints_of(name).items()}
    return {n: interval for n, interval in found.items() if interval is not None}


def outside(interval):
    """Values that an interval does not hold."""
    ends = [interval.low - 0.5, interval.high + 0.5]
    ends += [interval.low] if interval.open_low else []
    return [x for x in ends if math.isfinite(x)] + [math.nan, math.inf]


def refusal(call):
    with pytest.raises(mj.MergeError) as error:
        call()
    return str(error.value)


@pytest.mark.parametrize("name", [n for n in METHODS if data_of(n)])
def test_values_out_of_range(name):
    make = mj.METHODS[name].make
    for parameter, interval in data_of(name).items():
        for value in outside(interval):
            for given in (value, [value], mj.by_depth([value, value]), np.float32(value)):
                told = refusal(lambda p=parameter, v=given: make(**{p: v}))
                assert f"{name}({parameter}=...) must be in {interval}, not {value:g}" in told
        for value in ("0.2", True, None):
            told = refusal(lambda p=parameter, v=value: make(**{p: v}))
            assert told == f"{name}({parameter}=...) must be a number in {interval}, not {value!r}"


@pytest.mark.parametrize("name", METHODS)
def test_counts_and_choices(name):
    make = mj.METHODS[name].make
    for parameter, hint in hints_of(name).items():
        least = hyper.least_of(hint)
        for value in () if least is None else (least - 1, least + 0.5, True, "2", [least]):
            told = refusal(lambda p=parameter, v=value: make(**{p: v}))
            assert f"{name}({parameter}=...) must be a whole number of at least {least}" in told
        assert hint is not int, f"{name}({parameter}) does not say how small it may be"
    misspelled = {"densty": 1}
    assert "has no parameter 'densty'" in refusal(lambda: make(**misspelled))


@pytest.mark.parametrize("name", METHODS)
def test_lists_of_another_length(name):
    """A list with one number too many is refused by name, one of the right length where it may be
    none; nothing is compiled before."""
    entry = mj.METHODS[name]
    count = entry.experts or 2
    base, experts = trees.models(count, shapes=SHAPES)
    stats = trees.statistics(trees.chain_of(name).needs, experts)
    for parameter in data_of(name):
        value = float(entry.make.factory.defaults[parameter])
        told = refusal(
            lambda p=parameter, v=value: mj.merge(
                trees.chain_of(name, **{p: [v] * (count + 1)}), base, experts, stats=stats
            )
        )
        assert "holds for all" in told or f"there are {count} experts" in told, told


@pytest.mark.parametrize("name", METHODS)
def test_without_a_base(name):
    chain = trees.chain_of(name)
    _, experts = trees.models(mj.METHODS[name].experts or 2, shapes=SHAPES)
    stats = trees.statistics(chain.needs, experts)
    if any(stage.factory.space == "delta" for stage in mj.chains.walk(chain)):
        told = refusal(lambda: mj.merge(chain, None, experts, stats=stats)).split("\n")
        assert f"'{name}' works on deltas and needs a base; pass the base model" in told
        assert len(told) == (2 if mj.METHODS[name].modifier else 1)


@pytest.mark.parametrize(
    ("chain", "sentence"),
    [
        ("svc()|ties()", "'svc' refines .* nothing before it .* write ties()|svc()"),
        ("drop()|match_norm()|opcm()", "'match_norm' refines .* write drop()|opcm()|match_norm()"),
        ("tall_masks()|svc()", "'svc' refines .* put it behind total(), mean() or a named method"),
        ("ties()|scale(2.0)|elect_sign()", "'elect_sign' .* chain ties()|scale(scaling=2.0)|elect"),
        ("ties()|scale(2.0)|elect_sign()", "write elect_sign()|ties()|scale(scaling=2.0)"),
        ("ties()|nan()", "'nan' needs all experts, but the chain ties()|nan() has already reduced"),
        ("ties()|nan()", "keep one of 'ties' and 'nan'"),
        ("task_arithmetic(weights=[1, 2, 3])", "total(weights=...) of task_arithmetic() has 3"),
    ],
)
def test_places_and_numbers_are_told_in_the_words_of_the_chain(chain, sentence):
    base, experts = trees.models(2, shapes=SHAPES)
    told = refusal(lambda: mj.merge(chain, base, experts))
    assert "\n" not in told
    for part in sentence.split(" .* "):
        assert part in told
