import json
import os
import pathlib
import shutil

import disk_models
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mergejax as mj
from mergejax.checkpoints import budget, execute, folder, merge, output, pieces, safetensors
from mergejax.checkpoints.staging import Staging

METHODS = [
    "task_arithmetic(scaling=0.5)",
    "linear(weights=[0.25, 0.75])",
    "ties(density=0.3)",
    "ties(density=0.3, scope='tensor')",
    "drop(rate=0.5)|ties(density=0.5)",
    "slerp(t=0.4)",
    "iso_c()",
]


def load(path):
    return {
        name: x
        for file in sorted(path.glob("*.safetensors"))
        for name, x in load_file(file).items()
    }


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of 16 and chunks of 32 elements, so that small leaves have several."""
    for module in (pieces, merge):
        for name, size in (("PIECE", 16), ("MEASURED", 16), ("CHUNK", 32)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, size)


@pytest.mark.parametrize("method", METHODS)
def test_a_merge_on_disk_is_the_merge_in_memory(method, tmp_path, small_pieces):
    base, *experts = disk_models.family(tmp_path, shards=2)
    out = mj.merge_checkpoints(method, base, experts, tmp_path / "out", shard_size=400)
    wanted = {}
    mj.stream(
        method,
        load(base),
        [load(expert) for expert in experts],
        lambda name, arrays: wanted.__setitem__(name, np.asarray(arrays[0])),
        names=["expert0", "expert1"],
        layout="torch",
    )
    found = load(out)
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        assert found[name].dtype == x.dtype, name
        exact = method not in ("slerp(t=0.4)", "iso_c()") or "norm" not in name
        tolerance = 0 if exact else 2**-7
        np.testing.assert_allclose(
            found[name].astype(np.float32), x.astype(np.float32), rtol=tolerance, err_msg=name
        )


def test_the_sum_of_deltas_is_rounded_once(tmp_path):
    base, *experts = disk_models.family(tmp_path)
    out = mj.merge_checkpoints("task_arithmetic(scaling=0.5)", base, experts, tmp_path / "out")
    models = [{n: x.astype(np.float32) for n, x in load(p).items()} for p in (base, *experts)]
    for name, x in load(out).items():
        first, *others = (model[name] for model in models)
        by_hand = first + np.float32(0.5) * sum(y - first for y in others)
        assert np.array_equal(x, by_hand.astype(x.dtype)), name


def test_shards_and_index_are_as_transformers_writes_them(tmp_path):
    base, *experts = disk_models.family(tmp_path)
    out = mj.merge_checkpoints("average()", base, experts, tmp_path / "out", shard_size=300)
    files = sorted(path.name for path in out.glob("*.safetensors"))
    count = len(files)
    assert files == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    index = json.loads((out / folder.INDEX).read_text())
    tensors = load(out)
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    for name, file in index["weight_map"].items():
        assert name in load_file(out / file)
    assert sum(len(load_file(out / file)) for file in files) == len(tensors)


@pytest.mark.parametrize("shards", [1, 3])
def test_bytes_do_not_depend_on_threads_shards_of_inputs_or_budget(shards, tmp_path, monkeypatch):
    one = disk_models.family(tmp_path / "one")
    first = mj.merge_checkpoints("dare(rate=0.5)", one[0], one[1:], tmp_path / "a", memory="2GiB")
    monkeypatch.setattr(budget, "threads", lambda job, need: 1)
    several = disk_models.family(tmp_path / "several", shards=shards)
    second = mj.merge_checkpoints("dare(rate=0.5)", several[0], several[1:], tmp_path / "b")
    assert disk_models.snapshot(first) == disk_models.snapshot(second)


def test_a_recipe_names_hashes_and_nothing_of_this_machine(tmp_path):
    base, *experts = disk_models.family(tmp_path)
    out = mj.merge_checkpoints("ties(density=0.4)", base, experts, tmp_path / "out", seed=7)
    stored = json.loads((out / "mergejax.json").read_text())
    _, metadata = safetensors.read_header(out / "model.safetensors")
    assert metadata["format"] == "pt"
    assert json.loads(metadata["mergejax"]) == stored["recipe"]
    assert stored["recipe"]["method"] == "ties(density=0.4)"
    assert stored["recipe"]["seed"] == 7
    hashes = [e["xxh3_128"] for e in (stored["recipe"]["base"], *stored["recipe"]["experts"])]
    assert len({*hashes, stored["result"], output.UNKNOWN}) == 5
    for content in disk_models.snapshot(out).values():
        assert str(tmp_path).encode() not in content
        assert os.uname().nodename.encode() not in content


def test_a_model_has_one_hash_however_it_is_stored(tmp_path):
    base, *experts = disk_models.family(tmp_path / "one")
    again = disk_models.family(tmp_path / "two", shards=2)
    outs = [
        mj.merge_checkpoints(method, b, e, tmp_path / method[:4])
        for method, b, e in (("iso_c()", base, experts), ("ties()", again[0], again[1:]))
    ]
    recipes = [json.loads((out / "mergejax.json").read_text())["recipe"] for out in outs]
    assert recipes[0]["experts"] == recipes[1]["experts"]
    # And the result's hash is what a merge of the result would note.
    result = json.loads((outs[0] / "mergejax.json").read_text())["result"]
    last = mj.merge_checkpoints("average()", None, [outs[0], experts[0]], tmp_path / "last")
    noted = json.loads((last / "mergejax.json").read_text())["recipe"]["experts"][0]
    assert noted == {"name": "iso_", "xxh3_128": result}


def test_side_files_are_copied_and_the_type_in_the_config_follows(tmp_path):
    base, *experts = disk_models.family(tmp_path)
    (base / "tokenizer.json").write_text("{}")
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text('{"mean": true}')
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    before = disk_models.snapshot(base)
    out = mj.merge_checkpoints("average()", base, experts, tmp_path / "out", dtype="float32")
    assert (out / "tokenizer.json").read_text() == "{}"
    assert (out / "1_Pooling" / "config.json").read_text() == '{"mean": true}'
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float32"
    assert {x.dtype for x in load(out).values()} == {np.dtype(np.float32)}
    assert "| base | mit |" in (out / "README.md").read_text()
    assert disk_models.snapshot(base) == before


def test_integers_scalars_and_empty_tensors_survive(tmp_path):
    extra = {
        "ids": np.arange(4),
        "flag": np.array([True, False]),
        "bn.num_batches_tracked": np.array(3),
        "none": np.zeros((0, 3), np.float32),
        "scale": np.array(2.0, np.float32),
    }
    paths = []
    for i, name in enumerate(("base", "a", "b")):
        own = extra | {"bn.num_batches_tracked": np.array(3 + i)}
        own["scale"] = np.array(2.0 + i, np.float32)
        paths.append(disk_models.write(tmp_path / name, disk_models.weights(i, spread=0.1) | own))
    out = load(mj.merge_checkpoints("average()", paths[0], paths[1:], tmp_path / "out"))
    assert out["bn.num_batches_tracked"] == 3
    assert out["scale"].shape == ()
    assert out["scale"] == np.float32(3.5)
    assert out["none"].shape == (0, 3)
    assert np.array_equal(out["ids"], np.arange(4))
    assert out["flag"].tolist() == [True, False]


@pytest.mark.parametrize(
    "dtype", [np.float16, np.float32, np.float64, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]
)
def test_every_floating_type_goes_in_and_out(dtype, tmp_path):
    base, *experts = disk_models.family(tmp_path, dtype=np.float32)
    for path in (base, *experts):
        header, values, start = {}, b"", 0
        for name, x in load(path).items():
            content = x.astype(dtype).tobytes()
            code = safetensors.CODES[np.dtype(dtype)]
            header[name] = {
                "dtype": code,
                "shape": list(x.shape),
                "data_offsets": [start, start + len(content)],
            }
            start, values = start + len(content), values + content
        (path / "model.safetensors").write_bytes(disk_models.raw(header, values))
    out = mj.merge_checkpoints("average()", base, experts, tmp_path / "out")
    models = [folder.open_model(p) for p in (*experts, out)]
    for name in models[0].tensors:
        a, b, merged = (
            np.memmap(t.path, t.dtype, "r", t.offset, t.shape).astype(np.float32)
            for t in (model.tensors[name] for model in models)
        )
        assert models[2].tensors[name].dtype == dtype
        np.testing.assert_allclose(merged, ((a + b) / 2).astype(dtype).astype(np.float32))


def test_only_and_exclude_keep_the_base(tmp_path):
    base, *experts = disk_models.family(tmp_path)
    out = load(
        mj.merge_checkpoints(
            "average()", base, experts, tmp_path / "out", only=["layers"], exclude=["norm"]
        )
    )
    for name, x in load(base).items():
        merged = "layers" in name and "norm" not in name
        assert np.array_equal(out[name], x) == (not merged), name


def test_weights_go_into_the_method(tmp_path):
    base, *experts = disk_models.family(tmp_path)
    a = mj.merge_checkpoints("linear(weights=[1, 3])", base, experts, tmp_path / "a")
    b = mj.merge_checkpoints("linear()", base, experts, tmp_path / "b", weights=[1, 3])
    assert load(a).keys() == load(b).keys()
    assert all(np.array_equal(x, load(b)[name]) for name, x in load(a).items())


@pytest.mark.parametrize("method", ["task_arithmetic(scaling=0.5)", "ties(density=0.3)"])
@pytest.mark.parametrize("after", [1, 4, 12])
def test_an_interrupted_merge_continues_with_the_same_bytes(
    method, after, tmp_path, monkeypatch, small_pieces
):
    base, *experts = disk_models.family(tmp_path)
    whole = mj.merge_checkpoints(method, base, experts, tmp_path / "whole")
    noted, ran = [], []
    note, run = Staging.note, pieces.Runner.run

    def stop(self, line):
        note(self, line)
        noted.append(line)
        if len(noted) > after:
            raise KeyboardInterrupt

    monkeypatch.setattr(Staging, "note", stop)
    with pytest.raises(KeyboardInterrupt):
        mj.merge_checkpoints(method, base, experts, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(Staging, "note", note)
    monkeypatch.setattr(pieces.Runner, "run", lambda *a, **k: ran.append(a) or run(*a, **k))
    out = mj.merge_checkpoints(method, base, experts, tmp_path / "out")
    assert disk_models.snapshot(out) == disk_models.snapshot(whole)
    assert not (tmp_path / ".out.merging").exists()
    done = sum("out" in line for line in noted)
    last = [a for a in ran if a[4] is None]
    assert len(last) == sum(1 for _ in output_parts(base)) - done


def output_parts(base):
    for tensor in folder.open_model(base).tensors.values():
        yield from range(0, tensor.size, 32)


def interrupted(tmp_path, monkeypatch, method="average()"):
    """A merge that stopped behind some parts; returns its models."""
    models = disk_models.family(tmp_path)
    note, count = Staging.note, iter(range(5))

    def stop(self, line):
        note(self, line)
        if next(count, None) is None:
            raise KeyboardInterrupt

    monkeypatch.setattr(Staging, "note", stop)
    with pytest.raises(KeyboardInterrupt):
        mj.merge_checkpoints(method, models[0], models[1:], tmp_path / "out")
    monkeypatch.setattr(Staging, "note", note)
    return models


def test_a_power_cut_that_lost_written_bytes_is_repaired(tmp_path, monkeypatch):
    base, *experts = interrupted(tmp_path, monkeypatch)
    staged = tmp_path / ".out.merging" / "files" / "model.safetensors"
    staged.write_bytes(b"\0" * staged.stat().st_size)
    with (tmp_path / ".out.merging" / "journal.jsonl").open("ab") as journal:
        journal.write(b'{"part": ["model.no')
    out = mj.merge_checkpoints("average()", base, experts, tmp_path / "out")
    whole = mj.merge_checkpoints("average()", base, experts, tmp_path / "whole")
    assert disk_models.snapshot(out) == disk_models.snapshot(whole)


def test_inputs_that_changed_are_noticed_when_a_merge_continues(tmp_path, monkeypatch):
    base, *experts = interrupted(tmp_path, monkeypatch)
    file = experts[0] / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    tensors = sorted(folder.open_model(experts[0]).tensors.values(), key=lambda t: t.offset)
    content[tensors[0].offset] ^= 1
    file.write_bytes(content)
    with pytest.raises(mj.MergeError, match=r"'expert0'.* changed since this merge was begun"):
        mj.merge_checkpoints("average()", base, experts, tmp_path / "out")
    assert not (tmp_path / ".out.merging").exists()


def test_another_recipe_does_not_continue_what_was_begun(tmp_path, monkeypatch):
    base, *experts = interrupted(tmp_path, monkeypatch)
    out = mj.merge_checkpoints("ties()", base, experts, tmp_path / "out")
    whole = mj.merge_checkpoints("ties()", base, experts, tmp_path / "whole")
    assert disk_models.snapshot(out) == disk_models.snapshot(whole)


class Told:
    """A reporter that remembers."""

    def __init__(self):
        self.lines = []

    def log(self, text):
        self.lines.append(text)

    progress = merge.Silent.progress


def test_a_finished_merge_is_not_done_again_and_another_is_refused(tmp_path):
    base, *experts = disk_models.family(tmp_path)
    out = mj.merge_checkpoints("average()", base, experts, tmp_path / "out")
    before = disk_models.snapshot(out)
    told = Told()
    mj.merge_checkpoints("average()", base, experts, out, reporter=told)
    assert told.lines[-1].endswith("holds this very merge already; nothing to do")
    with pytest.raises(mj.MergeError, match="is not empty"):
        mj.merge_checkpoints("ties()", base, experts, out)
    assert disk_models.snapshot(out) == before
    (out / "left_over.safetensors").write_bytes(b"old")
    mj.merge_checkpoints("ties()", base, experts, out, overwrite=True)
    assert "left_over.safetensors" not in disk_models.snapshot(out)
    assert json.loads((out / "mergejax.json").read_text())["recipe"]["method"] == "ties()"


def test_a_finished_merge_of_changed_inputs_is_not_taken_for_done(tmp_path):
    base, *experts = disk_models.family(tmp_path)
    out = mj.merge_checkpoints("average()", base, experts, tmp_path / "out")
    disk_models.write(experts[0], disk_models.weights(9, spread=0.2))
    with pytest.raises(mj.MergeError, match="is not empty"):
        mj.merge_checkpoints("average()", base, experts, out)


def test_two_merges_into_one_target(tmp_path):
    base, *experts = disk_models.family(tmp_path)
    with (
        Staging(tmp_path / "out"),
        pytest.raises(mj.MergeError, match=f"being written by process {os.getpid()}"),
    ):
        mj.merge_checkpoints("average()", base, experts, tmp_path / "out")
    # A lock that a dead process left behind stops nobody.
    staged = tmp_path / ".out.merging"
    staged.mkdir(exist_ok=True)
    (staged / "lock").write_text("999999")
    assert mj.merge_checkpoints("average()", base, experts, tmp_path / "out").is_dir()


def test_a_disk_that_fills_up_keeps_what_was_done(tmp_path, monkeypatch):
    base, *experts = disk_models.family(tmp_path)
    write, count = execute.Runner._write, iter(range(3))

    def fill(*arguments):
        if next(count, None) is None:
            raise OSError(28, "No space left on device")
        return write(*arguments)

    monkeypatch.setattr(execute.Runner, "_write", fill)
    with pytest.raises(OSError, match="No space left") as caught:
        mj.merge_checkpoints("average()", base, experts, tmp_path / "out")
    assert str(tmp_path / ".out.merging") in caught.value.__notes__[0]
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(execute.Runner, "_write", write)
    out = mj.merge_checkpoints("average()", base, experts, tmp_path / "out")
    whole = mj.merge_checkpoints("average()", base, experts, tmp_path / "whole")
    assert disk_models.snapshot(out) == disk_models.snapshot(whole)


def test_a_disk_that_is_too_small_is_refused(tmp_path, monkeypatch):
    base, *experts = disk_models.family(tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(mj.MergeError, match=r"needs .*, but .* has 100 B free"):
        mj.merge_checkpoints("average()", base, experts, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "expert0", "expert1"]


def test_what_lies_on_the_disk_is_compared_with_what_was_written(tmp_path, monkeypatch):
    base, *experts = disk_models.family(tmp_path)
    verify = merge.verify

    def spoil(works, *arguments):
        path = works[0].targets[0].path
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        return verify(works, *arguments)

    monkeypatch.setattr(merge, "verify", spoil)
    with pytest.raises(OSError, match="does not hold what was written"):
        mj.merge_checkpoints("average()", base, experts, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_paths_of_any_letters(tmp_path):
    base, *experts = disk_models.family(tmp_path / "mit Leerzeichen, ünï 模型 🙂")
    out = mj.merge_checkpoints("average()", base, experts, tmp_path / "aus gabe" / "é")
    assert load(out)


def test_a_bare_file_is_a_model(tmp_path):
    for i, name in enumerate(("base", "a")):
        save_file(disk_models.weights(i, spread=0.1 * i), tmp_path / f"{name}.safetensors")
    out = mj.merge_checkpoints(
        "task_arithmetic(scaling=1)",
        tmp_path / "base.safetensors",
        [tmp_path / "a.safetensors"],
        tmp_path / "out",
    )
    expert = load_file(tmp_path / "a.safetensors")
    for name, x in load(out).items():
        np.testing.assert_allclose(
            x.astype(np.float32), expert[name].astype(np.float32), rtol=2**-7, atol=2**-7
        )


def test_the_layout_of_a_file_is_that_of_the_reference_writer(tmp_path):
    tensors = {
        "b": np.zeros(3, np.float16), "a": np.ones((2, 2), np.float32), "c": np.arange(2)
    }  # fmt: skip
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    found, metadata = safetensors.read_header(tmp_path / "model.safetensors")
    ordered = safetensors.in_file_order(found)
    assert list(ordered) == list(found)
    written = (tmp_path / "model.safetensors").read_bytes()
    assert written.startswith(safetensors.header_bytes(ordered, metadata))


def test_paths_stay_apart():
    paths = [pathlib.Path("/m/run1/last"), pathlib.Path("/m/run2/last"), pathlib.Path("/m/b")]
    assert folder.distinct_names(paths) == ["run1/last", "run2/last", "m/b"]


def test_threads_take_turns_at_the_devices(tmp_path, monkeypatch, small_pieces):
    base, *experts = disk_models.family(tmp_path)
    used, program = set(), pieces._program

    def watched(*arguments, **options):
        found = program(*arguments, **options)
        used.update(device for x in jax.tree.leaves(found) for device in x.devices())
        return found

    first = mj.merge_checkpoints("ties(density=0.5)", base, experts, tmp_path / "a")
    monkeypatch.setattr(pieces, "_program", watched)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)  # as many threads
    second = mj.merge_checkpoints("ties(density=0.5)", base, experts, tmp_path / "b")
    assert disk_models.snapshot(first) == disk_models.snapshot(second)
    assert len(used) == len(jax.local_devices()) == 4
