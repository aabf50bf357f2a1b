"""Gram matrices of output gradients and whole Fisher matrices, against loops in float64."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mergejax as mj
from mergejax.collect import block_fisher, fisher, output_gram

CLASSES, EXAMPLES, TOKENS, FEATURES, WIDTH = 3, 7, 4, 5, 6
KEY = jax.random.key(3)


class Tokens(nn.Module):
    """A hidden layer on each token, the mean of the tokens, a head."""

    layer: type = nn.Dense

    @nn.compact
    def __call__(self, x):
        hidden = jnp.tanh(self.layer(WIDTH, name="hidden")(x))
        return nn.Dense(CLASSES, name="head")(hidden.mean(1))


class NnxTokens(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(FEATURES, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.head(jnp.tanh(self.hidden(x)).mean(1))


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def data():
    params = {
        "hidden": {"kernel": normal(FEATURES, WIDTH, seed=1), "bias": normal(WIDTH, seed=2)},
        "head": {"kernel": normal(WIDTH, CLASSES, seed=3), "bias": normal(CLASSES, seed=4)},
    }
    labels = np.random.default_rng(6).integers(0, CLASSES, EXAMPLES)
    return params, normal(EXAMPLES, TOKENS, FEATURES, seed=5), labels


def gradients(params, x):
    """p [n, c]; ∂ log p_c / ∂ outputs of head [n, c, out] and hidden layer [n, c, t, out]."""
    p64 = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    hidden = np.tanh(np.float64(x) @ p64["hidden"]["kernel"] + p64["hidden"]["bias"])
    scores = hidden.mean(1) @ p64["head"]["kernel"] + p64["head"]["bias"]
    p = np.exp(scores - scores.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    head = np.eye(CLASSES)[None] - p[:, None, :]
    back = head @ p64["head"]["kernel"].T / x.shape[1]
    return p, head, back[:, :, None, :] * (1 - hidden[:, None] ** 2)


def restated(params, x, chosen=None, weights=None):
    """B of both layers: every example, class and token by its own outer product."""
    p, head, hidden = gradients(params, x)
    chosen = p if chosen is None else chosen
    weights = np.ones(x.shape[:2]) if weights is None else weights
    large = np.einsum("nt,nc,ncti,nctj->ij", weights, chosen, hidden, hidden) / weights.sum()
    each = weights.max(1)
    small = np.einsum("n,nc,nci,ncj->ij", each, chosen, head, head) / each.sum()
    return {"hidden/kernel": large, "head/kernel": small}


def close(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == jnp.float32
        # Sums of 84 products of float32 that passed three layers: some tens of roundings.
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=2e-6 * np.abs(value).max())
        np.testing.assert_array_equal(found[name], found[name].T)


@pytest.mark.parametrize("layer", [nn.Dense, nn.remat(nn.Dense), nn.jit(nn.Dense)])
def test_output_gram_equals_the_restatement(data, layer):
    params, x, _ = data
    found = output_gram(Tokens(layer), params, [x[:4], x[4:]])
    assert list(found) == ["hidden/kernel", "head/kernel"]  # in the order of the calls
    close(found, restated(params, x))


def test_output_gram_of_labels_of_the_data_and_of_token_masks(data):
    params, x, labels = data
    batches = [(x, labels)]
    found = output_gram(
        lambda params, batch: Tokens().apply({"params": params}, batch[0]),
        params,
        batches,
        estimator="empirical",
        labels=lambda batch: batch[1],
        mask=lambda batch: np.arange(TOKENS) < 1 + np.arange(EXAMPLES)[:, None] % TOKENS,
    )
    weights = (np.arange(TOKENS) < 1 + np.arange(EXAMPLES)[:, None] % TOKENS).astype(float)
    close(found, restated(params, x, np.eye(CLASSES)[labels], weights))


def test_nnx_equals_linen(data):
    params, x, _ = data
    model = NnxTokens(nnx.Rngs(0))
    for name, layer in params.items():
        getattr(model, name).kernel.set_value(jnp.asarray(layer["kernel"]))
        getattr(model, name).bias.set_value(jnp.asarray(layer["bias"]))
    close(output_gram(model, None, [x]), restated(params, x))
    blocks = block_fisher(model, None, [x])
    np.testing.assert_allclose(
        blocks["head/bias"], restated(params, x)["head/kernel"], rtol=1e-5, atol=1e-6
    )


def test_a_layer_that_is_called_twice_adds_up(data):
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(CLASSES, name="layer")
            return layer(layer(x))

    x, kernel = normal(EXAMPLES, CLASSES), normal(CLASSES, CLASSES, seed=1)
    params = {"layer": {"kernel": kernel, "bias": np.zeros(CLASSES, np.float32)}}
    found = output_gram(Twice(), params, [x])["layer/kernel"]
    scores = np.float64(x) @ kernel @ np.float64(kernel)
    p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    last = np.eye(CLASSES)[None] - p[:, None]
    both = np.stack([last, last @ np.float64(kernel).T])
    expected = np.einsum("nc,knci,kncj->ij", p, both, both) / (2 * EXAMPLES)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6 * np.abs(expected).max())


def test_convolution_and_general_dense_give_the_bias_gradient_of_one_row():
    """With one row for each example, B of a layer is the whole Fisher matrix of its bias."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (2, 2), padding="VALID", name="conv")(x)  # one pixel is left
            x = nn.DenseGeneral((2, 3), name="general")(jnp.tanh(x[:, 0, 0]))
            return nn.Dense(CLASSES, name="head")(jnp.tanh(x).reshape(len(x), -1))

    x = normal(EXAMPLES, 2, 2, 3)
    shapes = jax.eval_shape(Net().init, KEY, x)["params"]
    params = jax.tree.map(lambda leaf: normal(*leaf.shape, seed=leaf.size), shapes)
    grams = output_gram(Net(), params, [x], estimator="sampled", key=KEY)
    blocks = block_fisher(Net(), params, [x], estimator="sampled", key=KEY, exclude="kernel")
    assert set(blocks) == {"conv/bias", "general/bias", "head/bias"}
    for name, block in blocks.items():
        gram = grams[name.replace("bias", "kernel")]
        assert np.abs(gram).max() > 1e-3
        np.testing.assert_allclose(gram, block, rtol=1e-5, atol=2e-6 * np.abs(block).max())


def test_block_fisher_equals_the_restatement_and_has_the_diagonal_fisher(data):
    params, x, _ = data
    p, head, hidden = gradients(params, x)
    hidden_mean = np.tanh(
        np.float64(x) @ params["hidden"]["kernel"] + np.float64(params["hidden"]["bias"])
    ).mean(1)
    flat = np.einsum("ni,ncj->ncij", hidden_mean, head).reshape(EXAMPLES, CLASSES, -1)
    rows = {"head/kernel": flat, "head/bias": head, "hidden/bias": hidden.sum(2)}
    found = block_fisher(Tokens(), params, [x[:5], x[5:]], microbatch=3, largest=WIDTH * CLASSES)
    close(found, {n: np.einsum("nc,nci,ncj->ij", p, g, g) / EXAMPLES for n, g in rows.items()})
    diagonal = fisher(Tokens(), params, [x])
    for name in rows:
        np.testing.assert_allclose(
            np.diag(found[name]), np.ravel(diagonal[name]), rtol=1e-5, atol=1e-8
        )


@pytest.mark.parametrize("operator", ["kfac", "block_fisher"])
def test_mats_merges_with_what_was_collected(data, operator):
    """Identical statistics and enough steps: the mean where they determine it."""
    params, x, _ = data
    other = jax.tree.map(lambda leaf: leaf * np.float32(1.1), params)
    base = jax.tree.map(np.zeros_like, params)
    collectors = {
        "kfac": {"gram": mj.collect.gram, "output_gram": output_gram},
        "block_fisher": {"block_fisher": block_fisher},
    }[operator]
    stats = {need: [collect(Tokens(), params, [x])] * 2 for need, collect in collectors.items()}
    merged = mj.merge(f"mats(operator='{operator}')", base, [params, other], stats=stats)

    def distance(kernel):
        """The objective: Σ_i tr(E_iᵀ A E_i B) or eᵀ F e."""
        total = 0.0
        for expert in (params, other):
            e = np.float64(kernel) - expert["head"]["kernel"]
            if operator == "kfac":
                a, b = (np.float64(stats[n][0]["head/kernel"]) for n in ("gram", "output_gram"))
                total += np.trace(e.T @ a @ e @ b)
            else:
                f = np.float64(stats["block_fisher"][0]["head/kernel"])
                total += e.ravel() @ f @ e.ravel()
        return total

    mean = (params["head"]["kernel"] + other["head"]["kernel"]) / 2
    start = np.float32(0.3) * (params["head"]["kernel"] + other["head"]["kernel"])
    assert distance(mean) <= distance(merged["head"]["kernel"]) * (1 + 1e-5)
    assert distance(merged["head"]["kernel"]) < 1.01 * distance(mean) < 0.5 * distance(start)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(CLASSES, name="dense")(x), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, "intermediates": 0}
        scan = nn.scan(Layer, variable_axes=axes, split_rngs={"params": True}, length=2)
        return scan(name="layers")(x, None)[0]


@pytest.mark.parametrize(
    ("collector", "options", "words"),
    [
        (output_gram, {"estimator": "sampld"}, "output_gram: estimator 'sampld' is unknown.*did"),
        (output_gram, {"estimator": "sampled"}, r"output_gram: .*pass key=jax\.random\.key"),
        (output_gram, {"exclude": "nowhere"}, "output_gram: pattern 'nowhere' matches no leaf"),
        (output_gram, {"mask": lambda b: np.zeros(len(b))}, "output_gram: every row of"),
        (output_gram, {"mask": lambda b: np.ones(2)}, r"output_gram: mask.*\(2,\), expected one"),
        (block_fisher, {"exclude": "."}, "no leaf has at most largest=256.*not excluded"),
        (block_fisher, {"largest": 1}, "the smallest of 4 has 3"),
        (block_fisher, {"microbatch": 0}, "block_fisher: microbatch is 0"),
        (block_fisher, {"mask": lambda b: np.zeros(len(b))}, "block_fisher: every example has"),
    ],
)
def test_what_cannot_be_collected_is_said(data, collector, options, words):
    params, x, _ = data
    with pytest.raises(mj.MergeError, match=words):
        collector(Tokens(), params, [x], **options)


def test_layers_and_data_that_cannot_be_used_are_said(data):
    params, x, _ = data
    with pytest.raises(mj.MergeError, match="no batch"):
        output_gram(Tokens(), params, [])
    with pytest.raises(mj.MergeError, match="output gradients of 2 of 2 layers are not finite"):
        output_gram(Tokens(), params, [np.full_like(x, np.nan)])
    flat = normal(EXAMPLES, CLASSES)
    stacked = jax.jit(Stack().init)(KEY, flat)["params"]
    with pytest.raises(mj.MergeError, match="'layers/dense/kernel' is one of a stack"):
        output_gram(Stack(), stacked, [flat])
