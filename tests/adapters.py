"""Small random adapters for the tests, and their dense deltas."""

import numpy as np

from mergejax.lowrank import Factors

SHAPES = {"a/kernel": (6, 5), "b/kernel": (4, 8)}
RANKS = (2, 3, 1)


def drawn(ranks=RANKS, scales=(1.0, 0.5, 2.0), seed=0):
    rng = np.random.default_rng(seed)

    def factors(shape, rank, scale):
        down, up = rng.normal(size=(shape[0], rank)), rng.normal(size=(rank, shape[1]))
        return Factors(np.float32(down), np.float32(up), scale)

    return [
        {name: factors(shape, rank, scale) for name, shape in SHAPES.items()}
        for rank, scale in zip(ranks, scales, strict=False)
    ]


def wide(adapter):
    """The dense deltas in float64."""
    return {
        name: np.float64(f.scale) * np.float64(f.down) @ np.float64(f.up)
        for name, f in adapter.items()
    }


def close(got, expected, atol=2e-5):
    got = wide(got) if isinstance(next(iter(got.values())), Factors) else got
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_allclose(got[name], x, rtol=1e-5, atol=atol, err_msg=name)


def summed(adapters, weights):
    deltas = [wide(adapter) for adapter in adapters]
    return {n: sum(w * d[n] for w, d in zip(weights, deltas, strict=True)) for n in SHAPES}
