"""Statistics of the experts of a merge on disk, from the files that collectors write."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mergejax.checkpoints import safetensors, tagged
from mergejax.checkpoints.files import Buffers, Files
from mergejax.checkpoints.folder import Model
from mergejax.checkpoints.pieces import read_piece
from mergejax.door import check_statistics, statistics_by_leaf
from mergejax.errors import MergeError, raise_all
from mergejax.leaves import LeafInfo


class Given(NamedTuple):
    """What files hold about the experts.

    Attributes:
        kinds: by kind, for each expert its arrays by leaf name, mapped from the disk.
        contents: the hashes of the files' contents.
    """

    kinds: dict[str, list[dict[str, Any]]]
    contents: list[str]


def read(paths: Sequence[pathlib.Path], experts: Sequence[Model], method: Any) -> Given:
    """Reads what a method needs; files are told apart by the models that they are of.

    Args:
        paths: of files that `mj.collect.save` wrote, in any order.
        experts: the models.
        method: the chain; kinds that it does not read are left alone.

    Returns:
        What there is of every expert.

    Raises:
        MergeError: a file that is no such file or is of no expert, statistics that are missing or
            given twice.
    """
    needs = method.needs
    models = _fingerprints(experts) if paths and needs else {}
    found: dict[str, dict[int, dict[str, Any]]] = {need: {} for need in needs}
    problems, contents = [], []
    for path in paths if needs else ():
        tensors, header = safetensors.read_header(path)
        wrong = _problems(path, header, models, [expert.name for expert in experts])
        problems += wrong
        if wrong:
            continue
        contents.append(header["content"])
        expert, prefix = models[header["model"]]
        for kind in json.loads(header["data"]):
            if expert in found.get(kind, {}):
                problems.append(
                    f"{path}: '{kind}' of '{experts[expert].name}' is in another file, too; add "
                    "them first with mj.collect.add"
                )
            elif kind in found:
                own = {k: t for k, t in tensors.items() if k.startswith(f"{kind}#")}
                found[kind][expert] = {
                    prefix + key.split("#", 1)[1]: _mapped(tensor) for key, tensor in own.items()
                }
    for kind, by_expert in found.items():
        lacking = [e.name for i, e in enumerate(experts) if i not in by_expert]
        if lacking:
            problems.append(
                f"{method!r} needs the statistic '{kind}' of {', '.join(map(repr, lacking))}; "
                f"collect it with mj.collect.{kind}, write it with mj.collect.save, and give the "
                "file with --stats"
            )
    raise_all(problems)
    count = range(len(experts))
    kinds = {kind: [by[i] for i in count] for kind, by in found.items()}
    return Given(kinds, sorted(contents))


def of_leaves(
    given: Given, infos: Sequence[LeafInfo], experts: int
) -> tuple[tuple[LeafInfo, ...], dict[str, dict[str, list[Any]]]]:
    """The leaves with the statistics that are known of them, and these by leaf name and kind.

    Raises:
        MergeError: statistics of leaves that no model has, or of another shape.
    """
    bare = {info.name: info.name.removesuffix("/value") for info in infos}
    shapes = {bare[info.name]: info.shape for info in infos}
    known = statistics_by_leaf(given.kinds, shapes, experts)
    stats = {name: known[short] for name, short in bare.items() if short in known}
    told = [dataclasses.replace(info, stats=tuple(stats.get(info.name, ()))) for info in infos]
    check_statistics(told, stats, values=True)
    return tuple(told), stats


def _problems(
    path: pathlib.Path, header: Mapping[str, str], models: Mapping[str, Any], names: Sequence[str]
) -> list[str]:
    from mergejax.collect import files  # Flax takes a second to import

    problems = files.header_problems(path, header, None)
    if problems:
        return problems
    if header["model"] not in models:
        problems.append(
            f"{path}: was collected from none of {', '.join(map(repr, names))} (SHA-256 "
            f"{header['model'][:12]}...); collect it again, and if an expert is stored with the "
            "names of PyTorch, make a Flax tree of it first: mergejax convert --layout flax"
        )
    return problems


def _fingerprints(experts: Sequence[Model]) -> dict[str, tuple[int, str]]:
    """By the hash of its parameters the place of each expert, and how its leaf names begin."""
    found = {}
    with Files() as source:
        for i, expert in enumerate(experts):
            names = list(expert.tensors)
            prefix = "params/" if any(name.startswith("params/") for name in names) else ""
            found[tagged.digest(_Values(expert, prefix, source))] = (i, prefix)
    return found


class _Values(Mapping[str, np.ndarray]):
    """A model's arrays by leaf name, read when they are asked for."""

    def __init__(self, model: Model, prefix: str, source: Files):
        self._tensors = {
            name.removeprefix(prefix).removesuffix("/value"): tensor
            for name, tensor in model.tensors.items()
            if name.startswith(prefix)
        }
        self._source, self._buffers = source, Buffers()

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        values = read_piece(tensor, (0, tensor.size), self._source, self._buffers, 0)
        return values.reshape(tensor.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _mapped(tensor: safetensors.Tensor) -> np.ndarray:
    if not tensor.size:
        return np.zeros(tensor.shape, tensor.dtype)
    if not isinstance(tensor.path, pathlib.Path):
        raise MergeError(f"{tensor.source}: is not stored plainly; write it with mj.collect.save")
    return np.memmap(tensor.path, tensor.dtype, "r", tensor.offset, tensor.shape)
