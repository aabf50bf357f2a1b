"""Random kernels for the spectral methods, and what is asked of their merged deltas."""

import numpy as np

import mergejax as mj

OUT, IN = 6, 9


def deltas(count, seed=0, shape=(OUT, IN)):
    """Matrices [out, in] on a grid, so that adding a base loses nothing."""
    rng = np.random.default_rng(seed)
    return [np.round(rng.normal(size=shape) * 64) / 64 for _ in range(count)]


def merged(method, taus, layout="flax", base=None, **options):
    """The merged delta [out, in] of one kernel in the given layout."""
    turn = (lambda x: x.T) if layout == "flax" else (lambda x: x)
    zero = np.zeros(taus[0].shape) if base is None else base
    trees = [{"kernel": np.asarray(turn(zero + tau), np.float32)} for tau in taus]
    start = {"kernel": np.asarray(turn(zero), np.float32)}
    got = mj.merge(method, start, trees, layout=layout, **options)["kernel"]
    return turn(np.asarray(got, np.float64)) - zero


def near(got, expected, tolerance=1e-5):
    size = np.linalg.norm(expected)
    assert np.linalg.norm(got - expected) <= tolerance * (size if size else 1.0)


def spectrum(x):
    return np.linalg.svd(x)[1]


def rotation(size, seed):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]


def one_of_each(methods):
    """One chain for each method that the chains end with."""
    return list({chain.split("|")[-1].split("(")[0]: chain for chain in methods}.values())
