"""Tasks made from handwritten digits."""

import itertools

import ml_collections
import numpy as np
import pytest

import mergejax as mj
from mergejax import data
from mergejax.data import corrupt, digits
from mergejax.data.task import Split
from mergejax.progress import Printer


@pytest.fixture(scope="module")
def tasks():
    return digits.load(tuple(digits.DOMAINS), train=1000, validation=250, seed=0)


def _rows(split):
    return {image.tobytes() for image in split.inputs}


def test_tasks_have_images_in_range_and_labels_with_names(tasks):
    assert len(tasks) >= 5
    for task, part in itertools.product(tasks.values(), ("train", "validation", "test")):
        split = getattr(task, part)
        assert split.inputs.dtype == np.float32
        assert split.labels.dtype == np.int32
        assert split.inputs.shape == (len(split), 8, 8, 1)
        assert split.inputs.min() >= 0
        assert split.inputs.max() <= 1
        assert set(split.labels) == set(range(len(task.labels)))


def test_every_task_shows_the_same_scans_in_its_own_domain(tasks):
    mirrored = tasks["mirror"].train.inputs[:, :, ::-1]
    np.testing.assert_array_equal(tasks["negative"].train.inputs, 1 - mirrored)
    turned = np.rot90(mirrored, 2, axes=(1, 2))
    np.testing.assert_array_equal(tasks["half_turn_size"].train.inputs, turned)
    digit = tasks["mirror"].train.labels
    np.testing.assert_array_equal(tasks["checkered_parity"].train.labels, digit % 2)
    np.testing.assert_array_equal(tasks["half_turn_size"].train.labels, digit >= 5)
    pictures = [task.train.inputs.tobytes() for task in tasks.values()]
    assert len(set(pictures)) == len(tasks)


def test_quadrants_swap_diagonally(tasks):
    upright = tasks["mirror"].test.inputs[:, :, ::-1]
    swapped = tasks["quadrants"].test.inputs
    np.testing.assert_array_equal(swapped[:, :4, :4], upright[:, 4:, 4:])
    np.testing.assert_array_equal(swapped[:, :4, 4:], upright[:, 4:, :4])


def test_no_test_scan_is_learned_from(tasks):
    upright = {
        part: _rows(getattr(tasks["negative"], part)) for part in ("train", "validation", "test")
    }
    assert not upright["test"] & (upright["train"] | upright["validation"])
    counts = [len(getattr(tasks["negative"], part)) for part in upright]
    assert counts == [1000, 250, 547]


def test_pretraining_never_sees_validation_or_test_scans(tasks):
    # Without distortion the pre-training images would be the training scans themselves.
    scans = digits.divide(1000, 250, seed=0)
    assert _rows(tasks["negative"].train) == {
        (1 - scan)[..., None].tobytes() for scan in scans["train"].pictures
    }
    problems = digits.pretraining(tasks, 1000, 250, seed=0, variants=3)
    assert set(problems) == {"digit", "parity", "size"}
    np.testing.assert_array_equal(problems["digit"].labels, np.tile(scans["train"].digits, 3))
    np.testing.assert_array_equal(problems["parity"].labels, problems["digit"].labels % 2)


def test_distortion_keeps_the_digit_recognisable_and_depends_on_its_generator_only():
    scans = digits.divide(1000, 250, seed=0)["train"].pictures[:200]
    first = digits.distort(scans, np.random.default_rng(3))
    np.testing.assert_array_equal(first, digits.distort(scans, np.random.default_rng(3)))
    assert not np.array_equal(first, digits.distort(scans, np.random.default_rng(4)))
    pairs = [
        abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) for a, b in zip(scans, first, strict=True)
    ]
    others = [
        abs(np.corrcoef(a.ravel(), b.ravel())[0, 1])
        for a, b in zip(scans[1:], first[:-1], strict=True)
    ]
    assert np.mean(pairs) > np.mean(others) + 0.2


def test_another_seed_is_another_division():
    first, second = (digits.divide(1000, 250, seed=seed)["test"].pictures for seed in (0, 1))
    assert not np.array_equal(first, second)


def test_unknown_tasks_are_all_named_with_the_nearest_known():
    with pytest.raises(mj.MergeError, match="did you mean 'mirror'") as raised:
        digits.load(["miror", "negatve"], 1000, 250, seed=0)
    assert len(str(raised.value).splitlines()) == 2


def test_a_division_without_test_scans_is_refused():
    with pytest.raises(mj.MergeError, match="leave no test scan of 1797"):
        digits.load(["mirror"], 1500, 297, seed=0)


def test_unknown_suite_is_refused(tmp_path):
    config = ml_collections.ConfigDict({"data": {"suite": "digts"}, "data_dir": "", "seed": 0})
    with pytest.raises(mj.MergeError, match="did you mean 'digits'"):
        data.load(config, tmp_path, Printer())


def test_corruptions_do_what_they_say():
    images = np.random.default_rng(0).random([6, 5, 8, 3], np.float32)
    split = Split(images, np.arange(6, dtype=np.int32))
    found = {kind: corrupt.corrupted(split, kind, 3, limit=4) for kind in corrupt.IMAGES}
    for one in found.values():
        assert one.inputs.dtype == np.float32
        assert one.inputs.shape == (4, 5, 8, 3)
        assert one.inputs.min() >= 0
        assert one.inputs.max() <= 1
        assert one.labels.tolist() == [0, 1, 2, 3]
    middle = images[:4].mean(axis=(1, 2, 3), keepdims=True)
    wanted = middle + np.float32(0.4) * (images[:4] - middle)
    np.testing.assert_allclose(found["contrast"].inputs, wanted, rtol=1e-6)
    np.testing.assert_allclose(
        found["pixelate"].inputs[:, 2, 3], images[:4, 2:4, 2:4].mean(axis=(1, 2)), rtol=1e-6
    )
    np.testing.assert_array_equal(found["pixelate"].inputs[:, 4], images[:4, 4])
    noise = found["noise"].inputs - images[:4]
    inside = (found["noise"].inputs > 0) & (found["noise"].inputs < 1)
    assert 0.06 < noise[inside].std() < 0.09
    assert (
        np.abs(np.diff(found["blur"].inputs, axis=2)).mean()
        < 0.3 * np.abs(np.diff(images, axis=2)).mean()
    )
    again = corrupt.corrupted(split, "noise", 3, limit=4)
    np.testing.assert_array_equal(again.inputs, found["noise"].inputs)


def test_pixelate_keeps_small_constant_images():
    split = Split(np.full([1, 3, 3, 1], 0.5, np.float32), np.zeros([1], np.int32))
    np.testing.assert_array_equal(corrupt.corrupted(split, "pixelate", 0).inputs, 0.5)
