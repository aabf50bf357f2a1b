"""Training: what is learned, what is kept in the workdir, what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

import mergejax as mj
from mergejax import data, train
from mergejax.checkpoints import fingerprint, orbax
from mergejax.data.task import Split

MODEL = {"patch": 4, "width": 24, "depth": 2, "heads": 2, "expansion": 2}


class Notes:
    """A reporter that remembers."""

    def __init__(self):
        self.lines, self.bars = [], []

    def log(self, text):
        self.lines.append(text)

    def progress(self, description, total):
        notes, bar = self, [description, total, 0]
        self.bars.append(bar)

        class Bar:
            def __enter__(self):
                return lambda n: bar.__setitem__(2, bar[2] + n)

            def __exit__(self, *_):
                assert notes.bars[-1] is bar

        return Bar()


def _config(**changes):
    steps = {"learning_rate": 3e-3, "batch": 64}
    config = ml_collections.ConfigDict(
        {
            "seed": 0,
            "data_dir": "",
            "data": {
                "suite": "digits",
                "tasks": ("mirror", "checkered_parity"),
                "train": 1000,
                "validation": 250,
                "variants": 2,
            },
            "model": MODEL,
            "training": {
                "pretrain": {"steps": 150, **steps},
                "finetune": {"steps": 50, **steps},
                "multi_task": {"steps": 50, **steps},
            },
        }
    )
    config.update_from_flattened_dict(changes)
    return config


def _run(workdir, **changes):
    config, notes = _config(**changes), Notes()
    return train.train_all(config, data.load(config, workdir, notes), workdir, notes), notes


def _accuracy(trained, body, head, split):
    scores = train.logits(trained.model, body, head, jnp.asarray(split.inputs))
    return float(np.mean(np.argmax(np.asarray(scores), axis=1) == split.labels))


def _equal(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("trained")


@pytest.fixture(scope="module")
def first(workdir):
    return _run(workdir)


def test_experts_beat_the_base_on_their_own_task(first, workdir):
    trained, _ = first
    tasks = data.load(_config(), workdir, Notes())
    for name, task in tasks.items():
        head = trained.heads[name]
        base = _accuracy(trained, trained.base, head, task.test)
        expert = _accuracy(trained, trained.experts[name], head, task.test)
        multi_task = _accuracy(
            trained, trained.multi_task, trained.multi_task_heads[name], task.test
        )
        assert expert > base + 0.15
        assert multi_task > base + 0.1


def test_bodies_share_a_structure_with_numbered_blocks_and_heads_are_apart(first):
    trained, _ = first
    structure = jax.tree.structure(trained.base)
    for body in (*trained.experts.values(), trained.multi_task):
        assert jax.tree.structure(body) == structure
    assert set(trained.base) == {"patches", "positions", "block_0", "block_1", "norm"}
    kernels = {leaf.shape for leaf in jax.tree.leaves(trained.base["block_0"]) if leaf.ndim > 1}
    assert kernels == {(24, 24), (24, 48), (48, 24)}
    assert {leaf.dtype for leaf in jax.tree.leaves(trained.base)} == {np.dtype(np.float32)}
    assert trained.heads["mirror"]["kernel"].shape == (24, 10)
    assert trained.heads["checkered_parity"]["kernel"].shape == (24, 2)


def test_progress_reaches_every_total_and_the_log_has_plain_numbers(first):
    trained, notes = first
    assert [bar[1:] for bar in notes.bars] == [[150, 150], [50, 50], [50, 50], [50, 50]]
    phases = ["base", "experts/mirror", "experts/checkered_parity", "multi_task"]
    assert list(trained.log) == phases
    assert all(set(entry) == {"seconds", "steps", "loss"} for entry in trained.log.values())
    assert json.loads(json.dumps(trained.log)) == trained.log


def test_second_run_reuses_everything_and_says_so(first, workdir):
    trained, notes = _run(workdir)
    assert not notes.bars
    assert len(notes.lines) == 4
    assert all("reused from" in line for line in notes.lines)
    for field in ("base", "experts", "heads", "multi_task", "multi_task_heads", "log"):
        _equal(getattr(trained, field), getattr(first[0], field))


def test_missing_phases_are_made_again_to_the_same_bits(first, workdir, tmp_path):
    again = shutil.copytree(workdir, tmp_path / "again")
    for part in ("heads", "experts/mirror"):
        shutil.rmtree(again / "checkpoints" / part)
    trained, notes = _run(again)
    assert [bar[0] for bar in notes.bars] == ["train base", "train experts/mirror"]
    for field in ("base", "heads", "experts"):
        _equal(getattr(trained, field), getattr(first[0], field))


def test_another_seed_is_another_base(first, tmp_path):
    short = {f"training.{kind}.steps": 25 for kind in ("pretrain", "finetune", "multi_task")}
    bases = [_run(tmp_path / str(seed), seed=seed, **short)[0].base for seed in (1, 2)]
    assert not np.array_equal(bases[0]["norm"]["bias"], bases[1]["norm"]["bias"])


def test_workdir_of_another_config_is_refused_and_left_alone(first, workdir):
    before = sorted((path, path.stat().st_mtime_ns) for path in workdir.rglob("*"))
    with pytest.raises(mj.MergeError) as raised:
        _run(workdir, **{"model.width": 32, "training.finetune.steps": 51, "seed": 3})
    message = str(raised.value)
    assert "model.width: 24 there, 32 wanted" in message
    assert "training.finetune.steps: 50 there, 51 wanted" in message
    assert "seed: 0 there, 3 wanted" in message
    assert "another --workdir" in message
    assert "\n" not in message
    assert sorted((path, path.stat().st_mtime_ns) for path in workdir.rglob("*")) == before


def test_workdir_of_other_images_is_refused(first, workdir):
    config, notes = _config(), Notes()
    tasks = data.load(config, workdir, notes)
    mirror = tasks["mirror"]
    changed = Split(mirror.train.inputs * np.float32(0.5), mirror.train.labels)
    tasks["mirror"] = type(mirror)(**{**vars(mirror), "train": changed})
    with pytest.raises(mj.MergeError, match=r"examples\.mirror\.train"):
        train.train_all(config, tasks, workdir, notes)


def test_check_needs_no_data_and_ignores_fields_that_train_nothing(first, workdir):
    config = _config()
    config.methods, config.data_dir = ("ties",), "elsewhere"
    fingerprint.check(config, workdir)
    fingerprint.check(config, workdir / "absent")
    with pytest.raises(mj.MergeError, match="seed"):
        fingerprint.check(_config(seed=9), workdir)


SCRIPT = """
import sys
sys.path[:0] = [sys.argv[2], sys.argv[3]]
import train_test
train_test._run(sys.argv[1])
"""


def test_killed_run_continues_to_the_same_result(first, tmp_path):
    here = os.path.dirname(__file__)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), here, os.path.dirname(here)]
    process = subprocess.Popen(command)
    try:
        while not orbax.is_saved(tmp_path / "checkpoints" / "base"):
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not orbax.is_saved(tmp_path / "checkpoints" / "multi_task")
    trained, notes = _run(tmp_path)
    assert "base: reused from" in notes.lines[0]
    assert notes.bars
    _equal(trained.multi_task, first[0].multi_task)
