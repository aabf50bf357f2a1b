"""What `mergejax inspect` measures, against NumPy."""

import json

import disk_models
import numpy as np
import pytest
from safetensors.numpy import load_file

import mergejax as mj
from mergejax import command
from mergejax.checkpoints import inspect


def deltas(paths):
    base, *experts = ({n: np.float64(x) for n, x in load_file(p / "model.safetensors").items()}
                      for p in paths)  # fmt: skip
    flat = lambda tree: np.concatenate([tree[n].ravel() for n in base])
    return flat(base), [flat(e) - flat(base) for e in experts], base, experts


def test_the_total_is_what_numpy_finds(tmp_path):
    paths = disk_models.family(tmp_path, experts=3)
    total = inspect.inspect(paths[0], paths[1:])["total"]
    base, ds, *_ = deltas(paths)
    cosines = [
        a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        for i, a in enumerate(ds)
        for b in ds[:i]
    ]  # fmt: skip
    up, down = np.any(np.array(ds) > 0, 0), np.any(np.array(ds) < 0, 0)
    wanted = {
        "change": np.mean([np.linalg.norm(d) for d in ds]) / np.linalg.norm(base),
        "cosine": np.mean(cosines),
        "conflict": (up & down).sum() / (up | down).sum(),
        "changed": np.mean([(d != 0).mean() for d in ds]),
    }
    for name, value in wanted.items():
        np.testing.assert_allclose(total[name], value, rtol=1e-5, err_msg=name)
    assert total["parameters"] == base.size


def test_the_effective_rank_is_near_the_singular_values(tmp_path):
    """A delta of one direction has rank 1; the estimate of a full one is within its noise."""
    random = np.random.default_rng(0)
    base = {"layers.0.w": np.float32(random.normal(size=(64, 48)))}
    one = np.float32(np.outer(random.normal(size=64), random.normal(size=48)) * 0.01)
    full = np.float32(random.normal(size=(64, 48)) * 0.01)
    paths = [
        disk_models.write(tmp_path / name, {"layers.0.w": base["layers.0.w"] + d})
        for name, d in (("base", np.float32(0)), ("one", one), ("full", full))
    ]
    ranks = [inspect.inspect(paths[0], [path])["total"]["rank"] for path in paths[1:]]
    s = np.linalg.svd(full, compute_uv=False)
    exact = (s**2).sum() ** 2 / (s**4).sum()
    assert 0.4 < ranks[0] < 4.0
    assert 0.7 * exact < ranks[1] < 1.4 * exact


def test_rows_are_layers_and_roles(tmp_path):
    paths = disk_models.family(tmp_path)
    found = inspect.inspect(paths[0], paths[1:])
    assert [r["group"] for r in found["blocks"]] == ["outside the blocks", "block 0", "block 1"]
    assert {r["group"] for r in found["roles"]} == {"embedding", "kernel", "norm"}
    for rows in (found["blocks"], found["roles"]):
        assert sum(r["parameters"] for r in rows) == found["total"]["parameters"]


@pytest.mark.parametrize(
    ("spread", "sentence"), [(0.1, "can be merged"), (3.0, "do not look like fine-tunes")]
)
def test_the_verdict(spread, sentence, tmp_path):
    paths = [
        disk_models.write(tmp_path / str(i), disk_models.weights(i, spread=spread * (i > 0)))
        for i in range(3)
    ]
    assert sentence in inspect.inspect(paths[0], paths[1:])["verdict"]
    same = disk_models.write(tmp_path / "same", disk_models.weights(0))
    assert "nothing to merge" in inspect.inspect(paths[0], [same])["verdict"]


def test_models_that_do_not_fit_are_refused(tmp_path):
    paths = disk_models.family(tmp_path)
    disk_models.write(paths[2], disk_models.weights(2, rows=12))
    with pytest.raises(mj.MergeError, match="'expert1' has another vocabulary"):
        inspect.inspect(paths[0], paths[1:])


@pytest.mark.filterwarnings("ignore")
def test_the_command_prints_a_table_and_writes_two_files(tmp_path, capsys):
    paths = disk_models.family(tmp_path)
    out = tmp_path / "report"
    with pytest.raises(SystemExit) as status:
        command.launch(["inspect", *map(str, paths), "--out", str(out)])
    captured = capsys.readouterr()
    assert (status.value.code, captured.err) == (0, "")
    assert captured.out.startswith("group ")
    assert captured.out.endswith("worth a try.\n")
    assert sorted(p.name for p in out.iterdir()) == ["inspect.json", "inspect.png"]
    assert json.loads((out / "inspect.json").read_text())["models"][0] == "base"
