r"""Times the spectral methods on one block of a ViT-B/32, beside FusionBench and float64.

    OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 \
        python benchmarks/spectral.py --peer-python OTHER/bin/python

OTHER is as in `methods.py`. Prints a Markdown table: seconds of the fastest run after a first, by
the clock and of all processors, ours and the peer's; the ratio of the latter; the distance of our
merged deltas from float64 NumPy. The deltas are noise: their square kernels, nearly singular, are a
hard case. With one thread for each library, processor seconds compare on a shared machine, too.
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

sys.path.append(str(pathlib.Path(__file__).parents[1] / "tests"))
import reference_spectral as reference

METHODS = {
    "tsv_merge()": (reference.tsv, "tsv_merge"),
    "iso_c()": (reference.iso_c, "iso_c"),
    "iso_cts()": (reference.iso_cts, "iso_cts"),
    "cart()": (reference.cart, None),
    "total()|svc()": (None, "svc"),
    "opcm(zero_diagonal=True)": (None, "opcm"),
}


def error(chain, base, experts, restated):
    """The relative distance to float64 in the Frobenius norm, over a square and a tall kernel."""
    off = size = 0.0
    for name in ("block_0/attention/query/kernel", "block_0/mlp/in/kernel"):
        taus = [expert[name] - base[name] for expert in experts]
        merged = mj.merge(chain, {name: 0 * base[name]}, [{name: tau} for tau in taus])[name]
        expected = restated([np.float64(tau).T for tau in taus]).T
        off += np.sum((np.float64(merged) - expected) ** 2)
        size += np.sum(expected**2)
    return (off / size) ** 0.5


def peer_cost(python, method, given):
    script = pathlib.Path(__file__).with_name("peers.py")
    command = [python, script, "fusion_bench", method, "--size", given.size]
    command += ["--experts", given.experts, "--repeats", given.repeats]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        print(f"{method}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    return measure.Cost(**json.loads(done.stdout.splitlines()[-1]))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", default="block", choices=models.SIZES)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer-python", default="")
    parser.add_argument("--only", default="", help="regular expression of the chains to time")
    given = parser.parse_args()
    host, several = models.models(given.size, given.experts)
    base, experts = (jax.tree.map(jax.numpy.asarray, x) for x in (host, several))
    print("| chain | s | processor s | FusionBench s | processor s | times less | error |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for chain, (restated, peer) in METHODS.items():
        if not re.search(given.only, chain):
            continue
        ours = measure.cost(
            lambda chain=chain: jax.block_until_ready(mj.merge(chain, base, experts)), given.repeats
        )
        theirs = peer_cost(given.peer_python, peer, given) if peer and given.peer_python else None
        cells = [f"`{chain}`".replace("|", "\\|"), f"{ours.seconds:.2f}", f"{ours.processor:.2f}"]
        cells += [f"{theirs.seconds:.2f}", f"{theirs.processor:.2f}"] if theirs else ["", ""]
        cells += [f"{theirs.processor / ours.processor:.1f}" if theirs else ""]
        cells += [f"{error(chain, host, several, restated):.0e}" if restated else ""]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
