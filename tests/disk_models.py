"""Small models on disk, written by the reference library."""

import json
import pathlib

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

BF16 = ml_dtypes.bfloat16


def weights(seed, dtype=BF16, width=6, layers=2, rows=10, spread=0.0):
    """A base for spread 0, otherwise that base with noise."""
    base, noise = np.random.default_rng(0), np.random.default_rng(seed)

    def draw(*shape):
        values = base.normal(size=shape) + spread * noise.normal(size=shape)
        return values.astype(dtype)

    found = {"model.embed_tokens.weight": draw(rows, width)}
    for i in range(layers):
        found[f"model.layers.{i}.q_proj.weight"] = draw(width, width)
        found[f"model.layers.{i}.up_proj.weight"] = draw(2 * width, width)
        found[f"model.layers.{i}.norm.weight"] = draw(width)
    return found | {"model.norm.weight": draw(width)}


def write(folder, tensors, shards=1, config=None):
    """Writes a folder as `transformers` does."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {"torch_dtype": "bfloat16"}))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    places = {name: names[i % shards] for i, name in enumerate(tensors)}
    for file in names:
        own = {name: tensors[name] for name, place in places.items() if place == file}
        save_file(own, folder / file, {"format": "pt"})
    size = sum(x.nbytes for x in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def family(folder, experts=2, shards=1, **options):
    """A base and experts; returns their folders."""
    names = ["base", *(f"expert{i}" for i in range(experts))]
    return [
        write(pathlib.Path(folder) / name, weights(i, spread=0.1 * (i > 0), **options), shards)
        for i, name in enumerate(names)
    ]


def snapshot(folder):
    """All files below a folder with their bytes."""
    folder = pathlib.Path(folder)
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def raw(header, values=b"", length=None):
    """The bytes of a safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + values
