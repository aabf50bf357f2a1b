"""Counts where the converted CIFAR-10 networks predict what they predict in PyTorch.

    python benchmarks/cifar.py NETWORKS IMAGES [--parts cifar10:test ...]

NETWORKS holds the .th files of akamaster/pytorch_resnet_cifar10, IMAGES the data sets of TensorFlow
Datasets. Prints a Markdown table: for every network and part of the images how many there are, the
share of equal predictions, the largest difference of logits relative to the largest logit, and the
share that is correct here and in PyTorch.
"""

import argparse
import pathlib
import sys

import jax
import numpy as np
import tensorflow_datasets as tfds
import torch

import mergejax as mj

sys.path.append(str(pathlib.Path(__file__).parents[1] / "tests"))
from torch_resnet import make

MEAN, SPREAD = (np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225]))
BATCH = 500


def batches(folder, part):
    """(images as the networks take them, labels), batch after batch."""
    name, split = part.split(":", 1)
    source = tfds.data_source(name, data_dir=folder, split=split, download=False)
    for start in range(0, len(source), BATCH):
        rows = [source[i] for i in range(start, min(start + BATCH, len(source)))]
        pixels = np.stack([row["image"] for row in rows]).astype(np.float32) / 255
        yield (pixels - MEAN) / SPREAD, np.array([row["label"] for row in rows])


def networks(folder):
    """By name the Flax network and the PyTorch one, each a function of images."""
    for path in sorted(folder.glob("resnet*.th")):
        name = path.name.split("-")[0]
        module, variables = mj.models.load(path)
        reference = make(name, 10)
        state = torch.load(path, weights_only=True, map_location="cpu")["state_dict"]
        bare = {key.removeprefix("module."): x for key, x in state.items()}
        reference.load_state_dict(bare, strict=False)  # the files lack BatchNorm's counters

        def theirs(images, reference=reference):
            with torch.no_grad():
                return reference(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()

        yield name, jax.jit(lambda x, m=module, v=variables: m.apply(v, x)), theirs


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", type=pathlib.Path)
    parser.add_argument("images")
    parts = ["cifar10_lossless:train", "cifar10:train", "cifar10:test"]
    parser.add_argument("--parts", nargs="+", default=parts)
    given = parser.parse_args()
    print("| network | images | number | equal % | logits | correct % | in PyTorch % |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for name, ours, theirs in networks(given.networks):
        for part in given.parts:
            rows = []
            for images, labels in batches(given.images, part):
                a, b = np.asarray(ours(images)), theirs(images)
                error = np.abs(a - b).max() / np.abs(b).max()
                found = a.argmax(1), b.argmax(1)
                rows.append((len(labels), error, *counts(*found, labels)))
            number, _, equal, here, there = (sum(column) for column in zip(*rows, strict=True))
            shares = (f"{100 * x / number:.2f}" for x in (here, there))
            logits = max(row[1] for row in rows)
            print(f"| {name} | {part} | {number} | {100 * equal / number:.3f} | {logits:.1e} | "
                  f"{' | '.join(shares)} |", flush=True)  # fmt: skip


def counts(here, there, labels):
    """How many predictions are equal, correct here, correct there."""
    return (here == there).sum(), (here == labels).sum(), (there == labels).sum()


if __name__ == "__main__":
    main()
