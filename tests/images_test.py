"""Image sets read through TensorFlow Datasets, without TensorFlow."""

import contextlib
import sys

import jax
import ml_collections
import numpy as np
import pytest

import mergejax as mj
from mergejax import data, train
from mergejax.data import images, sources

tfds = pytest.importorskip("tensorflow_datasets")
Image = pytest.importorskip("PIL.Image")

THREE = ["low", "middle", "high"]
TEN = [
    "AnnualCrop",
    "Forest",
    "HerbaceousVegetation",
    "Highway",
    "Industrial",
    "Pasture",
    "PermanentCrop",
    "Residential",
    "River",
    "SeaLake",
]


def _pictures(shape, count, seed):
    """Random pictures, with labels in turn."""
    generator = np.random.default_rng([count, seed])
    for place in range(count):
        picture = generator.integers(0, 200, shape, dtype=np.uint8)
        record = {"image": Image.fromarray(picture.squeeze()), "label": place % 3}
        yield place, record if shape[-1] == 1 else {**record, "filename": f"{place}.jpg"}


def _prepare(folder, set_name, set_version, counts, features, *configs):
    class Pictures(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = set_name
        VERSION = tfds.core.Version(set_version)
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config) for config in configs]  # noqa: RUF012
        pkg_dir_path = folder

        def _info(self):
            known = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=known)

        def _split_generators(self, _):
            shape = features["image"].shape
            return {split: _pictures(shape, *counts[split]) for split in counts}

        def _generate_examples(self):
            """Unused, since the splits are generators already."""

    Pictures(data_dir=folder, file_format="array_record").download_and_prepare()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    grey = tfds.features.Image(shape=(24, 20, 1), encoding_format="png")
    label = tfds.features.ClassLabel(names=THREE)
    counts = {"train": (20, 0), "test": (7, 1)}
    _prepare(folder, "scene15", "1.0.0", counts, {"image": grey, "label": label})
    official = {
        "image": tfds.features.Image(shape=(64, 64, 3), encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(names=TEN),
        "filename": tfds.features.Text(),
    }
    _prepare(folder, "eurosat", "2.0.0", {"train": (30, 2)}, official, "rgb")
    return str(folder)


class Notes:
    """A reporter that remembers."""

    def __init__(self):
        self.lines = []

    def log(self, text):
        self.lines.append(text)

    def progress(self, description, total):
        self.lines.append(description)
        return contextlib.nullcontext(lambda n: None)


def _config(data_dir, tasks=("scene15", "eurosat"), **limits):
    return ml_collections.ConfigDict(
        {
            "seed": 0,
            "data_dir": data_dir,
            "data": {
                "suite": "images",
                "tasks": tasks,
                "size": 8,
                "limits": {"train": 100, "validation": 100, "test": 100, **limits},
            },
        }
    )


def test_sets_are_read_without_tensorflow_and_divided_per_source(data_dir, tmp_path):
    tasks = data.load(_config(data_dir), tmp_path, Notes())
    sizes = {
        name: [len(getattr(task, part)) for part in sources.PARTS] for name, task in tasks.items()
    }
    assert sizes == {"scene15": [18, 2, 7], "eurosat": [21, 3, 6]}
    for task in tasks.values():
        assert task.labels == tuple({"scene15": THREE, "eurosat": TEN}[task.name])
        assert task.head == task.name
        assert task.train.inputs.shape == (len(task.train), 8, 8, 3)
        assert task.train.inputs.dtype == np.float32
        assert task.train.labels.dtype == np.int32
        assert 0.3 < task.train.inputs.mean() < 0.5
    assert "tensorflow" not in sys.modules


def test_parts_do_not_overlap(data_dir, tmp_path):
    task = data.load(_config(data_dir), tmp_path, Notes())["eurosat"]
    assert len(task.labels) == 10
    rows = [{image.tobytes() for image in getattr(task, part).inputs} for part in sources.PARTS]
    assert len(set.union(*rows)) == sum(map(len, rows)) == 30


def test_decoded_images_are_reused_but_not_for_other_settings(data_dir, tmp_path, monkeypatch):
    first = data.load(_config(data_dir), tmp_path, Notes())
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tensorflow_datasets", None)
        notes = Notes()
        second = data.load(_config(data_dir), tmp_path, notes)
        assert len(notes.lines) == 1
        assert "2 tasks reused" in notes.lines[0]
    for name, task in first.items():
        np.testing.assert_array_equal(task.test.inputs, second[name].test.inputs)
        np.testing.assert_array_equal(task.test.labels, second[name].test.labels)
    notes = Notes()
    limited = data.load(_config(data_dir, train=5), tmp_path, notes)
    assert len(limited["scene15"].train) == 5
    assert notes.lines == ["decode scene15", "decode eurosat"]


def test_environment_names_the_folder(data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", data_dir)
    assert len(data.load(_config("", ("scene15",)), tmp_path, Notes())["scene15"].test) == 7


def test_every_missing_set_gets_its_sentence_and_nothing_is_written(data_dir, tmp_path):
    config = _config(data_dir, ("scene15", "mnist", "gtsrb"))
    with pytest.raises(mj.MergeError) as raised:
        data.load(config, tmp_path, Notes())
    official, other = str(raised.value).splitlines()
    assert official.startswith("task 'mnist': the data set 'mnist' cannot be read in " + data_dir)
    assert "(it has no folder 'mnist')" in official
    assert "--config.data_dir or TFDS_DATA_DIR" in official
    assert "tfds.data_source('mnist'" in official
    assert "'file_format': 'array_record'" in official
    assert "benchmark.ini.rub.de" in other
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(mj.MergeError, match="nowhere \\(there is no such folder\\)"):
        data.load(_config(str(tmp_path / "nowhere"), ("mnist",)), tmp_path, Notes())


def test_missing_package_is_one_sentence(data_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(mj.MergeError, match=r"pip install 'mergejax\[images\]'"):
        data.load(_config(data_dir), tmp_path, Notes())


def test_unknown_task_is_refused(data_dir, tmp_path):
    with pytest.raises(mj.MergeError, match="did you mean 'mnist'"):
        data.load(_config(data_dir, ("mnst",)), tmp_path, Notes())


def test_damaged_decoded_file_is_one_sentence(data_dir, tmp_path):
    data.load(_config(data_dir, ("scene15",)), tmp_path, Notes())
    (path,) = (tmp_path / sources.CACHE).iterdir()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(mj.MergeError, match="delete the file") as raised:
        data.load(_config(data_dir, ("scene15",)), tmp_path, Notes())
    assert str(path) in str(raised.value)


def test_base_of_images_learns_from_the_training_images_of_its_own_sets(data_dir, tmp_path):
    config = _config(data_dir, ("scene15",))
    config.data.pretraining = ("eurosat",)
    tasks = data.load(config, tmp_path, Notes())
    (split,) = data.pretraining(config, tasks, tmp_path, Notes()).values()
    whole = data.load(_config(data_dir, ("eurosat",)), tmp_path, Notes())["eurosat"]
    np.testing.assert_array_equal(split.inputs, whole.train.inputs)


def test_heads_that_pretraining_does_not_teach_are_trained_on_the_base_as_it_is(data_dir, tmp_path):
    config = _config(data_dir, ("scene15",))
    config.data.pretraining = ("eurosat",)
    config.model = {"patch": 4, "width": 8, "depth": 1, "heads": 2, "expansion": 1}
    phases = ("pretrain", "heads", "finetune", "multi_task")
    config.training = {
        phase: {"steps": 3 if phase == "pretrain" else 2, "learning_rate": 1e-2, "batch": 4}
        for phase in phases
    }
    tasks = data.load(config, tmp_path, Notes())
    notes = Notes()
    trained = train.train_all(config, tasks, tmp_path, notes)
    assert [line for line in notes.lines if line.startswith("train ")] == [
        "train base",
        "train heads",
        "train experts/scene15",
        "train multi_task",
    ]
    assert {name: head["bias"].shape for name, head in trained.heads.items()} == {"scene15": (3,)}
    assert {name: trained.log[name]["steps"] for name in ("base", "heads")} == {
        "base": 3,
        "heads": 2,
    }
    again = train.train_all(config, tasks, tmp_path, Notes())
    for one, other in zip(jax.tree.leaves(trained.base), jax.tree.leaves(again.base), strict=True):
        np.testing.assert_array_equal(one, other)


def test_large_images_are_averaged_from_their_middle():
    image = np.zeros([8, 12, 3], np.uint8)
    image[:, 2:6], image[:, 6:10] = 100, 200
    image[::2, 2:10] += 10
    small = images.square(image, 2)
    np.testing.assert_array_equal(small[..., 0], [[105, 205], [105, 205]])
    assert small.shape == (2, 2, 3)


def test_small_images_are_framed_and_grey_is_repeated():
    image = np.arange(1, 5, dtype=np.uint8).reshape(2, 2, 1)
    framed = images.square(image, 4)
    np.testing.assert_array_equal(framed[1:3, 1:3, 2], image[..., 0])
    assert framed.sum() == 3 * image.sum()


def test_a_common_head_needs_the_same_labels(data_dir, tmp_path):
    config = _config(data_dir)
    config.data.head = "shared"
    with pytest.raises(mj.MergeError) as raised:
        data.load(config, tmp_path, Notes())
    assert str(raised.value) == (
        "config.data.head: 'shared' cannot be the head of 'eurosat' with 10 labels and of "
        "'scene15' with 3 labels; choose tasks with the same labels, or leave config.data.head "
        "empty"
    )
    config.data.tasks = ("eurosat",)
    config.data.held_out = ("scene15",)
    assert data.load(config, tmp_path, Notes())["eurosat"].head == "shared"
    assert data.held_out(config, tmp_path, Notes())["scene15"].head == "scene15"
