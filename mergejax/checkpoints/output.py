"""What a merged model consists of: shards, index, side files, recipe and card."""

import json
import pathlib
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mergejax.checkpoints import formats, safetensors
from mergejax.checkpoints.files import Files, hasher
from mergejax.checkpoints.folder import CONFIG, INDEX, SINGLE, Model, read_json
from mergejax.checkpoints.safetensors import Tensor

RECIPE = "mergejax.json"
CARD = "README.md"
UNKNOWN = "0" * 32  # stands for a hash that is not known yet, in the space that is kept for it


def shards(
    tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]], shard_bytes: int
) -> dict[str, dict[str, Tensor]]:
    """Deals tensors out to files as `transformers` does: in order, a new file when one is full.

    Args:
        tensors: type and shape by name.
        shard_bytes: largest size of a file's values; a larger tensor has a file of its own.

    Returns:
        For each file its tensors in the order in which they lie there; paths are file names,
        offsets count from the first value.
    """
    groups: list[dict[str, Tensor]] = [{}]
    full = 0
    for name, (dtype, shape) in tensors.items():
        tensor = Tensor(pathlib.Path(), dtype, shape, 0)
        if groups[-1] and full + tensor.bytes > shard_bytes:
            groups.append({})
            full = 0
        groups[-1][name] = tensor
        full += tensor.bytes
    several = len(groups) > 1
    files = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors" if several else SINGLE
        placed, offset = {}, 0
        for name, tensor in safetensors.in_file_order(group).items():
            placed[name] = tensor._replace(path=pathlib.Path(file), offset=offset)
            offset += tensor.bytes
        files[file] = placed
    return files


def place(
    files: Mapping[str, Mapping[str, Tensor]], folder: pathlib.Path, recipe: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Where every tensor will lie in a folder, in the format of the recipe."""
    if recipe["format"] != "safetensors":
        return dict(_layout(files, folder, recipe).placed)
    found = {}
    for file, tensors in files.items():
        start = len(safetensors.header_bytes(tensors, metadata(recipe)))
        for name, tensor in tensors.items():
            found[name] = tensor._replace(path=folder / file, offset=start + tensor.offset)
    return found


def _layout(
    files: Mapping[str, Mapping[str, Tensor]], folder: pathlib.Path, recipe: Mapping[str, Any]
) -> formats.Layout:
    types = {name: (t.dtype, t.shape) for held in files.values() for name, t in held.items()}
    return formats.lay_out(recipe["format"], types, folder)


def metadata(recipe: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of every file."""
    return {"format": "pt", "mergejax": json.dumps(recipe, separators=(",", ":"))}


def file_bytes(files: Mapping[str, Mapping[str, Tensor]], recipe: Mapping[str, Any]) -> int:
    """The bytes that the files of weights will have."""
    if recipe["format"] != "safetensors":
        return _layout(files, pathlib.Path(), recipe).bytes
    return sum(
        len(safetensors.header_bytes(tensors, metadata(recipe)))
        + sum(tensor.bytes for tensor in tensors.values())
        for tensors in files.values()
    )


def content_hash(tensors: Mapping[str, Tensor], digests: Mapping[str, Sequence[str]]) -> str:
    """One hash for a model's names, types, shapes and values, however they are spread over files.

    Args:
        tensors: by name.
        digests: `HASH` of every 2^23 elements of each tensor, in hexadecimal.
    """
    found = hasher()
    for name in sorted(tensors):
        tensor = tensors[name]
        line = [name, safetensors.CODES[tensor.dtype], list(tensor.shape), list(digests[name])]
        found.update(json.dumps(line).encode() + b"\n")
    return found.hexdigest()


def write_headers(
    files: Mapping[str, Mapping[str, Tensor]],
    folder: pathlib.Path,
    recipe: Mapping[str, Any],
    output: Files,
) -> None:
    """Writes what stands around the values, and the index if there are shards."""
    if recipe["format"] != "safetensors":
        _layout(files, folder, recipe).write(output)
        return
    for file, tensors in files.items():
        header = safetensors.header_bytes(tensors, metadata(recipe))
        output.write_from(folder / file, 0, memoryview(header))
    if len(files) > 1:
        (folder / INDEX).write_text(index_text(files), encoding="utf-8")


def index_text(files: Mapping[str, Mapping[str, Tensor]]) -> str:
    """The index of several files."""
    every = [tensor for tensors in files.values() for tensor in tensors.values()]
    index = {
        "metadata": {
            "total_parameters": sum(tensor.size for tensor in every),
            "total_size": sum(tensor.bytes for tensor in every),
        },
        "weight_map": {name: file for file, tensors in files.items() for name in tensors},
    }
    return json.dumps(index, indent=2, sort_keys=True) + "\n"


def recipe_text(recipe: Mapping[str, Any], result: str) -> str:
    """The file of the recipe."""
    return json.dumps({"recipe": recipe, "result": result}, indent=2) + "\n"


def write_sides(
    reference: Model,
    models: Sequence[Model],
    folder: pathlib.Path,
    recipe: Mapping[str, Any],
    result: str,
) -> None:
    """Copies the reference's side files; writes the recipe and the card."""
    texts = side_texts(reference, recipe["dtype"])
    for name, source in reference.sides.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name not in texts:
            shutil.copyfile(source, target)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / RECIPE).write_text(recipe_text(recipe, result), encoding="utf-8")
    (folder / CARD).write_text(card(models, recipe), encoding="utf-8")


def side_texts(reference: Model, dtype: str | None) -> dict[str, str]:
    """The side files that are not the reference's own: those of a plan, a changed configuration."""
    texts, config = dict(reference.texts), dict(reference.config)
    if dtype and config:
        known = [key for key in ("torch_dtype", "dtype") if key in config] or ["dtype"]
        config |= dict.fromkeys(known, dtype)
    if CONFIG in reference.sides and config != read_json(reference.sides[CONFIG]):
        texts[CONFIG] = json.dumps(config, indent=2) + "\n"
    return texts


def licence_of(model: Model) -> str:
    """The licence that a model's card names, or an empty text."""
    path = model.path / CARD if model.path.is_dir() else model.path.parent / CARD
    try:
        text = path.read_text(encoding="utf-8", errors="replace")[:10_000]
    except OSError:
        return ""
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^license:\s*['\"]?([\w.+-]+)", front[1], re.MULTILINE) if front else None
    return found[1] if found else ""


def card(models: Sequence[Model], recipe: Mapping[str, Any]) -> str:
    """A model card: parents, their licences, the recipe."""
    licences = {model.name: licence_of(model) for model in models}
    common = set(licences.values())
    lines = ["---", "tags:", "- merge", "- mergejax"]
    if len(common) == 1 and "" not in common:
        lines.append(f"license: {common.pop()}")
    lines += ["---", "", "# Merged model", "", f"Merged by mergejax with `{recipe['method']}`.", ""]
    lines += ["| parent | licence in its card |", "|---|---|"]
    lines += [f"| {name} | {licence or 'none stated'} |" for name, licence in licences.items()]
    lines += ["", "```json", json.dumps(recipe, indent=2), "```", ""]
    return "\n".join(lines)
