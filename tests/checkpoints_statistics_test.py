"""Merges on disk by methods that read statistics: as in memory, and what is refused."""

import jax
import numpy as np
import pytest
import safetensors.numpy
import trees

import mergejax as mj
from mergejax import command
from mergejax.collect import Statistics, save

SHAPES = {
    "block_0": {"dense": {"kernel": (5, 7), "bias": (7,)}, "norm": {"scale": (7,)}},
    "block_1": {"dense": {"kernel": (600, 500)}},  # more than one piece
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two experts with all statistics, in files that are named the other way round."""
    place = tmp_path_factory.mktemp("experts")
    _, experts = trees.models(2, shapes=SHAPES, seed=4)
    stats = trees.statistics(("gram", "fisher"), experts)
    for i, expert in enumerate(experts):
        flat = {f"params/{n}": x for n, x in trees.flat(expert).items()}
        safetensors.numpy.save_file(flat, place / f"expert_{i}.safetensors")
        several = [
            Statistics(kind, tree[i], dict.fromkeys(tree[i], 64)) for kind, tree in stats.items()
        ]
        save(place / f"stats_{1 - i}.safetensors", several, expert, f"task {i}")
    return place, experts, stats


def run(capsys, place, *arguments, stats=(0, 1), method="regmean()"):
    options = [f"--expert={place / f'expert_{i}.safetensors'}" for i in (0, 1)]
    options += [f"--stats={place / f'stats_{i}.safetensors'}" for i in stats]
    status = command.run(["merge", *options, f"--method={method}", "--quiet", *map(str, arguments)])
    return status, capsys.readouterr().err


@pytest.mark.parametrize("method", ["regmean()", "fisher()"])
def test_merges_on_disk_are_those_in_memory(method, folder, tmp_path, capsys):
    place, experts, stats = folder
    assert run(capsys, place, "--out", tmp_path / "out", method=method) == (0, "")
    kind = method.removesuffix("()")
    kind = {"regmean": "gram"}.get(kind, kind)
    expected = trees.flat(mj.merge(method, None, experts, stats={kind: stats[kind]}))
    got = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert set(got) == {f"params/{name}" for name in expected}
    for name, value in expected.items():
        np.testing.assert_allclose(got[f"params/{name}"], value, rtol=1e-5, atol=1e-5)
    before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    assert run(capsys, place, "--out", tmp_path / "out", method=method)[0] == 0  # nothing to do
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before


def refused(capsys, folder, tmp_path, *sentences, **options):
    with pytest.raises(mj.MergeError) as caught:
        run(capsys, folder[0], "--out", tmp_path / "out", **options)
    for sentence in sentences:
        assert sentence in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_statistics_that_are_missing_or_of_others_are_told(folder, tmp_path, capsys):
    place, experts, stats = folder
    wanted = "needs the statistic 'gram' of"
    how = "collect it with mj.collect.gram, write it with mj.collect.save, and give the file"
    refused(
        capsys,
        folder,
        tmp_path,
        f"{wanted} 'expert_0.safetensors', 'expert_1.safetensors'; {how}",
        stats=(),
    )
    refused(capsys, folder, tmp_path, f"{wanted} 'expert_1.safetensors'; {how}", stats=(1,))
    refused(
        capsys,
        folder,
        tmp_path,
        "'gram' of 'expert_0.safetensors' is in another file, too",
        stats=(1, 1),
    )
    refused(capsys, folder, tmp_path, "stats_9.safetensors", stats=(0, 1, 9))
    other = jax.tree.map(lambda x: x + 1, experts[0])
    found = Statistics("gram", stats["gram"][0], dict.fromkeys(stats["gram"][0], 1))
    save(place / "stats_2.safetensors", found, other)
    sentence = "was collected from none of 'expert_0.safetensors', 'expert_1.safetensors'"
    refused(capsys, folder, tmp_path, sentence, "--layout flax", stats=(0, 1, 2))
    small = {name: x[:-1, :-1] for name, x in found.items()}
    save(place / "stats_3.safetensors", Statistics("gram", small, found.rows), experts[0])
    refused(capsys, folder, tmp_path, "has shape", "collect it again", stats=(0, 3))
