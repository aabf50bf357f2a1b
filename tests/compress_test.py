"""Compression: restatements in float64, what is lost and what is not, sizes, files, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import trees

import mergejax as mj

SHAPES = {"embed": {"bias": (7,)}, "block_0": {"kernel": (5, 7), "bias": (7,)}, "kernel": (4, 6)}
LOW_RANK = ["tsv_compress()", "tsv_compress(fraction=0.7)"]
PACKS = ["skill_pack(rank=3, bands='1:8, 1:4, :2', group=4)", "skill_pack(bands=':32')"]
SINGLE = ["compeft(density=0.3, alpha=2.0)", "t_switch(density=0.2)", "bit_delta()"]
JOINT = ["tall_masks(threshold=[0.2, 0.4, 0.6])", "emr()", "emr(rescale='tensor_mean')"]


def models(count=3, dtype="float32"):
    return trees.models(count, dtype, SHAPES)


def deltas(count=3):
    return mj.compress.deltas(*models(count))


def together(delta):
    return np.concatenate([np.float64(x).ravel() for x in delta.values()])


def zero(delta):
    return {name: np.zeros_like(x) for name, x in delta.items()}


def through(method, several):
    """What the method as a stage makes of deltas."""
    out = mj.merge(method, zero(several[0]), several)
    return out if isinstance(out, list) else [out]


def count_of(method):
    return 3 if method in JOINT + LOW_RANK else 1


# The stages ---------------------------------------------------------------------------------------


def largest(delta, density):
    """The threshold of the whole model, by a sort."""
    magnitudes = np.sort(np.abs(together(delta)))[::-1]
    return magnitudes[max(1, int(density * magnitudes.size)) - 1]


def signs(delta, density, magnitude):
    limit = largest(delta, density)
    return {n: magnitude * np.sign(x) * (np.abs(np.float64(x)) >= limit) for n, x in delta.items()}


def compeft(delta, density, alpha):
    return signs(delta, density, alpha * together(delta).std(ddof=1))


def t_switch(delta, density, norm="whole"):
    flat = together(delta)
    kept = (np.abs(flat) >= largest(delta, density)) & (flat != 0)
    length = np.linalg.norm(flat if norm == "whole" else flat[kept])
    return signs(delta, density, length / np.sqrt(kept.sum()))


def bit_delta(delta):
    return {
        n: np.abs(np.float64(x)).mean() * np.where(x >= 0, 1, -1) if n.endswith("kernel") else x
        for n, x in delta.items()
    }


@pytest.mark.parametrize("density", [0.001, 0.3, 1.0])
@pytest.mark.parametrize("alpha", [1.0, 2.5])
def test_compeft(density, alpha):
    (delta,) = deltas(1)
    (got,) = through(mj.compeft(density=density, alpha=alpha), [delta])
    trees.close(got, compeft(delta, density, alpha))


@pytest.mark.parametrize("density", [0.001, 0.3, 1.0])
@pytest.mark.parametrize("norm", ["whole", "kept"])
def test_t_switch(density, norm):
    (delta,) = deltas(1)
    (got,) = through(mj.t_switch(density=density, norm=norm), [delta])
    trees.close(got, t_switch(delta, density, norm))


def test_bit_delta():
    (delta,) = deltas(1)
    (got,) = through(mj.bit_delta(), [delta])
    trees.close(got, bit_delta(delta))


def test_a_delta_of_equal_elements_stays():
    delta = {"w": np.full(50, 0.1, np.float32), "kernel": np.full((3, 4), 0.1, np.float32)}
    for method in (mj.compeft(), mj.t_switch(density=1.0), mj.bit_delta()):
        trees.close(through(method, [delta])[0], delta, rtol=1e-6, atol=0)


def test_t_switch_keeps_the_norm():
    (delta,) = deltas(1)
    for density in (0.05, 0.5, 1.0):
        (got,) = through(mj.t_switch(density=density), [delta])
        norms = np.linalg.norm(together(got)), np.linalg.norm(together(delta))
        np.testing.assert_allclose(*norms, rtol=1e-5)


def test_bit_delta_has_the_best_factor():
    (delta,) = deltas(1)
    (got,) = through(mj.bit_delta(), [delta])
    x, y = np.float64(delta["kernel"]), np.float64(got["kernel"])
    errors = [np.linalg.norm(x - factor * y) for factor in (0.99, 1, 1.01)]
    assert errors[1] == min(errors)
    assert set(np.sign(y[x == 0])) == {1}


def test_the_best_alpha_of_compeft_for_gaussian_deltas():
    delta = {"w": np.float32(np.random.default_rng(0).normal(size=20000))}

    def error(alpha):
        (got,) = through(mj.compeft(density=0.2, alpha=alpha), [delta])
        return np.linalg.norm(together(delta) - together(got))

    assert error(1.75) < min(error(1.65), error(1.85))


def test_signs_stay_and_only_three_values_are_left():
    (delta,) = deltas(1)
    for method in SINGLE[:2]:
        (got,) = through(method, [delta])
        flat = together(got)
        assert len(np.unique(flat)) == 3
        assert np.all(flat * together(delta) >= 0)


@pytest.mark.parametrize("method", SINGLE)
def test_zero_deltas_stay_zero(method):
    (delta,) = deltas(1)
    trees.equal(through(method, [zero(delta)])[0], zero(delta))


# Singular directions ------------------------------------------------------------------------------


def truncated(x, rank):
    u, values, vt = np.linalg.svd(np.float64(x), full_matrices=False)
    return u[:, :rank] * values[:rank] @ vt[:rank]


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.7, 1.0])
def test_tsv_compress(fraction):
    several = deltas(3)
    for delta, got in zip(
        several, through(mj.tsv_compress(fraction=fraction), several), strict=True
    ):
        for name, x in delta.items():
            rank = max(1, int(min(x.shape) * (fraction or 1 / 3) + 1e-9))
            expected = truncated(x, rank) if name.endswith("kernel") else x
            np.testing.assert_allclose(got[name], expected, atol=1e-6)


def test_tsv_compress_of_everything_is_the_delta():
    (delta,) = deltas(1)
    trees.close(through("tsv_compress()", [delta])[0], delta, atol=1e-6)


def rounded(x, width, group):
    found = np.empty_like(x)
    for start in range(0, len(x), group):
        part = x[start : start + group]
        unit = np.abs(part).max(0) / (2 ** (width - 1) - 1)
        found[start : start + group] = np.round(part / unit) * unit
    return found


def test_skill_pack():
    (delta,) = deltas(1)
    (got,) = through(PACKS[0], [delta])
    for name, x in delta.items():
        expected = x
        if name.endswith("kernel"):
            u, values, vt = np.linalg.svd(np.float64(x.T), full_matrices=False)  # [out, in]
            expected = sum(
                values[i]
                * rounded(u[:, i : i + 1], width, 4)
                @ rounded(vt.T[:, i : i + 1], width, 4).T
                for i, width in enumerate((8, 4, 2))
            ).T
        np.testing.assert_allclose(got[name], expected, atol=1e-5)


def test_skill_pack_without_rounding_is_the_truncation():
    (delta,) = deltas(1)
    (got,) = through("skill_pack(rank=2, bands=':32')", [delta])
    np.testing.assert_allclose(got["kernel"], truncated(delta["kernel"], 2), atol=1e-6)


def test_more_bits_lose_less():
    delta = {"kernel": np.float32(np.random.default_rng(0).normal(size=(24, 16)))}
    errors = [
        np.linalg.norm(
            through(f"skill_pack(bands=':{bits}', group=8)", [delta])[0]["kernel"] - delta["kernel"]
        )
        for bits in (2, 3, 4, 6, 8, 32)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4 < errors[-2]


@pytest.mark.parametrize("method", ["tsv_compress(fraction=0.5)", PACKS[0]])
def test_a_torch_layout_gives_the_transposed_delta(method):
    several = deltas(1)
    turned = [{n: np.ascontiguousarray(x.T) for n, x in delta.items()} for delta in several]
    expected = through(method, several)[0]
    for got in (
        mj.merge(method, zero(turned[0]), turned, layout="torch"),
        mj.compress.decode(mj.compress.encode(method, turned, layout="torch"))[0],
    ):
        trees.close({n: np.asarray(x).T for n, x in got.items()}, expected, atol=1e-6)


def test_kernels_of_three_axes_are_matrices():
    delta = {"query/kernel": np.float32(np.random.default_rng(0).normal(size=(6, 2, 4)))}
    for method in ("tsv_compress(fraction=0.3)", PACKS[0]):
        (want,) = through(method, [delta])
        (got,) = mj.compress.decode(mj.compress.encode(method, [delta]))
        trees.close(got, want, atol=1e-6)
    flat = truncated(delta["query/kernel"].reshape(6, 8), 1)
    (got,) = through("tsv_compress(fraction=0.3)", [delta])
    np.testing.assert_allclose(got["query/kernel"].reshape(6, 8), flat, atol=1e-6)


@pytest.mark.parametrize("method", [*SINGLE[1:], "tsv_compress(fraction=0.4)", PACKS[0], "emr()"])
def test_stacked_layers_are_packed_one_by_one(method, tmp_path):
    several = deltas(1)
    layers = [{f"{i}/kernel": (i + 1) * x["kernel"] for i in range(3)} for x in several]
    stacked = [{"kernel": np.stack(list(x.values()))} for x in layers]
    packed = mj.compress.encode(method, stacked, scanned="kernel")
    base = zero(stacked[0])
    mj.compress.save(tmp_path / "a", packed, base)
    packed = mj.compress.load(tmp_path / "a", base)
    (got,) = mj.compress.decode(packed)
    (want,) = mj.compress.decode(mj.compress.encode(method, layers))
    np.testing.assert_array_equal(got["kernel"], np.stack(list(want.values())))
    (model,) = mj.compress.restore(base, packed)
    np.testing.assert_array_equal(model["kernel"], got["kernel"])
    expected = mj.merge(method, base, stacked, scanned="kernel")["kernel"]
    np.testing.assert_allclose(got["kernel"], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("skill_pack(bands='20')", "skill_pack(bands='20') must list directions and their bits"),
        ("skill_pack(bands=':4, 2:8')", "skill_pack(bands=':4, 2:8') must list directions and"),
        ("skill_pack(bands=':9')", "skill_pack(bands=':9') must list directions and their bits"),
        ("skill_pack(rank=0)", "skill_pack(rank=0, group=128) must both be at least 1"),
        ("tsv_compress(fraction=1.5)", "tsv_compress(fraction=...) must be in [0, 1], not 1.5"),
    ],
)
def test_bad_parameters_are_refused_in_words(text, sentence):
    with pytest.raises(mj.MergeError) as error:
        mj.parse(text)
    assert str(error.value).startswith(sentence)


# Packing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", SINGLE + JOINT + LOW_RANK + PACKS)
def test_what_is_unpacked_is_what_the_stage_returns(method):
    several = deltas(count_of(method))
    packed = mj.compress.encode(method, several)
    expected = through(method, several)
    for got, want in zip(mj.compress.decode(packed), expected, strict=True):
        if method.startswith("emr"):
            trees.close(got, want, rtol=1e-6, atol=0)
        elif method in LOW_RANK + PACKS:
            trees.close(got, want, rtol=1e-5, atol=1e-6)
        else:
            trees.equal(got, want)


@pytest.mark.parametrize("method", SINGLE)
def test_merging_after_unpacking_is_merging_what_the_stage_returns(method):
    several = deltas(3)
    unpacked = [mj.compress.decode(mj.compress.encode(method, [delta]))[0] for delta in several]
    for host in ("ties(density=0.4)", "task_arithmetic(0.3)"):
        got = mj.merge(host, zero(several[0]), unpacked)
        trees.equal(got, mj.merge(f"{method}|{host}", zero(several[0]), several))


@pytest.mark.parametrize("method", JOINT + LOW_RANK)
def test_merging_after_unpacking_joint_methods(method):
    several = deltas(3)
    unpacked = mj.compress.decode(mj.compress.encode(method, several))
    got = mj.merge("magmax()", zero(several[0]), unpacked)
    expected = mj.merge(f"{method}|magmax()", zero(several[0]), several)
    trees.close(got, expected, rtol=1e-5, atol=1e-6)


def test_restored_experts_are_the_base_plus_what_is_unpacked():
    base, experts = models(2, "bfloat16")
    packed = mj.compress.encode("emr()", mj.compress.deltas(base, experts))
    for model, delta in zip(
        mj.compress.restore(base, packed), mj.compress.decode(packed), strict=True
    ):
        wide = {n: x.astype(np.float32) + delta[n] for n, x in trees.flat(base).items()}
        trees.equal(trees.flat(model), {n: x.astype(jnp.bfloat16) for n, x in wide.items()})


def test_integers_are_the_bases_and_running_statistics_are_kept_whole():
    base = {
        "kernel": np.zeros((3, 4), np.float32),
        "batch_stats": {"mean": np.zeros(3, np.float32)},
        "count": np.int32(5),
    }
    experts = [
        {
            **base,
            "kernel": np.full((3, 4), x, np.float32),
            "batch_stats": {"mean": np.full(3, x, np.float32)},
        }
        for x in (1.0, 3.0)
    ]
    packed = mj.compress.encode("emr()", mj.compress.deltas(base, experts))
    for model, x in zip(mj.compress.restore(base, packed), (1.0, 3.0), strict=True):
        np.testing.assert_allclose(model["kernel"], x, rtol=1e-6)
        np.testing.assert_allclose(model["batch_stats"]["mean"], 2.0)  # their average
        assert model["count"] == 5


def test_packed_deltas_are_a_pytree():
    packed = mj.compress.encode("emr()", deltas(2))
    again = jax.tree.map(np.asarray, jax.device_put(packed))
    trees.equal(mj.compress.decode(again), mj.compress.decode(packed))


# Size ---------------------------------------------------------------------------------------------

SIZES = {"embed/bias": 7, "block_0/kernel": 35, "block_0/bias": 7, "kernel": 24}


def in_bytes(*bits):
    return sum(-(-int(n) // 8) for n in bits)


def test_size_of_signs():
    (delta,) = deltas(1)
    packed = mj.compress.encode("t_switch(density=0.2)", [delta])
    (got,) = mj.compress.decode(packed)
    kept = {n: int((x != 0).sum()) for n, x in got.items()}
    size = mj.compress.size(packed)
    assert size.payload == sum(4 + in_bytes(n, kept[leaf]) for leaf, n in SIZES.items())
    assert size.dense == 4 * 73
    entropy = 0.0
    for leaf, n in SIZES.items():
        p = kept[leaf] / n
        entropy += 32 + (n * (-(1 - p) * np.log2(1 - p) - p * np.log2(p / 2)) if p else 0)
    np.testing.assert_allclose(size.formula, entropy / 8)
    assert size.formula <= size.payload


def test_size_of_bit_delta():
    packed = mj.compress.encode("bit_delta()", [{"kernel": np.ones((64, 64), np.float32) * 3}])
    assert mj.compress.size(packed) == (516, 516, 4 * 4096)


@pytest.mark.parametrize(("method", "scalars"), [("tall_masks()", 0), ("emr()", 4)])
def test_size_of_masks(method, scalars):
    size = mj.compress.size(mj.compress.encode(method, deltas(3)))
    assert size.payload == 4 * 73 + 3 * (scalars + sum(in_bytes(n) for n in SIZES.values()))
    assert size.formula == 4 * 73 + 3 * (scalars + 73 / 8)
    assert size.dense == 3 * 4 * 73


def test_size_of_singular_directions():
    size = mj.compress.size(mj.compress.encode("tsv_compress()", deltas(3)))
    whole = 7 + 7
    assert size.payload == size.formula == 4 * 3 * (whole + (5 + 7 + 1) + (4 + 6 + 1))
    assert size.dense == 3 * 4 * 73


def test_size_of_skill_pack():
    size = mj.compress.size(mj.compress.encode(PACKS[0], deltas(1)))
    payload = formula = 4 * (7 + 7)
    for shape in ((5, 7), (4, 6)):
        groups = sum(-(-n // 4) for n in shape)
        payload += 4 * 3 + sum(
            in_bytes(*(width * n for n in shape)) + 4 * groups for width in (8, 4, 2)
        )
        formula += 4 * 3 + sum(width * sum(shape) / 8 + 4 * groups for width in (8, 4, 2))
    assert (size.payload, size.formula) == (payload, formula)


# Files --------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    base, experts = models(1)
    packed = mj.compress.encode(SINGLE[0], mj.compress.deltas(base, experts))
    path = tmp_path / "delta.safetensors"
    mj.compress.save(path, packed, base)
    return path, packed, base


@pytest.mark.parametrize("method", SINGLE + JOINT + LOW_RANK[:1] + PACKS[:1])
def test_a_file_gives_back_what_was_saved(method, tmp_path):
    base, experts = models(count_of(method))
    packed = mj.compress.encode(method, mj.compress.deltas(base, experts))
    path = tmp_path / "delta.safetensors"
    mj.compress.save(path, packed, base)
    loaded = mj.compress.load(path, base)
    trees.equal(mj.compress.decode(loaded), mj.compress.decode(packed))
    assert mj.compress.size(loaded) == mj.compress.size(packed)
    assert (loaded.method, loaded.experts) == (packed.method, packed.experts)
    assert [x.name for x in tmp_path.iterdir()] == [path.name]


def test_the_header_says_what_the_file_is(saved):
    path, _, base = saved
    with safetensors.safe_open(path, framework="numpy") as file:
        header = file.metadata()
    assert header["method"] == "compeft(density=0.3, alpha=2.0)"
    assert header["version"] == "1"
    assert header["base"] == mj.compress.fingerprint(base)


def refusal(path, base):
    with pytest.raises(mj.MergeError) as error:
        mj.compress.load(path, base)
    assert str(error.value).startswith(str(path))
    assert str(error.value).count("\n") == 0
    return str(error.value)


def test_another_base_is_refused(saved):
    path, _, base = saved
    other = jax.tree.map(np.copy, base)
    other["kernel"][0, 0] += 1
    assert "belongs to another base" in refusal(path, other)
    assert "belongs to another base" in refusal(path, {**base, "more": np.zeros(1, np.float32)})


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_truncated_file_is_refused(saved, length):
    path, _, base = saved
    path.write_bytes(path.read_bytes()[:length])
    assert "missing or damaged" in refusal(path, base)


def test_every_damaged_byte_is_noticed(saved):
    path, _, base = saved
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[place] ^= 0x15
        path.write_bytes(damaged)
        with pytest.raises(mj.MergeError):
            mj.compress.load(path, base)


def test_other_files_are_refused(saved, tmp_path):
    path, _, base = saved
    assert "missing or damaged" in refusal(tmp_path / "none", base)
    safetensors.numpy.save_file({"w": np.zeros(2)}, path)
    assert "holds no packed deltas" in refusal(path, base)
    header = {"format": "mergejax.compress", "version": "7"}
    safetensors.numpy.save_file({"w": np.zeros(2)}, path, metadata=header)
    assert "is of version 7" in refusal(path, base)


def test_a_file_that_cannot_be_written_leaves_the_former_one(saved, monkeypatch):
    path, packed, base = saved
    before = path.read_bytes()

    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(OSError, match="no space left"):
        mj.compress.save(path, packed, base)
    assert path.read_bytes() == before
    assert [x.name for x in path.parent.iterdir()] == [path.name]


def test_fingerprints_see_names_shapes_types_and_values():
    base = {"a": np.zeros((2, 3), np.float32)}
    others = [
        {"b": base["a"]},
        {"a": base["a"].reshape(3, 2)},
        {"a": np.zeros((2, 3), np.int32)},
        {"a": base["a"] + 1},
        {"a": -base["a"]},
    ]
    prints = {mj.compress.fingerprint(tree) for tree in [base, *others]}
    assert len(prints) == 6
    assert mj.compress.fingerprint({"a": jnp.zeros((2, 3))}) in prints


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda d: ("compeft()", d), "compeft packs one delta at a time, not 2; call encode for"),
        (lambda d: ("ties()", d), "'ties()' is not one compression, known: bit_delta, compeft"),
        (lambda d: ("compeft()|emr()", d), "'compeft()|emr()' is more than one compression;"),
        (lambda d: ("compefd()", d), "no method is called 'compefd', did you mean 'compeft'?"),
        (lambda d: ("compeft(density=0)", d), "compeft(density=...) must be in (0, 1], not 0"),
        (lambda d: ("emr()", []), "deltas must be a list of trees, one per expert"),
        (lambda d: ("emr()", d[0]), "deltas must be a list of trees, one per expert"),
        (lambda d: ("emr()", [d[0], {"kernel": d[1]["kernel"]}]), "expert '1' has no leaf"),
        (
            lambda d: ("emr()", [{"n": np.ones(2, np.int32)}]),
            "leaf 'n' of delta 0 has dtype int32, but deltas are floating-point; leave it out",
        ),
        (
            lambda d: ("bit_delta()", [{"kernel": np.float32([[1, np.nan]])}]),
            "leaf 'kernel' of expert '0' has 1 non-finite values",
        ),
    ],
)
def test_is_refused_in_words(call, sentence):
    method, several = call(deltas(2))
    with pytest.raises(mj.MergeError) as error:
        mj.compress.encode(method, several)
    assert str(error.value).splitlines()[0].startswith(sentence)


def test_a_base_of_another_shape_is_refused():
    packed = mj.compress.encode("bit_delta()", [{"w": np.ones(3, np.float32)}])
    with pytest.raises(mj.MergeError, match="leaves 'w' that the base lacks or has in another"):
        mj.compress.restore({"w": np.ones(4, np.float32)}, packed)


def test_integers_that_differ_from_the_base_are_refused():
    with pytest.raises(mj.MergeError, match="leaf 'n' holds int32 values that differ"):
        mj.compress.deltas({"n": np.ones(2, np.int32)}, [{"n": np.zeros(2, np.int32)}])
