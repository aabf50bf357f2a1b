"""Residual networks: torchvision's layout, and the real ones for CIFAR-10 on real images."""

import pathlib

import jax
import numpy as np
import pytest

import mergejax as mj

torch = pytest.importorskip("torch", reason="PyTorch is the reference")

from torch_resnet import make  # noqa: E402

SHARED = pathlib.Path(__file__).parents[2] / "shared"
FILES = SHARED / "checkpoints" / "resnet_cifar10"
IMAGES = SHARED / "data" / "tfds"
MEAN, SPREAD = (np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225]))


@pytest.mark.parametrize(
    ("name", "labels"),
    [("resnet18", 5), ("resnet50", 3), ("resnext50_32x4d", 3), ("resnet20", 10), ("resnet32", 7)],
)
def test_logits_parameters_and_bits_are_those_of_torch(name, labels):
    model = make(name, labels)
    config = {"architectures": [name], "num_labels": labels}
    images = np.random.default_rng(0).normal(size=(2, 40, 36, 3)).astype(np.float32)
    found = mj.models.compare(model, config, {"pixel_values": images})
    assert found.output <= 1e-5
    state = model.state_dict()
    _, variables = mj.models.from_torch(state, config)
    count = sum(x.size for x in jax.tree.leaves(variables["params"]))
    assert count == sum(x.numel() for x in model.parameters())
    back = mj.models.to_torch(variables, config)
    assert back.keys() == state.keys()  # counters of BatchNorm included
    for key, x in state.items():
        assert back[key].dtype == x.numpy().dtype
        assert back[key].tobytes() == x.numpy().tobytes(), key


def test_the_network_is_known_by_its_names_and_counters_are_kept_on_request():
    model = make("resnet20", 4)
    model.bn1.num_batches_tracked += 7
    state = {f"module.{key}": x for key, x in model.state_dict().items()}
    config = {"architectures": ["resnet20"], "num_labels": 4}
    _, variables = mj.models.from_torch(state, config)
    back = mj.models.to_torch(variables, config, like=state)
    assert back["module.bn1.num_batches_tracked"] == 7
    assert all(back[key].tobytes() == x.numpy().tobytes() for key, x in state.items())
    plan = mj.models.plan({key: tuple(x.shape) for key, x in state.items()}, config)
    assert len(plan.unused) == 19
    assert "'module.bn1.num_batches_tracked', 'module.layer1.{0-2}.bn1.num" in plan.said()[0]


def test_training_moves_the_statistics_as_torch_does():
    """But for the unbiased variance that PyTorch keeps."""
    model = make("resnet20", 4)
    config = {"architectures": ["resnet20"], "num_labels": 4}
    module, variables = mj.models.from_torch(model.state_dict(), config)
    images = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
    before = {key: x.numpy().copy() for key, x in model.state_dict().items()}
    _, moved = module.apply(variables, images, train=True, mutable=["batch_stats"])
    model.train()(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    after = mj.models.to_torch({**variables, **moved}, config)
    for key, x in model.state_dict().items():
        if key.endswith("running_mean"):
            np.testing.assert_allclose(after[key], x.numpy(), rtol=1e-4, atol=1e-5)
        if key == "bn1.running_var":
            n = 4 * 8 * 8
            unbiased = before[key] + (after[key] - before[key] * 0.9) * n / (n - 1) - before[key]
            unbiased += 0.9 * before[key]
            np.testing.assert_allclose(unbiased, x.numpy(), rtol=1e-5)


def images_of(name, split):
    tfds = pytest.importorskip("tensorflow_datasets", reason="it reads the images")
    pytest.importorskip("PIL", reason="it decodes the images")
    source = tfds.data_source(name, data_dir=IMAGES, split=split, download=False)
    found = [(example["image"], example["label"]) for example in source]
    pixels = np.stack([image for image, _ in found]).astype(np.float32) / 255
    return (pixels - MEAN) / SPREAD, np.array([label for _, label in found])


@pytest.mark.skipif(not FILES.is_dir(), reason="the CIFAR checkpoints are not beside the checkout")
def test_a_real_network_predicts_what_torch_predicts_on_jpeg_images():
    """Lossless images and all four networks: tests/models_proof_test.py."""
    path = FILES / "resnet20-12fca82f.th"
    module, variables = mj.models.load(path)
    assert sum(x.size for x in jax.tree.leaves(variables["params"])) == 269_722
    state = torch.load(path, weights_only=True, map_location="cpu")["state_dict"]
    bare = {key.removeprefix("module."): x for key, x in state.items()}
    reference = make("resnet20", 10)
    reference.load_state_dict(bare, strict=False)
    images, labels = images_of("cifar10", "test[:400]")
    ours = np.asarray(jax.jit(module.apply)(variables, images))
    with torch.no_grad():
        theirs = reference(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()
    assert np.mean(ours.argmax(1) == theirs.argmax(1)) >= 0.999
    assert np.mean(ours.argmax(1) == labels) > 0.75  # measured on 10,000: 81.0 %
