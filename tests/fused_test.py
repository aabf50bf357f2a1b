"""Fused projections, taken apart and put together."""

import numpy as np
import pytest

import mergejax as mj


def drawn(layout, seed):
    rng = np.random.default_rng(seed)
    kernel, other = rng.normal(size=(6, 12)), rng.normal(size=(6, 6))
    bias = rng.normal(size=12)
    model = {"block_0/qkv/kernel": kernel, "block_0/qkv/bias": bias, "block_0/out/kernel": other}
    flip = (lambda x: x.T) if layout == "torch" else (lambda x: x)
    return {name: np.ascontiguousarray(flip(x), np.float32) for name, x in model.items()}


@pytest.mark.parametrize("layout", ["flax", "torch"])
def test_parts_are_slices_of_the_outputs_and_go_back_to_the_bit(layout):
    model = drawn(layout, 0)
    parts = mj.split_fused(model, {"qkv": 3}, layout=layout)
    kernel = model["block_0/qkv/kernel"]
    second = kernel[:, 4:8] if layout == "flax" else kernel[4:8]
    np.testing.assert_array_equal(parts["block_0/qkv/part_b/kernel"], second)
    np.testing.assert_array_equal(parts["block_0/qkv/part_c/bias"], model["block_0/qkv/bias"][8:])
    assert parts["block_0/out/kernel"] is model["block_0/out/kernel"]
    whole = mj.fuse(parts, layout=layout)
    assert list(whole) == list(model)
    for name, x in model.items():
        np.testing.assert_array_equal(whole[name], x)


def test_a_spectral_method_sees_three_matrices():
    base, *experts = (drawn("flax", seed) for seed in range(3))
    split = [mj.split_fused(model, {"qkv": 3}) for model in (base, *experts)]
    apart = mj.fuse(mj.merge("iso_c()", split[0], split[1:]))
    delta = np.asarray(apart["block_0/qkv/kernel"] - base["block_0/qkv/kernel"], np.float64)
    for part in np.split(delta, 3, axis=1):
        values = np.linalg.svd(part, compute_uv=False)
        np.testing.assert_allclose(values, values[0], rtol=1e-4)
    together = mj.merge("iso_c()", base, experts)["block_0/qkv/kernel"]
    assert abs(np.asarray(together) - np.asarray(apart["block_0/qkv/kernel"])).max() > 1e-2


def test_names_of_pytorch_and_bare_names():
    parts = mj.split_fused(
        {"h.0.attn.c_attn.weight": np.zeros((6, 2), np.float32)}, {"c_attn": 2}, layout="torch"
    )
    assert list(parts) == ["h.0.attn.c_attn.part_a.weight", "h.0.attn.c_attn.part_b.weight"]
    bare = mj.split_fused({"kernel": np.zeros((2, 4), np.float32)}, {"kernel": 2})
    assert list(bare) == ["part_a/kernel", "part_b/kernel"]
    assert mj.fuse(bare)["kernel"].shape == (2, 4)


def test_what_cannot_be_split_is_said_all_at_once():
    with pytest.raises(mj.MergeError) as raised:
        mj.split_fused(drawn("flax", 0), {"qkv": 5, "gate": 2})
    first, second, third = str(raised.value).splitlines()
    assert first.startswith("split_fused: pattern 'gate' matches no leaf")
    assert (
        "'block_0/qkv/kernel' of shape (6, 12) has no 5 equal parts along its output axis 1"
        in second
    )
    assert "'block_0/qkv/bias'" in third
