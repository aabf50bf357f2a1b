"""The sequential executor against the spec's sweep in NumPy, float64, and its refusals."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mergejax as mj
from mergejax.models import vit

SHRINK = 0.95


class Mlp(nn.Module):
    """Three layers, every shape another one; kernels are named by their block."""

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Dense(5, name="first")(x))
        x = jnp.tanh(nn.Dense(4, name="second")(x))
        return nn.Dense(3, name="third")(x)


def block(name):
    def apply(params, x):
        y = nn.Dense(params[name]["bias"].size).apply({"params": params[name]}, x)
        return y if name == "third" else jnp.tanh(y)

    return mj.Block((name,), apply)


BLOCKS = [block(name) for name in ("first", "second", "third")]


def random_tree(tree, seed):
    leaves, structure = jax.tree.flatten(tree)
    generator = np.random.default_rng(seed)
    return structure.unflatten(
        [generator.normal(size=leaf.shape).astype(np.float32) * 0.4 for leaf in leaves]
    )


@pytest.fixture(scope="module")
def models():
    params = jax.eval_shape(Mlp().init, jax.random.key(0), jnp.zeros((1, 6)))["params"]
    experts = [random_tree(params, seed) for seed in range(3)]
    generator = np.random.default_rng(9)
    data = [generator.normal(size=(40, 6)).astype(np.float32) for _ in experts]
    return experts, data


def restated(experts, data):
    """Spec 4 for dense layers, each a block: Grams behind merged layers, mean of the biases.

    The solve is B4's: a unit diagonal and 1e-6 added to it, from the average.

    Returns:
        By layer the leaves, and the condition numbers of the systems solved so far, added up.
    """
    hidden = [np.asarray(x, np.float64) for x in data]
    merged, condition = {}, 0.0
    for name in ("first", "second", "third"):
        kernels = [np.asarray(e[name]["kernel"], np.float64) for e in experts]
        bias = np.mean([np.asarray(e[name]["bias"], np.float64) for e in experts], axis=0)
        grams = [x.T @ x / len(x) for x in hidden]
        grams = [SHRINK * g + (1 - SHRINK) * np.diag(np.diag(g)) for g in grams]
        average = np.mean(kernels, axis=0)
        right = sum(g @ (w - average) for g, w in zip(grams, kernels, strict=True))
        scale = 1 / np.sqrt(np.diag(sum(grams)))
        unit = sum(grams) * scale * scale[:, None] + 1e-6 * np.eye(len(scale))
        kernel = average + scale[:, None] * np.linalg.solve(unit, scale[:, None] * right)
        condition += np.linalg.cond(unit)
        merged[name] = {"kernel": kernel, "bias": bias}, condition
        hidden = [np.tanh(x @ kernel + bias) for x in hidden]
    return merged


def test_equals_the_restated_sweep_on_batches(models):
    experts, data = models
    batches = [[x[i : i + 15] for i in range(0, 40, 15)] for x in data]
    merged = mj.sequential(f"regmean(shrink={SHRINK})", BLOCKS, None, experts, batches)
    for name, (layer, condition) in restated(experts, data).items():
        # A solve multiplies roundings by its condition number, and so do those before it, whose
        # results are its inputs: 4 roundings of the largest entry for each.
        assert condition < 100
        atol = 4 * np.finfo(np.float32).eps * condition * np.abs(layer["kernel"]).max()
        np.testing.assert_allclose(merged[name]["kernel"], layer["kernel"], rtol=0, atol=atol)
        np.testing.assert_allclose(merged[name]["bias"], layer["bias"], rtol=0, atol=1e-6)
    plain = mj.regmean(shrink=SHRINK)
    grams = [mj.collect.gram(Mlp(), e, [x]) for e, x in zip(experts, data, strict=True)]
    plain = mj.merge(plain, None, experts, stats={"gram": grams})
    # The first block sees the data themselves; the last one other inputs than RegMean's.
    np.testing.assert_allclose(merged["first"]["kernel"], plain["first"]["kernel"], atol=1e-5)
    assert not np.allclose(merged["third"]["kernel"], plain["third"]["kernel"], atol=1e-3)


class Step(nnx.Module):
    """One layer of the same network in NNX, under its name."""

    def __init__(self, name, sizes):
        setattr(self, name, nnx.Linear(*sizes, rngs=nnx.Rngs(0)))

    def __call__(self, x):
        (name,) = nnx.to_pure_dict(nnx.state(self))
        y = getattr(self, name)(x)
        return y if name == "third" else jnp.tanh(y)


@pytest.mark.parametrize("method", ["regmean(shrink=0.95)", "featcal()"])
def test_nnx_modules_are_blocks_as_functions_are(models, method):
    experts, data = models
    sizes = {"first": (6, 5), "second": (5, 4), "third": (4, 3)}
    steps = [mj.Block((name,), Step(name, size)) for name, size in sizes.items()]

    def state(tree):
        whole = nnx.merge_state(*(nnx.state(step.apply, nnx.Param) for step in steps))
        nnx.replace_by_pure_dict(whole, tree)
        return whole

    batches = [[x] for x in data]
    found = mj.sequential(method, steps, state(experts[2]), [state(e) for e in experts], batches)
    expected = mj.sequential(method, BLOCKS, experts[2], experts, batches)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)
    into = state(experts[0])
    nnx.replace_by_pure_dict(into, found)
    assert jnp.array_equal(into["third"]["kernel"].get_value(), found["third"]["kernel"])


def test_identical_experts_return_themselves(models):
    experts, data = models
    merged = mj.sequential(mj.regmean(), BLOCKS, None, [experts[0]] * 3, [[x] for x in data])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged, experts[0])


def test_blocks_of_the_vision_transformer_are_the_model():
    # Expansion 1 and a stem of the same width: all kernels but one have one shape, one program.
    model = vit.VisionTransformer(2, 4, 1, 2, expansion=1, class_token=True, stem=(4,))
    images = np.random.default_rng(0).random((3, 8, 8, 1)).astype(np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    params = random_tree(shapes, 1)
    steps = vit.blocks(model, params)

    @jax.jit
    def both(params):
        value = images
        for step in steps:
            value = step.apply({name: params[name] for name in step.leaves}, value)
        return value, model.apply({"params": params}, images)

    np.testing.assert_allclose(*both(params), atol=1e-5)
    experts = [params, random_tree(params, 2)]
    merged = mj.sequential(mj.regmean(), steps, params, experts, [[images], [images]])
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *experts)
    np.testing.assert_allclose(merged["patches"]["kernel"], mean["patches"]["kernel"], atol=1e-6)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"blocks": BLOCKS[:2]}, r"'third' of expert 0 belong to no block"),
        ({"blocks": [*BLOCKS, block("third")]}, r"'third' belong to several blocks"),
        ({"blocks": [*BLOCKS, block("fourth")]}, r"expert 0 has no 'fourth'"),
        ({"base": {"first": {}}}, r"the base has no 'second'"),
        ({"batches": [[]]}, r"3 experts and 1 iterables of batches"),
        ({"batches": [[np.zeros((2, 6))], [], []]}, r"no batch for expert 1, 2"),
        ({"method": "fisher()"}, r"needs the statistic 'fisher'.*only 'gram'"),
    ],
)
def test_bad_input_is_one_sentence(models, change, sentence):
    experts, data = models
    given = {"method": "regmean()", "blocks": BLOCKS, "batches": [[x] for x in data]} | change
    base = given.get("base")
    with pytest.raises(mj.MergeError, match=sentence):
        mj.sequential(given["method"], given["blocks"], base, experts, given["batches"])
