"""Small cases whose answers the specifications of the methods give."""

import numpy as np
import pytest

import mergejax as mj


def leaf(*values):
    return {"w": np.asarray(values, np.float32)}


def merged(method, base, *experts):
    return np.asarray(mj.merge(method, base, list(experts))["w"]).tolist()


A, B, C = [4, -3, 2, -1], [1, 2, 2, -2], [-1, -3, 0.5, 1]
LEFT, RIGHT = [4, -3, 0, 0], [0, 0, 2, -1]  # these changed nothing in common
# What the specification says of a method: the chain, the deltas, the merged delta.
KNOWN = {
    "breadcrumbs without limits is task arithmetic": (
        "breadcrumbs(density=1.0, top=0.0, scaling=0.5)",
        [A, B],
        [2.5, -0.5, 2, -1.5],
    ),
    "breadcrumbs never keeps the largest": (
        "breadcrumbs(density=1.0, top=0.25, scaling=1.0)",
        [A],
        [0, -3, 2, -1],
    ),
    "regions of everything are the mean": (
        "localize_and_stitch(density=1.0)",
        [A, B],
        [2.5, -0.5, 2, -1.5],
    ),
    "regions apart are kept in full": ("localize_and_stitch(density=0.5)", [LEFT, RIGHT], A),
    "magmax takes a duplicate once": ("magmax(1.0)", [A, B, A], [4, -3, 2, -2]),
    "RAM keeps in full what one expert changed": ("ram()", [LEFT, RIGHT], A),
    "RAM averages what all changed": ("ram()", [A, B], [2.5, -0.5, 2, -1.5]),
    "RAM+ of supports apart is RAM": ("ram_plus(gain=0.9)", [LEFT, RIGHT], A),
    "RAM+ without a gain is RAM": ("ram_plus(gain=0.0)", [A, LEFT], [4, -3, 2, -1]),
    "power 0 of changes is the mean": ("delta_guided(power=0.0)", [A, B], [2.5, -0.5, 2, -1.5]),
    "a large power of changes is the larger": ("delta_guided(power=400.0)", [A, B], [4, -3, 2, -2]),
    "a large power of norms is the larger": ("change_weighted(power=400.0)", [A, B], A),
    "power 0 of metrics is the mean": (
        "metrics_weighted(metrics=[1, 9], power=0.0)",
        [A, B],
        [2.5, -0.5, 2, -1.5],
    ),
    "a large power of losses is the best": (
        "metrics_weighted(metrics=[9, 1], power=400.0)",
        [A, B],
        B,
    ),
    "multi-SLERP of duplicates": ("multislerp()", [A, A, A], A),
    "Karcher mean of duplicates": ("karcher()", [A, A, A], A),
    "NAN of equal norms is half the sum": ("nan(of='deltas')", [[3, 4], [4, 3]], [3.5, 3.5]),
    "SCE of equal energies is a mean of signs": ("sce(density=1.0)", [[1, -2], [1, 2]], [1, 2]),
    "VaRM is the mean by squared norms": ("varm()", [[3, 0], [0, 1]], [2.7, 0.1]),
    "the last checkpoint": ("ema(decay=0.0)", [A, B, C], C),
    "a window of one": ("window_average(length=1)", [A, B, C], C),
    "nearswap with a small t stays": ("nearswap(t=0.0)", [A], [0, 0, 0, 0]),
    "nearswap with a large t adopts": ("nearswap(t=9.0)", [A], A),
    "TIES of one expert is its trimmed delta": (
        "ties(density=0.5, cut='exact', scope='tensor')",
        [A],
        [4, -3, 0, 0],
    ),
    "breadcrumbs of a leaf too small for a top keeps it": (
        "breadcrumbs(density=0.5, top=0.01, scaling=1.0, scope='tensor')",
        [A],
        [4, -3, 0, 0],
    ),
    "magmax in another order": ("magmax(1.0)", [B, A], [4, -3, 2, -2]),
    "RAM+ in the authors' later form": ("ram_plus(gain=1, limit=1)", [[3, 1], [0, 2]], [6, 1.5]),
    "metrics of another unit": (
        "metrics_weighted(metrics=[10, 90])",
        [[10, 0], [0, 10]],
        [9, 1],
    ),
    "SCE weighs small energies, too": ("sce(density=1.0)", [[2e-5, 0], [1e-5, 0]], [1.8e-5, 0]),
    "Model Stock of small deltas": (
        "model_stock()",
        [[1e-6, 0], [0.6e-6, 0.8e-6]],
        [0.6e-6, 0.3e-6],
    ),
    "SLERP of opposites is straight": ("slerp()", [[4, 0], [-2, 0]], [1, 0]),
    "SLERP with zero is straight": ("slerp()", [[4, 0], [0, 0]], [2, 0]),
    "NuSLERP ends at its first": ("nuslerp(weights=[1, 0])", [A, B], A),
    "multi-SLERP of two is the middle": ("multislerp()", [[3, 0], [0, 4]], [3.5 / 2**0.5] * 2),
    "Karcher mean of two is the middle": ("karcher()", [[3, 0], [0, 4]], [3.5 / 2**0.5] * 2),
    "TIES max of one sign": ("ties(density=1.0, reduction='max')", [A, B], [4, -3, 2, -2]),
}


@pytest.mark.parametrize(("method", "taus", "expected"), KNOWN.values(), ids=KNOWN)
def test_known_answers(method, taus, expected):
    zero = leaf(*[0] * len(expected))
    np.testing.assert_allclose(
        merged(method, zero, *[leaf(*tau) for tau in taus]), expected, rtol=2e-6
    )


def test_equal_magnitudes_go_to_the_later_expert_and_to_the_first_place():
    zero = leaf(0, 0, 0, 0)
    assert merged("magmax(scaling=1.0)", zero, leaf(2, -1, 3, 0), leaf(-2, 1, 2, 0)) == [
        -2,
        1,
        3,
        0,
    ]
    assert merged("breadcrumbs(density=0.5, top=0.0, scaling=1.0)", zero, leaf(1, -1, 1, -1)) == [
        1,
        -1,
        0,
        0,
    ]


def test_sce_of_one_expert_or_at_full_density_selects_everything():
    zero = leaf(0, 0, 0)
    assert merged("sce(density=0.1)", zero, leaf(1, -2, 3)) == [1, -2, 3]
    assert merged("sce(density=1.0)", zero, leaf(1, -2, 3), leaf(1, -2, 3)) == [1, -2, 3]
    assert merged("sce(density=0.5)", zero, leaf(1, -2, 3), leaf(1, -2, 3)) == [0, 0, 0]


def test_model_stock_of_equal_and_of_orthogonal_and_of_opposite_deltas():
    zero = leaf(0, 0)
    assert merged("model_stock()", zero, leaf(2, 0), leaf(2, 0)) == [2, 0]
    assert merged("model_stock()", zero, leaf(2, 0), leaf(0, 2)) == [0, 0]
    assert merged("model_stock()", zero, leaf(2, 0), leaf(-2, 0)) == [0, 0]
    obtuse = merged("model_stock(clip=True)", zero, leaf(1, 0), leaf(-0.5, 0.8))
    assert obtuse == [0, 0]
    assert merged("model_stock()", zero, leaf(1, 0), leaf(-0.5, 0.8))[1] < 0


def test_directions_that_cancel_are_averaged_and_a_zero_has_none():
    zero = leaf(0, 0)
    assert merged("multislerp()", zero, leaf(4, 0), leaf(-2, 0)) == [1, 0]
    assert merged("multislerp()", zero, leaf(4, 0), leaf(0, 0)) == [2, 0]
    assert merged("karcher()", None, leaf(4, 0), leaf(0, 0)) == [2, 0]
    assert merged("karcher()", None, leaf(0, 0), leaf(0, 0)) == [0, 0]


def test_pcb_of_constant_deltas_and_of_zeros_stays_finite():
    zero = leaf(0, 0, 0)
    assert merged("pcb()", zero, leaf(0, 0, 0), leaf(0, 0, 0)) == [0, 0, 0]
    assert np.isfinite(merged("pcb()", zero, leaf(1, 1, 1), leaf(1, 1, 1))).all()


def test_an_expert_without_a_norm_adds_nothing_to_nan():
    assert merged("nan()", leaf(1.0), leaf(0.0), leaf(3.0)) == [1.0 + 2.0]


@pytest.mark.parametrize(
    ("method", "count", "problem"),
    [
        ("model_stock()", 1, "'model_stock' takes at least 2 experts, not 1"),
        ("nearswap()", 2, "'nearswap' takes exactly 1 expert, not 2"),
        ("analogy()", 2, "'analogy' takes exactly 3 experts, not 2"),
        ("chat_vector()", 3, "'chat_vector' takes exactly 2 experts, not 3"),
        ("metrics_weighted(metrics=[1, 2, 3])", 2, "has 3 numbers, but there are 2 experts"),
    ],
)
def test_a_wrong_number_of_experts_is_one_sentence(method, count, problem):
    with pytest.raises(mj.MergeError, match=problem):
        merged(method, leaf(0.0), *[leaf(1.0)] * count)


def test_values_out_of_range_are_refused():
    with pytest.raises(
        mj.MergeError, match=r"metrics_weighted\(metrics=...\) must be in \(0, inf\)"
    ):
        mj.metrics_weighted(metrics=[1, -1])
    with pytest.raises(mj.MergeError, match="a whole number of at least 1, not 0"):
        mj.window_average(length=0)
