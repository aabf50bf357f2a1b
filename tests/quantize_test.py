"""Kernels in few bits: exact cases, limits, the objective, files, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import mergejax as mj
from mergejax.checkpoints import convert
from mergejax.quantize.solve import relaxed

RNG = np.random.default_rng(0)
KERNELS = [np.float32(RNG.normal(size=(12, 5))) for _ in range(3)]
ROWS = [np.float32(RNG.normal(size=(40, 12)) @ RNG.normal(size=(12, 12))) for _ in range(2)]
GRAMS = [x.T @ x / np.float32(len(x)) for x in ROWS]
MERGED = {"dense": {"kernel": KERNELS[0], "bias": np.ones(5, np.float32)}}
EXPERTS = [{"dense": {"kernel": k, "bias": np.ones(5, np.float32)}} for k in KERNELS[1:]]
STATS = [{"dense/kernel": g} for g in GRAMS]


def kernel(model):
    return np.asarray(mj.quantize.dequantize(model, like=MERGED)["dense"]["kernel"], np.float64)


def objective(w, anchor):
    ridge = anchor * np.diag(sum(GRAMS)).mean()
    pulled = ridge * np.sum((w - KERNELS[0]) ** 2)
    return pulled + sum(
        np.trace((w - k).T @ g @ (w - k)) for k, g in zip(KERNELS[1:], GRAMS, strict=True)
    )


@pytest.mark.parametrize("form", ["affine", "symmetric"])
@pytest.mark.parametrize("group", [0, 4])
def test_rounding_to_nearest_restated(form, group):
    got = kernel(mj.quantize.round_to_nearest(MERGED, bits=3, group=group, form=form))
    w = KERNELS[0].astype(np.float64)
    for start in range(0, 12, group or 12):
        part = w[start : start + (group or 12)]
        low, high = np.minimum(part.min(0), 0), np.maximum(part.max(0), 0)
        if form == "symmetric":
            high = np.maximum(high, -low)
            low = -high
        scale = (high - low) / 7
        zero = 4 if form == "symmetric" else np.round(-low / scale)
        expected = scale * (np.clip(np.round(part / scale) + zero, 0, 7) - zero)
        # The largest magnitude of a symmetric grid lies half-way between two codes.
        clear = np.abs(part / scale % 1 - 0.5) > 1e-5
        assert clear.mean() > 0.7
        np.testing.assert_allclose(
            got[start : start + len(part)][clear], expected[clear], atol=1e-5
        )


def restated_gptq(w, hessian, bits, damping):
    """Row by row, in float64, without blocks."""
    w = w.astype(np.float64).copy()
    low, high = np.minimum(w.min(0), 0), np.maximum(w.max(0), 0)
    scale = (high - low) / (2**bits - 1)
    zero = np.round(-low / scale)
    damped = hessian + damping * np.diag(hessian).mean() * np.eye(len(hessian))
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    rounded = np.zeros_like(w)
    for i in range(len(w)):
        codes = np.clip(np.round(w[i] / scale) + zero, 0, 2**bits - 1)
        rounded[i] = scale * (codes - zero)
        error = (w[i] - rounded[i]) / upper[i, i]
        w[i:] -= np.outer(upper[i, i:], error)
    return rounded


def test_gptq_restated():
    got = kernel(mj.quantize.gptq(MERGED, STATS[0], bits=4))
    expected = restated_gptq(KERNELS[0], GRAMS[0].astype(np.float64), 4, 0.01)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_gptq_of_more_rows_than_a_block():
    w = np.float32(RNG.normal(size=(150, 3)))
    x = np.float32(RNG.normal(size=(400, 150)))
    gram = x.T @ x / np.float32(400)
    got = mj.quantize.dequantize(mj.quantize.gptq({"kernel": w}, {"kernel": gram}))["kernel"]
    expected = restated_gptq(w, gram.astype(np.float64), 4, 0.01)
    off = np.abs(np.asarray(got) - expected) > 1e-4
    assert off.mean() < 0.02  # a value between two codes may fall to either in float32


def test_gptq_is_nearer_in_the_outputs_and_equals_rounding_for_independent_inputs():
    nearest = kernel(mj.quantize.round_to_nearest(MERGED))
    better = kernel(mj.quantize.gptq(MERGED, STATS[0]))
    error = lambda w: np.trace((w - KERNELS[0]).T @ GRAMS[0] @ (w - KERNELS[0]))
    assert error(better) < 0.8 * error(nearest)
    diagonal = {"dense/kernel": np.diag(np.diag(GRAMS[0]))}
    np.testing.assert_allclose(kernel(mj.quantize.gptq(MERGED, diagonal)), nearest, atol=1e-5)


def test_inputs_that_are_never_active_become_zero():
    gram = GRAMS[0].copy()
    gram[3], gram[:, 3] = 0, 0
    got = kernel(mj.quantize.gptq(MERGED, {"dense/kernel": gram}))
    assert not got[3].any()
    assert np.isfinite(got).all()


@pytest.mark.parametrize("anchor", [0.01, 0.3])
def test_the_relaxation_is_where_the_objective_is_stationary(anchor):
    target, hessian = relaxed(
        jnp.asarray(KERNELS[0]), [jnp.asarray(k) for k in KERNELS[1:]], GRAMS, jnp.float32(anchor)
    )
    best = np.asarray(target, np.float64)
    for _ in range(20):
        step = RNG.normal(size=best.shape)
        assert objective(best + 1e-2 * step, anchor) > objective(best, anchor)
        # Completing the square: what is above the minimum is a quadratic form in the distance.
        above = objective(best + step, anchor) - objective(best, anchor)
        form = np.trace(step.T @ np.asarray(hessian, np.float64) @ step)
        np.testing.assert_allclose(above, form, rtol=1e-3)


def test_experts_guide_better_than_the_merged_model_alone():
    guided = kernel(mj.quantize.expert_guided(MERGED, EXPERTS, STATS, anchor=0.01))
    pooled = {"dense/kernel": sum(GRAMS)}
    alone = kernel(mj.quantize.gptq(MERGED, pooled))
    assert objective(guided, 0.0) < 0.5 * objective(alone, 0.0)


def test_limits_of_bits_and_anchor():
    fine = kernel(mj.quantize.expert_guided(MERGED, EXPERTS, STATS, anchor=0.3, bits=16))
    target, _ = relaxed(
        jnp.asarray(KERNELS[0]), [jnp.asarray(k) for k in KERNELS[1:]], GRAMS, jnp.float32(0.3)
    )
    np.testing.assert_allclose(fine, target, atol=3e-3)
    held = kernel(mj.quantize.expert_guided(MERGED, EXPERTS, STATS, anchor=1e6))
    np.testing.assert_allclose(held, kernel(mj.quantize.round_to_nearest(MERGED)), atol=1e-3)
    same = kernel(mj.quantize.expert_guided(MERGED, [MERGED, MERGED], STATS, anchor=0.0))
    pooled = {"dense/kernel": sum(GRAMS)}
    np.testing.assert_allclose(same, kernel(mj.quantize.gptq(MERGED, pooled)), atol=1e-5)


def test_a_searched_span_has_no_larger_error():
    whole = kernel(mj.quantize.round_to_nearest(MERGED, bits=2))
    searched = kernel(mj.quantize.round_to_nearest(MERGED, bits=2, span="searched"))
    error = lambda w: (np.abs(w - KERNELS[0]) ** 2.4).sum()
    assert error(searched) < error(whole)


@pytest.mark.parametrize("bits", [4, 8])
def test_files_hold_the_same_codes_and_convert_makes_ordinary_ones(tmp_path, bits):
    model = mj.quantize.round_to_nearest(MERGED, bits=bits, group=5)  # the last group is shorter
    path = tmp_path / "model.safetensors"
    mj.quantize.save(path, model)
    again = mj.quantize.load(path)
    np.testing.assert_array_equal(
        again.kernels["dense/kernel"].codes, model.kernels["dense/kernel"].codes
    )
    stored = safetensors.numpy.load_file(path)
    assert stored["dense/kernel#codes"].nbytes == 60 * bits // 8
    convert.convert(path, tmp_path / "whole.safetensors")
    whole = safetensors.numpy.load_file(tmp_path / "whole.safetensors")
    np.testing.assert_array_equal(whole["dense/kernel"], np.float32(kernel(model)))
    np.testing.assert_array_equal(whole["dense/bias"], MERGED["dense"]["bias"])
    with pytest.raises(mj.MergeError, match="is a quantised model; make an ordinary one"):
        mj.merge_checkpoints("average", None, [path, path], tmp_path / "merged")


def test_bad_input_is_one_sentence_each(tmp_path):
    with pytest.raises(mj.MergeError, match="bits=1 must be a whole number from 2 to 16"):
        mj.quantize.round_to_nearest(MERGED, bits=1)
    with pytest.raises(mj.MergeError, match="no form in files; choose bits=4 or 8"):
        mj.quantize.save(tmp_path / "a", mj.quantize.round_to_nearest(MERGED, bits=3))
    with pytest.raises(mj.MergeError, match=r"has shape .* collect it again with this model"):
        mj.quantize.gptq(MERGED, {"dense/kernel": np.eye(5, dtype=np.float32)})
    with pytest.raises(mj.MergeError, match="has non-finite values"):
        mj.quantize.round_to_nearest({"kernel": np.full((2, 2), np.nan, np.float32)})
    (tmp_path / "b.safetensors").write_bytes(b"nothing")
    with pytest.raises(mj.MergeError, match="cannot be read"):
        mj.quantize.load(tmp_path / "b.safetensors")
    assert jax.tree.leaves(MERGED)
