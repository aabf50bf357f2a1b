"""What a user asks for: the options of a merge, checked before anything is opened."""

import dataclasses
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from mergejax.checkpoints.layers import Ranges, read_layers
from mergejax.checkpoints.safetensors import DTYPES
from mergejax.errors import MergeError, did_you_mean, raise_all

VOCABULARIES = ("error", "base", "union")
FORMATS = ("safetensors", "orbax", "msgpack", "npz")
_UNITS = {"": 1, "B": 1} | {
    f"{letter}{kind}": base**power
    for power, letter in enumerate("KMGT", 1)
    for kind, base in (("B", 1000), ("iB", 1024), ("", 1000))
}
# Names of types as configurations write them.
FLOATS = {dtype.name: dtype for code, dtype in DTYPES.items() if code[0] in "FB" and code != "BOOL"}


@dataclasses.dataclass(frozen=True)
class Request:
    """A merge as the user asks for it.

    Attributes:
        base: folder or file of the base, or None.
        experts: folders or files of the experts.
        method: a chain or a text in the string language.
        out: the folder to write.
        weights: one per expert, put into the method; None leaves the method as it is.
        dtype: of the floating-point output; by default the base's.
        seed: of random masks.
        memory: budget in bytes; by default half of what is free.
        shard_size: largest number of bytes of values in one file.
        overwrite: whether a target that holds something else is replaced.
        only, exclude: regular expressions of the leaves that are, or are not, merged.
        strict: whether warnings are errors.
        vocabulary: what is done about vocabularies that differ: 'error', 'base' or 'union'.
        format: of the result: 'safetensors', 'orbax', 'msgpack' or 'npz'.
        stats: files of statistics that `mj.collect.save` wrote, of the experts in any order.
        layers: of which models the layers of the result are; empty for all layers of all.
    """

    base: pathlib.Path | None
    experts: tuple[pathlib.Path, ...]
    method: Any
    out: pathlib.Path | None
    weights: tuple[float, ...] | None = None
    dtype: str | None = None
    seed: int = 0
    memory: int | None = None
    shard_size: int = 5_000_000_000
    overwrite: bool = False
    only: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    strict: bool = False
    vocabulary: str = "error"
    layers: Ranges = ()
    format: str = "safetensors"
    stats: tuple[pathlib.Path, ...] = ()


def make_request(
    base: Any,
    experts: Any,
    method: Any,
    out: Any,
    *,
    weights: Any = None,
    dtype: Any = None,
    seed: Any = 0,
    memory: Any = None,
    shard_size: Any = 5_000_000_000,
    overwrite: bool = False,
    only: Any = (),
    exclude: Any = (),
    strict: bool = False,
    vocabulary: Any = "error",
    layers: Any = (),
    format: Any = "safetensors",
    stats: Any = (),
) -> Request:
    """Checks the options one by one and puts them into a `Request`.

    Raises:
        MergeError: one sentence for every option that makes no sense.
    """
    problems: list[str] = []
    if isinstance(experts, str | os.PathLike) or not isinstance(experts, Sequence):
        problems.append("experts must be a list of paths, one per expert, such as ['a', 'b']")
        experts = []
    elif not experts:
        problems.append("there is no expert to merge; give at least one with --expert")
    if method is None or method == "":
        problems.append("there is no method; give one with --method, such as 'ties(density=0.2)'")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        problems.append(f"seed must be an integer in [0, 2^32), not {seed!r}")
    if dtype is not None and dtype not in FLOATS:
        near = did_you_mean(str(dtype), FLOATS)
        problems.append(f"dtype: {dtype!r} is no floating-point type, {near}")
    if vocabulary not in VOCABULARIES:
        near = did_you_mean(str(vocabulary), VOCABULARIES)
        problems.append(f"vocabulary: {vocabulary!r} is no choice, {near}")
    if format not in FORMATS:
        problems.append(f"format: {format!r} is unknown, {did_you_mean(str(format), FORMATS)}")
    for what, path in (("base", base), *(("an expert", x) for x in experts), ("out", out)):
        problems += [] if path is None else _path_problems(what, path)
    stats = [stats] if isinstance(stats, str | os.PathLike) else list(stats)
    for path in stats:
        problems += _path_problems("stats", path)
    ranges: Ranges = ()
    try:
        ranges = read_layers(layers)
    except MergeError as error:
        problems += str(error).splitlines()
    sizes = []
    for name, value in (("memory", memory), ("shard_size", shard_size)):
        try:
            sizes.append(None if value is None else read_size(value))
        except ValueError:
            sizes.append(None)
            problems.append(f"{name} must be a size such as '2GiB', not {value!r}")
    raise_all(problems)
    return Request(
        None if base is None else pathlib.Path(base),
        tuple(pathlib.Path(expert) for expert in experts),
        method,
        None if out is None else pathlib.Path(out),
        None if weights is None else tuple(weights),
        dtype,
        seed,
        sizes[0],
        sizes[1] or 5_000_000_000,
        bool(overwrite),
        _patterns(only),
        _patterns(exclude),
        bool(strict),
        vocabulary,
        ranges,
        format,
        tuple(pathlib.Path(path) for path in stats),
    )


def _path_problems(what: str, value: Any) -> list[str]:
    """Why a path cannot be one, whatever lies there; that nothing does is said elsewhere."""
    if not isinstance(value, str | os.PathLike):
        return [f"{what} must be a path, not {value!r}"]
    path = pathlib.Path(value)
    if not os.fspath(value) or (what == "out" and path.name in ("", "..")):
        return [f"{what}: {os.fspath(value)!r} names no folder; write its name"]
    used = path.with_name(f".{path.name}.merging") if what == "out" else path
    try:
        os.stat(used)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError) as error:  # too long, forbidden, a loop of links, a zero byte
        reason = getattr(error, "strerror", None) or error
        return [f"{what}: the path {str(path)[:80]!r} cannot be used ({reason}); choose another"]
    return []


def _patterns(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def read_size(value: Any) -> int:
    """Bytes from a number or a text with a unit.

    Raises:
        ValueError: it is no positive size.

    Example:
        >>> read_size('2GiB'), read_size('5GB'), read_size(1000)
        (2147483648, 5000000000, 1000)
    """
    match = re.fullmatch(r"\s*([\d.]+)\s*([KMGT]?i?B?)\s*", str(value))
    if match is None or match[2] not in _UNITS:
        raise ValueError(value)
    size = int(float(match[1]) * _UNITS[match[2]])
    if size <= 0:
        raise ValueError(value)
    return size


def show_size(count: float) -> str:
    """Bytes as people read them.

    Example:
        >>> show_size(1_500_000_000)
        '1.5 GB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if count >= 100 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
