"""Statistics that add up, and their files: what is kept, what is refused."""

import json

import flax.linen as nn
import jax
import numpy as np
import pytest
import safetensors.numpy

import mergejax as mj
from mergejax import calibration, data
from mergejax.collect import Statistics, add, fisher, gram, load, save

MODEL = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(3)])
X = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)


@pytest.fixture(scope="module")
def collected():
    """(params, Gram matrices of all data, of the first 7 rows, of the others)."""
    params = jax.device_get(MODEL.init(jax.random.key(0), X)["params"])
    apply = jax.jit(lambda params, x: MODEL.apply({"params": params}, x))
    grams = [gram(apply, params, [X[:7], X[7:]]), gram(apply, params, [X[:7]])]
    return params, *grams, gram(apply, params, [X[7:]])


def same(found, expected, rtol=0.0):
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], value, rtol=rtol, atol=rtol)
        np.testing.assert_array_equal(found.rows[name], expected.rows[name])


def test_files_of_two_hosts_add_up_to_the_statistics_of_all_data(collected, tmp_path):
    params, whole, first, second = collected
    information = fisher(MODEL, params, [X])
    assert {float(n) for n in whole.rows.values()} == {12.0}
    save(tmp_path / "a", [first, information], params, data="rows[:7]")
    save(tmp_path / "b", second, params, data=["rows[7:]"])
    a, b = load(tmp_path / "a", params), load(tmp_path / "b")
    assert set(a) == {"gram", "fisher"}
    same(a["gram"], first)
    same(a["fisher"], information)
    total = add(a["gram"], b["gram"])
    # Two roundings of sums of 12 products, and those of the means.
    same(total, whole, rtol=4 * 12 * np.finfo(np.float32).eps)
    assert total.data == ("rows[:7]", "rows[7:]")
    save(tmp_path / "whole", total, params)
    again = load(tmp_path / "whole", params)["gram"]
    same(again, total)
    assert again.data == total.data
    merged = mj.merge("regmean()", None, [params, params], stats={"gram": [again, whole]})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), merged, params)


def test_stacked_layers_add_by_the_rows_of_each():
    parts = [
        Statistics("gram", {"k": np.stack([np.eye(2), scale * np.eye(2)])}, {"k": rows})
        for scale, rows in ((1.0, [1, 0]), (5.0, [3, 2]))
    ]
    found = add(*parts)
    np.testing.assert_array_equal(found["k"], np.stack([np.eye(2), 5 * np.eye(2)]))
    assert found.rows["k"].tolist() == [4.0, 2.0]


def test_to_jax_statistics_are_a_dictionary(collected):
    whole = collected[1]
    doubled = jax.jit(lambda tree: jax.tree.map(lambda x: 2 * x, tree))(whole)
    assert type(doubled) is dict
    np.testing.assert_array_equal(doubled["layers_0/kernel"], 2 * whole["layers_0/kernel"])


def test_what_does_not_add_is_said(collected):
    _, whole, first, second = collected
    named = Statistics("gram", first, first.rows, ("cola",), "a" * 64)
    other = Statistics("gram", second, second.rows, ("cola",), "b" * 64)
    with pytest.raises(ValueError, match="of two models") as caught:
        add(named, other)
    assert "the data 'cola' are in several parts; add each once" in str(caught.value)
    with pytest.raises(ValueError, match="'fisher' does not add to 'gram'"):
        add(whole, Statistics("fisher", whole, whole.rows))
    with pytest.raises(ValueError, match="'layers_2/kernel' is missing or of another shape"):
        add(whole, Statistics("gram", {"layers_0/kernel": np.eye(5)}, {"layers_0/kernel": 1}))
    with pytest.raises(ValueError, match="no statistics to add"):
        add()


def rewritten(path, arrays=lambda x: x, **fields):
    with safetensors.safe_open(path, framework="numpy") as file:
        header = {**file.metadata(), **fields}
    tensors = {name: arrays(x) for name, x in safetensors.numpy.load_file(path).items()}
    safetensors.numpy.save_file(tensors, path, metadata=header)


def test_files_that_do_not_fit_are_refused(collected, tmp_path):
    params, whole, *_ = collected
    path = tmp_path / "a.safetensors"
    save(path, whole, params)
    other = jax.tree.map(lambda x: x + 1, params)
    with pytest.raises(ValueError, match=r"another model.*collect it again from this one"):
        load(path, other)
    with pytest.raises(ValueError, match="was loaded for another model"):
        save(tmp_path / "b", load(path)["gram"], other)
    with pytest.raises(ValueError, match="two statistics of kind 'gram'"):
        save(tmp_path / "b", [whole, whole], params)
    with pytest.raises(ValueError, match=r"missing\.safetensors: cannot be read"):
        load(tmp_path / "missing.safetensors")
    rewritten(path, layout="torch_out_in")
    with pytest.raises(ValueError, match="layout 'torch_out_in', expected 'flax_in_out'"):
        load(path, params)
    rewritten(path, layout="flax_in_out", rows=json.dumps({}))
    with pytest.raises(ValueError, match="is damaged"):
        load(path, params)
    save(path, whole, params)
    rewritten(path, lambda x: x + 1)
    with pytest.raises(ValueError, match="is damaged"):
        load(path, params)
    safetensors.numpy.save_file({"w": np.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"holds no statistics; they are written by mj\.collect"):
        load(path, params)
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_task_without_examples_is_told(tmp_path):
    nothing = data.task.Split(np.zeros((0, 8, 8, 1), np.float32), np.zeros(0, np.int32))
    tasks = {"empty": data.task.Task("empty", nothing, nothing, nothing, ("a", "b"), "empty")}
    with pytest.raises(ValueError, match="'empty' has no training example to collect gram from"):
        calibration.statistics(["gram"], None, tasks, None, tmp_path, None)
    assert not list(tmp_path.iterdir())
