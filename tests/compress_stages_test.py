"""What compressions keep, as stages: restatements in float64, and what they lose."""

import numpy as np
import pytest
import trees
from packing import PACKS, SINGLE, deltas, through, together, zero

import mergejax as mj

# The stages ---------------------------------------------------------------------------------------


def largest(delta, density):
    """The threshold of the whole model, by a sort."""
    magnitudes = np.sort(np.abs(together(delta)))[::-1]
    return magnitudes[max(1, int(density * magnitudes.size)) - 1]


def signs(delta, density, magnitude):
    limit = largest(delta, density)
    return {n: magnitude * np.sign(x) * (np.abs(np.float64(x)) >= limit) for n, x in delta.items()}


def compeft(delta, density, alpha):
    return signs(delta, density, alpha * together(delta).std(ddof=1))


def t_switch(delta, density, norm="whole"):
    flat = together(delta)
    kept = (np.abs(flat) >= largest(delta, density)) & (flat != 0)
    length = np.linalg.norm(flat if norm == "whole" else flat[kept])
    return signs(delta, density, length / np.sqrt(kept.sum()))


def bit_delta(delta):
    return {
        n: np.abs(np.float64(x)).mean() * np.where(x >= 0, 1, -1) if n.endswith("kernel") else x
        for n, x in delta.items()
    }


@pytest.mark.parametrize("density", [0.001, 0.3, 1.0])
@pytest.mark.parametrize("alpha", [1.0, 2.5])
def test_compeft(density, alpha):
    (delta,) = deltas(1)
    (got,) = through(mj.compeft(density=density, alpha=alpha), [delta])
    trees.close(got, compeft(delta, density, alpha))


@pytest.mark.parametrize("density", [0.001, 0.3, 1.0])
@pytest.mark.parametrize("norm", ["whole", "kept"])
def test_t_switch(density, norm):
    (delta,) = deltas(1)
    (got,) = through(mj.t_switch(density=density, norm=norm), [delta])
    trees.close(got, t_switch(delta, density, norm))


def test_bit_delta():
    (delta,) = deltas(1)
    (got,) = through(mj.bit_delta(), [delta])
    trees.close(got, bit_delta(delta))


def test_a_delta_of_equal_elements_stays():
    delta = {"w": np.full(50, 0.1, np.float32), "kernel": np.full((3, 4), 0.1, np.float32)}
    for method in (mj.compeft(), mj.t_switch(density=1.0), mj.bit_delta()):
        trees.close(through(method, [delta])[0], delta, rtol=1e-6, atol=0)


def test_t_switch_keeps_the_norm():
    (delta,) = deltas(1)
    for density in (0.05, 0.5, 1.0):
        (got,) = through(mj.t_switch(density=density), [delta])
        norms = np.linalg.norm(together(got)), np.linalg.norm(together(delta))
        np.testing.assert_allclose(*norms, rtol=1e-5)


def test_bit_delta_has_the_best_factor():
    (delta,) = deltas(1)
    (got,) = through(mj.bit_delta(), [delta])
    x, y = np.float64(delta["kernel"]), np.float64(got["kernel"])
    errors = [np.linalg.norm(x - factor * y) for factor in (0.99, 1, 1.01)]
    assert errors[1] == min(errors)
    assert set(np.sign(y[x == 0])) == {1}


def test_the_best_alpha_of_compeft_for_gaussian_deltas():
    delta = {"w": np.float32(np.random.default_rng(0).normal(size=20000))}

    def error(alpha):
        (got,) = through(mj.compeft(density=0.2, alpha=alpha), [delta])
        return np.linalg.norm(together(delta) - together(got))

    assert error(1.75) < min(error(1.65), error(1.85))


def test_signs_stay_and_only_three_values_are_left():
    (delta,) = deltas(1)
    for method in SINGLE[:2]:
        (got,) = through(method, [delta])
        flat = together(got)
        assert len(np.unique(flat)) == 3
        assert np.all(flat * together(delta) >= 0)


@pytest.mark.parametrize("method", SINGLE)
def test_a_second_compression_keeps_what_the_first_left(method):
    (once,) = through(method, deltas(1))
    (twice,) = through(method, [once])
    if method.startswith("compeft"):  # whose magnitude is that of what comes in
        once, twice = ({n: np.sign(x) for n, x in delta.items()} for delta in (once, twice))
    trees.close(twice, once, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", SINGLE)
def test_zero_deltas_stay_zero(method):
    (delta,) = deltas(1)
    trees.equal(through(method, [zero(delta)])[0], zero(delta))


# Singular directions ------------------------------------------------------------------------------


def truncated(x, rank):
    u, values, vt = np.linalg.svd(np.float64(x), full_matrices=False)
    return u[:, :rank] * values[:rank] @ vt[:rank]


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.7, 1.0])
def test_tsv_compress(fraction):
    several = deltas(3)
    for delta, got in zip(
        several, through(mj.tsv_compress(fraction=fraction), several), strict=True
    ):
        for name, x in delta.items():
            rank = max(1, int(min(x.shape) * (fraction or 1 / 3) + 1e-9))
            expected = truncated(x, rank) if name.endswith("kernel") else x
            np.testing.assert_allclose(got[name], expected, atol=1e-6)


def test_tsv_compress_of_everything_is_the_delta():
    (delta,) = deltas(1)
    trees.close(through("tsv_compress()", [delta])[0], delta, atol=1e-6)


def rounded(x, width, group):
    found = np.empty_like(x)
    for start in range(0, len(x), group):
        part = x[start : start + group]
        unit = np.abs(part).max(0) / (2 ** (width - 1) - 1)
        found[start : start + group] = np.round(part / unit) * unit
    return found


def test_skill_pack():
    (delta,) = deltas(1)
    (got,) = through(PACKS[0], [delta])
    for name, x in delta.items():
        expected = x
        if name.endswith("kernel"):
            u, values, vt = np.linalg.svd(np.float64(x.T), full_matrices=False)  # [out, in]
            expected = sum(
                values[i]
                * rounded(u[:, i : i + 1], width, 4)
                @ rounded(vt.T[:, i : i + 1], width, 4).T
                for i, width in enumerate((8, 4, 2))
            ).T
        np.testing.assert_allclose(got[name], expected, atol=1e-5)


def test_skill_pack_without_rounding_is_the_truncation():
    (delta,) = deltas(1)
    (got,) = through("skill_pack(rank=2, bands=':32')", [delta])
    np.testing.assert_allclose(got["kernel"], truncated(delta["kernel"], 2), atol=1e-6)


def test_more_bits_lose_less():
    delta = {"kernel": np.float32(np.random.default_rng(0).normal(size=(24, 16)))}
    errors = [
        np.linalg.norm(
            through(f"skill_pack(bands=':{bits}', group=8)", [delta])[0]["kernel"] - delta["kernel"]
        )
        for bits in (2, 3, 4, 6, 8, 32)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4 < errors[-2]


@pytest.mark.parametrize("method", ["tsv_compress(fraction=0.5)", PACKS[0]])
def test_a_torch_layout_gives_the_transposed_delta(method):
    several = deltas(1)
    turned = [{n: np.ascontiguousarray(x.T) for n, x in delta.items()} for delta in several]
    expected = through(method, several)[0]
    for got in (
        mj.merge(method, zero(turned[0]), turned, layout="torch"),
        mj.compress.decode(mj.compress.encode(method, turned, layout="torch"))[0],
    ):
        trees.close({n: np.asarray(x).T for n, x in got.items()}, expected, atol=1e-6)


def test_kernels_of_three_axes_are_matrices():
    delta = {"query/kernel": np.float32(np.random.default_rng(0).normal(size=(6, 2, 4)))}
    for method in ("tsv_compress(fraction=0.3)", PACKS[0]):
        (want,) = through(method, [delta])
        (got,) = mj.compress.decode(mj.compress.encode(method, [delta]))
        trees.close(got, want, atol=1e-6)
    flat = truncated(delta["query/kernel"].reshape(6, 8), 1)
    (got,) = through("tsv_compress(fraction=0.3)", [delta])
    np.testing.assert_allclose(got["query/kernel"].reshape(6, 8), flat, atol=1e-6)


@pytest.mark.parametrize("method", [*SINGLE[1:], "tsv_compress(fraction=0.4)", PACKS[0], "emr()"])
def test_stacked_layers_are_packed_one_by_one(method, tmp_path):
    several = deltas(1)
    layers = [{f"{i}/kernel": (i + 1) * x["kernel"] for i in range(3)} for x in several]
    stacked = [{"kernel": np.stack(list(x.values()))} for x in layers]
    packed = mj.compress.encode(method, stacked, scanned="kernel")
    base = zero(stacked[0])
    mj.compress.save(tmp_path / "a", packed, base)
    packed = mj.compress.load(tmp_path / "a", base)
    (got,) = mj.compress.decode(packed)
    (want,) = mj.compress.decode(mj.compress.encode(method, layers))
    np.testing.assert_array_equal(got["kernel"], np.stack(list(want.values())))
    (model,) = mj.compress.restore(base, packed)
    np.testing.assert_array_equal(model["kernel"], got["kernel"])
    expected = mj.merge(method, base, stacked, scanned="kernel")["kernel"]
    np.testing.assert_allclose(got["kernel"], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("skill_pack(bands='20')", "skill_pack(bands='20') must list directions and their bits"),
        ("skill_pack(bands=':4, 2:8')", "skill_pack(bands=':4, 2:8') must list directions and"),
        ("skill_pack(bands=':9')", "skill_pack(bands=':9') must list directions and their bits"),
        ("skill_pack(rank=0)", "skill_pack(rank=...) must be a whole number of at least 1, not 0"),
        ("tsv_compress(fraction=1.5)", "tsv_compress(fraction=...) must be in [0, 1], not 1.5"),
    ],
)
def test_bad_parameters_are_refused_in_words(text, sentence):
    with pytest.raises(mj.MergeError) as error:
        mj.parse(text)
    assert str(error.value).startswith(sentence)
