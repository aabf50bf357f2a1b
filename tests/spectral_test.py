"""Spectral methods: their restatements, their spectra, their symmetries, degenerate inputs."""

import numpy as np
import pytest
import reference_spectral as reference
from spectral_models import IN, OUT, deltas, merged, near, one_of_each, rotation, spectrum

import mergejax as mj


def svc(taus, alpha=1.0):
    return reference.svc(0.5 * sum(taus), taus, alpha)


def boosted(taus, beta=0.01):
    return reference.boosted(sum(taus), beta)


def boosted_tsv(taus, beta):
    return reference.boosted(reference.tsv(taus), beta)


# A method, its restatement, the options of both.
CASES = [
    ("tsv_merge()", reference.tsv, {}),
    ("tsv_merge(scaling=0.5)", lambda taus: 0.5 * reference.tsv(taus), {}),
    ("r_tsvm()", reference.r_tsvm, {}),
    ("r_tsvm(outlier_weight=1.0)", reference.r_tsvm, {"outlier_weight": 1.0}),
    ("iso_c()", reference.iso_c, {}),
    ("iso_cts(common=0.5)", reference.iso_cts, {"common": 0.5}),
    ("iso_cts(common=0.2)", reference.iso_cts, {"common": 0.2}),
    ("iso_cts(common=1.0)", reference.iso_c, {}),
    ("cart()", reference.cart, {}),
    ("cart(density=0.5, scaling=1.5)", reference.cart, {"density": 0.5, "scaling": 1.5}),
    ("task_arithmetic(0.5)|svc()", svc, {}),
    ("task_arithmetic(0.5)|svc(alpha=0.4)", svc, {"alpha": 0.4}),
    ("total()|subspace_boosting()", boosted, {}),
    ("total()|subspace_boosting(beta=0.4)", boosted, {"beta": 0.4}),
    ("tsv_merge()|subspace_boosting(beta=0.3)", boosted_tsv, {"beta": 0.3}),
]
METHODS = [method for method, _, _ in CASES]


@pytest.mark.parametrize(("method", "restated", "options"), CASES, ids=METHODS)
def test_equals_its_restatement(method, restated, options):
    for taus in (deltas(3), [*deltas(2, seed=1), np.zeros((OUT, IN))]):
        near(merged(method, taus, base=deltas(1, seed=9)[0]), restated(taus, **options))


# Symmetries ---------------------------------------------------------------------------------------

EQUIVARIANT = [*METHODS, "opcm()"]


@pytest.mark.parametrize("method", [m for m in EQUIVARIANT if "r_tsvm" not in m])
def test_rotating_inputs_and_outputs_rotates_the_merged_delta(method):
    taus, left, right = deltas(2, seed=4), rotation(OUT, 1), rotation(IN, 2)
    rotated = merged(method, [left @ tau @ right.T for tau in taus])
    near(rotated, left @ merged(method, taus) @ right.T, 2e-5)


@pytest.mark.parametrize(
    "method",
    ["tsv_merge()", "r_tsvm()", "iso_c()", "cart()", "total()|subspace_boosting(0.3)", "opcm()"],
)
def test_transposed_experts_give_the_transposed_answer(method):
    taus = deltas(2, seed=5)
    near(merged(method, [tau.T for tau in taus]), merged(method, taus).T)


@pytest.mark.parametrize("method", ["iso_cts(common=0.5)", "task_arithmetic(0.5)|svc(0.1)"])
def test_one_sided_methods_tell_inputs_from_outputs(method):
    taus = deltas(2, seed=5)
    got, turned = merged(method, taus), merged(method, [tau.T for tau in taus]).T
    assert np.linalg.norm(got - turned) > 0.01 * np.linalg.norm(got)


@pytest.mark.parametrize("factor", [1e-18, 1e-6, 1e12])
@pytest.mark.parametrize("method", one_of_each(METHODS))
def test_deltas_of_any_scale(method, factor):
    taus = deltas(2, seed=6)
    near(merged(method, [factor * tau for tau in taus]) / factor, merged(method, taus))


# Spectra ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["iso_c()", "iso_cts(common=0.5)"])
def test_isotropic_spectra_are_flat(method):
    values = spectrum(merged(method, deltas(3)))
    np.testing.assert_allclose(values, values.mean(), rtol=1e-5)


def test_iso_c_keeps_the_nuclear_norm_of_the_sum():
    taus = deltas(3)
    np.testing.assert_allclose(
        spectrum(merged("iso_c()", taus)).sum(), spectrum(sum(taus)).sum(), rtol=1e-5
    )


def test_tsv_has_the_spectrum_of_what_it_keeps():
    taus = deltas(3)
    kept = np.concatenate([spectrum(tau)[: OUT // 3] for tau in taus])
    np.testing.assert_allclose(
        spectrum(merged("tsv_merge()", taus)), np.sort(kept)[::-1], rtol=1e-5
    )


def test_r_tsvm_of_dense_experts_without_outlier_weights_is_tsv():
    taus = [tau + 1 / 128 for tau in deltas(3)]
    near(merged("r_tsvm(outlier_weight=1.0)", taus), merged("tsv_merge()", taus))


def test_r_tsvm_gives_denser_experts_more_directions():
    dense, sparse = (tau + 1 / 128 for tau in deltas(2))
    sparse = np.where(np.arange(IN) < 2, sparse, 0.0)
    values = spectrum(merged("r_tsvm(outlier_weight=1.0)", [dense, sparse]))
    kept = [spectrum(dense)[:4], spectrum(sparse)[:1]]
    np.testing.assert_allclose(values[:5], np.sort(np.concatenate(kept))[::-1], rtol=1e-5)


def test_tsv_has_the_rank_of_what_it_keeps():
    values = spectrum(merged("tsv_merge()", deltas(4)))
    assert np.all(values[:4] > 0.1)
    assert np.all(values[4:] < 1e-5)


def test_tsv_adds_up_experts_whose_directions_are_orthogonal():
    taus = [np.zeros((OUT, IN)), np.zeros((OUT, IN))]
    taus[0][:3, :4], taus[1][3:, 4:] = deltas(1)[0][:3, :4], deltas(1)[0][3:, 4:]
    near(merged("tsv_merge()", taus), sum(taus))


def test_cart_keeping_every_direction_is_the_mean_whatever_the_scaling():
    taus = deltas(3)
    near(merged("cart(density=1.0, scaling=5.0)", taus), sum(taus) / 3)


def test_boosting_changes_no_singular_vector():
    taus = deltas(2)
    left, values, right = reference.svd(sum(taus))
    core = left.T @ merged("total()|subspace_boosting(0.4)", taus) @ right
    np.testing.assert_allclose(core, np.diag(np.diag(core)), atol=1e-5)
    assert np.all(np.diag(core) >= values - 1e-5)
    assert np.isclose(np.diag(core)[0], values[0], rtol=1e-5)


def test_calibration_factors_are_between_zero_and_one_over_alpha():
    taus = deltas(4)
    before, after = sum(taus), merged("total()|svc(alpha=0.5)", taus)
    left, values, right = reference.svd(before)
    factors = np.diag(left.T @ after @ right) / values
    assert np.all(factors > 0)
    assert np.all(factors <= 2 + 1e-5)


# Degenerate inputs --------------------------------------------------------------------------------

_ONE = deltas(1, seed=7)[0]
_LOW = np.outer(_ONE[:, 0], _ONE[0])


@pytest.mark.parametrize("method", one_of_each(METHODS))
@pytest.mark.parametrize(
    "taus",
    [[_ONE] * 3, [_ONE, -_ONE], [_LOW, _LOW], [_LOW, 2 * _LOW.copy(), _ONE], [0 * _ONE, _LOW]],
    ids=["equal", "opposite", "rank one", "parallel", "one zero"],
)
def test_degenerate_experts_give_a_finite_answer(method, taus):
    got = merged(method, taus)
    assert np.isfinite(got).all()
    assert np.linalg.norm(got) <= 5 * sum(np.linalg.norm(tau) for tau in taus)


@pytest.mark.parametrize("method", ["tsv_merge()", "r_tsvm()", "iso_c()", "iso_cts(common=0.3)"])
def test_an_expert_that_changes_nothing_brings_no_direction(method):
    taus = deltas(2, seed=8)
    near(merged(method, [taus[0], 0 * taus[0], taus[1]]), merged(method, taus))


@pytest.mark.parametrize("method", ["iso_c()", "iso_cts()", "total()|subspace_boosting(0.0)"])
def test_directions_without_a_singular_value_stay_without(method):
    values = spectrum(merged(method, [_LOW, 3 * _LOW]))
    assert values[0] > 0
    assert np.all(values[1:] < 1e-5 * values[0])


def test_equal_experts_share_their_directions():
    near(merged("tsv_merge()", [_ONE, _ONE]), reference.truncated(_ONE, OUT // 2))


def test_more_experts_than_directions_are_averaged():
    taus = deltas(5, shape=(OUT, 3))
    near(merged("tsv_merge()", taus), sum(taus) / 5)
    near(merged("tsv_merge()", [*taus[:3], *[0 * tau for tau in taus]]), reference.tsv(taus[:3]))


def test_a_common_share_out_of_range_is_refused():
    for value in (1.5, [0.5, 0.5], "all"):
        with pytest.raises(mj.MergeError, match=r"common=.*one number in \[0, 1\], not "):
            list(mj.chains.walk(mj.iso_cts(common=value)))
