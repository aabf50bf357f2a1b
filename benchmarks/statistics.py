"""Time and memory of collecting statistics of a ViT-B/16, and of solving with them.

    python benchmarks/statistics.py [gram] [fisher] [solve] [--peer-python OTHER/bin/python]

Gram matrices against the plain forward pass of the same batches, the diagonal Fisher information by
sampled labels against a batched backward pass, RegMean of all layers of eight experts against the
reduction of FusionBench 0.2.33 in the interpreter given (on the same matrices, without its
collection). Prints a Markdown table: seconds of the fastest run after a first, the ratio, and the
growth of anonymous memory at its peak in GB; of the solve also the seconds of all processors
together, which tell something where a machine is shared. It runs on any device.
"""

import argparse

import jax
import jax.numpy as jnp
import measure
import methods
import models
import numpy as np
import optax

import mergejax as mj
from mergejax.models import vit

CLASSES = 100
SHAPE = {"patch": 16, "width": 768, "depth": 12, "heads": 12, "class_token": True}


class Classifier(vit.nn.Module):
    """The body and a head."""

    @vit.nn.compact
    def __call__(self, images):
        features = vit.VisionTransformer(**SHAPE, name="body")(images)
        return vit.nn.Dense(CLASSES, name="head")(features)


def network(images):
    """(model, its parameters, one batch of random images)."""
    model = Classifier()
    batch = np.random.default_rng(0).random((images, 224, 224, 3), np.float32)
    params = jax.jit(model.init)(jax.random.key(0), batch[:1])["params"]
    return model, params, jnp.asarray(batch)


def wait(found):
    return jax.block_until_ready(jax.tree.leaves(found))


def row(name, ours, other, theirs, images=""):
    ratio = ours.seconds / theirs.seconds if theirs else float("nan")
    peak = (ours.peak - ours.before) / 1e9
    seconds = f"{theirs.seconds:.2f}" if theirs else ""
    print(
        f"| {name} | {images} | {ours.seconds:.2f} | {other} | {seconds} | {ratio:.2f} | "
        f"{peak:.2f} |",
        flush=True,
    )


def gram(given):
    model, params, batch = network(given.images)
    forward = jax.jit(lambda params, x: model.apply({"params": params}, x))
    several = [batch] * given.batches
    plain = measure.cost(lambda: wait([forward(params, x) for x in several]), given.repeats)
    ours = measure.cost(lambda: wait(mj.collect.gram(model, params, several)), given.repeats)
    row("`gram`", ours, "forward passes", plain, f"{given.batches} × {given.images}")


def fisher(given):
    model, params, batch = network(given.images)
    labels = jnp.zeros(given.images, jnp.int32)

    def loss(params, x):
        scores = model.apply({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()

    backward = jax.jit(jax.grad(loss))
    plain = measure.cost(lambda: wait(backward(params, batch)), given.repeats)
    options = {"estimator": "sampled", "key": jax.random.key(0), "microbatch": given.microbatch}
    ours = measure.cost(
        lambda: wait(mj.collect.fisher(model, params, [batch], **options)), given.repeats
    )
    row("`fisher`, sampled labels", ours, "backward pass", plain, given.images)


def solve(given):
    # On the device, where `mj.collect.gram` leaves its results; otherwise copying them is measured.
    place = lambda leaves: jax.tree.map(jnp.asarray, leaves)
    experts = [place(models.model(given.size, 1 + i)) for i in range(given.experts)]
    grams = [place(models.grams(given.size, i)) for i in range(given.experts)]
    ours = measure.cost(
        lambda: wait(mj.merge("regmean()", None, experts, stats={"gram": grams})), given.repeats
    )
    theirs = None
    if given.peer_python:
        theirs = methods.peer_cost(
            given.peer_python, "fusion_bench", "regmean", given.size, given.experts, given.repeats
        )
    row(f"`regmean()`, {given.experts} experts", ours, "FusionBench", theirs)
    others = f", FusionBench {theirs.processor:.2f}" if theirs else ""
    print(f"\nProcessor seconds of the solve: {ours.processor:.2f}{others}")


PARTS = {"gram": gram, "fisher": fisher, "solve": solve}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", default="all", choices=["all", *PARTS])
    parser.add_argument("--images", type=int, default=4, help="in a batch")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--microbatch", type=int, default=1)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--size", default="vit", choices=models.SIZES, help="of the solve")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--peer-python", default="")
    given = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, {jax.device_count()} device")
    print("| what | images | s | against | s | ratio | peak GB |")
    print("|---|---:|---:|---|---:|---:|---:|")
    for part in PARTS if "all" in given.parts else given.parts:
        PARTS[part](given)


if __name__ == "__main__":
    main()
