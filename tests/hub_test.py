"""Names on the Hub: what the cache holds is taken, a missing folder is said to be one."""

import pathlib
import shutil

import disk_models
import pytest
from checkpoints_adapters_test import adapter
from convert_test import assert_same, read

import mergejax as mj
from mergejax.checkpoints import hub

huggingface_hub = pytest.importorskip("huggingface_hub", reason="it keeps the cache")
constants = pytest.importorskip("huggingface_hub.constants", reason="it says where")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the library, which may not use the network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def put(cache, name, folder):
    """Puts a model into the cache as the library lays it out."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    (place / "blobs").mkdir()
    (place / "snapshots" / commit).mkdir(parents=True)
    for i, file in enumerate(sorted(pathlib.Path(folder).iterdir())):
        blob = place / "blobs" / f"{i:040x}"
        shutil.copy(file, blob)
        (place / "snapshots" / commit / file.name).symlink_to(f"../../blobs/{blob.name}")


def test_models_in_the_cache_are_merged_by_their_names(cache, tmp_path):
    folders = disk_models.family(tmp_path / "local", shards=2)
    for folder in folders[:2]:
        put(cache, f"owner/{folder.name}", folder)
    by_path = mj.merge_checkpoints("ties()", folders[0], folders[1:], tmp_path / "a")
    names = ["owner/base", "owner/expert0", folders[2]]
    by_name = mj.merge_checkpoints("ties()", names[0], names[1:], tmp_path / "b")
    assert disk_models.snapshot(by_name) == disk_models.snapshot(by_path)
    assert_same(read("owner/base"), read(folders[0]))


def test_adapters_in_the_cache_are_merged_without_their_base(cache, tmp_path):
    (tmp_path / "local").mkdir()
    for seed in (0, 1):
        adapter(tmp_path / "local" / f"lora{seed}", seed)
        put(cache, f"owner/lora{seed}", tmp_path / "local" / f"lora{seed}")
    paths = [tmp_path / "local" / "lora0", tmp_path / "local" / "lora1"]
    by_path = mj.merge_checkpoints("svd(rank=2)", None, paths, tmp_path / "a")
    by_name = mj.merge_checkpoints("svd(rank=2)", None, ["owner/lora0", paths[1]], tmp_path / "b")
    assert disk_models.snapshot(by_name) == disk_models.snapshot(by_path)


def test_a_missing_folder_is_said_to_be_one(cache, tmp_path):
    sentence = "owner/absent: there is no such file or folder, and the Hub gives no model of that"
    with pytest.raises(mj.MergeError, match=sentence) as caught:
        mj.merge_checkpoints("ties()", "owner/absent", ["owner/gone"], tmp_path / "out")
    assert len(str(caught.value).splitlines()) == 2
    # A folder's name that is misspelt is no name on the Hub.
    folders = disk_models.family(pathlib.Path("models"))
    with pytest.raises(mj.MergeError, match=r"models/bse: there is no such .*did you mean 'base'"):
        mj.merge_checkpoints("ties()", "models/bse", folders[1:], tmp_path / "out")


def test_what_the_cache_lacks_is_fetched(cache, monkeypatch, tmp_path):
    asked = []

    def get(name, local_files_only=False, allow_patterns=(), **_):
        asked.append((name, local_files_only, list(allow_patterns[-1:])))
        if "*.bin" in allow_patterns:
            (tmp_path / "pytorch_model.bin").touch()
        return tmp_path

    monkeypatch.setattr(huggingface_hub, "snapshot_download", get)
    assert hub.find(pathlib.Path("owner/model")) == tmp_path
    assert asked == [
        ("owner/model", True, []),
        ("owner/model", False, ["*.safetensors"]),
        ("owner/model", False, ["*.bin"]),
    ]
