"""Parameter trees on disk: whole, or refused in one sentence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mergejax as mj
from mergejax.checkpoints import orbax

TREE = {
    "block_0": {"kernel": np.arange(4096, dtype=np.float32).reshape(64, 64)},
    "norm": {"scale": np.ones([64], np.float32)},
}


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "harm", [_flip, lambda path: path.unlink(), lambda path: path.write_bytes(b"")]
)
def test_damaged_checkpoint_is_one_sentence(tmp_path, harm):
    orbax.save(tmp_path / "base", TREE)
    files = sorted(path for path in (tmp_path / "base").rglob("*") if path.is_file())
    harm(max(files, key=lambda path: path.stat().st_size))
    with pytest.raises(mj.MergeError, match=r"the checkpoint is damaged \(file '") as raised:
        orbax.restore(tmp_path / "base")
    message = str(raised.value)
    assert str(tmp_path / "base") in message
    assert "delete it" in message
    assert "\n" not in message


def test_folder_that_is_no_checkpoint_is_one_sentence(tmp_path):
    with pytest.raises(mj.MergeError, match="the checkpoint is damaged") as raised:
        orbax.restore(tmp_path)
    assert "\n" not in str(raised.value)


def test_save_replaces_and_ignores_left_overs(tmp_path):
    for value in (1.0, 2.0):
        (tmp_path / ".model.new").mkdir(exist_ok=True)
        orbax.save(tmp_path / "model", {"a": {"kernel": np.full([2, 2], value, np.float32)}})
    np.testing.assert_array_equal(orbax.restore(tmp_path / "model")["a"]["kernel"], 2.0)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_round_trip_keeps_dtypes_and_shapes(tmp_path):
    tree = {
        "a": {"kernel": jnp.ones([2, 3], jnp.bfloat16), "scalar": jnp.float32(3)},
        "b": np.arange(4, dtype=np.int32),
    }
    orbax.save(tmp_path / "model", tree)
    back = orbax.restore(tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, back, tree)
    assert [leaf.dtype for leaf in jax.tree.leaves(back)] == ["bfloat16", "float32", "int32"]
