"""Adapters of Hugging Face PEFT: names, scales and ranks, there and back."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

import mergejax as mj

CONFIG = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 8,
    "use_rslora": False,
    "bias": "none",
    "target_modules": ["q_proj", "v_proj"],
    "base_model_name_or_path": "some/model",
}
LAYERS = {"model.layers.0.q_proj": (3, 5), "model.layers.1.v_proj": (4, 3)}  # out, in


def state(rank=2, infix="", seed=0):
    rng = np.random.default_rng(seed)
    found = {}
    for layer, (out, inputs) in LAYERS.items():
        for side, shape in (("A", (rank, inputs)), ("B", (out, rank))):
            name = f"base_model.model.{layer}.lora_{side}{infix}.weight"
            found[name] = np.float32(rng.normal(size=shape))
    return found


def dense(given, layer, scale):
    """The update of PyTorch's weight, [out, in]."""
    pair = {key.split("lora_")[1][0]: x for key, x in given.items() if layer in key}
    return scale * np.float64(pair["B"]) @ np.float64(pair["A"])


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        (CONFIG, 4.0),
        ({**CONFIG, "use_rslora": True}, 8 / math.sqrt(2)),
        ({"r": 2, "lora_alpha": 3}, 1.5),
        ({**CONFIG, "r": 16, "rank_pattern": {"q_proj": 2, "v_proj": 2}}, 4.0),
        ({**CONFIG, "lora_alpha": 1, "alpha_pattern": {".*proj": 6}}, 3.0),
    ],
)
@pytest.mark.parametrize("infix", ["", ".default"])
def test_the_delta_is_pefts(config, scale, infix):
    given = state(infix=infix)
    adapter = mj.lowrank.from_peft(given, config)
    for layer in LAYERS:
        got = mj.lowrank.dense(adapter)[f"{layer}.weight"].T
        np.testing.assert_allclose(got, dense(given, layer, scale), rtol=1e-5, atol=1e-5)


def test_ranks_may_differ_by_layer():
    given = state()
    for side, shape in (("A", (5, 3)), ("B", (4, 5))):
        given[f"base_model.model.model.layers.1.v_proj.lora_{side}.weight"] = np.ones(
            shape, np.float32
        )
    adapter = mj.lowrank.from_peft(given, {**CONFIG, "rank_pattern": {"layers.1.v_proj": 5}})
    assert [f.rank for f in adapter.values()] == [2, 5]
    assert [f.scale for f in adapter.values()] == [4.0, 8 / 5]


def test_there_and_back_is_the_same_delta():
    adapters = [
        mj.lowrank.from_peft(state(seed=1), CONFIG),
        mj.lowrank.from_peft(state(rank=3, seed=2), {**CONFIG, "r": 3, "use_rslora": True}),
    ]
    merged = mj.lowrank.knots(adapters)
    given, config = mj.lowrank.to_peft(merged, CONFIG)
    assert config["base_model_name_or_path"] == "some/model"
    assert set(config["target_modules"]) == set(LAYERS)
    assert {x.dtype for x in given.values()} == {np.dtype("float32")}
    assert {x.shape[0] for key, x in given.items() if "lora_A" in key} == {config["r"]}
    again = mj.lowrank.dense(mj.lowrank.from_peft(given, config))
    for name, x in mj.lowrank.dense(merged).items():
        np.testing.assert_allclose(again[name], x, rtol=1e-5, atol=1e-6)


def test_the_result_goes_on_a_torch_base():
    base = {f"{layer}.weight": np.zeros(shape, np.float32) for layer, shape in LAYERS.items()}
    given = state()
    got = mj.lowrank.apply(base, mj.lowrank.from_peft(given, CONFIG), layout="torch")
    for layer in LAYERS:
        np.testing.assert_allclose(
            got[f"{layer}.weight"], dense(given, layer, 4.0), rtol=1e-5, atol=1e-5
        )


def test_jax_arrays_of_bfloat16_are_taken():
    given = {key: jnp.asarray(x, jnp.bfloat16) for key, x in state().items()}
    adapter = mj.lowrank.from_peft(given, CONFIG)
    assert mj.lowrank.dense(adapter)["model.layers.0.q_proj.weight"].dtype == jnp.float32


def changed(**more):
    return {**state(), **more}


A = "base_model.model.model.layers.0.q_proj.lora_A.weight"
without_a = {key: x for key, x in state().items() if key != A}


@pytest.mark.parametrize(
    ("given", "config", "sentence"),
    [
        (without_a, CONFIG, "layer 'model.layers.0.q_proj' has no lora_A; load the whole state"),
        (state(), {"r": 2}, "the configuration has no 'lora_alpha'; pass PEFT's adapter_config"),
        (state(), {**CONFIG, "use_dora": True}, "the configuration has use_dora=True, but plain"),
        (state(), {**CONFIG, "bias": "all"}, "the configuration has bias='all', but plain LoRA"),
        (state(), {**CONFIG, "init_lora_weights": "pissa"}, "the configuration has init_lora_w"),
        (state(), {**CONFIG, "layer_replication": [[0, 2]]}, "the configuration has layer_repl"),
        (state(), {**CONFIG, "peft_type": "IA3"}, "the configuration has peft_type='IA3', but"),
        (changed(**{"base_model.model.score.weight": np.ones(2)}), CONFIG, "'base_model.model.sco"),
        (changed(**{A: np.ones((2, 5, 3, 3))}), CONFIG, f"'{A}' has shape (2, 5, 3, 3), but fact"),
        (
            changed(**{A: np.ones((3, 5))}),
            CONFIG,
            "layer 'model.layers.0.q_proj' has lora_A (3, 5)",
        ),
    ],
)
def test_is_refused_in_words(given, config, sentence):
    with pytest.raises(mj.MergeError) as error:
        mj.lowrank.from_peft(given, config)
    assert str(error.value).startswith(sentence)
