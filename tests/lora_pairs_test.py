"""Adapters of cloneofsimo/lora: names that are not PEFT's, two real ones made for one base."""

import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file

import mergejax as mj

FOLDER = pathlib.Path(__file__).parents[2] / "shared" / "checkpoints" / "sd15_lora"


def test_pairs_become_factors():
    rng = np.random.default_rng(0)
    state = {"a:0:down": rng.normal(size=(2, 5)), "a:0:up": rng.normal(size=(3, 2))}
    adapter = mj.lowrank.from_pairs(state, scale=0.5)
    dense = mj.lowrank.dense(adapter)["a:0"]
    np.testing.assert_allclose(dense.T, 0.5 * state["a:0:up"] @ state["a:0:down"], rtol=1e-5)


@pytest.mark.parametrize(
    ("state", "ignore", "sentence"),
    [
        ({"a:down": np.ones((1, 2))}, (), "'a' has no :up; load it too"),
        ({"a:down": np.ones((1, 2)), "a:up": np.ones((3, 2))}, (), "whose ranks differ"),
        ({"<s1>": np.ones(3)}, (), "'<s1>' are no factors NAME:down or NAME:up of two axes"),
        ({"a:down": np.ones((1, 2, 1, 1))}, (), "'a:down' are no factors"),
        ({"<s1>": np.ones(3)}, "<t", "ignore='<t' matches no tensor of the adapter"),
    ],
)
def test_what_is_no_pair_is_refused(state, ignore, sentence):
    with pytest.raises(mj.MergeError, match=sentence):
        mj.lowrank.from_pairs(state, ignore=ignore)


@pytest.fixture(scope="module")
def real():
    if not FOLDER.is_dir():
        pytest.skip("the real adapters are not beside the checkout")
    analog = load_file(FOLDER / "analog_svd_rank4.safetensors")
    disney = load_file(FOLDER / "lora_disney.safetensors")
    return mj.lowrank.from_pairs(analog), mj.lowrank.from_pairs(disney, ignore="^<s")


def test_two_real_adapters_are_merged_exactly_and_extracted_with_the_error_told(real):
    assert [len(adapter) for adapter in real] == [192, 192]
    assert [{f.rank for f in adapter.values()} for adapter in real] == [{4}, {1}]
    merged = mj.lowrank.concatenate(real, weights=[1.0, 0.5])
    assert {f.rank for f in merged.values()} == {5}
    whole, losses = mj.lowrank.refactor(merged, rank=5)
    assert max(losses.values()) == 0
    _, small = mj.lowrank.refactor(merged, rank=2)
    for name in list(merged)[::48]:
        wide = [[np.float64(x) for x in (f[name].down, f[name].up)] for f in (*real, merged, whole)]
        first, second, found, again = (down @ up for down, up in wide)
        wanted = first + 0.5 * second
        size = np.abs(wanted).max()
        np.testing.assert_allclose(found, wanted, atol=1e-6 * size)
        np.testing.assert_allclose(again, wanted, atol=1e-5 * size)
        values = np.linalg.svd(wanted, compute_uv=False)
        lost = np.linalg.norm(values[2:]) / np.linalg.norm(values)
        np.testing.assert_allclose(small[name], lost, rtol=1e-3, atol=1e-5)
