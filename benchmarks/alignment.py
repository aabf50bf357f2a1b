"""Weight matching of ResNet-50- and ViT-B-shaped trees, and git-re-basin on its ResNet-50 spec.

    python benchmarks/alignment.py [--sweeps 3] [--peer PATH/git-re-basin/src]

The networks are random, the second a permuted copy of the first with as much noise: some sweeps are
needed. With --peer, a checkout of github.com/samuela/git-re-basin, its own function runs on the
same arrays in the same process, and the ratio is printed.
"""

import argparse
import importlib
import sys
import time
import types

import jax
import numpy as np

from mergejax import alignment
from mergejax.alignment import Group, Symmetries

BLOCKS = (3, 4, 6, 3)


def resnet50():
    """(symmetries, shapes) in git-re-basin's names: streams of the stages, two groups a block."""
    axes, shapes, sizes = {}, {}, {}

    def layer(name, into, out, n_in, n_out, size):
        axes[f"{name}/Conv_0/kernel"] = (None, None, into, out)
        shapes[f"{name}/Conv_0/kernel"] = (size, size, n_in, n_out)
        for leaf in ("scale", "bias"):
            axes[f"{name}/BatchNorm_0/{leaf}"] = (out,)
            shapes[f"{name}/BatchNorm_0/{leaf}"] = (n_out,)
        sizes[out] = n_out

    layer("layers_0/ConvBlock_0", None, "P_bg0", 3, 64, 7)
    stream, width = "P_bg0", 64
    for stage, blocks in enumerate(BLOCKS):
        inner, outer, after = 64 * 2**stage, 256 * 2**stage, f"P_bg{stage + 1}"
        for block in range(blocks):
            name = f"blockgroups_{stage}/blocks_{block}"
            first, second = f"P_{name}_inner1", f"P_{name}_inner2"
            layer(f"{name}/ConvBlock_0", stream, first, width, inner, 1)
            layer(f"{name}/ConvBlock_1", first, second, inner, inner, 3)
            layer(f"{name}/ConvBlock_2", second, after, inner, outer, 1)
            if not block:
                skip = f"{name}/ResNetSkipConnection_0/ConvBlock_0"
                layer(skip, stream, after, width, outer, 1)
            stream, width = after, outer
    axes |= {"dense/kernel": (stream, None), "dense/bias": (None,)}
    shapes |= {"dense/kernel": (width, 1000), "dense/bias": (1000,)}
    return Symmetries({name: Group(n) for name, n in sizes.items()}, axes), shapes


def vit_b(layers=12, width=768, heads=12, hidden=3072):
    dim = width // heads
    groups = {"stream": Group(width)}
    axes = {"embed": (None, "stream"), "pos": (None, "stream"), "head": ("stream", None)}
    shapes = {"embed": (768, width), "pos": (197, width), "head": (width, 1000)}
    for i in range(layers):
        h, qk, vo, mlp = (f"{name}_{i}" for name in ("heads", "qk", "vo", "mlp"))
        groups |= {h: Group(heads), mlp: Group(hidden)}
        groups |= {qk: Group(dim, (h,)), vo: Group(dim, (h,))}
        for name, inner in (("query", qk), ("key", qk), ("value", vo)):
            axes[f"{i}/{name}"], shapes[f"{i}/{name}"] = ("stream", h, inner), (width, heads, dim)
        axes[f"{i}/out"], shapes[f"{i}/out"] = (h, vo, "stream"), (heads, dim, width)
        axes[f"{i}/up"], shapes[f"{i}/up"] = ("stream", mlp), (width, hidden)
        axes[f"{i}/down"], shapes[f"{i}/down"] = (mlp, "stream"), (hidden, width)
    return Symmetries(groups, axes), shapes


def networks(symmetries, shapes):
    rng = np.random.default_rng(0)

    def draw():
        return {n: rng.standard_normal(s, np.float32) / np.sqrt(s[0]) for n, s in shapes.items()}

    first, noise = draw(), draw()
    twin = alignment.apply(symmetries, alignment.random(symmetries, 1), first)
    return first, {name: twin[name] + noise[name] for name in twin}


def timed(function):
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def peer_function(path):
    """Their module, with the one helper of `utils` that it needs."""
    helper = types.ModuleType("utils")
    helper.rngmix = lambda rng, x: jax.random.fold_in(rng, hash(x) % 2**31)
    sys.modules["utils"] = helper
    sys.path.insert(0, path)
    return importlib.import_module("weight_matching")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--sweeps", type=int, default=100, help="at most so many, of both")
    parser.add_argument("--peer", help="folder src of a checkout of git-re-basin")
    options = parser.parse_args()
    for name, (symmetries, shapes) in (("ResNet-50", resnet50()), ("ViT-B", vit_b())):
        first, second = networks(symmetries, shapes)
        seconds, found = timed(
            lambda s=symmetries, a=first, b=second: alignment.weight_matching(
                s, a, b, sweeps=options.sweeps
            )
        )
        print(f"{name}: {seconds:.1f} s, {found.sweeps} sweeps, objective {found.objective:.6g}")
        if options.peer and name == "ResNet-50":
            peer = peer_function(options.peer)
            spec = peer.resnet50_permutation_spec()
            a, b = ({n: jax.numpy.asarray(x) for n, x in m.items()} for m in (first, second))
            theirs, permutations = timed(
                lambda p=peer, s=spec, a=a, b=b: p.weight_matching(
                    jax.random.key(0), s, a, b, max_iter=options.sweeps, silent=True
                )
            )
            orders = {n: np.asarray(p) for n, p in permutations.items()}
            moved = alignment.apply(symmetries, orders, second)
            value = sum(float(np.vdot(first[n], moved[n])) for n in symmetries.axes)
            print(f"git-re-basin: {theirs:.1f} s, objective {value:.6g}, {theirs / seconds:.1f} x")


if __name__ == "__main__":
    main()
