"""Maps inside attention heads: a locked model computes the same, merges badly, and is unlocked."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mergejax as mj

SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24}
KINDS = {
    "llama": (
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 20, **SIZE,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
         "attention_bias": True},
        {"heads": 4, "groups": 2, "rotary": True},
    ),
    "bert": (
        {"model_type": "bert", "architectures": ["BertModel"], "vocab_size": 20, **SIZE,
         "num_attention_heads": 4, "max_position_embeddings": 32},
        {"heads": 4},
    ),
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 20, (3, 7)).astype(np.int32)


def made(kind):
    """A model's function, its parameters, an expert a little off, and its attention layers."""
    config, arrangement = KINDS[kind]
    module = mj.models.build(config)

    def noisy(tree, seed, spread):
        rng = np.random.default_rng(seed)
        return jax.tree.map(lambda x: np.float32(x + spread * rng.normal(size=x.shape)), tree)

    apply = jax.jit(lambda p: jax.tree.leaves(module.apply({"params": p}, TOKENS))[0])
    params = module.init(jax.random.key(0), TOKENS)["params"]
    base = noisy(params, 1, 0.1)  # biases that are not zero
    return apply, base, noisy(base, 2, 0.004), mj.alignment.attentions(base, **arrangement)


def off(a, b):
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


@pytest.mark.parametrize("kind", KINDS)
def test_a_locked_model_computes_the_same_and_is_unlocked_exactly(kind):
    apply, base, _, layers = made(kind)
    assert len(layers) == 2
    locked = mj.alignment.lock(base, layers, seed=3)
    # Condition 10 loses one digit of float32's seven.
    assert off(apply(locked), apply(base)) < 1e-5
    changed = jax.tree.map(lambda a, b: off(a, b) > 0.1, locked, base)
    flat = {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(changed)}
    for name, moved in flat.items():
        inside = "attention" in name and "norm" not in name
        bias_of_out = "out" in name and "bias" in name
        assert moved == (inside and not bias_of_out), name
    found = mj.alignment.unlock(locked, base, layers)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, base)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lock_spoils_the_average_and_unlocking_mends_it(kind):
    apply, base, expert, layers = made(kind)
    wanted = apply(mj.merge("average()", None, [base, expert]))
    locked = mj.alignment.lock(expert, layers, seed=4)
    spoiled = off(apply(mj.merge("average()", None, [base, locked])), wanted)
    unlocked = mj.alignment.unlock(locked, base, layers)
    assert off(apply(unlocked), apply(expert)) < 1e-5
    mended = off(apply(mj.merge("average()", None, [base, unlocked])), wanted)
    between = off(apply(expert), apply(base))
    assert spoiled > 10 * between
    assert mended < between


def test_rotations_alone_do_not_undo_a_lock():
    # The published claim of robustness is against an alignment by rotations (Kabsch).
    _, base, expert, layers = made("bert")
    locked = mj.alignment.lock(expert, layers, seed=4)
    a = locked["block_0"]["attention"]["query"]["kernel"].reshape(16, 4, 4)
    b = base["block_0"]["attention"]["query"]["kernel"].reshape(16, 4, 4)
    left = []
    for i in range(4):
        for j in range(4):
            u, _, v = np.linalg.svd(a[:, i].T @ b[:, j])
            left.append(off(a[:, i] @ (u @ v), b[:, j]))
    assert min(left) > 0.3


def test_what_cannot_be_locked_is_one_sentence():
    _, base, _, layers = made("bert")
    with pytest.raises(mj.MergeError, match="no layer has kernels of 'query'"):
        mj.alignment.attentions({"a": np.ones(2)}, heads=2)
    wrong = dataclasses.replace(layers[0], heads=3)
    with pytest.raises(mj.MergeError, match="16 columns of queries, which are not 3 heads in 4"):
        mj.alignment.lock(base, [wrong], seed=0)
    other = dataclasses.replace(layers[0], name="block_7/attention")
    with pytest.raises(mj.MergeError, match="the reference: layer 'block_7/attention' has no"):
        mj.alignment.unlock({**base, "block_7": base["block_0"]}, base, [other])
