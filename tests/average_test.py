"""Averages over the steps of a run: Orbax' own folders, and folders named by steps."""

import numpy as np
import pytest
from convert_test import read
from orbax import checkpoint
from safetensors.numpy import save_file

import mergejax as mj
from mergejax import command

STEPS = (5, 10, 15, 20)


def model(step):
    draw = np.random.default_rng(step).normal
    return {"dense": {"kernel": draw(size=(4, 6)).astype(np.float32)}, "step": np.int32(step)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps") / "run"
    with checkpoint.CheckpointManager(folder.absolute()) as manager:
        for step in STEPS:
            manager.save(step, args=checkpoint.args.StandardSave(model(step)))
    return folder


def mean(steps, weights=None):
    kernels = [model(step)["dense"]["kernel"].astype(np.float64) for step in steps]
    return np.average(kernels, axis=0, weights=weights)


@pytest.mark.parametrize(
    ("flags", "steps", "weights"),
    [
        (["--steps", "6:20"], (10, 15, 20), None),
        (["--window", "2"], (15, 20), None),
        (["--steps", "5,15", "--weights", "1,3"], (5, 15), (1, 3)),
        (["--steps", ":15", "--window", "2", "--format", "orbax"], (10, 15), None),
    ],
)
def test_steps_of_an_orbax_run_are_averaged(flags, steps, weights, run, tmp_path):
    out = tmp_path / "averaged"
    arguments = ["average", str(run), *flags, "--out", str(out), "--quiet"]
    assert command.run(arguments) == 0
    found = read(out)
    # Each value is the rounded sum of a few float32 products near one.
    np.testing.assert_allclose(found["dense/kernel"], mean(steps, weights), atol=1e-6)
    assert found["step"] == steps[-1]  # a counter is the last step's


def test_folders_of_other_libraries(tmp_path):
    for step in STEPS:
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        save_file({"kernel": model(step)["dense"]["kernel"]}, folder / "model.safetensors")
    (tmp_path / "run" / "logs").mkdir()
    out = mj.average_checkpoints(tmp_path / "run", tmp_path / "out", "10:")
    np.testing.assert_allclose(read(out)["kernel"], mean((10, 15, 20)), atol=1e-6)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--steps", "21:"], "fewer than two of them, there are"),
        (["--steps", "5,7"], "there is no step '7', there are '5', '10', '15'"),
        (["--steps", "five"], "expected a range such as 1000:5000"),
        (["--window", "0"], "window must be at least 1, not 0"),
        (["--weights", "1,2,3"], "there are 3 weights for 4 steps"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(flags, sentence, run, tmp_path):
    with pytest.raises(mj.MergeError, match=sentence):
        command.run(["average", str(run), *flags, "--out", str(tmp_path / "out"), "--quiet"])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_steps(tmp_path):
    (tmp_path / "logs").mkdir()
    with pytest.raises(mj.MergeError, match="holds no steps; expected folders such as 1000"):
        mj.average_checkpoints(tmp_path, tmp_path / "out")
    (tmp_path / "10").mkdir()
    (tmp_path / "step_10").mkdir()
    with pytest.raises(mj.MergeError, match="10 and step_10 are one step"):
        mj.average_checkpoints(tmp_path, tmp_path / "out")
