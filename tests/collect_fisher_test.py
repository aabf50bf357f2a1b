"""Diagonal Fisher information against float64 NumPy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

from mergejax.collect import fisher

KEY = jax.random.key(0)
CLASSES, FEATURES, EXAMPLES = 3, 4, 21


def logits(params, inputs):
    return inputs @ params["kernel"] + params["bias"][None]


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(EXAMPLES, FEATURES)).astype(np.float32)
    labels = rng.integers(CLASSES, size=EXAMPLES)
    params = {
        "kernel": rng.normal(size=(FEATURES, CLASSES)).astype(np.float32),
        "bias": rng.normal(size=CLASSES).astype(np.float32),
    }
    return params, inputs, labels


def probabilities(params, inputs):
    scores = np.float64(inputs) @ np.float64(params["kernel"]) + params["bias"]
    scores = np.exp(scores - scores.max(1, keepdims=True))
    return scores / scores.sum(1, keepdims=True)


def square_of(inputs, errors):
    """(∂ log p / ∂ parameters)² per example, from e_y − p [examples, classes]."""
    kernel = np.square(inputs)[:, :, None] * np.square(errors)[:, None, :]
    return {"kernel": kernel, "bias": np.square(errors)}


def restated(params, inputs, weights=None):
    """The exact form, class by class and example by example."""
    p = probabilities(params, inputs)
    weights = np.ones(len(inputs)) if weights is None else weights
    total = {"kernel": 0.0, "bias": 0.0}
    for label in range(CLASSES):
        squares = square_of(np.float64(inputs), np.eye(CLASSES)[label] - p)
        for name, square in squares.items():
            total[name] += np.einsum("n,n,n...->...", weights, p[:, label], square)
    return {name: value / weights.sum() for name, value in total.items()}


def batched(*arrays, size):
    whole = arrays if len(arrays) > 1 else arrays[0]
    slices = [slice(start, start + size) for start in range(0, EXAMPLES, size)]
    return [jax.tree.map(lambda x, part=part: x[part], whole) for part in slices]


def close(found, expected, rtol=1e-4):
    for name, value in expected.items():
        assert found[name].dtype == jnp.float32
        assert (found[name] >= 0).all()
        np.testing.assert_allclose(found[name], value, rtol=rtol, atol=1e-9)


@pytest.mark.parametrize("size", [1, 8, 21])
@pytest.mark.parametrize("microbatch", [1, 5, 32])
def test_exact_equals_the_restatement_for_all_batch_sizes(data, size, microbatch):
    params, inputs, _ = data
    found = fisher(logits, params, batched(inputs, size=size), microbatch=microbatch)
    close(found, restated(params, inputs))


@pytest.mark.parametrize("size", [1, 8, 21])
def test_empirical_squares_before_it_averages(data, size):
    params, inputs, labels = data
    batches = batched(inputs, labels, size=size)
    found = fisher(
        lambda params, batch: logits(params, batch[0]),
        params,
        batches,
        estimator="empirical",
        labels=lambda batch: batch[1],
    )
    errors = np.eye(CLASSES)[labels] - probabilities(params, inputs)
    squares = square_of(np.float64(inputs), errors)
    close(found, {name: value.mean(0) for name, value in squares.items()})
    summed_first = np.square(np.float64(inputs).T @ errors) / EXAMPLES
    assert not np.allclose(found["kernel"], summed_first, rtol=0.2)


def test_sampled_does_not_depend_on_the_batches_and_averages_to_exact(data):
    params, inputs, _ = data
    whole = fisher(logits, params, [inputs], estimator="sampled", key=KEY)
    split = fisher(logits, params, batched(inputs, size=4), estimator="sampled", key=KEY)
    close(split, {name: np.asarray(value) for name, value in whole.items()}, rtol=1e-5)
    other = fisher(logits, params, [inputs], estimator="sampled", key=jax.random.key(1))
    assert not np.allclose(other["kernel"], whole["kernel"], rtol=1e-3)

    draws = 2000
    repeated = np.tile(inputs, (draws, 1))
    found = fisher(logits, params, [repeated], estimator="sampled", key=KEY, microbatch=512)
    p = probabilities(params, inputs)
    for name, exact in restated(params, inputs).items():
        each = np.stack(
            [square_of(np.float64(inputs), np.eye(CLASSES)[c] - p)[name] for c in range(CLASSES)]
        )
        weighted = p.T.reshape(CLASSES, EXAMPLES, *[1] * (each.ndim - 2))
        variance = (weighted * each**2).sum(0) - (weighted * each).sum(0) ** 2
        error = np.sqrt(variance.sum(0) / draws) / EXAMPLES
        assert (np.abs(found[name] - exact) < 5 * error).all()
        assert (error < 0.06 * exact).all()  # so that a wrong scale cannot pass


def test_weights_leave_padding_out_whatever_it_holds(data):
    params, inputs, labels = data
    weights = np.linspace(0, 1, EXAMPLES)
    weights[:3] = 0
    inputs[:3] = np.nan
    labels[:3] = -1
    batches = batched(inputs, labels, weights, size=8)
    options = {"labels": lambda batch: batch[1], "mask": lambda batch: batch[2]}

    def function(params, batch):
        return logits(params, batch[0])

    close(fisher(function, params, batches, **options), restated(params, inputs[3:], weights[3:]))
    empirical = fisher(function, params, batches, estimator="empirical", **options)
    errors = np.eye(CLASSES)[labels[3:]] - probabilities(params, inputs[3:])
    squares = square_of(np.float64(inputs[3:]), errors)["bias"]
    close(empirical, {"bias": weights[3:] @ squares / weights.sum()})


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(CLASSES, name="head")(nn.tanh(nn.Dense(5, name="body")(x)))


def test_network_equals_one_gradient_per_example_and_class(data):
    _, inputs, _ = data
    model = Network()
    params = model.init(KEY, inputs)["params"]
    expected = jax.tree.map(np.zeros_like, params)
    gradient = jax.jit(
        jax.grad(lambda params, x, label: nn.log_softmax(model.apply({"params": params}, x))[label])
    )
    for x in inputs:
        p = nn.softmax(model.apply({"params": params}, x))
        for label in range(CLASSES):
            squares = jax.tree.map(jnp.square, gradient(params, x, label))
            expected = jax.tree.map(lambda e, s, w=p[label]: e + w * s, expected, squares)
    expected = jax.tree.map(lambda leaf: leaf / EXAMPLES, expected)
    calls = []
    found = fisher(
        model, params, batched(inputs, size=8), progress=lambda *call: calls.append(call)
    )
    expected = traverse_util.flatten_dict(expected, sep="/")
    assert set(found) == set(expected)
    close(found, expected)
    assert calls == [(1, 3, "fisher"), (2, 3, "fisher"), (3, 3, "fisher")]
    compiled = jax.jit(lambda params, x: model.apply({"params": params}, x))
    again = fisher(compiled, params, (batch for batch in batched(inputs, size=21)))
    close(again, expected)


def test_nnx_model_and_state_equal_linen(data):
    params, inputs, _ = data
    model = nnx.Linear(FEATURES, CLASSES, rngs=nnx.Rngs(0))
    model.kernel.set_value(jnp.asarray(params["kernel"]))
    model.bias.set_value(jnp.asarray(params["bias"]))
    state = nnx.state(model, nnx.Param)
    graph, _ = nnx.split(model)
    expected = restated(params, inputs)
    for found in (
        fisher(model, None, [inputs]),
        fisher(model, state, [inputs]),
        fisher(lambda params, x: nnx.merge(graph, params)(x), state, [inputs]),
    ):
        assert set(found) == set(expected)
        close(found, expected)


def test_low_precision_parameters_give_float32_and_integers_have_none(data):
    params, inputs, _ = data
    low = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    found = fisher(
        lambda params, x: logits(params, x.astype(jnp.bfloat16)),
        {**low, "steps": jnp.arange(3)},
        [1e-3 * inputs],
    )
    rounded = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), low)
    close(found, restated(rounded, 1e-3 * inputs), rtol=0.05)
    assert "steps" not in found


def test_at_most_one_more_compilation_for_the_last_batch(data):
    params, inputs, _ = data
    traces = []

    def function(params, inputs):
        traces.append(inputs.shape[0])
        return logits(params, inputs)

    fisher(function, params, batched(inputs, size=2), microbatch=1)
    assert traces.count(2) == 1
    assert len(traces) < 8


@pytest.mark.parametrize("shared", [False, True])
def test_compiled_functions_share_a_trace_and_plain_ones_see_what_has_changed(data, shared):
    params, inputs, _ = data
    traces, scale = [], {"input": 1.0}

    def function(params, inputs):
        traces.append(inputs.shape)
        return logits(params, scale["input"] * inputs)

    model = jax.jit(function) if shared else function
    fisher(model, params, [inputs])
    count = len(traces)
    other = jax.tree.map(lambda leaf: 0.5 * leaf, params)
    close(fisher(model, other, [inputs]), restated(other, inputs))
    assert (len(traces) == count) == shared
    if not shared:
        scale["input"] = 2.0
        close(fisher(model, params, [inputs]), restated(params, 2 * inputs))
    sampled = [
        fisher(model, params, [inputs], estimator="sampled", key=jax.random.key(seed))["bias"]
        for seed in (0, 1)
    ]
    assert not np.allclose(*sampled)


def wrong_shape(params, batch):
    return logits(params, batch)[:, 0]


def not_finite(params, batch):
    return logits(params, batch) / 0.0


@pytest.mark.parametrize(
    ("function", "options", "words"),
    [
        (logits, {"estimator": "exakt"}, "'exakt' is unknown, did you mean 'exact'"),
        (logits, {"estimator": "sampled"}, r"pass key=jax\.random\.key"),
        (logits, {"estimator": "empirical"}, r"pass labels=lambda batch: batch\['label'\]"),
        (logits, {"microbatch": 0}, "microbatch is 0, expected at least 1"),
        (logits, {"mask": lambda b: np.zeros(21)}, "every example has weight 0"),
        (logits, {"mask": lambda b: np.ones(20)}, r"shape \(20,\), expected one weight.*21"),
        (logits, {"mask": lambda b: np.full(21, np.nan)}, "with values from nan"),
        (wrong_shape, {}, r"gives \(21,\) for 21 examples, expected logits"),
        (lambda p, b: (logits(p, b),), {}, "gives tuple for 21 examples, expected logits"),
        (not_finite, {}, "squared gradients of 2 of 2 layers are not finite, the first is 'bias'"),
    ],
)
def test_what_cannot_be_collected_is_said(data, function, options, words):
    params, inputs, _ = data
    with pytest.raises(ValueError, match=words):
        fisher(function, params, [inputs], **options)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.full(21, 3), "label 3 of example 0 is not one of the 3 classes 0 to 2 .21 such"),
        (np.full(21, -1), "label -1 of example 0"),
        (np.ones(21), r"gave float64 \(21,\), expected one integer"),
        (np.ones((21, 1), int), r"int64 \(21, 1\), expected one integer"),
    ],
)
def test_labels_that_do_not_fit_are_said(data, labels, words):
    params, inputs, _ = data
    with pytest.raises(ValueError, match=words):
        fisher(logits, params, [inputs], estimator="empirical", labels=lambda batch: labels)


def test_batches_that_do_not_fit_are_said(data):
    params, inputs, labels = data
    with pytest.raises(ValueError, match="no batch"):
        fisher(logits, params, iter([]))
    with pytest.raises(ValueError, match=r"first axes \[\(20,\), \(21,\)\]"):
        fisher(logits, params, [(inputs, labels[:20])])
    with pytest.raises(ValueError, match=r"first axes \[\(0,\)\], expected .* at least one"):
        fisher(logits, params, [(inputs[:0], labels[:0])])
    with pytest.raises(ValueError, match="fisher: the model does not run on batch 1"):
        fisher(logits, params, [(inputs[:, :1], labels)])
    with pytest.raises(ValueError, match="fisher: the batches are 5, expected an iterable"):
        fisher(logits, params, 5)


# Sequences


def token_logits(params, x):
    return x @ params["kernel"] + params["bias"][None, None]


@pytest.fixture
def sequences(data):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(6, 4, FEATURES)).astype(np.float32)
    weights = (np.arange(4) < np.array([4, 2, 3, 1, 4, 0])[:, None]).astype(np.float32)
    return data[0], x, rng.integers(CLASSES, size=(6, 4)), weights


def of_sequences(params, x, labels, weights):
    """Gradients of each sequence's log-likelihood, squared, and their mean."""
    total = {"kernel": 0.0, "bias": 0.0}
    for tokens, chosen, w in zip(x, labels, weights, strict=True):
        errors = w[:, None] * (np.eye(CLASSES)[chosen] - probabilities(params, tokens))
        total["kernel"] += np.square(np.float64(tokens).T @ errors)
        total["bias"] += np.square(errors.sum(0))
    count = (weights.max(1) > 0).sum()
    return {name: value / count for name, value in total.items()}


def test_of_a_sequence_the_tokens_are_summed_before_they_are_squared(sequences):
    params, x, labels, weights = sequences
    padded = np.where(weights[..., None] > 0, x, 50.0)
    batches = [(padded[:4], labels[:4], weights[:4]), (padded[4:], labels[4:], weights[4:])]
    found = fisher(
        lambda params, batch: token_logits(params, batch[0]),
        params,
        batches,
        estimator="empirical",
        labels=lambda batch: np.where(batch[2] > 0, batch[1], -1),  # padding may be anything
        mask=lambda batch: batch[2],
        microbatch=3,
    )
    close(found, of_sequences(params, x, labels, weights))
    assert found.rows["bias"] == 5


def test_tokens_of_sequences_are_drawn_each(sequences):
    params, x, *_ = sequences
    draws = [
        fisher(jax.jit(token_logits), params, [x], estimator="sampled", key=jax.random.key(seed))
        for seed in range(300)
    ]
    # Independent draws: the expected square of the sum over tokens is the sum of their Fishers.
    expected = {n: 4 * f for n, f in restated(params, x.reshape(-1, FEATURES)).items()}
    for name, value in expected.items():
        several = np.stack([found[name] for found in draws])
        error = several.std(0) / np.sqrt(len(draws))
        assert (np.abs(several.mean(0) - value) < 5 * error).all()


def test_what_of_sequences_cannot_be_collected_is_said(sequences):
    params, x, labels, _ = sequences
    with pytest.raises(
        ValueError, match=r"gives \(6, 4, 3\) for 6 examples, expected .* estimator='sampled'"
    ):
        fisher(token_logits, params, [x])
    options = {"estimator": "empirical"}
    with pytest.raises(ValueError, match="one integer for each of the 6 examples and its 4 tokens"):
        fisher(token_logits, params, [x], labels=lambda b: labels[:, 0], **options)
    with pytest.raises(ValueError, match="label 7 of example 2 is not one of the 3 classes"):
        fisher(
            token_logits,
            params,
            [x],
            labels=lambda b: np.where(b[..., 0] == x[2, 1, 0], 7, 0),
            **options,
        )


def test_batches_of_changing_structure_are_said(data):
    params, inputs, _ = data
    batches = [{"a": inputs}, {"a": inputs, "b": inputs}]
    with pytest.raises(ValueError, match=r"batch 2 is .* but the first was of another structure"):
        fisher(lambda params, batch: logits(params, batch["a"]), params, batches)
