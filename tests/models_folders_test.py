"""Folders of the Hub to Flax trees on disk and back, leaf by leaf."""

import json
import math
import tracemalloc

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mergejax as mj
from mergejax import command
from mergejax.checkpoints.convert import convert
from mergejax.checkpoints.files import Files
from mergejax.checkpoints.rearranged import Piece, Rearranged
from mergejax.checkpoints.safetensors import Tensor

CONFIG = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 16, "n_head": 2,
    "n_layer": 2, "n_positions": 8, "vocab_size": 20,
}  # fmt: skip


def gpt2(folder, config=CONFIG, **more):
    """A folder as `transformers` writes it, and its tensors."""
    module = mj.models.build(config)
    variables = module.init(jax.random.key(0), np.zeros((1, 4), np.int32))
    moved = jax.tree.map(lambda x: x + 0.1 * np.arange(x.size, dtype=np.float32).reshape(x.shape),
                         variables)  # fmt: skip
    state = mj.models.to_torch(moved, config) | more
    folder.mkdir()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.json").write_text("{}")
    return state


def same_bits(found, wanted):
    assert found.keys() == wanted.keys()
    assert all(found[n].tobytes() == x.tobytes() and found[n].shape == x.shape
               for n, x in wanted.items())  # fmt: skip


@pytest.mark.parametrize("suffix", ["", ".msgpack", ".safetensors"])
@pytest.mark.parametrize("memory", ["256MiB", "100"])
def test_a_folder_becomes_a_flax_tree_and_comes_back(suffix, memory, tmp_path, capsys):
    mask = {"transformer.h.0.attn.bias": np.ones((1, 1, 8, 8), np.uint8)}
    state = gpt2(tmp_path / "model", **mask)
    there = tmp_path / f"flax{suffix}"
    arguments = ["convert", "--memory", memory]
    command.run([*arguments, str(tmp_path / "model"), str(there), "--layout", "flax"])
    assert "1 buffers that Flax does not need are left out: 'transf" in capsys.readouterr().out
    own = [] if not suffix else ["--config", str(tmp_path / "model" / "config.json")]
    back = tmp_path / "back"
    command.run([*arguments, str(there), str(back), "--layout", "torch", *own])
    same_bits(load_file(back / "model.safetensors"), {n: x for n, x in state.items()
                                                      if n not in mask})  # fmt: skip
    assert json.loads((back / "config.json").read_text()) == CONFIG
    if not suffix:
        assert (back / "vocab.json").is_file()
    _, direct = mj.models.load(tmp_path / "model")
    _, again = mj.models.load(there, config=None if not suffix else back / "config.json")
    jax.tree.map(np.testing.assert_array_equal, direct, again)


def test_what_is_saved_is_loaded(tmp_path):
    gpt2(tmp_path / "model")
    _, variables = mj.models.load(tmp_path / "model")
    mj.models.save(tmp_path / "again", variables, CONFIG)
    first, second = (load_file(tmp_path / n / "model.safetensors") for n in ("model", "again"))
    same_bits(second, first)
    with pytest.raises(mj.MergeError, match="again exists; choose another folder"):
        mj.models.save(tmp_path / "again", variables, CONFIG)


def test_padding_of_the_vocabulary_is_asked_about_kept_or_dropped(tmp_path):
    wide = gpt2(tmp_path / "wide", CONFIG | {"vocab_size": 24})
    (tmp_path / "wide" / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(mj.MergeError, match=r"has 24 rows, and the config says vocab_size=20; pad"):
        mj.models.load(tmp_path / "wide")
    module, kept = mj.models.load(tmp_path / "wide", padding="keep")
    assert module.apply(kept, np.zeros((1, 3), np.int32)).shape == (1, 3, 24)
    same_bits(mj.models.to_torch(kept, CONFIG), wide)
    module, cut = mj.models.load(tmp_path / "wide", padding="drop")
    np.testing.assert_array_equal(
        cut["params"]["body"]["tokens"]["embedding"], wide["transformer.wte.weight"][:20]
    )
    assert module.apply(cut, np.zeros((1, 3), np.int32)).shape == (1, 3, 20)


@pytest.mark.parametrize("budget", [1, 60, 10**6])
@pytest.mark.parametrize(
    ("shape", "axes", "parts", "join"),
    [((6, 4), (1, 0), 1, 0), ((6, 4), (1, 0), 3, 0), ((4, 6), (0, 1), 3, 0), ((5, 6), (0, 1), 2, 1),
     ((6, 2, 3, 3), (2, 3, 1, 0), 1, 0), ((3, 3, 2, 6), (3, 2, 0, 1), 1, 0), ((6,), (0,), 2, 0)],
)  # fmt: skip
def test_rearranged_bytes_are_numpys(shape, axes, parts, join, budget, tmp_path):
    x = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    (tmp_path / "x").write_bytes(x.tobytes())
    tensor = Tensor(tmp_path / "x", x.dtype, x.shape, 0)
    pieces = [Piece(tensor, axes, part, parts) for part in range(parts)]
    arrays = [y.transpose(axes) for y in np.split(x, parts, axis=axes[-1])]
    for several, wanted in (
        (pieces, np.concatenate(arrays, axis=join)),
        (pieces[-1:], arrays[-1]),
    ):
        leaf = Rearranged(several, join, budget).tensor()
        assert leaf.shape == wanted.shape
        content = bytearray(leaf.bytes)
        with Files() as files:
            for start in range(0, leaf.bytes, 20):
                part = memoryview(content)[start : start + 20]
                files.read_into(leaf.path, start, part)
        assert bytes(content) == wanted.tobytes()


def test_converting_holds_no_more_than_the_budget_and_two_pieces(tmp_path):
    wide = CONFIG | {"n_embd": 1024, "n_layer": 1, "n_inner": 2048, "tie_word_embeddings": False}
    gpt2(tmp_path / "model", wide)
    convert(tmp_path / "model", tmp_path / "warm", layout="flax")
    tracemalloc.start()
    convert(tmp_path / "model", tmp_path / "flax", layout="flax", memory=2**20)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 14 * 2**20  # one stripe, and 4 MiB each of the source and of the copy
