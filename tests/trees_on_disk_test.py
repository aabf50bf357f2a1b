"""Flax msgpack and Orbax checkpoints: read, merged and written as their own libraries do."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from convert_test import EVERY, NARROW, assert_same, read
from flax import serialization
from orbax import checkpoint

import mergejax as mj
from mergejax import command
from mergejax.checkpoints import convert, formats, msgpack, orbax_arrays

# Orbax closes its event loop while tensorstore may still have something to say to it.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(?s).*Event loop is closed:pytest.PytestUnraisableExceptionWarning"
)
METHOD = "task_arithmetic(scaling=0.5)"


def tree(seed):
    draw = np.random.default_rng(seed).normal
    kernel = lambda *shape: draw(size=shape).astype(np.float32)
    return {
        "params": {
            "embed": {"embedding": kernel(7, 4).astype(ml_dtypes.bfloat16)},
            "block_0": {"dense": {"kernel": kernel(4, 6), "bias": kernel(6)}},
            "block_1": {"attention": {"kernel": kernel(4, 2, 3)}},
            "scale": np.float32(draw()),
        },
        "step": np.int32(3),
    }


def flat(nested):
    leaves = jax.tree_util.tree_flatten_with_path(nested)[0]
    return {mj.leaves.name_of(path): np.asarray(x) for path, x in leaves}


def write(form, path, nested):
    if form == "msgpack":
        path = path.with_suffix(".msgpack")
        path.write_bytes(serialization.msgpack_serialize(nested))
    elif form == "run":
        with checkpoint.CheckpointManager(path.absolute()) as manager:
            manager.save(10, args=checkpoint.args.StandardSave(nested))
        return path / "10"
    else:
        handler = checkpoint.PyTreeCheckpointHandler(
            use_ocdbt=form != "zarr", use_zarr3=form == "zarr3"
        )
        with checkpoint.Checkpointer(handler) as checkpointer:
            checkpointer.save(path.absolute(), checkpoint.args.PyTreeSave(nested))
    return path


@pytest.mark.parametrize("form", ["msgpack", "run", "ocdbt", "zarr", "zarr3"])
def test_what_the_libraries_write_is_read(form, tmp_path):
    nested = tree(0) | {"list": [np.arange(3), 2.5], "narrow": NARROW, "none": None}
    if form == "run":
        del nested["none"]
    if form == "msgpack":
        nested["list"] = {"0": np.arange(3), "1": 2.5}
    assert_same(read(write(form, tmp_path / "model", nested)), flat(nested))


@pytest.mark.parametrize("form", ["msgpack", "run", "ocdbt"])
def test_they_are_merged_as_in_memory(form, tmp_path):
    trees = [tree(i) for i in range(3)]
    paths = [write(form, tmp_path / f"m{i}", nested) for i, nested in enumerate(trees)]
    out = mj.merge_checkpoints(METHOD, paths[0], paths[1:], tmp_path / "out")
    assert_same(read(out), flat(mj.merge(METHOD, trees[0], trees[1:])))


def test_kernels_of_flax_are_in_by_out(tmp_path):
    trees = [tree(i) for i in range(3)]
    paths = [write("msgpack", tmp_path / f"{i}.msgpack", t) for i, t in enumerate(trees)]
    out = mj.merge_checkpoints("widen()", paths[0], paths[1:], tmp_path / "out")
    wanted = flat(mj.merge("widen()", trees[0], trees[1:]))
    for name, x in read(out).items():
        np.testing.assert_allclose(
            np.float32(x), np.float32(wanted[name]), rtol=1e-5, atol=1e-5, err_msg=name
        )


def test_variables_of_nnx_keep_their_names(tmp_path):
    trees = [{"dense": {"kernel": {"value": tree(i)["params"]["block_0"]["dense"]["kernel"]}}}
             for i in range(3)]  # fmt: skip
    paths = [write("ocdbt", tmp_path / f"{i}", t) for i, t in enumerate(trees)]
    out = mj.merge_checkpoints("widen()", paths[0], paths[1:], tmp_path / "out", format="orbax")
    wanted = mj.merge("widen()", *[t["dense"] for t in trees[:1]], [t["dense"] for t in trees[1:]])
    assert list(read(out)) == ["dense/kernel/value"]
    np.testing.assert_allclose(
        read(out)["dense/kernel/value"], wanted["kernel"]["value"], rtol=1e-5, atol=1e-5
    )


def test_large_arrays_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 20)
    monkeypatch.setattr(msgpack, "_LARGEST", 20)
    nested = {"a": {"kernel": np.arange(24, dtype=np.float32).reshape(4, 6)}, "b": np.ones(2)}
    path = write("msgpack", tmp_path / "a.msgpack", nested)
    assert_same(read(path), flat(nested))
    again = convert.convert(path, tmp_path / "again.msgpack")
    assert again.read_bytes() == path.read_bytes()


def test_msgpack_has_the_bytes_that_flax_writes(tmp_path):
    sizes = (0, 1, 2, 3, 60, 300, 70_000)
    nested = {"a": {f"x{n}": np.zeros(n, np.uint8) for n in sizes}, "types": EVERY}
    nested["many"] = {str(i): np.ones((2, i % 3, 1), np.float16) for i in range(20)}
    path = write("msgpack", tmp_path / "a.msgpack", nested)
    convert.convert(path, tmp_path / "again.msgpack")
    assert (tmp_path / "again.msgpack").read_bytes() == path.read_bytes()


def restored(form, path):
    if form == "msgpack":
        return serialization.msgpack_restore((path / "model.msgpack").read_bytes())
    if form == "npz":
        return dict(np.load(path / "model.npz"))
    as_numpy = checkpoint.RestoreArgs(restore_type=np.ndarray)
    with checkpoint.PyTreeCheckpointer() as checkpointer:
        saved = checkpointer.metadata(path.absolute()).item_metadata.tree
        arguments = jax.tree.map(lambda _: as_numpy, saved)
        return checkpointer.restore(path.absolute(), restore_args=arguments)


@pytest.mark.parametrize("form", ["msgpack", "npz", "orbax"])
def test_results_are_what_the_libraries_read(form, tmp_path, capsys):
    trees = [tree(i) for i in range(3)]
    if form == "npz":
        for nested in trees:
            del nested["params"]["embed"]
    paths = [write("msgpack", tmp_path / f"{i}.msgpack", t) for i, t in enumerate(trees)]
    arguments = ["--base", paths[0], "--expert", paths[1], "--expert", paths[2]]
    arguments += ["--method", METHOD, "--format", form, "--out"]
    command.run(["merge", "--quiet", *map(str, arguments), str(tmp_path / "out")])
    wanted = flat(mj.merge(METHOD, trees[0], trees[1:]))
    assert_same(flat(restored(form, tmp_path / "out")), wanted)
    recipe = json.loads((tmp_path / "out" / "mergejax.json").read_text())["recipe"]
    assert (recipe["format"], recipe["method"]) == (form, METHOD)
    # The same bytes in another place, and known as done.
    command.run(["merge", *map(str, arguments), str(tmp_path / "again")])
    for file in (tmp_path / "out").rglob("*"):
        if file.is_file():
            other = tmp_path / "again" / file.relative_to(tmp_path / "out")
            assert other.read_bytes() == file.read_bytes(), file
    capsys.readouterr()
    command.run(["merge", *map(str, arguments), str(tmp_path / "again")])
    assert "nothing to do" in capsys.readouterr().out
    # A result is an input.
    assert_same(read(tmp_path / "out"), wanted)


def test_orbax_restores_into_a_train_state(tmp_path):
    nested = {"w": {"kernel": np.ones((3, 2), np.float32)}, "b": jnp.zeros(2, jnp.bfloat16)}
    source = write("msgpack", tmp_path / "a.msgpack", nested)
    convert.convert(source, tmp_path / "model")
    with checkpoint.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(
            (tmp_path / "model").absolute(), jax.eval_shape(lambda: nested)
        )
    jax.tree.map(np.testing.assert_array_equal, found, nested)


@pytest.mark.parametrize("form", ["msgpack", "npz", "orbax"])
def test_an_interrupted_merge_goes_on(form, tmp_path, monkeypatch):
    paths = []
    for i in range(3):
        nested = {"w": {"kernel": np.random.default_rng(i).normal(size=(8, 8))}, "b": np.ones(3)}
        paths.append(write("msgpack", tmp_path / f"{i}.msgpack", nested))
    whole = mj.merge_checkpoints(METHOD, paths[0], paths[1:], tmp_path / "whole", format=form)
    monkeypatch.setattr(formats.Layout, "write", property(lambda self: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        mj.merge_checkpoints(METHOD, paths[0], paths[1:], tmp_path / "out", format=form)
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    out = mj.merge_checkpoints(METHOD, paths[0], paths[1:], tmp_path / "out", format=form)
    assert_same(read(out), read(whole))
    assert [p.name for p in tmp_path.glob(".*")] == []


def test_a_step_is_found_and_a_run_is_refused(tmp_path):
    with checkpoint.CheckpointManager((tmp_path / "run").absolute()) as manager:
        for step in (5, 10):
            items = {
                "state": checkpoint.args.PyTreeSave({"w": np.full(3, float(step))}),
                "meta": checkpoint.args.JsonSave({"x": 1}),
            }
            manager.save(step, args=checkpoint.args.Composite(**items))
    assert_same(read(tmp_path / "run" / "10"), {"w": np.full(3, 10.0)})
    with pytest.raises(mj.MergeError, match=r"is a run of several steps \('5', '10'\); give one"):
        read(tmp_path / "run")
    steps = [tmp_path / "run" / step for step in ("5", "10")]
    mj.merge_checkpoints("average", None, steps, tmp_path / "mean", format="orbax")
    assert_same(read(tmp_path / "mean"), {"w": np.full(3, 7.5)})
    assert orbax_arrays.is_orbax(tmp_path / "run")
    assert not orbax_arrays.is_orbax(tmp_path / "absent")


def _orbax_damage(path):
    for file in path.rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(b"")


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (lambda p: (p / "_METADATA").write_text("{"), "_METADATA cannot be read"),
        (lambda p: (p / "_METADATA").write_text("{}"), "the checkpoint is damaged"),
        (_orbax_damage, "damaged|cannot be read"),
    ],
)
def test_damaged_orbax_checkpoints(harm, sentence, tmp_path):
    path = write("ocdbt", tmp_path / "model", {"w": np.arange(4096.0), "v": np.ones(9)})
    harm(path)
    with pytest.raises(mj.MergeError, match=sentence) as caught:
        read(path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is no Flax msgpack file"),
        (b"\x81\xa1w\xc1", "byte 3 is no msgpack"),
        (serialization.msgpack_serialize({"w": np.ones(9)})[:-8], "ends behind its place"),
        (serialization.msgpack_serialize({"w": np.ones(9)}) + b"\x00", "1 bytes follow its end"),
        (serialization.msgpack_serialize({"w": "text"}), "'w' of str cannot be merged"),
        (serialization.msgpack_serialize({"w": 1j}), "'w' of bytes cannot be merged"),
        (serialization.msgpack_serialize(np.ones(3)), "holds no tree of arrays"),
        (b"\x81\xa1w\x81\xd9\x1c__msgpack_chunked_array__\xc3", "is no Flax msgpack file"),
        (b"\x81\xa1w" * 300, "nested too deeply"),
    ],
)
def test_damaged_msgpack_files(content, sentence, tmp_path):
    (tmp_path / "a.msgpack").write_bytes(content)
    with pytest.raises(mj.MergeError, match=sentence) as caught:
        read(tmp_path / "a.msgpack")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"format": "npy"}, r"format: 'npy' is unknown, did you mean 'npz'"),
        ({"format": "npz"}, r"npz has no type for 'params/embed/embedding'"),
    ],
)
def test_formats_that_do_not_fit(options, sentence, tmp_path):
    paths = [write("msgpack", tmp_path / f"{i}.msgpack", tree(i)) for i in range(2)]
    with pytest.raises(mj.MergeError, match=sentence):
        mj.merge_checkpoints(METHOD, paths[0], paths[1:], tmp_path / "out", **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.msgpack", "1.msgpack"]


@pytest.mark.parametrize("form", ["msgpack", "npz", "safetensors"])
def test_scalars_and_empty_arrays_survive(form, tmp_path):
    paths = []
    for i in range(3):
        nested = {"scale": np.float32(i), "none": np.ones((0, 3), np.float32), "w": np.full(2, i)}
        nested["w"] = nested["w"].astype(np.float32)
        paths.append(write("msgpack", tmp_path / f"{i}.msgpack", nested))
    method = "task_arithmetic(scaling=0.5)"
    out = mj.merge_checkpoints(method, paths[0], paths[1:], tmp_path / "out", format=form)
    wanted = {"scale": np.float32(1.5), "none": np.ones((0, 3)), "w": np.full(2, 1.5)}
    assert_same(read(out), {name: np.float32(value) for name, value in wanted.items()})


def test_orbax_refuses_empty_arrays(tmp_path):
    path = write("msgpack", tmp_path / "a.msgpack", {"w": np.ones((0, 3)), "v": np.ones(2)})
    with pytest.raises(mj.MergeError, match="Orbax stores no empty arrays such as 'w'"):
        convert.convert(path, tmp_path / "model")
