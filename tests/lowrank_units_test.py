"""Adapters by their spectra and rank units: DC-Merge, DO-Merging, LoRA-LEGO, RMM."""

import jax
import numpy as np
import pytest
from adapters import SHAPES, close, drawn, summed, wide

import mergejax as mj
from mergejax.lowrank import Factors
from mergejax.lowrank.do_merging import mixture
from mergejax.lowrank.lego import cluster_up_to_sign


def zeroed(adapter):
    return {n: Factors(f.down, 0 * f.up, f.scale) for n, f in adapter.items()}


def regauged(adapter, seed=0):
    """The same deltas with rescaled, negated and permuted rank units."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, f in adapter.items():
        scale = rng.choice([-1, 1], f.rank) * rng.uniform(0.1, 10, f.rank)
        order = rng.permutation(f.rank)
        down, up = (f.down * scale)[:, order], (f.up / scale[:, None])[order]
        found[name] = Factors(np.float32(down), np.float32(up), f.scale)
    return found


METHODS = [
    "lego(rank=2)",
    "do_merging()",
    "dc_merge(rank=1)",
    "dc_merge(rank=2, smoothing='linear')",
]


@pytest.mark.parametrize("text", METHODS)
def test_a_scale_is_the_same_as_scaled_factors(text):
    folded = [{n: Factors(f.down, f.scale * f.up) for n, f in a.items()} for a in drawn()]
    close(mj.lowrank.merge(text, folded), wide(mj.lowrank.merge(text, drawn())))


@pytest.mark.parametrize("text", METHODS)
def test_zero_adapters_give_zero(text):
    zero = {n: np.zeros(s) for n, s in SHAPES.items()}
    close(mj.lowrank.merge(text, [zeroed(a) for a in drawn()]), zero, 0)


@pytest.mark.parametrize("text", METHODS)
def test_a_zero_adapter_among_others_and_a_repeated_one_stay_finite(text):
    adapters = drawn()
    for several in ([zeroed(adapters[0]), *adapters[1:]], [adapters[1]] * 3):
        for x in wide(mj.lowrank.merge(text, several)).values():
            assert np.isfinite(x).all()


@pytest.mark.parametrize("text", METHODS[1:])
def test_the_order_of_the_adapters_does_not_matter(text):
    got = mj.lowrank.merge(text, drawn())
    close(mj.lowrank.merge(text, drawn()[::-1]), wide(got), 1e-4)


@pytest.mark.parametrize("text", ["lego(rank=2)", *METHODS[2:]])
def test_transposed_factors_give_the_transposed_delta(text):
    turned = [{n: Factors(f.up.T, f.down.T, f.scale) for n, f in a.items()} for a in drawn()]
    got = wide(mj.lowrank.merge(text, turned))
    close({n: x.T for n, x in got.items()}, wide(mj.lowrank.merge(text, drawn())), 1e-4)


@pytest.mark.parametrize("text", METHODS[1:])
def test_the_gauge_of_the_factors_does_not_matter(text):
    got = wide(mj.lowrank.merge(text, drawn()))
    close(mj.lowrank.merge(text, [regauged(a) for a in drawn()]), got, 1e-4)


# DC-Merge -----------------------------------------------------------------------------------------


def smoothed(values, smoothing, ratio):
    if smoothing == "none":
        return values
    top = 1 if smoothing == "mean" else min(ratio, values[0] / values[-1])
    shape = np.linspace(top, 1, len(values))
    return shape * values.sum() / shape.sum()


def dc_merge(adapters, rank, smoothing, ratio, density):
    merged = {}
    for name in SHAPES:
        triplets = []
        for adapter in adapters:
            u, values, vt = np.linalg.svd(wide(adapter)[name], full_matrices=False)
            triplets.append((u[:, :rank], smoothed(values[:rank], smoothing, ratio), vt[:rank]))

        def polar(bases):
            u, _, vt = np.linalg.svd(np.concatenate(bases, 1), full_matrices=False)
            return u @ vt

        left, right = polar([u for u, _, _ in triplets]), polar([vt.T for _, _, vt in triplets])
        cores = [left.T @ (u * values) @ vt @ right for u, values, vt in triplets]
        kept = []
        for core in cores:
            count = max(1, int(density * core.size))
            limit = np.sort(np.abs(core).ravel())[-count]
            kept.append(core * (np.abs(core) >= limit))
        sign = np.sign(sum(kept))
        agree = [(np.sign(core) == sign) & (core != 0) for core in kept]
        core = sum(c * a for c, a in zip(kept, agree, strict=True)) / np.maximum(sum(agree), 1)
        blocks = np.kron(np.eye(len(adapters)), np.ones((rank, rank)))
        merged[name] = left @ (core * blocks) @ right.T
    return merged


@pytest.mark.parametrize("smoothing", ["mean", "linear", "none"])
@pytest.mark.parametrize("density", [0.001, 0.5])
def test_dc_merge(smoothing, density):
    adapters = drawn((2, 3), (1.0, 0.5))
    host = f"ties(density={density}, scope='tensor', cut='exact', zero='plus')"
    got = mj.lowrank.dc_merge(adapters, rank=2, smoothing=smoothing, ratio=1.5, host=host)
    close(got, dc_merge(adapters, 2, smoothing, 1.5, density))
    assert {f.rank for f in got.values()} == {4}


def test_dc_merge_of_one_adapter_without_smoothing_is_the_adapter():
    adapter = drawn()[1]
    got = mj.lowrank.dc_merge([adapter], rank=3, smoothing="none", host="average()")
    close(got, wide(adapter))


@pytest.mark.parametrize("smoothing", ["mean", "linear"])
def test_smoothing_keeps_the_nuclear_norm_also_of_adapters_of_lower_rank(smoothing):
    adapter = drawn()[0]  # rank 2
    got = mj.lowrank.dc_merge([adapter], rank=4, smoothing=smoothing, host="average()")
    for name, x in wide(adapter).items():
        norms = (np.linalg.norm(y, "nuc") for y in (wide(got)[name], x))
        np.testing.assert_allclose(*norms, rtol=1e-5)
        assert np.linalg.matrix_rank(wide(got)[name], tol=1e-4) == 2


# DO-Merging ---------------------------------------------------------------------------------------


def test_do_merging_of_one_adapter_is_the_adapter():
    close(mj.lowrank.do_merging([drawn()[1]]), wide(drawn()[1]))


def test_do_merging_averages_the_magnitudes():
    adapters = drawn()
    got = wide(mj.lowrank.do_merging(adapters, scaling=0.5))
    for name in SHAPES:
        norms = [np.linalg.norm(wide(a)[name], axis=1) for a in adapters]
        np.testing.assert_allclose(
            np.linalg.norm(got[name], axis=1), 0.5 * np.mean(norms, 0), rtol=1e-4
        )


def test_do_merging_with_a_large_penalty_is_the_sum_of_the_directions():
    adapters = drawn()
    got = mj.lowrank.do_merging(adapters, penalty=1e6, step_size=1e-6)
    expected = {}
    for name in SHAPES:
        deltas = [wide(a)[name] for a in adapters]
        norms = [np.linalg.norm(d, axis=1, keepdims=True) for d in deltas]
        total = sum(d / n for d, n in zip(deltas, norms, strict=True))
        total /= np.linalg.norm(total, axis=1, keepdims=True)
        expected[name] = np.mean(norms, 0) * total
    close(got, expected, 2e-3)


def test_do_merging_descends_its_objective_in_dense_form():
    """The mixtures that it finds beat the directions themselves, evaluated on dense matrices."""
    deltas = [wide(a)["b/kernel"] for a in drawn()]
    directions = [d / np.linalg.norm(d, axis=1, keepdims=True) for d in deltas]
    inner = lambda x, y: (x * y).sum() / len(x)
    gram = np.array([[inner(x, y) for y in directions] for x in directions])
    mixed = np.asarray(mixture(np.float32(gram), np.float32(0.1), np.float32(0.01), 300))

    def loss(mixture):
        rows = [sum(c * d for c, d in zip(row, directions, strict=True)) for row in mixture]
        pairs = sum(inner(rows[i], rows[j]) ** 2 for i in range(3) for j in range(i))
        return pairs + 0.1 * sum(inner(r - d, r - d) for r, d in zip(rows, directions, strict=True))

    def slope(i, j):
        step = np.zeros((3, 3))
        step[i, j] = 1e-4
        return (loss(mixed + step) - loss(mixed - step)) / 2e-4

    assert loss(mixed) < 0.9 * loss(np.eye(3))
    assert max(abs(slope(i, j)) for i in range(3) for j in range(3)) < 2e-3


# LoRA-LEGO ----------------------------------------------------------------------------------------


def test_lego_with_a_cluster_for_every_unit_is_the_sum():
    adapters = drawn((2, 2), (1.0, 0.5))
    close(mj.lowrank.lego(adapters, rank=4), summed(adapters, [1, 1]))


def test_lego_of_equal_adapters_is_that_adapter_in_any_gauge():
    adapter = drawn()[1]
    several = [adapter, regauged(adapter, 1), regauged(adapter, 2)]
    for seed in range(4):
        close(mj.lowrank.lego(several, rank=3, seed=seed), wide(adapter), 1e-4)


def test_lego_keeps_the_mean_norm_of_a_cluster():
    units = [np.float32([[3.0, 0.1]]), np.float32([[5.0, -0.1]])]
    adapters = [{"q": Factors(u.T, u)} for u in units]
    got = mj.lowrank.lego(adapters, rank=1)["q"]
    whole = np.linalg.norm(np.concatenate([got.down[:, 0], got.up[0]]))
    wanted = np.mean([np.linalg.norm(u) for u in units]) * np.sqrt(2)
    np.testing.assert_allclose(whole, wanted, rtol=1e-6)


def test_clusters_are_those_of_a_search_over_all_partitions():
    rng = np.random.default_rng(3)
    centers = np.eye(4)[:3] * 5
    labels = np.array([0, 0, 1, 1, 2, 2, 2])
    signs = rng.choice([-1, 1], 7)
    units = signs[:, None] * (centers[labels] + 0.1 * rng.normal(size=(7, 4)))
    for seed in range(5):
        _, found = cluster_up_to_sign(units, 3, np.random.default_rng(seed))
        assert all(
            (found[i] == found[j]) == (labels[i] == labels[j]) for i in range(7) for j in range(7)
        )


def test_every_cluster_has_units_even_where_units_are_equal():
    units = np.ones((5, 2))
    centers, _ = cluster_up_to_sign(units, 3, np.random.default_rng(0))
    np.testing.assert_array_equal(centers, 1)


def test_lego_draws_by_seed_alone():
    adapters = drawn()
    first = wide(mj.lowrank.lego(adapters, rank=2, seed=5))
    close(mj.lowrank.lego(adapters, rank=2, seed=5), first, 0)


def test_lego_refuses_more_clusters_than_units():
    with pytest.raises(mj.MergeError, match=r"lego\(rank=4\) is above the 3 rank units"):
        mj.lowrank.lego(drawn((2, 1)), rank=4)


# RMM ----------------------------------------------------------------------------------------------


def sides(adapter, name):
    """Balanced rank units in float64."""
    f = adapter[name]
    down, up = np.float64(f.down).T, f.scale * np.float64(f.up)
    shift = np.sqrt(np.linalg.norm(up, axis=1) / np.linalg.norm(down, axis=1))[:, None]
    return down * shift, up / shift


def test_as_many_bases_as_adapters_recover_each_exactly():
    adapters = drawn()
    shared = mj.lowrank.rmm(adapters, bases=3)
    for i, adapter in enumerate(adapters):
        got = mj.lowrank.recover(shared, i)
        close(got, wide(adapter))
        assert {n: f.rank for n, f in got.items()} == {n: f.rank for n, f in adapter.items()}
    errors = mj.lowrank.recovery_errors(shared, adapters)
    assert max(max(several) for several in errors.values()) < 1e-5


@pytest.mark.parametrize("bases", [1, 2])
def test_the_bases_are_the_best_in_least_squares(bases):
    adapters = drawn((2, 2, 2))
    shared = mj.lowrank.rmm(adapters, bases=bases)
    recovered = [mj.lowrank.recover(shared, i) for i in range(3)]
    for name in SHAPES:
        for rho in range(2):
            for side in (0, 1):
                x = np.stack([sides(a, name)[side][rho] for a in adapters])
                u, values, vt = np.linalg.svd(x, full_matrices=False)
                best = u[:, :bases] * values[:bases] @ vt[:bases]
                pairs = [(r[name].down[:, rho], r[name].up[rho]) for r in recovered]
                found = np.stack([pair[side] for pair in pairs])
                np.testing.assert_allclose(found, best, atol=1e-5)


def test_errors_are_those_of_the_dense_deltas_and_fall_with_more_bases():
    adapters = drawn()
    before = 2.0
    for bases in (1, 2, 3):
        shared = mj.lowrank.rmm(adapters, bases=bases)
        errors = mj.lowrank.recovery_errors(shared, adapters)
        for i, adapter in enumerate(adapters):
            got = wide(mj.lowrank.recover(shared, i))
            for name, x in wide(adapter).items():
                lost = np.linalg.norm(got[name] - x) / np.linalg.norm(x)
                np.testing.assert_allclose(errors[name][i], lost, atol=1e-5)
        mean = np.mean([errors[name] for name in SHAPES])
        assert mean < before
        before = mean


def test_one_basis_recovers_equal_adapters():
    adapter = drawn()[1]
    shared = mj.lowrank.rmm([adapter] * 3, bases=1)
    close(mj.lowrank.recover(shared, 2), wide(adapter))


def test_shared_bases_are_a_pytree():
    shared = jax.tree.map(np.asarray, mj.lowrank.rmm(drawn(), bases=3))
    close(mj.lowrank.recover(shared, 0), wide(drawn()[0]))


@pytest.mark.parametrize("bases", [0, 4, 1.5])
def test_an_impossible_number_of_bases_is_refused(bases):
    with pytest.raises(mj.MergeError, match=r"must be an integer in \[1, 3\], the number of"):
        mj.lowrank.rmm(drawn(), bases=bases)
