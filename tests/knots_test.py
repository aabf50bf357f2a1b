"""KnOTS against a dense singular value decomposition, and its invariants."""

import numpy as np
import pytest
import reference
from adapters import SHAPES, close, drawn, summed, wide

import mergejax as mj
from mergejax.lowrank import Factors


def knots(adapters, density, scaling, shared="output"):
    """By a dense SVD of the updates side by side; TIES over the coordinates of all leaves."""
    axis = 0 if shared == "output" else 1
    coordinates, bases = [{} for _ in adapters], {}
    for name in SHAPES:
        deltas = [wide(adapter)[name] for adapter in adapters]
        deltas = deltas if axis == 0 else [d.T for d in deltas]
        u, values, vt = np.linalg.svd(np.concatenate(deltas), full_matrices=False)
        kept = values > 1e-6 * values[0]
        parts = np.split((u * values)[:, kept], len(adapters))
        bases[name] = vt[kept]
        for own, part in zip(coordinates, parts, strict=True):
            own[name] = part
    merged = reference.ties_delta(coordinates, density=density)
    dense = {n: scaling * merged[n] @ bases[n] for n in SHAPES}
    return dense if axis == 0 else {n: x.T for n, x in dense.items()}


@pytest.mark.parametrize("shared", ["output", "input"])
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_knots_with_ties(density, shared):
    adapters = drawn()
    host = f"ties(density={density})"
    got = mj.lowrank.knots(adapters, host=host, scaling=0.6, shared=shared)
    close(got, knots(adapters, density, 0.6, shared))


def test_knots_thresholds_run_over_all_leaves():
    adapters = drawn()
    tiny = [
        {**a, "b/kernel": Factors(a["b/kernel"].down, 1e-3 * a["b/kernel"].up)} for a in adapters
    ]
    got = wide(mj.lowrank.knots(tiny, host="ties(density=0.2)"))
    assert np.all(got["b/kernel"] == 0)
    assert np.any(got["a/kernel"] != 0)


@pytest.mark.parametrize("shared", ["output", "input"])
def test_knots_with_a_linear_host_is_that_host(shared):
    adapters = drawn()
    host = mj.task_arithmetic(0.5, weights=[1, 2, 3])
    got = mj.lowrank.knots(adapters, host=host, scaling=1.0, shared=shared)
    close(got, summed(adapters, [0.5, 1.0, 1.5]))


def test_knots_with_dare_draws_by_seed():
    adapters = drawn()
    draw = lambda seed: wide(
        mj.lowrank.knots(adapters, host="drop(rate=0.5)|ties(density=1.0)", seed=seed)
    )
    first, again, other = draw(1), draw(1), draw(2)
    close(first, again, 0)
    assert any(np.abs(first[n] - other[n]).max() > 1e-3 for n in SHAPES)


def test_knots_of_one_adapter_is_the_adapter():
    adapter = drawn()[1]
    close(mj.lowrank.knots([adapter], host="ties(density=1.0)", scaling=1.0), wide(adapter))


def test_knots_does_not_depend_on_the_order():
    adapters = drawn()
    got = mj.lowrank.knots(adapters)
    close(mj.lowrank.knots(adapters[::-1]), wide(got))


def test_knots_has_a_coordinate_for_each_direction_and_no_more():
    adapters = drawn((2, 2), (1.0, 1.0))
    twice = [adapters[0], adapters[0], adapters[1]]
    got = mj.lowrank.knots(twice, host="ties(density=1.0)")
    assert {f.rank for f in got.values()} == {4}


def test_knots_of_zero_adapters_is_zero():
    adapters = [{n: Factors(f.down, 0 * f.up) for n, f in a.items()} for a in drawn()]
    close(mj.lowrank.knots(adapters), {n: np.zeros(s) for n, s in SHAPES.items()}, 0)


def test_an_absolute_cutoff_erases_small_updates_and_the_relative_one_does_not():
    adapters = [{n: Factors(1e-4 * f.down, 1e-4 * f.up) for n, f in a.items()} for a in drawn()]
    host = "task_arithmetic(1.0)"
    kept = mj.lowrank.knots(adapters, host=host, scaling=1.0)
    close(kept, summed(adapters, [1, 1, 1]), 1e-13)
    lost = mj.lowrank.knots(adapters, host=host, scaling=1.0, cutoff=1e-5, relative=False)
    assert {f.rank for f in lost.values()} == {1}
