"""Translations of parameters that the recorded cases happen not to have."""

import json

import numpy as np
import pytest
import reference
import trees
from golden_case import Case, Untranslatable
from golden_translation import TRANSLATIONS

import mergejax as mj

NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.{part}.weight" for i in range(3) for part in ("attn.q", "mlp.up")),
    "model.norm.weight",
]
PYTORCH = "PyTorch layout: linear weights [out_features, in_features]"


def case(method, hyperparameters, experts=2, **more):
    shapes = {name: (6,) if "norm" in name else (4, 6) for name in NAMES}
    base, several = trees.models(experts, shapes=shapes)
    tensors = {"base": base} | {f"expert{i}": expert for i, expert in enumerate(several)} | more
    facts = {"method": method, "hyperparameters": hyperparameters, "layout": PYTORCH}
    return Case(json.loads(json.dumps(facts)), tensors)


def merged(given):
    translated = TRANSLATIONS[given.method](given)
    given.parameters.finish()
    return mj.merge(
        translated.method,
        translated.base,
        translated.experts,
        stats=translated.stats,
        layout=given.layout,
        **translated.options,
    )


def masks(count, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {name: (6,) if "norm" in name else (4, 6) for name in NAMES}
    drawn = [
        {n: (rng.random(s) < 0.5).astype(np.uint8) for n, s in shapes.items()} for _ in range(count)
    ]
    return {f"mask{i}": mask for i, mask in enumerate(drawn)}


def yaml(merge_method, models, **settings):
    config = {
        "merge_method": merge_method,
        "base_model": "base",
        "models": [
            {"model": name, **({"parameters": given} if given else {})}
            for name, given in models.items()
        ],
        "dtype": "float32",
        **settings,
    }
    return {"config": config}


def test_a_configuration_s_filters_and_gradients():
    weight = [
        {"filter": "attn", "value": [0.0, 1.0]},
        {"filter": "lm_head", "value": 7},
        {"value": 0.5},
    ]
    models = {"base": None, "expert0": {"weight": weight}, "expert1": {"weight": 2.0}}
    given = case("mergekit-yaml/task_arithmetic", yaml("task_arithmetic", models))
    got, (first, second) = merged(given), given.experts
    for name in NAMES:
        depth = {"layers.0": 0.0, "layers.1": 0.5, "layers.2": 1.0}
        w = next((d for part, d in depth.items() if part in name), 0.5) if "attn" in name else 0.5
        base = given.base[name]
        expected = base + w * (first[name] - base) + 2.0 * (second[name] - base)
        np.testing.assert_allclose(got[name], expected, rtol=1e-5, atol=1e-5)


def test_a_configuration_s_shared_parameters_come_second():
    models = {"expert0": {"density": 0.9}, "expert1": None}
    shared = {"density": 0.3, "weight": 0.5, "normalize": False, "lambda": 0.7, "int8_mask": True}
    given = case("mergekit-yaml/ties", yaml("ties", models, parameters=shared))
    expected = reference.ties(
        given.base, given.experts, 0.7, density=[0.9, 0.3], weights=0.5, reduction="sum",
        scope="tensor", cut="exact", zero="plus",
    )  # fmt: skip
    trees.close(merged(given), expected, rtol=1e-5, atol=1e-5)


def test_a_density_by_filter():
    density = [{"filter": "mlp", "value": 0.2}, {"filter": "*", "value": 1.0}]
    models = {"expert0": {"density": density, "weight": 1}, "expert1": {"weight": 1}}
    given = case("mergekit-yaml/ties", yaml("ties", models))
    name, whole = "model.layers.1.mlp.up.weight", merged(given)
    part = [{name: tree[name]} for tree in (given.base, *given.experts)]
    options = {"scope": "tensor", "cut": "exact", "zero": "plus"}
    expected = reference.ties(part[0], part[1:], density=[0.2, 1.0], **options)
    np.testing.assert_allclose(whole[name], expected[name], rtol=1e-5, atol=1e-5)


def test_a_linear_configuration_without_a_base():
    models = {"expert0": {"weight": 3}, "expert1": {"weight": 1}}
    given = case("mergekit-yaml/linear", yaml("linear", models, base_model=None))
    expected = reference.linear(None, given.experts, [3, 1])
    trees.close(merged(given), expected, rtol=1e-5, atol=1e-5)


def test_random_methods_take_the_recorded_masks():
    kept = masks(2)
    given = case("mergekit/dare_linear", {"weight": 1.0, "density": 0.5, "rescale": False}, **kept)
    expected = reference.dare(
        given.base, given.experts, list(kept.values()), rate=0.5, scaling=1.0, rescale="none"
    )
    trees.close(merged(given), expected, rtol=1e-5, atol=1e-5)


def test_masks_of_linear_layers_only():
    kept = masks(2)
    hyper = {
        "scaling_factor": 0.5,
        "sparsity_ratio": 0.6,
        "only_on_linear_weights": True,
        "rescale": True,
    }
    got = merged(case("fusion_bench/dare/task_arithmetic", hyper, **kept))
    given = case("fusion_bench/task_arithmetic", {"scaling_factor": 0.5})
    np.testing.assert_allclose(got["model.norm.weight"], merged(given)["model.norm.weight"])


def test_excluded_keys_keep_the_base():
    hyper = {
        "scaling_factor": 0.3,
        "threshold": 20,
        "merge_func": "max",
        "remove_keys": ["model.norm.weight"],
    }
    given = case("fusion_bench/ties_merging", hyper)
    np.testing.assert_array_equal(
        merged(given)["model.norm.weight"], given.base["model.norm.weight"]
    )


@pytest.mark.parametrize("order", ["expert1, expert0", [1, 0], "1 0"])
def test_another_order_of_experts(order):
    given = case("opcm (original repository)", {"alpha": 0.8, "order": order})
    kernels = [name for name in NAMES if "norm" not in name and "embed" not in name]

    def turned(tree):
        return {name: x.T for name, x in tree.items()}

    expected = reference.opcm(
        turned(given.base), [turned(e) for e in given.experts[::-1]], kernels, 0.8
    )
    trees.close(merged(given), turned(expected), rtol=1e-4, atol=1e-4)


MERGELM = {"weight_mask_rates": [0.4, 0.4], "use_weight_rescale": False}
FINE = {
    "percent": ("ties (global trim)", {"reset_thresh": 30, "merge_func": "dis-max"}),
    "fraction": ("ties (global trim)", {"reset_thresh": 0.3, "merge_func": "dis-mean"}),
    "everything": ("ties (global trim)", {"reset_thresh": 100, "merge_func": "dis-sum"}),
    "a mask rate": ("ties (global trim)", {"param_value_mask_rate": 0.29}),
    "a mask rate per tensor": ("ties (per tensor)", {"param_value_mask_rate": 0.5}),
    "a vote by count": (
        "mergekit/ties",
        {"weight": [1, -1], "density": [0.1, 1], "consensus_method": "count"},
    ),
    "weights that cancel": ("mergekit/task_arithmetic", {"weight": [1, -1], "normalize": True}),
    "normalised deltas": ("mergekit/task_arithmetic", {"weight": [1, 3], "normalize": True}),
    "a weight of the base": ("mergekit/linear", {"weight": [0.2, 0.5, 0.3], "normalize": False}),
    "no weight of the base": ("mergekit/linear", {"weight": [0.5, 0.3]}),
    "averages": ("fusion_bench/weighted_average", {"weights": [1, 2], "normalize": False}),
    "a projection of all": ("fusion_bench/opcm", {"alpha": 1.0, "order": "expert0..1"}),
    "no projection": ("fusion_bench/opcm", {"alpha": 0.0}),
    "lines over a sum": (
        "lines (ties)",
        {"merge": "ties dis-sum k=30", "beta": 1.1, "num_blocks": 3},
    ),
}


@pytest.mark.parametrize(("method", "hyper"), FINE.values(), ids=FINE)
def test_is_translated(method, hyper):
    assert np.isfinite(merged(case(method, hyper))["model.norm.weight"]).all()


@pytest.mark.parametrize(
    "hyper",
    [
        {**MERGELM, "mask_apply_method": "average_merging"},
        {**MERGELM, "mask_apply_method": "task_arithmetic", "scaling_coefficient": 0.3},
        {**MERGELM, "mask_apply_method": "ties_merging", "param_value_mask_rate": 0.8},
        {**MERGELM, "mask_apply_method": "task_arithmetic", "mask_strategy": "magnitude"},
    ],
)
def test_hosts_behind_recorded_masks(hyper):
    got = merged(case("dare + task arithmetic", hyper, **masks(2)))
    assert np.isfinite(got["model.norm.weight"]).all()


NOT = {
    "an unknown parameter": ("mergekit/slerp", {"t": 0.5, "curvature": 1}, "curvature"),
    "an unknown parameter of a configuration": (
        "mergekit-yaml/linear",
        yaml("linear", {"expert0": {"weight": 1, "height": 2}}),
        "height",
    ),
    "slices": (
        "mergekit-yaml/linear",
        yaml("linear", {"expert0": {"weight": 1}}, slices=[{"sources": []}]),
        "slices",
    ),
    "another method in the configuration": ("mergekit-yaml/ties", yaml("slerp", {}), "slerp"),
    "a merged vocabulary": (
        "mergekit-yaml/linear",
        yaml("linear", {"expert0": {"weight": 1}}, tokenizer_source="union"),
        "union",
    ),
    "no masks": ("mergekit/dare_ties", {"weight": 1, "density": 0.5}, "masks"),
    "a missing parameter": ("mergekit/linear", {}, "weight"),
    "a rescaled trim": ("mergekit/ties", {"weight": 1, "density": 0.5, "rescale": True}, "rescale"),
    "another reset": ("ties (global trim)", {"reset_type": "std", "reset_thresh": 1}, "std"),
    "another resolution": (
        "ties (global trim)",
        {"resolve_method": "normfrac", "reset_thresh": 20, "merge_func": "dis-mean"},
        "normfrac",
    ),
    "another number of blocks": (
        "lines (sum)",
        {"merge": "sum of task vectors", "beta": 0.5, "num_blocks": 12},
        "num_blocks",
    ),
    "another host": (
        "lines (sum)",
        {"merge": "consensus", "beta": 0.5, "num_blocks": 3},
        "consensus",
    ),
    "an unreadable order": ("fusion_bench/opcm", {"alpha": 0.5, "order": "shuffled"}, "shuffled"),
    "no statistics": ("fisher", {"coefficients": [1, 1], "fisher_floor": 0}, "Fisher"),
}


@pytest.mark.parametrize(("method", "hyper", "word"), NOT.values(), ids=NOT)
def test_is_not_translated(method, hyper, word):
    with pytest.raises(Untranslatable, match=word):
        merged(case(method, hyper))
