"""Times every method in memory, beside mergekit and FusionBench on the same arrays.

    python benchmarks/methods.py --size vit --experts 8 --peer-python OTHER/bin/python

OTHER is an environment with PyTorch, mergekit 0.1.5 and (files only) FusionBench 0.2.33; without it
the peers' columns stay empty. Prints a Markdown table: seconds of the fastest run after a first,
GB/s of experts read, that as a share of the copy bandwidth measured in the same run, peak anonymous
memory over the size of base and experts, and the ratio of the peer's time to ours.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys

import jax
import measure
import models
import numpy as np

import mergejax as mj

# Our chain, the experts it takes (None: as many as asked), and a peer's method for the same result.
METHODS = {
    "linear()": (None, ("mergekit", "linear")),
    "task_arithmetic(scaling=1.0)": (None, ("mergekit", "task_arithmetic")),
    "ties(scope='tensor', cut='exact', zero='plus')": (None, ("mergekit", "ties")),
    "ties()": (None, ("fusion_bench", "ties")),
    "drop(rate=0.8, rescale='norm')|total()": (None, ("mergekit", "dare_linear")),
    "dare()": (None, None),
    "della(scaling=1.0, rescale='norm')": (None, ("mergekit", "della")),
    "breadcrumbs(scope='tensor', scaling=1.0)": (None, ("mergekit", "breadcrumbs")),
    "breadcrumbs()": (None, None),
    "pcb()": (None, None),
    "localize_and_stitch()": (None, None),
    "consensus()": (None, None),
    "magmax()": (None, None),
    "ram()": (None, ("mergekit", "ram")),
    "sce()": (None, ("mergekit", "sce")),
    "model_stock()": (None, ("mergekit", "model_stock")),
    "multislerp()": (None, ("mergekit", "multislerp")),
    "karcher()": (None, ("mergekit", "karcher")),
    "widen()": (None, None),
    "slerp()": (2, ("mergekit", "slerp")),
    "nuslerp()": (2, ("mergekit", "nuslerp")),
    "nearswap()": (1, ("mergekit", "nearswap")),
    "arcee_fusion()": (1, ("mergekit", "arcee_fusion")),
    "tsv_merge()": (None, ("fusion_bench", "tsv_merge")),
    "iso_c()": (None, ("fusion_bench", "iso_c")),
    "iso_cts()": (None, ("fusion_bench", "iso_cts")),
    "opcm(zero_diagonal=True)": (None, ("fusion_bench", "opcm")),
    "total()|svc()": (None, ("fusion_bench", "svc")),
    "cart()": (None, None),
    "swudi()": (None, None),
}


def copy_bandwidth(arrays):
    """Bytes a second that a plain copy of the arrays reads."""
    targets = [np.empty_like(x) for x in arrays]

    def call():
        for x, target in zip(arrays, targets, strict=True):
            np.copyto(target, x)

    return sum(x.nbytes for x in arrays) / measure.cost(call, 3).seconds


def peer_cost(python, peer, method, size, experts, repeats):
    """What the peer takes, measured in a process of its own; None if it cannot run."""
    script = pathlib.Path(__file__).with_name("peers.py")
    command = [python, script, peer, method, "--size", size]
    command += ["--experts", str(experts), "--repeats", str(repeats)]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        print(f"{peer} {method}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    return measure.Cost(**json.loads(done.stdout.splitlines()[-1]))


def row(chain, several, peer, given, base, experts, bandwidth):
    count = several or given.experts
    chosen = experts[:count]
    ours = measure.cost(lambda: jax.block_until_ready(mj.merge(chain, base, chosen)), given.repeats)
    inputs = sum(x.nbytes for model in (base, *chosen) for x in model.values())
    read = sum(x.nbytes for model in chosen for x in model.values())
    memory = (ours.peak - ours.before + inputs) / inputs
    speed = read / ours.seconds
    cells = [f"`{chain}`", count, f"{ours.seconds:.3f}", f"{speed / 1e9:.2f}"]
    cells += [f"{speed / bandwidth:.0%}", f"{memory:.2f}"]
    theirs = None
    if peer and given.peer_python:
        theirs = peer_cost(given.peer_python, *peer, given.size, count, given.repeats)
    cells += [
        " ".join(peer) if peer else "",
        f"{theirs.seconds:.3f}" if theirs else "",
        f"{theirs.seconds / ours.seconds:.1f}" if theirs else "",
    ]
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", default="small", choices=models.SIZES)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer-python", default="")
    parser.add_argument("--only", default="", help="regular expression of the chains to time")
    given = parser.parse_args()
    base, experts = models.models(given.size, given.experts)
    parameters = sum(x.size for x in base.values())
    bandwidth = copy_bandwidth([x for model in experts for x in model.values()])
    base, experts = (jax.tree.map(jax.numpy.asarray, x) for x in (base, experts))
    device = jax.devices()[0]
    print(f"{parameters / 1e6:.1f} million parameters, {given.experts} experts, float32, {device}")
    print(f"copy: {bandwidth / 1e9:.2f} GB/s read\n")
    print("| chain | experts | s | GB/s | of copy | memory | peer | s | times faster |")
    print("|---|---:|---:|---:|---:|---:|---|---:|---:|")
    for chain, (several, peer) in METHODS.items():
        if re.search(given.only, chain):
            row(chain, several, peer, given, base, experts, bandwidth)


if __name__ == "__main__":
    main()
