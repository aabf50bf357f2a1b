"""Files of packed deltas, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import trees
from packing import JOINT, LOW_RANK, PACKS, SINGLE, count_of, deltas, models

import mergejax as mj

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
