"""From one format to another and back, every value as it was."""

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import mergejax as mj
from mergejax import command
from mergejax.checkpoints import convert, msgpack
from mergejax.checkpoints.files import Files, pieces_of
from mergejax.checkpoints.folder import open_model
from mergejax.checkpoints.safetensors import DTYPES, Tensor, header_bytes

ARRAYS = {
    "block_0/dense/kernel": np.arange(6, dtype=np.float32).reshape(2, 3),
    "block_0/dense/bias": np.float64([1, 2, 3]),
    "block_1.weight": np.float16([[0.5]]),
    "count": np.asarray(7),
    "flag": np.asarray([True, False]),
    "bytes": np.arange(4, dtype=np.uint8),
}
NARROW = {
    "low": np.linspace(-1, 1, 5).astype(ml_dtypes.bfloat16),
    "lower": np.linspace(-1, 1, 5).astype(ml_dtypes.float8_e4m3fn),
}
EVERY = {code: np.arange(1, 7).reshape(2, 3).astype(dtype) for code, dtype in DTYPES.items()}
SUFFIX = {"safetensors": ".safetensors", "npz": ".npz", "msgpack": ".msgpack", "orbax": ""}


def read(path):
    """The arrays of a model by name."""
    found = {}
    with Files() as files:
        for name, t in open_model(path).tensors.items():
            content = b"".join(bytes(p) for p in pieces_of(t.path, t.offset, t.bytes, files, 7))
            found[name] = np.frombuffer(content, t.dtype).reshape(t.shape)
    return found


def write_safetensors(path, arrays):
    """Types that the reference library does not know in NumPy included."""
    tensors = {name: Tensor(path, x.dtype, x.shape, 0) for name, x in arrays.items()}
    values = b"".join(x.tobytes() for x in arrays.values())
    path.write_bytes(header_bytes(tensors, {}) + values)


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        assert found[name].dtype == x.dtype, name
        assert found[name].shape == x.shape, name
        assert found[name].tobytes() == x.tobytes(), name


@pytest.mark.parametrize("form", SUFFIX)
def test_round_trips_are_exact(form, tmp_path):
    arrays = ARRAYS if form == "npz" else ARRAYS | NARROW | EVERY
    if form != "orbax":  # which refuses empty arrays
        arrays = arrays | {"empty": np.zeros((0, 3), np.float32)}
    write_safetensors(tmp_path / "first.safetensors", arrays)
    there = convert.convert(tmp_path / "first.safetensors", tmp_path / f"there{SUFFIX[form]}", form)
    assert_same(read(there), arrays)
    back = convert.convert(there, tmp_path / "back.safetensors")
    assert_same(read(back), arrays)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_the_file_is_what_the_reference_library_reads(tmp_path):
    np.savez(tmp_path / "a.npz", **ARRAYS)
    convert.convert(tmp_path / "a.npz", tmp_path / "a.safetensors")
    assert_same(load_file(tmp_path / "a.safetensors"), ARRAYS)
    convert.convert(tmp_path / "a.safetensors", tmp_path / "b.npz")
    assert_same(dict(np.load(tmp_path / "b.npz")), ARRAYS)


def test_npz_files_are_merged(tmp_path):
    random = np.random.default_rng(0)
    trees = [{"w": random.normal(size=(4, 3)).astype(np.float32)} for _ in range(3)]
    paths = [tmp_path / f"{i}.npz" for i in range(3)]
    for path, tree in zip(paths, trees, strict=True):
        np.savez(path, **tree)
    out = mj.merge_checkpoints("task_arithmetic(scaling=0.5)", paths[0], paths[1:], tmp_path / "o")
    wanted = mj.merge("task_arithmetic(scaling=0.5)", trees[0], trees[1:])
    assert np.array_equal(load_file(out / "model.safetensors")["w"], wanted["w"])


@pytest.mark.parametrize(
    ("write", "sentence"),
    [
        (lambda p: p.write_bytes(b"nothing"), "is no readable npz file"),
        (lambda p: np.savez_compressed(p, w=np.ones(3)), "'w' is compressed"),
        (lambda p: np.savez(p, w=np.ones((2, 3)).T), "in the order of columns"),
        (lambda p: np.savez(p, w=np.array(["x"])), "of the foreign type"),
    ],
)
def test_npz_files_that_cannot_be_read(write, sentence, tmp_path):
    write(tmp_path / "a.npz")
    with pytest.raises(mj.MergeError, match=sentence):
        convert.convert(tmp_path / "a.npz", tmp_path / "a.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


@pytest.mark.parametrize(
    ("source", "target", "sentence"),
    [
        ("absent", "b.npz", "there is no such file"),
        ("a.safetensors", "a.safetensors", "exists; choose another target"),
        ("a.safetensors", "b.gguf", "its format is unknown"),
        ("a.safetensors", "b.npz", r"npz has no type for 'low', 'lower'"),
        ("broken.msgpack", "b.npz", "is no Flax msgpack file"),
    ],
)
def test_what_cannot_be_converted(source, target, sentence, tmp_path, capsys):
    write_safetensors(tmp_path / "a.safetensors", NARROW)
    (tmp_path / "broken.msgpack").write_bytes(b"\xc1\xc1")
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(SystemExit) as status:
        command.launch(["convert", str(tmp_path / source), str(tmp_path / target)])
    err = capsys.readouterr().err
    assert (status.value.code, len(err.splitlines())) == (2, 1)
    assert sentence in err
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_names_that_no_tree_can_hold(tmp_path):
    for names in (("a", "a/b"), ("a/b", "a")):
        arrays = {name: np.ones(1, np.float32) for name in names}
        with pytest.raises(mj.MergeError, match="no tree can hold both"):
            msgpack.nested(arrays)
