"""The element masks: uniform, independent, and functions of names and places alone."""

import jax
import numpy as np
import pytest
import scipy.stats

import mergejax as mj
import mergejax.forms
from mergejax.core import Leaf
from mergejax.randomness import fold_key, keep_mask, name_key, uniform

SIZE = 200_000
LIMIT = 1e-6  # p-values below this are taken as failures; all draws are fixed


def leaf(key, start=(0, 0)):
    key, start = np.asarray(key, np.uint32), np.asarray(start, np.uint32)
    return Leaf(base=None, depth=0.0, block=-1, expert=-1, key=key, start=start)


def draw(key, start=(0, 0), size=SIZE):
    return np.asarray(uniform(leaf(key, start), (size,)))


KEYS = {
    "zero": (0, 0),
    "one": (1, 0),
    "ones": (0xFFFFFFFF, 0xFFFFFFFF),
    "named": name_key("block_0/kernel"),
    "folded": fold_key(name_key("block_0/kernel"), np.uint32(0), np.uint32(3)),
}


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_uniform_over_the_interval(key):
    numbers = draw(key)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.histogram(numbers, 1000, (0, 1))[0]
    assert scipy.stats.chisquare(counts).pvalue > LIMIT
    low_bits = np.bincount((numbers * 2**24).astype(np.int64) & 255, minlength=256)
    assert scipy.stats.chisquare(low_bits).pvalue > LIMIT


@pytest.mark.parametrize("probability", [0.003, 0.1, 0.5, 0.97])
def test_keep_rate(probability):
    for key in KEYS.values():
        kept = int(keep_mask(leaf(key), (SIZE,), probability).sum())
        assert scipy.stats.binomtest(kept, SIZE, probability).pvalue > LIMIT


def test_probabilities_zero_and_one_are_certain():
    assert not keep_mask(leaf((7, 8)), (SIZE,), 0.0).any()
    assert keep_mask(leaf((7, 8)), (SIZE,), 1.0).all()


def independent(first, second):
    """No sign of dependence: joint counts on a grid, and the correlation."""
    joint = np.histogram2d(first, second, 12, [(0, 1), (0, 1)])[0].ravel()
    assert scipy.stats.chisquare(joint).pvalue > LIMIT
    correlation = np.corrcoef(first, second)[0, 1]
    assert abs(correlation) < 5 / np.sqrt(first.size)


@pytest.mark.parametrize("lag", [1, 2, 3, 7, 8, 64, 255, 256, 1000, 4096, 2**16])
def test_independent_of_the_element_some_places_on(lag):
    numbers = draw(KEYS["named"])
    independent(numbers[:-lag], numbers[lag:])


# All keys come out of `fold_key`, which moves both halves; so do these.
RELATED = {
    "leaves": (name_key("block_0/kernel"), name_key("block_1/kernel")),
    "seeds": (fold_key(name_key("w"), np.uint32(0)), fold_key(name_key("w"), np.uint32(1))),
    "experts": (
        fold_key(name_key("w"), *name_key("0"), np.uint32(0)),
        fold_key(name_key("w"), *name_key("1"), np.uint32(0)),
    ),
    "stages": (
        fold_key(name_key("w"), *name_key("0"), np.uint32(0)),
        fold_key(name_key("w"), *name_key("0"), np.uint32(1)),
    ),
}


def test_every_word_moves_both_halves_of_a_key():
    key = name_key("w")
    words = np.arange(2000, dtype=np.uint32)
    folded = np.asarray(jax.vmap(lambda word: fold_key(key, word))(words))
    for half in folded.T:
        assert np.unique(half).size == words.size


@pytest.mark.parametrize("pair", RELATED.values(), ids=RELATED)
def test_independent_of_a_related_key(pair):
    first, second = (draw(key) for key in pair)
    independent(first, second)
    independent(first[:-1], second[1:])


def test_runs_of_kept_elements_are_as_long_as_chance_makes_them():
    kept = draw(KEYS["named"]) < 0.5
    lengths = np.diff(np.flatnonzero(np.diff(kept)))
    counts = np.bincount(np.minimum(lengths, 10))[1:]
    shares = np.append(0.5 ** np.arange(1, 10), 0.5**9)
    assert scipy.stats.chisquare(counts, shares * lengths.size).pvalue > LIMIT


def test_a_block_continues_the_leaf():
    whole = draw((3, 4))
    np.testing.assert_array_equal(whole[1234:], draw((3, 4), (1234, 0), SIZE - 1234))


def test_the_index_carries_into_its_high_half():
    before = draw((3, 4), (2**32 - 5, 6), 10)
    np.testing.assert_array_equal(before[5:], draw((3, 4), (0, 7), 5))
    np.testing.assert_array_equal(before[:5], draw((3, 4), (2**32 - 5, 6), 5))


@pytest.mark.parametrize("high", [1, 2, 2**31])
def test_four_billion_elements_on_the_numbers_are_others(high):
    independent(draw((3, 4)), draw((3, 4), (0, high)))


# Through the public interface ---------------------------------------------------------------------

BASE = {"a": np.zeros((40, 50), np.float32), "b": np.zeros(2000, np.float32)}
EXPERT = {"a": np.ones((40, 50), np.float32), "b": np.ones(2000, np.float32)}


def masks(experts=1, names=None, **options):
    singles = mj.merge(
        mj.drop(0.5, rescale="none"), BASE, [EXPERT] * experts, names=names, **options
    )
    singles = singles if isinstance(singles, list) else [singles]
    return [{n: np.asarray(x).ravel() for n, x in single.items()} for single in singles]


def agreement(first, second):
    return np.mean(np.asarray(first) == np.asarray(second))


def test_leaves_experts_seeds_and_places_in_the_chain_have_masks_of_their_own():
    first, second = masks(2)
    (other_seed,) = masks(seed=1)
    twice = mj.merge("drop(0.5, rescale='none')|drop(0.5, rescale='none')", BASE, [EXPERT])
    for other in (first["b"], second["a"], other_seed["a"]):
        assert abs(agreement(first["a"], other) - 0.5) < 0.06
    assert abs(np.mean(np.asarray(twice["a"])) - 0.25) < 0.05


def test_a_mask_follows_the_expert_s_name():
    first, second = masks(2, names=["math", "code"])
    swapped = masks(2, names=["code", "math"])
    np.testing.assert_array_equal(first["a"], swapped[1]["a"])
    np.testing.assert_array_equal(second["a"], swapped[0]["a"])
    (alone,) = masks(1, names=["code"])
    np.testing.assert_array_equal(second["b"], alone["b"])


def test_a_mask_depends_neither_on_other_leaves_nor_on_their_order():
    (whole,) = masks()
    alone = mj.merge(mj.drop(0.5, rescale="none"), {"b": BASE["b"]}, [{"b": EXPERT["b"]}])
    np.testing.assert_array_equal(whole["b"], alone["b"])


@pytest.mark.parametrize("block", [7, 64, 999])
def test_a_mask_does_not_depend_on_the_size_of_blocks(block, monkeypatch):
    (whole,) = masks()
    monkeypatch.setattr(mergejax.forms, "BLOCK", block)
    (in_blocks,) = masks()
    np.testing.assert_array_equal(whole["a"], in_blocks["a"])


@pytest.mark.parametrize("rate", [0.2, 0.9])
def test_the_mean_over_seeds_is_the_delta(rate):
    method = mj.chain(mj.drop(rate), mj.total())
    seeds = np.arange(400, dtype=np.uint32)
    merged = jax.jit(jax.vmap(lambda seed: mj.merge(method, BASE, [EXPERT], seed=seed)["b"]))(seeds)
    deviation = np.sqrt(rate / (1 - rate) / merged.size)
    merged = np.asarray(merged, np.float64)
    assert abs(merged.mean() - 1) < 5 * deviation
    variance = merged.var(axis=0).mean()
    np.testing.assert_allclose(variance, rate / (1 - rate), rtol=0.03)
