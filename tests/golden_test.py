"""Results of other implementations, recorded in third_party/golden or in `--golden-dir`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax
from golden_case import LEFT_OUT, NOT_BUILT, Case, NotBuilt
from golden_translation import TRANSLATIONS

import mergejax as mj


class Deviation(NamedTuple):
    """Where this library differs from a peer on purpose; `where` names the entries, by leaf."""

    methods: tuple[str, ...]
    where: Callable[[Case, str], np.ndarray]
    reason: str


def _dead_inputs(case, name):
    """Rows of a kernel whose input is zero in every example, [out, in] in these files."""
    diagonals = [np.diagonal(grams[name]) for grams in case.numbered("gram") if name in grams]
    expected = case.tensors["expected"][name]
    dead = np.all([d == 0 for d in diagonals], axis=0) if diagonals else np.zeros(1, bool)
    return np.broadcast_to(dead, expected.shape)


def _zero_model(case, name):
    models = [*case.numbered("expert"), *([case.base] if "base" in case.tensors else [])]
    zero = any(not np.any(np.asarray(model[name])) for model in models)
    return np.full(np.shape(models[0][name]), zero)


def _unchanged_kernel(case, name):
    """Kernels that one expert changed and another did not."""
    base = np.asarray(case.base[name])
    changed = {np.any(np.asarray(expert[name]) != base) for expert in case.experts}
    return np.full(base.shape, base.ndim == 2 and len(changed) == 2)


def _narrow_kernel(case, name):
    shape = np.shape(case.base[name])
    return np.full(shape, len(shape) == 2 and min(shape) < len(case.experts))


_SUBSPACES = (
    "dc_merge (full fine-tuning)",
    "fusion_bench/isotropic_merging (Iso-CTS)",
    "fusion_bench/task_singular_vector",
)
DEVIATIONS = (
    Deviation(
        ("regmean",),
        _dead_inputs,
        "inputs that are zero in every example leave a kernel's rows undetermined: the mean is kept"
        ", MaTS inverts around them",
    ),
    Deviation(
        ("mergekit/slerp", "mergekit-yaml/slerp", "fusion_bench/slerp"),
        _zero_model,
        "a leaf that is zero in one model has no direction: interpolated linearly, where mergekit "
        "and FusionBench take it as orthogonal",
    ),
    Deviation(
        _SUBSPACES,
        _unchanged_kernel,
        "an expert that leaves a kernel as it is brings no directions to it: peers take the "
        "arbitrary ones of a decomposition of zeros",
    ),
    Deviation(
        ("dc_merge (full fine-tuning)", "fusion_bench/task_singular_vector"),
        _narrow_kernel,
        "a kernel narrower than the number of experts is averaged: peers leave it at the base",
    ),
)
HALF = (
    "half precision is computed in float32 and rounded once, where peers round along the way: "
    "compared to two units in the last place"
)


def pytest_generate_tests(metafunc):
    folder = Path(metafunc.config.getoption("--golden-dir"))
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise pytest.UsageError(f"--golden-dir={folder} holds no case, CASE.json")
    if metafunc.function is test_statistics_of_random_masks:
        # A method that is not built yet is counted once, by the comparison of its result.
        built = [path for path in paths if recorded(path, "method") in TRANSLATIONS]
        paths = [path for path in built if recorded(path, "statistics")]
    metafunc.parametrize("path", paths, ids=[path.stem for path in paths])


def recorded(path, key):
    return json.loads(path.read_text()).get(key)


def read(path):
    flat = safetensors.flax.load_file(path.with_suffix(".safetensors"))
    tensors = {}
    for key, value in flat.items():
        prefix, name = key.split("/", 1)
        tensors.setdefault(prefix, {})[name] = value
    return Case(json.loads(path.read_text()), tensors)


def translate(path):
    method = recorded(path, "method")
    if method not in TRANSLATIONS:
        pytest.skip(NOT_BUILT + method)
    case = read(path)
    try:
        translated = TRANSLATIONS[case.method](case)
    except NotBuilt as form:
        pytest.skip(NOT_BUILT + str(form))
    case.parameters.finish()
    return case, translated


def merged(translated, case, method=None, **options):
    options = {**translated.options, "layout": case.layout, **options}
    if method is None:
        method, options["stats"] = translated.method, translated.stats
    return mj.merge(method, translated.base, translated.experts, **options)


def last_place(case, name, dtype):
    """Two units in the last place of the largest model, entry by entry."""
    models = [*case.numbered("expert"), *([case.base] if "base" in case.tensors else [])]
    largest = np.max([abs(np.asarray(model[name], np.float64)) for model in models], axis=0)
    return 2 * float(jnp.finfo(dtype).eps) * largest


def test_result_of_another_implementation(path, record_property):
    case, translated = translate(path)
    got = results(translated, case)
    compared = 0
    for prefix, tree in got.items():
        compared += compare(case, tree, case.tensors[prefix], record_property)
    assert compared > 0


def results(translated, case):
    """What this library computes, under the prefix of the recorded tensors that it answers to."""
    if translated.result is not None:
        return translated.result()
    models = merged(translated, case)
    if "expected" in case.tensors:
        return {"expected": models}
    models = models if isinstance(models, list) else [models]
    assert len(models) == len(case.numbered("expected"))
    return {f"expected{i}": model for i, model in enumerate(models)}


def compare(case, got, several, record_property):
    """The number of entries that were compared."""
    tolerance = case.facts["tolerance"]
    compared = 0
    for name, expected in several.items():
        counted = np.ones(expected.shape, bool)
        if name in case.tensors.get("ambiguous", {}):
            counted &= np.asarray(case.tensors["ambiguous"][name]) == 0
        for deviation in DEVIATIONS:
            if case.method in deviation.methods and (left := deviation.where(case, name)).any():
                record_property(LEFT_OUT, deviation.reason)
                counted &= ~left
        wide = np.asarray(expected, np.float64)
        allowed = tolerance["atol"] + tolerance["rtol"] * abs(wide)
        if expected.dtype in (jnp.bfloat16, jnp.float16):
            record_property(LEFT_OUT, HALF)
            allowed += last_place(case, name, expected.dtype)
        off = (abs(np.asarray(got[name], np.float64) - wide) > allowed) & counted
        assert not off.any(), (
            f"{name}: {off.sum()} of {off.size} entries, got {np.asarray(got[name])[off][:5]}, "
            f"expected {wide[off][:5]}"
        )
        compared += counted.sum()
    return compared


def flat(tree):
    return np.concatenate([np.asarray(tree[name], np.float64).ravel() for name in sorted(tree)])


def test_statistics_of_random_masks(path):
    """Our own draws keep as many elements as the peer's, and their mean is as near the whole."""
    case, translated = translate(path)
    expected = case.facts["statistics"]
    base, draw = flat(translated.base), translated.draw

    @jax.jit
    def merged_by_seed(seeds):
        one = lambda seed: merged(translated, case, draw.random(), seed=seed)
        return jax.lax.map(one, seeds)

    merges = merged_by_seed(np.arange(expected["draws"], dtype=np.uint32))
    mean = flat({name: np.asarray(x, np.float64).mean(0) for name, x in merges.items()}) - base
    whole = flat(merged(translated, case, draw.host)) - base
    slope = mean @ whole / (whole @ whole)
    error = np.linalg.norm(mean - whole) / np.linalg.norm(whole)
    np.testing.assert_allclose(slope, expected["slope_of_mean_delta_on_undropped_delta"], atol=0.01)
    np.testing.assert_allclose(error, expected["relative_l2_error_of_mean_delta"], atol=0.01)
    dropped = draw.dropped("none")
    singles = [merged(translated, case, dropped, seed=seed) for seed in range(40)]
    for i, rate in enumerate(expected["keep_rate_per_expert"]):
        changed = flat(translated.experts[i]) != base
        kept = np.mean([flat(several[i])[changed] != base[changed] for several in singles])
        np.testing.assert_allclose(kept, rate, atol=5 / np.sqrt(40 * changed.sum()))
