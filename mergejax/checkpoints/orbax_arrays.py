"""Orbax checkpoints as models: where each array lies, read in pieces, and written as plain files.

Reading goes through TensorStore, as Orbax's own does, so every way that Orbax stores arrays is
read. Writing makes what Orbax calls a checkpoint without OCDBT: one uncompressed zarr chunk a leaf.
"""

import functools
import json
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mergejax.checkpoints.files import Files
from mergejax.checkpoints.msgpack import nested
from mergejax.checkpoints.safetensors import CODES, Tensor
from mergejax.errors import MergeError, raise_all, some

METADATA = "_METADATA"
_ITEMS = ("default", "params", "state")  # the parts of a step that are taken for the model
_OWN = re.compile(r"^(_|manifest\.|checksums\.json$|commit_success|checkpoint$)")


def is_orbax(path: pathlib.Path) -> bool:
    """Whether a folder holds an Orbax checkpoint, a step of a run, or a run."""
    if not path.is_dir():
        return False
    return (path / METADATA).is_file() or bool(_items(path)) or bool(_steps(path))


def _items(path: pathlib.Path) -> list[pathlib.Path]:
    return sorted(inner.parent for inner in path.glob(f"*/{METADATA}"))


def _steps(path: pathlib.Path) -> list[str]:
    found = {inner.relative_to(path).parts[0] for inner in path.glob(f"*/*/{METADATA}")}
    return sorted(found, key=lambda name: (len(name), name))


def checkpoint_in(path: pathlib.Path) -> pathlib.Path:
    """The folder of the tree of arrays: the given one, or the item of a step that is the model.

    Raises:
        MergeError: a run rather than one of its steps, or several items.
    """
    if (path / METADATA).is_file():
        return path
    items = _items(path)
    if any(item.name.isdigit() for item in items) or not items:
        steps = [item.name for item in items] or _steps(path)
        raise MergeError(
            f"{path} is a run of several steps ({some(steps)}); give one of them, or average "
            "them with 'mergejax average'"
        )
    for name in _ITEMS:
        if path / name in items:
            return path / name
    if len(items) > 1:
        names = some([item.name for item in items])
        raise MergeError(f"{path} holds several items, {names}; give the folder of one")
    return items[0]


def side_files(path: pathlib.Path) -> dict[str, pathlib.Path]:
    """Settings beside the arrays: files that are not Orbax's."""
    files = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
    return {file.name: file for file in files if not _OWN.match(file.name)}


class Stored:
    """The bytes of one array, in the order of rows; decoded when they are read.

    Args:
        path: of the checkpoint.
        leaf: what Orbax calls the array.
        shape, dtype: of the array.
        context: of TensorStore; keeps the chunks that were decoded last.
        held: bytes that it keeps at most.
    """

    def __init__(
        self, path: pathlib.Path, leaf: str, shape: tuple[int, ...], dtype: np.dtype, context: Any,
        held: int,
    ):  # fmt: skip
        self.path, self._leaf, self._shape, self._dtype = path, leaf, shape, dtype
        self.context, self.held = context, held

    @property
    def name(self) -> str:
        return self.path.name

    @functools.cached_property
    def _store(self) -> Any:
        import tensorstore

        zarr3 = read_metadata(self.path).get("use_zarr3")
        base = {"driver": "file", "path": f"{self.path.absolute()}/"}
        if (self.path / "manifest.ocdbt").is_file():
            place = {"driver": "ocdbt", "base": base, "path": f"{self._leaf}/"}
        else:
            place = {**base, "path": f"{self.path.absolute()}/{self._leaf}/"}
        spec = {"driver": "zarr3" if zarr3 else "zarr", "kvstore": place}
        return tensorstore.open(spec, open=True, read=True, context=self.context).result()

    def read_into(self, files: Files, offset: int, target: memoryview) -> None:
        """Fills a buffer; decodes the chunks that it needs, unless they are kept."""
        size = self._dtype.itemsize
        start, stop = offset // size, -(-(offset + len(target)) // size)
        flat = np.empty(stop - start, self._dtype)
        try:
            for index, place in _slabs(self._shape, start, stop):
                flat[place] = self._store[index].read().result().reshape(-1)
        except ValueError as error:
            reason = str(error).splitlines()[0][:160]
            raise MergeError(
                f"{self.path}: array '{self._leaf}' cannot be read ({reason}); restore the "
                "checkpoint from a copy"
            ) from None
        first = offset - start * size
        target[:] = flat.view(np.uint8)[first : first + len(target)].data


def _slabs(shape: tuple[int, ...], start: int, stop: int) -> list[tuple[Any, slice]]:
    """The elements from `start` to `stop` in the order of rows as rectangular parts.

    Returns:
        For each part its index, and its place among the elements.
    """
    if not shape:
        return [((), slice(0, 1))]
    inner = math.prod(shape[1:])
    found: list[tuple[Any, slice]] = []
    at = start
    while at < stop:
        row, rest = divmod(at, inner)
        whole = (stop - at) // inner if not rest else 0
        if whole:
            end = at + whole * inner
            found.append(((slice(row, row + whole),), slice(at - start, end - start)))
        else:
            end = min(stop, (row + 1) * inner)
            for index, place in _slabs(shape[1:], rest, rest + end - at):
                moved = slice(place.start + at - start, place.stop + at - start)
                found.append(((row, *index), moved))
        at = end
    return found


def read_metadata(path: pathlib.Path) -> dict[str, Any]:
    """What Orbax notes about a checkpoint."""
    try:
        return dict(json.loads((path / METADATA).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise MergeError(f"{path / METADATA} cannot be read ({error}); restore it") from None


def read_orbax(path: pathlib.Path) -> dict[str, Tensor]:
    """The arrays of a checkpoint by names that '/' joins; none of their values is read.

    Raises:
        MergeError: the folder is damaged, or a leaf is neither an array nor a number.
    """
    import jax
    import tensorstore
    from orbax import checkpoint

    path = checkpoint_in(path)
    read_metadata(path)
    try:
        with checkpoint.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.metadata(path.absolute()).item_metadata.tree
    except Exception as error:  # Orbax lets through what its many readers raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise MergeError(
            f"{path}: the checkpoint is damaged ({reason}); restore the folder from a copy"
        ) from None
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    problems, kinds = [], {}
    for keys, leaf in leaves:
        name = "/".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in keys)
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or np.dtype(dtype) not in CODES:
            kind = type(leaf).__name__ if dtype is None else f"type {dtype}"
            problems.append(f"{path}: '{name}' of {kind} cannot be merged; leave it out")
            continue
        kinds[name] = leaf.name, tuple(leaf.shape), np.dtype(dtype), _chunk_bytes(leaf)
    raise_all(problems)
    # Two of the largest chunks, so that neighbours are not decoded again piece by piece.
    held = 2 * max((chunk for *_, chunk in kinds.values()), default=0)
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": held}})
    return {
        name: Tensor(Stored(path, leaf, shape, dtype, context, held), dtype, shape, 0)
        for name, (leaf, shape, dtype, _) in kinds.items()
    }


def _chunk_bytes(leaf: Any) -> int:
    storage = getattr(leaf, "storage", None)
    shape = getattr(storage, "chunk_shape", None) or leaf.shape
    return math.prod(shape) * np.dtype(leaf.dtype).itemsize


def deal(types: Mapping[str, tuple[np.dtype, tuple[int, ...]]], folder: pathlib.Path) -> Any:
    """Where values lie in a checkpoint without OCDBT, and the files around them.

    Args:
        types: type and shape by name.
        folder: of the checkpoint.

    Returns:
        The tensors by name; the texts of the other files by their names.

    Raises:
        MergeError: empty arrays, which Orbax does not store; names that no tree can hold.
    """
    empty = [name for name, (_, shape) in types.items() if 0 in shape]
    if empty:
        raise MergeError(f"Orbax stores no empty arrays such as {some(empty)}; choose msgpack")
    nested(types)
    placed, texts, tree = {}, {}, {}
    for name, (dtype, shape) in types.items():
        keys = name.split("/")
        leaf = ".".join(keys)
        chunk = ".".join("0" for _ in shape) or "0"
        placed[name] = Tensor(folder / leaf / chunk, dtype, shape, 0)
        texts[f"{leaf}/.zarray"] = _dump(_zarray(dtype, shape))
        tree[str(tuple(keys))] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
    if len(texts) < len(types):
        raise MergeError("names that differ only in '/' and '.' fit in no Orbax checkpoint")
    texts[METADATA] = _dump(
        {
            "tree_metadata": tree,
            "use_ocdbt": False,
            "use_zarr3": False,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
    )
    return placed, texts


def _zarray(dtype: np.dtype, shape: tuple[int, ...]) -> dict[str, Any]:
    return {
        "chunks": list(shape),
        "compressor": None,
        "dimension_separator": ".",
        "dtype": dtype.str if dtype.isbuiltin == 1 else dtype.name,
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": list(shape),
        "zarr_format": 2,
    }


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
