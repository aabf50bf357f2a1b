"""The same methods in other libraries, on the same arrays, in an interpreter of their own.

python benchmarks/peers.py mergekit ties --size small --experts 8
"""

import argparse
import contextlib
import importlib.util
import json
import pathlib
import sys
import types

import measure
import models
import torch

sys.path.pop(0)  # this folder, whose `statistics` would hide Python's from the peers


def leaf_name(name):
    """A peer's rules go by the names that PyTorch gives."""
    return name.replace("/", ".").replace("kernel", "weight").replace("scale", "weight")


def tensors(leaves):
    """Kernels as PyTorch has them, [out, in] and OIHW."""
    order = {2: (1, 0), 4: (3, 2, 0, 1)}
    return {
        leaf_name(name): torch.from_numpy(
            x.transpose(order[x.ndim]).copy() if name.endswith("kernel") else x
        )
        for name, x in leaves.items()
    }


# mergekit -----------------------------------------------------------------------------------------

MERGEKIT = {
    "linear": {"weight": 1.0},
    "task_arithmetic": {"weight": 1.0},
    "ties": {"weight": 1.0, "density": 0.2},
    "dare_linear": {"weight": 1.0, "density": 0.2},
    "della": {"weight": 1.0, "density": 0.7, "epsilon": 0.07},
    "breadcrumbs": {"weight": 1.0, "density": 0.2, "gamma": 0.1},
    "sce": {"select_topk": 0.1},
    "model_stock": {},
    "multislerp": {"weight": 1.0},
    "karcher": {},
    "ram": {},
    "slerp": {"t": 0.5},
    "nuslerp": {"weight": 1.0},
    "nearswap": {"t": 0.01},
    "arcee_fusion": {},
}
WITHOUT_BASE = ("linear", "karcher")


def mergekit(method, base, experts):
    from mergekit.merge_methods.api import merge_state_dicts

    named = {f"expert{i}": expert for i, expert in enumerate(experts)}
    if method == "slerp":
        named = {"base": named.pop("expert0"), **named}
    elif method not in WITHOUT_BASE:
        named = {"base": base, **named}
    options = {} if method in WITHOUT_BASE else {"base": "base"}

    def call():
        with torch.no_grad():
            merge_state_dicts(named, method, parameters=MERGEKIT[method], **options)

    return call


# FusionBench --------------------------------------------------------------------------------------


def fusion_bench_file(path):
    """One file of FusionBench, without the packages that its other files need."""
    folder = pathlib.Path(importlib.util.find_spec("fusion_bench").origin).parent
    for name in ("fusion_bench", "fusion_bench.utils", "fusion_bench.utils.type"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["fusion_bench.utils"].timeit_context = lambda *_: contextlib.nullcontext()
    sys.modules["fusion_bench.utils.type"].StateDictType = dict
    spec = importlib.util.spec_from_file_location("peer", folder / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def regmean(experts, grams):
    """Shrink 0.9, as ours; the reduction of FusionBench alone, without its collection."""
    from fusion_bench.method.regmean import regmean as peer

    weights = [
        {leaf_name(n).removesuffix(".weight"): torch.from_numpy(g) for n, g in tree.items()}
        for tree in grams
    ]
    several = {name: [expert[name] for expert in experts] for name in experts[0]}

    def call():
        with torch.no_grad():
            peer.merging_with_regmean_weights(several, weights, 0.9)

    return call


def is_kernel(x):
    return x.ndim == 2 and min(x.shape) > 50  # all but vectors and the table of positions


def svc(base, experts):
    """Behind the sum, in its vectorised form, which computes in float64."""
    from fusion_bench.method.singular_value_calibration import utils as peer

    for name, x in base.items():
        several = [expert[name] for expert in experts]
        merged = x + sum(y - x for y in several)
        if is_kernel(x):
            peer.subspace_consistency_spectral_calibration_accelerated(x, several, merged, 1.0)


def _hidden_imports():
    """What FusionBench imports of an older transformers and does not use here."""
    from transformers.models.clip import modeling_clip

    modeling_clip.CLIPVisionTransformer = object


def opcm(base, experts):
    """Its step for linear weights, and the rescaling to the mean norm."""
    _hidden_imports()
    from fusion_bench.method.opcm.opcm_general import OPCM as peer

    own = types.SimpleNamespace(
        fabric=types.SimpleNamespace(device="cpu"), previous_lambda_t=1, lambda_t=1
    )
    merged, norms = dict(experts[0]), []

    def norm(model):
        return torch.sqrt(sum(torch.sum((model[n] - base[n]) ** 2) for n in base))

    norms.append(norm(merged))
    for expert in experts[1:]:
        norms.append(norm(expert))
        for name, x in base.items():
            if is_kernel(x):
                parts = merged[name], x, expert[name]
                merged[name] = peer.merge_linear_weights(own, *parts, name + ".weight", 0.5)[1]
            else:
                merged[name] = peer.merge_other_parameters(own, merged[name], x, expert[name], name)
        factor = torch.stack(norms).mean() / norm(merged)
        merged = {n: base[n] + factor * (merged[n] - base[n]) for n in base}
        own.previous_lambda_t = 1 / factor


SPECTRAL = {f.__name__: f for f in (svc, opcm)}


def fusion_bench(method, base, experts):
    if method == "ties":
        utils = fusion_bench_file("method/ties_merging/ties_merging_utils.py")

        def call():
            flat = torch.stack([utils.state_dict_to_vector(expert, []) for expert in experts])
            origin = utils.state_dict_to_vector(base, [])
            merged = utils.ties_merging(flat - origin, reset_thresh=20, merge_func="dis-mean")
            utils.vector_to_state_dict(origin + merged, base, [])

        return call
    if method in SPECTRAL:
        return lambda: SPECTRAL[method](base, experts)
    files = {
        "tsv_merge": (
            "method/task_singular_vector/utils/TSVM_utils.py",
            "compute_and_sum_svd_mem_reduction",
        ),
        "iso_c": ("method/isotropic_merging/iso_utils.py", "iso_c"),
        "iso_cts": ("method/isotropic_merging/iso_utils.py", "iso_cts"),
    }
    path, name = files[method]
    function = getattr(fusion_bench_file(path), name)
    extra = {"common_space_fraction": 0.8} if method == "iso_cts" else {}

    def call():
        with torch.no_grad(), contextlib.redirect_stdout(None):
            deltas = [{n: expert[n] - base[n] for n in base} for expert in experts]
            merged = function(deltas, accelerator="cpu", **extra)
            {n: base[n] + merged[n] for n in base}

    return call


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("peer", choices=("mergekit", "fusion_bench"))
    parser.add_argument("method")
    parser.add_argument("--size", default="small")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    base, experts = models.models(given.size, given.experts)
    base, experts = tensors(base), [tensors(expert) for expert in experts]
    if given.method == "regmean":
        call = regmean(experts, [models.grams(given.size, i) for i in range(given.experts)])
    else:
        call = {"mergekit": mergekit, "fusion_bench": fusion_bench}[given.peer](
            given.method, base, experts
        )
    print(json.dumps(measure.cost(call, given.repeats)._asdict()))


if __name__ == "__main__":
    main()
