"""Tied weights: an output and an embedding that are one matrix are merged as one leaf."""

import disk_models
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import mergejax as mj
from mergejax import command

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


def family(folder, tied=True, shards=1, untied_expert=False, once=()):
    """A base and two experts that store one matrix under two names."""
    folders = []
    for i in range(3):
        tensors = disk_models.weights(i, spread=0.1 * (i > 0), rows=300)
        if i not in once:
            tensors[OUTPUT] = tensors[EMBEDDING]
        if i == 2 and untied_expert:
            tensors[OUTPUT] = tensors[OUTPUT] + ml_dtypes.bfloat16(1)
        config = {"tie_word_embeddings": tied}
        folders.append(disk_models.write(folder / f"m{i}", tensors, shards, config))
    return folders


def test_they_stay_one_matrix_and_are_written_as_the_base_writes_them(tmp_path):
    base, *experts = family(tmp_path)
    out = mj.merge_checkpoints("dare(rate=0.5)", base, experts, tmp_path / "out")
    merged = load_file(out / "model.safetensors")
    np.testing.assert_array_equal(merged[OUTPUT], merged[EMBEDDING])
    once = family(tmp_path / "once", once=(0, 1, 2))
    reference = mj.merge_checkpoints("dare(rate=0.5)", once[0], once[1:], tmp_path / "reference")
    wanted = load_file(reference / "model.safetensors")
    assert sorted(merged) == sorted([*wanted, OUTPUT])
    for name, values in wanted.items():
        np.testing.assert_array_equal(merged[name], values)


def test_models_that_store_it_once_go_with_models_that_store_it_twice(tmp_path):
    results = []
    for number, once in enumerate([(), (1,), (0,), (0, 2)]):
        base, *experts = family(tmp_path / str(number), shards=2, once=once)
        out = mj.merge_checkpoints("ties(density=0.5)", base, experts, tmp_path / f"out{number}")
        held = [load_file(file) for file in sorted(out.glob("*.safetensors"))]
        tensors = {name: x for file in held for name, x in file.items()}
        assert (OUTPUT in tensors) == (0 not in once)
        results.append(tensors[EMBEDDING])
    for values in results[1:]:
        np.testing.assert_array_equal(values, results[0])


def test_a_finished_merge_of_tied_weights_is_known_and_a_broken_copy_is_not(tmp_path, capsys):
    base, *experts = map(str, family(tmp_path))
    flags = ["merge", "--base", base, "--expert", experts[0], "--expert", experts[1]]
    flags += ["--method", "linear()", "--out", str(tmp_path / "out")]
    assert command.run(flags) == 0
    assert command.run(flags) == 0
    assert "holds this very merge already" in "".join(capsys.readouterr())
    file = tmp_path / "out" / "model.safetensors"
    content = bytearray(file.read_bytes())
    place = content.rindex(bytes(load_file(file)[OUTPUT].tobytes()))
    content[place + 5] ^= 1
    file.write_bytes(content)
    with pytest.raises(mj.MergeError, match="not empty"):
        command.run(flags)


def test_what_the_configuration_unties_stays_two(tmp_path):
    base, *experts = family(tmp_path, tied=False, untied_expert=True)
    out = mj.merge_checkpoints("linear()", base, experts, tmp_path / "out")
    merged = load_file(out / "model.safetensors")
    assert (merged[OUTPUT] != merged[EMBEDDING]).any()


@pytest.mark.parametrize("once", [(), (0,)])
def test_an_expert_with_two_matrices_for_one_is_one_sentence(tmp_path, once):
    base, *experts = family(tmp_path, untied_expert=True, once=once)
    with pytest.raises(mj.MergeError) as raised:
        mj.merge_checkpoints("linear()", base, experts, tmp_path / "out")
    assert str(raised.value) == (
        f"'m2' has other values in '{OUTPUT}' than in '{EMBEDDING}', but 'm0' has one tensor for "
        "both; give a base that has two"
    )
    assert not (tmp_path / "out").exists()


def test_a_base_that_says_tied_and_is_not_is_one_sentence(tmp_path):
    base, *experts = family(tmp_path, untied_expert=True)
    with pytest.raises(mj.MergeError, match="ties them; set"):
        mj.merge_checkpoints("linear()", experts[1], [base, experts[0]], tmp_path / "out")
