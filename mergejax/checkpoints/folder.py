"""Models on disk: Hugging Face folders and bare files, opened by their headers alone."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from mergejax.checkpoints import hub, msgpack, npz, orbax_arrays, safetensors, torch_files
from mergejax.checkpoints.safetensors import Tensor
from mergejax.errors import MergeError, did_you_mean, raise_all, some

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TORCH_INDEX = "pytorch_model.bin.index.json"
TORCH_SINGLE = "pytorch_model.bin"
CONFIG = "config.json"
ADAPTER = "adapter_config.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".msgpack", ".h5", ".onnx", ".gguf", ".npz")


@dataclasses.dataclass(frozen=True)
class Model:
    """One model on disk.

    Attributes:
        name: what messages, recipes and random masks call it: the last part of its path.
        path: the folder or the file.
        tensors: where the values lie, by name.
        config: the model's configuration, empty where it has none.
        sides: small files beside the weights that a copy of the model needs, by name.
        texts: what stands in the result instead of some of them, or beside them.
        twins: tensors that repeat another one, which alone is in `tensors`, by its name.
        warnings: what looks odd but can be read.
    """

    name: str
    path: pathlib.Path
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sides: Mapping[str, pathlib.Path] = dataclasses.field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    texts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    twins: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors.values())


def open_model(path: str | pathlib.Path, name: str | None = None) -> Model:
    """Opens a folder as `transformers` or Orbax writes it, or a bare file of weights.

    Args:
        path: of the folder or the file, or 'owner/name' of a model on the Hub.
        name: what to call the model; by default the last part of its path.

    Returns:
        The model; nothing of its values is read.

    Raises:
        MergeError: one sentence for everything that is wrong with the path, the index, the headers.

    Example:
        >>> open_model("no/such/folder")
        Traceback (most recent call last):
        mergejax.errors.MergeError: no/such/folder: there is no such file or folder; check the path
    """
    path = pathlib.Path(path)
    name = name or path.resolve().name
    path = hub.find(path)
    if not path.exists():
        hint = f" {_near(path)}" if _near(path) else ""
        raise MergeError(f"{path}: there is no such file or folder; check the path{hint}")
    if path.is_file():
        held = read_file(_a_weight_file(path))
        return Model(name, path, _some_tensors(held, path))
    config = read_json(path / CONFIG) if (path / CONFIG).is_file() else {}
    if orbax_arrays.is_orbax(path) and not any(path.glob("*.safetensors")):
        own = orbax_arrays.read_orbax(path)
        return Model(name, path, _some_tensors(own, path), config, orbax_arrays.side_files(path))
    tensors, warnings = _read_folder(path)
    used = {file for tensor in tensors.values() for file in tensor.paths}
    sides, left = {}, []
    for file in sorted(path.rglob("*")):
        place = file.relative_to(path)
        if any(part.startswith(".") for part in place.parts) or not file.is_file():
            continue
        if _is_side(file.name):
            sides[place.as_posix()] = file
        elif len(place.parts) > 1 and file not in used and file.suffix in _WEIGHTS:
            left.append(place.as_posix())
    if left:
        warnings = [*warnings, f"{path}: {some(left)} is neither merged nor copied"]
    return Model(name, path, _some_tensors(tensors, path), config, sides, tuple(warnings))


def read_file(path: pathlib.Path) -> Mapping[str, Tensor]:
    """The tensors of one file, in the format that its name ends with; safetensors otherwise."""
    if path.suffix in torch_files.SUFFIXES:
        return torch_files.read_torch(path)
    if path.suffix == ".npz":
        return npz.read_npz(path)
    if path.suffix == ".msgpack":
        return msgpack.read_msgpack(path)
    tensors, metadata = safetensors.read_header(path)
    if metadata.get("format") == safetensors.QUANTIZED:
        raise MergeError(
            f"{path} is a quantised model; make an ordinary one of it first: "
            f"mergejax convert {path.name} {path.stem}_whole.safetensors"
        )
    return tensors


def _near(path: pathlib.Path) -> str:
    try:
        siblings = [p.name for p in path.parent.iterdir()]
    except OSError:
        return ""
    hint = did_you_mean(path.name, siblings)
    return f"({hint})" if hint.startswith("did") else ""


def _a_weight_file(path: pathlib.Path) -> pathlib.Path:
    if path.suffix in (".json", ".txt", ".md", ".yaml", ".yml"):
        raise MergeError(f"{path} is no file of weights; give the folder that it lies in")
    return path


def _some_tensors(tensors: Mapping[str, Tensor], path: pathlib.Path) -> Mapping[str, Tensor]:
    if not tensors:
        raise MergeError(f"{path} holds no tensors; give a model with weights")
    return tensors


def _is_side(name: str) -> bool:
    """Whether a file belongs to a copy of the model: settings and tokenizers, never weights."""
    if name.startswith(".") or name.endswith((*_WEIGHTS, ".index.json")):
        return False
    return name not in ("README.md", "mergejax.json")


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON file that must hold a table.

    Raises:
        MergeError: it cannot be read or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if text.startswith(safetensors.POINTER.decode()):
            raise MergeError(f"{path} is a git-lfs pointer; run 'git lfs pull'")
        content = json.loads(text, object_pairs_hook=safetensors.unique)
    except MergeError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MergeError(f"{path} is no JSON ({reason}); restore the file") from None
    if not isinstance(content, dict):
        raise MergeError(f"{path} holds no JSON table; restore the file")
    return content


def _read_folder(path: pathlib.Path) -> tuple[Mapping[str, Tensor], list[str]]:
    """The tensors of a folder, and warnings."""
    files = sorted(p for p in path.glob("*.safetensors") if p.is_file() and p.name[0] != ".")
    index, single = path / INDEX, path / SINGLE
    if index.is_file() and single.is_file():
        raise MergeError(
            f"{path} holds both {SINGLE} and {INDEX}; remove the one that is left over"
        )
    if index.is_file():
        return _read_index(index)
    if single.is_file() or len(files) == 1:
        chosen = single if single.is_file() else files[0]
        stale = [p.name for p in files if p != chosen]
        warnings = [f"{path}: {some(stale)} is not read, {SINGLE} is"] if stale else []
        return read_file(chosen), warnings
    if files:
        raise MergeError(
            f"{path} holds {len(files)} safetensors files and no {INDEX}; add the index, or give "
            "one file"
        )
    if (path / TORCH_INDEX).is_file():
        return _read_index(path / TORCH_INDEX)
    if (path / TORCH_SINGLE).is_file():
        return read_file(path / TORCH_SINGLE), []
    others = [p for suffix in (".msgpack", ".npz") for p in sorted(path.glob(f"*{suffix}"))]
    if len(others) == 1:
        return read_file(others[0]), []
    if not any(path.iterdir()):
        raise MergeError(f"{path} is an empty folder; check the path")
    left = sorted(p.name for p in path.iterdir() if p.name.endswith(_WEIGHTS))
    found = f"; it holds {some(left)}" if left else ""
    raise MergeError(f"{path} holds no model's weights{found}; give a folder of one model")


def _read_index(index: pathlib.Path) -> tuple[Mapping[str, Tensor], list[str]]:
    """The tensors of all shards that an index names."""
    content = read_json(index)
    places = content.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise MergeError(f"{index} has no weight_map of file names by tensor; restore the file")
    wrong = [name for name, file in places.items() if not _is_plain(file)]
    if wrong:
        raise MergeError(f"{index}: {some(wrong)} lie in no file of this folder; restore the index")
    problems: list[str] = []
    found: dict[str, Tensor] = {}
    for file in sorted(set(places.values())):
        shard = index.parent / file
        wanted = [name for name, place in places.items() if place == file]
        if not shard.is_file():
            problems.append(
                f"{shard} is missing, though {index.name} names it for {len(wanted)} tensors; "
                "download it"
            )
            continue
        try:
            tensors = read_file(shard)
        except MergeError as error:
            problems.append(str(error))
            continue
        if missing := [name for name in wanted if name not in tensors]:
            problems.append(f"{shard} lacks {some(missing)}, which {index.name} says it holds")
        if extra := [name for name in tensors if places.get(name) != file]:
            problems.append(f"{shard} holds {some(extra)}, which {index.name} does not say")
        found |= {name: tensors[name] for name in wanted if name in tensors}
    raise_all(problems)
    same_kind = index.parent.glob("*" + pathlib.Path(next(iter(places.values()))).suffix)
    stale = sorted(p.name for p in same_kind if p.name not in set(places.values()))
    warnings = [f"{index.parent}: {some(stale)} is in no index and not read"] if stale else []
    return found, warnings


def _is_plain(file: Any) -> bool:
    return isinstance(file, str) and bool(re.fullmatch(r"[^/\\\0]+\.(safetensors|bin)", file))


def distinct_names(paths: list[pathlib.Path]) -> list[str]:
    """Names for models by the last parts of their paths, as many as tell them apart.

    Example:
        >>> distinct_names([pathlib.Path("/a/x/best"), pathlib.Path("/a/y/best")])
        ['x/best', 'y/best']
    """
    resolved = [path.resolve() for path in paths]
    longest = max((len(path.parts) for path in resolved), default=1)
    for length in range(1, longest):
        names = ["/".join(path.parts[-length:]) for path in resolved]
        if len(set(names)) == len(set(resolved)):
            return names
    return [path.as_posix() for path in resolved]
