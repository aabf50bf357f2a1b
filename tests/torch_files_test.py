"""PyTorch files: read without PyTorch, and never trusted."""

import os
import pathlib
import pickle
import zipfile

import disk_models
import numpy as np
import pytest

import mergejax as mj
from mergejax.checkpoints import folder, torch_files

REAL = pathlib.Path("../shared/checkpoints")


def values(path):
    return {
        name: np.memmap(t.path, t.dtype, "r", t.offset, t.shape) if t.size else np.zeros(t.shape)
        for name, t in folder.open_model(path).tensors.items()
    }


class Runs:
    """What a malicious file holds: unpickled the usual way, it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def zipped(path, content):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
    return path


def test_a_malicious_pickle_is_refused_and_never_run(tmp_path):
    trap = tmp_path / "trap"
    content = pickle.dumps({"w": Runs(trap)}, protocol=2)
    pickle.loads(content)
    trap.rmdir()  # it works elsewhere
    path = zipped(tmp_path / "model.bin", content)
    with pytest.raises(mj.MergeError, match=r"refused: it calls for \w+.mkdir, which no state dic"):
        folder.open_model(path)
    (tmp_path / "old.pth").write_bytes(content)
    with pytest.raises(mj.MergeError, match=r"old.pth is refused"):
        folder.open_model(tmp_path / "old.pth")
    assert not trap.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"nothing", pickle.dumps({"w": 1}, protocol=2), pickle.dumps([1], protocol=2)],
)
def test_damaged_files_are_one_sentence(content, tmp_path):
    for path in (zipped(tmp_path / "a.bin", content), tmp_path / "b.bin"):
        if not path.exists():
            path.write_bytes(content)
        with pytest.raises(mj.MergeError) as caught:
            folder.open_model(path)
        assert len(str(caught.value).splitlines()) == 1
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("seed", range(3))
def test_mutations_never_crash(seed, tmp_path):
    content = pickle.dumps({"w": [1, "x", {"y": (2.0, None)}]}, protocol=2)
    random = np.random.default_rng(seed)
    for _ in range(100):
        changed = bytearray(content)
        changed[int(random.integers(len(changed)))] = int(random.integers(256))
        path = zipped(tmp_path / "a.bin", bytes(changed))
        with pytest.raises(mj.MergeError):
            folder.open_model(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_files_of_pytorch_are_read_as_pytorch_reads_them(legacy, tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch writes the files")
    tied = torch.randn(3, 4)
    state = {
        "w": tied,
        "tied": tied,
        "half": torch.randn(5).to(torch.bfloat16),
        "part": torch.arange(10)[4:8],
        "flag": torch.tensor([True, False]),
        "parameter": torch.nn.Parameter(torch.randn(2)),
        "none": torch.zeros(0, 3),
    }
    path = tmp_path / "pytorch_model.bin"
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    found = values(tmp_path)
    assert found.keys() == state.keys()
    for name, x in state.items():
        assert np.array_equal(found[name].astype(np.float32), x.detach().float().numpy()), name
    torch.save({"state_dict": {"w": tied.T}}, path)
    with pytest.raises(mj.MergeError, match=r"tensor 'w' is a view"):
        folder.open_model(tmp_path)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real files are not beside this checkout")
def test_two_trainings_of_a_real_network_are_averaged(tmp_path):
    paths = [REAL / "face_detector" / f"version-slim-{size}.pth" for size in (320, 640)]
    out = mj.merge_checkpoints("average()", None, paths, tmp_path / "out")
    first, second, merged = values(paths[0]), values(paths[1]), values(out)
    assert merged.keys() == first.keys()
    for name, x in merged.items():
        if x.dtype == np.float32:
            wanted = first[name] + (second[name] - first[name]) / np.float32(2)
            np.testing.assert_allclose(x, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real files are not beside this checkout")
def test_a_real_file_that_wraps_its_state_dict():
    path = REAL / "resnet_cifar10" / "resnet20-12fca82f.th"
    tensors = torch_files.read_torch(path)
    assert tensors["module.conv1.weight"].shape == (16, 3, 3, 3)
    assert 0.01 < np.abs(values(path)["module.conv1.weight"]).mean() < 1


def test_a_merge_of_pytorch_files_is_the_merge_of_safetensors(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch writes the files")
    base, *experts = disk_models.family(tmp_path, dtype=np.float32)
    wanted = mj.merge_checkpoints("ties()", base, experts, tmp_path / "a")
    for path in (base, *experts):
        state = {n: torch.from_numpy(np.array(x)) for n, x in values(path).items()}
        (path / folder.SINGLE).unlink()
        torch.save(state, path / folder.TORCH_SINGLE)
    found = mj.merge_checkpoints("ties()", base, experts, tmp_path / "b")
    first, second = values(wanted), values(found)
    assert all(np.array_equal(x, second[name]) for name, x in first.items())
