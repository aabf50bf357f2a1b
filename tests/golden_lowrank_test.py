"""Translations of mask and adapter methods with parameters that no recorded case has."""

import json

import numpy as np
import pytest
import trees
from golden_case import Case, Untranslatable
from golden_lowrank import TRANSLATIONS

import mergejax as mj

SHAPES = {"up.weight": (6, 4), "square.weight": (4, 4), "norm.weight": (4,)}
FACTS = {"layout": "PyTorch layout: linear weights [out_features, in_features]"}


def case(method, hyperparameters, experts=3, **more):
    base, several = trees.models(experts, shapes=SHAPES)
    tensors = {"base": base} | {f"expert{i}": expert for i, expert in enumerate(several)} | more
    facts = {"method": method, "hyperparameters": hyperparameters, **FACTS}
    return Case(json.loads(json.dumps(facts)), tensors)


def translated(given):
    found = TRANSLATIONS[given.method](given)
    given.parameters.finish()
    return found


def result(given):
    return translated(given).result()["expected"]


def test_thresholds_may_differ_by_task():
    given = case("tall_mask", {"lam": [0.2, 0.4, 0.6]})
    assert repr(translated(given).method) == "tall_masks(threshold=[0.2, 0.4, 0.6])"
    given = case("consensus", {"lam": [0.2, 0.4, 0.6], "k": 1, "coef": 0.3})
    assert "agreement=1" in repr(translated(given).method)
    with pytest.raises(Untranslatable, match="2 values for 3 models"):
        translated(case("tall_mask", {"lam": [0.2, 0.4]}))


def lora(experts=2, rank=2):
    rng = np.random.default_rng(0)
    found = {}
    for i in range(experts):
        kernels = {n: s for n, s in SHAPES.items() if len(s) == 2}
        found[f"lora_a{i}"] = {
            n: np.float32(rng.normal(size=(rank, s[1]))) for n, s in kernels.items()
        }
        found[f"lora_b{i}"] = {
            n: np.float32(rng.normal(size=(s[0], rank))) for n, s in kernels.items()
        }
    return found


def test_lora_soups_by_alpha_and_rank_with_equal_weights():
    tensors = lora()
    given = case("lora_soups (cat)", {"ranks": [2, 2], "lora_alpha": [4, 1]}, 2, **tensors)
    got = result(given)["up.weight"] - given.base["up.weight"]
    pairs = [
        tensors[f"lora_b{i}"]["up.weight"] @ tensors[f"lora_a{i}"]["up.weight"] for i in (0, 1)
    ]
    np.testing.assert_allclose(got, 0.5 * (2 * pairs[0] + 0.5 * pairs[1]), rtol=1e-5, atol=1e-5)


def test_lora_soups_in_linear_mode():
    tensors = lora()
    logits = {n: np.float32([0.0, np.log(3)]) for n in tensors["lora_a0"]}
    for method, mode in (("lora_soups (linear)", {}), ("lora_soups (cat)", {"mode": "linear"})):
        given = case(method, {"scaling": [2.0, 2.0], **mode}, 2, **tensors, logits=logits)
        got = result(given)["up.weight"] - given.base["up.weight"]
        a = sum(tensors[f"lora_a{i}"]["up.weight"] for i in (0, 1))
        b = sum(w * tensors[f"lora_b{i}"]["up.weight"] for i, w in ((0, 0.5), (1, 1.5)))
        np.testing.assert_allclose(got, b @ a, rtol=1e-5, atol=1e-5)
    with pytest.raises(Untranslatable, match="mode='svd'"):
        translated(case("lora_soups (cat)", {"scaling": [2.0, 2.0], "mode": "svd"}, 2, **tensors))


@pytest.mark.parametrize("across_output", [True, False])
def test_knots_of_everything_summed_leaves_out_who_opposes(across_output):
    parameters = {
        "topK": 100,
        "merging_type": "sum",
        "scaling": 0.5,
        "concat_across_output": across_output,
    }
    given = case("knots + ties", parameters, experts=1)
    got, expert = result(given), given.experts[0]
    for name in ("up.weight", "square.weight"):
        expected = given.base[name] + 0.5 * (expert[name] - given.base[name])
        np.testing.assert_allclose(got[name], expected, atol=1e-5)
    np.testing.assert_array_equal(got["norm.weight"], given.base["norm.weight"])


def test_knots_with_another_host_is_not_translated():
    with pytest.raises(Untranslatable, match="merge_method='dare'"):
        translated(case("knots + ties", {"merge_method": "dare", "topK": 30}))


def test_dc_merge_with_a_linear_spectrum(monkeypatch):
    given = case("dc_merge (LoRA)", {"smoothing_strategy": "linear", "rho": 3.0, "scale": 0.5})
    seen = {}
    monkeypatch.setattr(
        mj.lowrank, "dc_merge", lambda adapters, **options: seen.update(options) or {}
    )
    result(given)
    assert seen == {"smoothing": "linear", "ratio": 3.0, "scaling": 0.5}
