"""Merges PEFT's adapters into one adapter, without their base: factors in, factors out."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from mergejax.checkpoints import adapters, folder, hub, output, safetensors, target
from mergejax.checkpoints.files import HASH, hasher
from mergejax.checkpoints.folder import ADAPTER, Model
from mergejax.checkpoints.request import FLOATS, Request
from mergejax.checkpoints.staging import Staging
from mergejax.errors import MergeError, raise_all
from mergejax.progress import Reporter
from mergejax.version import __version__

FILE = "adapter_model.safetensors"
# What a request may say beside experts, method and output.
_KNOWN = ("base", "experts", "method", "out", "dtype", "overwrite", "strict")


@dataclasses.dataclass(frozen=True)
class Merge:
    """A merge of adapters that can be written: its files by name, and what is said about them."""

    files: Mapping[str, bytes]
    sentence: str


def applies(request: Request) -> bool:
    """Whether all that is to be merged are adapters, and no base is given."""
    try:
        paths = [] if request.base is not None else _places(request)
    except MergeError:
        return False  # which models are missing is told where models are opened
    return bool(paths) and all(map(adapters.is_adapter, paths))


def _places(request: Request) -> list[pathlib.Path]:
    """Where the experts lie, also those that were given by their names on the Hub."""
    return [hub.find(path) for path in request.experts]


def prepare(request: Request) -> Merge:
    r"""Merges adapters in memory, \(\Delta W=s\,BA\) of every layer, by a method for factors.

    Args:
        request: experts that are folders of PEFT, a method of `mergejax.lowrank` in the string
            language, such as 'svd(rank=8)'.

    Returns:
        The files of an adapter that `peft` loads: every layer has the largest rank, padded with
        zeros, and scales are folded into the factors.

    Raises:
        MergeError: options that only models have; adapters of different bases, layers or kinds;
            values that are not finite; an unknown method.
    """
    from mergejax import lowrank

    problems = _option_problems(request)
    names = folder.distinct_names(list(request.experts))
    request = dataclasses.replace(request, experts=tuple(_places(request)))
    read: list[Any] = [problems.attempt(_read, path) for path in request.experts]
    raise_all(problems.lines)
    configs = [config for config, _ in read]
    raise_all([*_differences(names, configs), *_doubles(names, [state for _, state in read])])
    factors = []
    for path, (config, state) in zip(request.experts, read, strict=True):
        factors.append(problems.attempt(lowrank.from_peft, _float32(path, state), config))
    raise_all(problems.lines)
    merged = lowrank.merge(_method(request), factors)
    state, config = lowrank.to_peft(merged, configs[0])
    kinds = sorted({x.dtype.name for _, held in read for x in held.values()})
    dtype = FLOATS[request.dtype or (kinds[0] if len(kinds) == 1 else "float32")]
    recipe = _recipe(request, names, dtype.name)
    files = {
        FILE: _file(_stored(state, dtype), recipe),
        ADAPTER: json.dumps(config, indent=2).encode() + b"\n",
    }
    parents = [Model(n, path, {}) for n, path in zip(names, request.experts, strict=True)]
    files[output.CARD] = output.card(parents, recipe).encode()
    result = hasher(files[FILE]).hexdigest()
    files[output.RECIPE] = output.recipe_text(recipe, result).encode()
    sentence = f"{len(merged)} layers of {len(read)} adapters, rank {config['r']}"
    return Merge(files, sentence)


def run(request: Request, reporter: Reporter) -> None:
    """Merges adapters and writes the result to its place, whole or not at all.

    Raises:
        MergeError: what `prepare` refuses; a place that holds something else.
    """
    out, merge = request.out, prepare(request)
    assert out is not None
    if problems := target.problems(out, request.overwrite):
        there = {path.name: path.read_bytes() for path in out.glob("*")} if out.is_dir() else {}
        if there == merge.files:
            reporter.log(f"{out} holds this very merge already; nothing to do")
            return
        raise_all(problems)
    with Staging(out) as staging:
        staging.resume({"adapters": [str(path.resolve()) for path in _places(request)]})
        for name, content in merge.files.items():
            (staging.files / name).write_bytes(content)
        staging.publish()
    reporter.log(f"{out}: {merge.sentence}")


def _method(request: Request) -> str:
    """The method's text, unless it is one for models."""
    from mergejax import lowrank, registry

    text = str(request.method)
    name = text.partition("(")[0].strip()
    if name not in lowrank.METHODS and name in registry.METHODS:
        raise MergeError(
            f"{name}() merges models; name their base with --base, or take a method for adapters: "
            f"{', '.join(sorted(lowrank.METHODS))}"
        )
    return text


def _option_problems(request: Request) -> Any:
    from mergejax.checkpoints.job import Problems

    problems = Problems()
    for field in dataclasses.fields(Request):
        value = getattr(request, field.name)
        if field.name not in _KNOWN and value != field.default:
            problems.lines.append(
                f"{field.name} is for models, but adapters are merged without their base; leave "
                "it out, or name the base with --base to have a whole model"
            )
    problems.lines += target.path_problems(request)
    return problems


def _read(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The configuration of an adapter and its tensors by name."""
    if not (path / FILE).is_file():
        raise MergeError(f"{path} has no {FILE}; save the adapter with safetensors")
    folder.read_file(path / FILE)  # says what is wrong with a damaged one
    return dict(folder.read_json(path / ADAPTER)), load_file(path / FILE)


def _float32(path: pathlib.Path, state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    found = {name: x.astype(np.float32) for name, x in state.items()}
    raise_all(
        [
            f"tensor '{name}' of {path} has {np.sum(~np.isfinite(x))} non-finite values (NaN or "
            "Inf); repair it or leave it out"
            for name, x in found.items()
            if not np.isfinite(x).all()
        ]
    )
    return found


def _stored(state: Mapping[str, np.ndarray], dtype: np.dtype) -> dict[str, np.ndarray]:
    with np.errstate(over="ignore"):
        found = {name: x.astype(dtype) for name, x in state.items()}
    raise_all(
        [
            f"tensor '{name}' of the merged adapter has values beyond the range of {dtype}; "
            "choose a wider --dtype"
            for name, x in found.items()
            if not np.isfinite(x.astype(np.float32)).all()
        ]
    )
    return found


def _file(state: Mapping[str, np.ndarray], recipe: Mapping[str, Any]) -> bytes:
    """A safetensors file; the library's own writer puts metadata into no certain order."""
    (tensors,) = output.shards({n: (x.dtype, x.shape) for n, x in state.items()}, 2**63).values()
    header = safetensors.header_bytes(tensors, output.metadata(recipe))
    return b"".join([header, *(state[name].tobytes() for name in tensors)])


def _differences(names: list[str], configs: list[dict[str, Any]]) -> list[str]:
    """Why adapters do not belong to one model."""
    first = configs[0]
    return [
        f"adapter '{name}' has {key}={config.get(key)!r}, but '{names[0]}' has {first.get(key)!r}; "
        "merge adapters of one base"
        for key in ("base_model_name_or_path", "fan_in_fan_out", "task_type")
        for name, config in zip(names[1:], configs[1:], strict=True)
        if config.get(key) != first.get(key)
    ]


def _doubles(names: list[str], states: Sequence[Mapping[str, np.ndarray]]) -> list[str]:
    """Adapters that are one and the same, which a slip of the hand would count twice."""
    content = [
        sorted((n, x.dtype.name, x.shape, x.tobytes()) for n, x in s.items()) for s in states
    ]
    firsts = [content.index(values) for values in content]
    return [
        f"adapters '{names[first]}' and '{names[i]}' hold the same values; leave one of them out"
        for i, first in enumerate(firsts)
        if first < i
    ]


def _recipe(request: Request, names: list[str], dtype: str) -> dict[str, Any]:
    hashes = [hasher((path / FILE).read_bytes()).hexdigest() for path in request.experts]
    return {
        "mergejax": __version__,
        "method": str(request.method),
        "experts": [
            {"name": name, HASH: digest} for name, digest in zip(names, hashes, strict=True)
        ],
        "dtype": dtype,
    }
