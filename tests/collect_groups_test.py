"""Grouped convolutions: every group is a layer of its own, to collectors and to methods."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx
from trees import close

import mergejax as mj
from mergejax.collect import affine_gram, gram, moments

GROUPS, KEY = 2, jax.random.key(0)
X = np.random.default_rng(0).standard_normal((3, 6, 5, 4)).astype(np.float32)
OPTIONS = {"kernel_size": (3, 2), "strides": (2, 1), "kernel_dilation": (1, 2)}


def parts(tree):
    """What belongs to each group: [..., out] by outputs."""
    return [jax.tree.map(lambda x, i=i: np.split(x, GROUPS, axis=-1)[i], tree) for i in (0, 1)]


@pytest.fixture(scope="module")
def models():
    """A grouped convolution and one of its groups; the base, and two experts."""
    whole = nn.Conv(6, **OPTIONS, feature_group_count=GROUPS)
    keys = jax.random.split(KEY, 3)
    return whole, nn.Conv(3, **OPTIONS), [whole.init(key, X)["params"] for key in keys]


def test_statistics_are_those_of_each_group_alone(models):
    whole, part, (params, *_) = models
    split = list(zip(parts(params), np.split(X, GROUPS, axis=-1), strict=True))
    for collect in (gram, affine_gram):
        each = [collect(part, own, [x])["kernel"] for own, x in split]
        close(collect(whole, params, [X[:1], X[1:]])["kernel"], np.stack(each))
    each = [moments(part, own, [x])[1]["kernel"] for own, x in split]
    close(moments(whole, params, [X])[1]["kernel"], np.concatenate(each))
    grouped = nnx.Conv(4, 6, **OPTIONS, feature_group_count=GROUPS, rngs=nnx.Rngs(0))
    close(gram(grouped, None, [X])["kernel"], gram(whole, params, [X])["kernel"])


METHODS = [
    "regmean()",
    'regmean(biases="joint")',
    "lot()",
    "bayesian()",
    "mats(steps=3)",
    "cat(directions=1, bias_count=0)",
]


@pytest.mark.parametrize("method", METHODS)
def test_methods_merge_group_by_group(models, method):
    whole, part, (base, *experts) = models
    inputs = [X, np.flip(X, 1) + 1]

    def merged(base, experts, stats):
        wanted = mj.parse(method).needs
        stats = {n: x for n, x in stats.items() if n in wanted}
        return mj.merge(method, base, experts, stats={**stats, **empty(wanted)})

    def empty(wanted):
        return {"norm_square": [{}, {}]} if "norm_square" in wanted else {}

    def collected(model, experts, inputs):
        several = list(zip(experts, inputs, strict=True))
        return {c.__name__: [c(model, p, [x]) for p, x in several] for c in (gram, affine_gram)}

    found = parts(merged(base, experts, collected(whole, experts, inputs)))
    for i in range(GROUPS):
        own = [parts(expert)[i] for expert in experts]
        seen = [np.split(x, GROUPS, axis=-1)[i] for x in inputs]
        expected = merged(parts(base)[i], own, collected(part, own, seen))
        jax.tree.map(lambda x, y: close(x, y, rtol=1e-4, atol=1e-5), found[i], expected)


def test_quantised_group_by_group(models):
    whole, part, (params, *_) = models
    found = mj.quantize.gptq(params, gram(whole, params, [X]), bits=4)
    for i, (own, x) in enumerate(zip(parts(params), np.split(X, GROUPS, axis=-1), strict=True)):
        alone = mj.quantize.gptq(own, gram(part, own, [x]), bits=4)
        codes = np.split(found.kernels["kernel"].codes, GROUPS, axis=-1)[i]
        np.testing.assert_array_equal(codes, alone.kernels["kernel"].codes)


def test_groups_that_do_not_divide_the_outputs_are_said(models):
    _, _, (_, *experts) = models
    wrong = {"kernel": np.ones((4, 12, 12), np.float32)}
    with pytest.raises(ValueError, match=r"has shape \(4, 12, 12\), expected \(12, 12\)"):
        mj.merge("regmean()", None, experts, stats={"gram": [wrong, wrong]})
