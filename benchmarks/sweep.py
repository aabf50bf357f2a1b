"""A sweep of TIES over density and scaling that returns scores, in one compilation.

    python benchmarks/sweep.py --size small --experts 8

Prints the seconds of one setting and of 64 settings, compiled before, and how many times longer the
sweep takes. Densities are a loop and scalings are mapped inside it, so that what does not depend on
the scaling, the trim and the election, is computed once for each density.
"""

import argparse

import jax
import jax.numpy as jnp
import measure
import models

import mergejax as mj


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", default="small", choices=models.SIZES)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    base, experts = models.models(given.size, given.experts)
    base, experts = (jax.tree.map(jnp.asarray, x) for x in (base, experts))

    def score(density, scaling, base, experts):
        """The squared distance from the mean of the experts."""
        merged = mj.merge(mj.ties(density=density, scaling=scaling), base, experts)
        mean = jax.tree.map(lambda *xs: sum(xs) / len(xs), *experts)
        return sum(jnp.square(merged[name] - mean[name]).sum() for name in merged)

    @jax.jit
    def one(density, scaling, base, experts):
        return score(density, scaling, base, experts)

    @jax.jit
    def sweep(densities, scalings, base, experts):
        row = jax.vmap(score, in_axes=(None, 0, None, None))
        return jax.lax.map(lambda density: row(density, scalings, base, experts), densities)

    densities, scalings = jnp.linspace(0.1, 0.8, 8), jnp.linspace(0.3, 1.7, 8)
    single = measure.cost(
        lambda: one(densities[0], scalings[0], base, experts).block_until_ready(), given.repeats
    )
    several = measure.cost(
        lambda: sweep(densities, scalings, base, experts).block_until_ready(), given.repeats
    )
    table = sweep(densities, scalings, base, experts)
    expected = one(densities[3], scalings[5], base, experts)
    assert abs(table[3, 5] - expected) <= 1e-3 * expected
    print(f"one setting {single.seconds:.2f} s, 64 settings {several.seconds:.2f} s: ", end="")
    print(f"{several.seconds / single.seconds:.1f} times as long")


if __name__ == "__main__":
    main()
