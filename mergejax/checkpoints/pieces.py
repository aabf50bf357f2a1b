"""One part of one leaf, from the files it is read from to the file it is written to.

A chain whose stages are all elementwise runs in pieces of a fixed length, flat, whatever a leaf's
shape, and the last piece of a leaf is filled up: one program merges the whole model. Other chains
see the leaf as it is.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mergejax import forms
from mergejax.checkpoints import files
from mergejax.checkpoints.files import CHUNK, Buffers, Files, ranges
from mergejax.checkpoints.safetensors import Tensor
from mergejax.core import Leaf
from mergejax.leaves import LeafInfo
from mergejax.memory import give_back
from mergejax.plan import solve_stage
from mergejax.randomness import fold_key
from mergejax.run import LEAFWISE
from mergejax.step import Due

_OUTPUT = -1  # stands for the merged model where models are counted
PIECE = 2**20  # elements that are merged at once; starting a program takes as long as 2^17 of them
_WORKSPACE = 1.4  # LAPACK's own comes to what the compiler knows
MEASURED = 2**19  # elements that are measured at once; sums of floats depend on it


@dataclasses.dataclass(frozen=True)
class Work:
    """A leaf and what is to be done with it.

    Attributes:
        info: what is known about the leaf.
        tensors: where its values lie: the base's, if it is read, then the experts'.
        owners: whose the tensors are, in words.
        targets: where the merged values go; to several places for tied weights.
        length: of the pieces in which it is merged, 0 for the leaf as it is.
        program: its stages, its `Leaf` without values, its own numbers; None for a copied leaf.
        rounds: what is measured over this leaf alone, before anything else.
    """

    info: LeafInfo
    tensors: Sequence[Tensor]
    owners: Sequence[str]
    targets: Sequence[Tensor]
    length: int
    program: tuple[Any, Leaf, Any] | None
    rounds: Sequence[Due] = ()

    @property
    def dtype(self) -> np.dtype:
        """The type of the merged values."""
        return self.targets[0].dtype

    def pieces(self, part: tuple[int, int], measured: bool = False) -> Iterator[tuple[int, int]]:
        """What of a part is in memory at once."""
        length = min(self.length, MEASURED) if measured else self.length
        return ranges(*part, length or max(self.info.size, 1))

    def parts(self) -> list[tuple[int, int]]:
        """The parts that are read, run and noted one by one; a leaf in pieces has several."""
        size = self.info.size
        several = self.length and size > CHUNK and not self.rounds
        return list(ranges(0, size, CHUNK)) if several else [(0, size)]


class Outcome(NamedTuple):
    """What came of one part.

    Attributes:
        found: what was measured, summed over the part, or None.
        digests: of the inputs' chunks, for each model, if they were asked for.
        written: digests of the output's chunks, for each target.
        non_finite: (owner, count) of values that are NaN or infinite; the result's owner is ''.
    """

    found: Any
    digests: Sequence[Sequence[str]]
    written: Sequence[str]
    non_finite: Sequence[tuple[str, int]]


@functools.partial(jax.jit, static_argnames=("due", "dtype"))
def _program(placed, leaf, experts, names, seed, seen, local, *, due, dtype):
    leaf = leaf.replace(key=fold_key(leaf.key, seed))
    found = forms.run_leaf(placed, leaf, experts, names, seen, local, due)
    if due is not None:
        return found
    inputs = experts if leaf.base is None else [leaf.base, *experts]
    return forms.marked(found[0], inputs).astype(dtype)


def program_memory(work: Work, has_base: bool) -> tuple[int, int]:
    """The bytes that the program of a leaf takes beside its inputs, and how long its text is.

    Args:
        work: a leaf that is merged as it is and of which nothing is measured.
        has_base: whether the first tensor is the base's.
    """
    assert work.program is not None
    placed, leaf, local = work.program
    kinds = [np.dtype(np.float32) if t.dtype == np.float64 else t.dtype for t in work.tensors]
    values = [jax.ShapeDtypeStruct(work.info.shape, kind) for kind in kinds]
    leaf = leaf.replace(start=start_of(0), base=values[0] if has_base else None)
    names = np.zeros((len(values) - has_base, 2), np.uint32)
    dtype = jax.dtypes.canonicalize_dtype(work.dtype)
    lowered = _program.lower(
        placed, leaf, values[has_base:], names, np.uint32(0), {}, local, due=None, dtype=dtype
    )
    sizes = lowered.compile().memory_analysis()
    give_back()
    taken = sizes.temp_size_in_bytes + sizes.output_size_in_bytes if sizes else 0
    text = lowered.as_text()
    return round(taken * (_WORKSPACE if "lapack" in text else 1)), len(text)


def section(tensor: Tensor, start: int, stop: int) -> Tensor:
    """The elements from `start` to `stop` of a tensor, as a tensor of one axis."""
    offset = tensor.offset + start * tensor.dtype.itemsize
    return Tensor(tensor.path, tensor.dtype, (stop - start,), offset)


def read_piece(
    tensor: Tensor,
    piece: tuple[int, int],
    source: Files,
    buffers: Buffers,
    key: Any,
    length: int = 0,
) -> np.ndarray:
    """The elements of a piece, flat, and behind them anything up to `length`.

    They are overwritten when `key` is used again.
    """
    if tensor.rows is not None:
        look = lambda t, start, stop, i: read_piece(t, (start, stop), source, buffers, (key, i))
        return _filled(tensor.rows.read(*piece, tensor.dtype, look), length)
    place = section(tensor, *piece)
    buffer = buffers.take(key, max(place.bytes, length * place.dtype.itemsize))
    source.read_into(place.path, place.offset, buffer[: place.bytes])
    values = np.frombuffer(buffer, place.dtype)
    if tensor.product is None:
        return values
    return _filled(tensor.product.onto(values[: place.size], *piece), length)


def _filled(x: np.ndarray, length: int) -> np.ndarray:
    """An array with zeros behind it, of at least a given length."""
    return x if x.size >= length else np.concatenate([x, np.zeros(length - x.size, x.dtype)])


def _narrow(x: np.ndarray) -> np.ndarray:
    """Values as they are computed with: no float64, whose largest become infinite."""
    if x.dtype != np.float64:
        return x
    with np.errstate(over="ignore", invalid="ignore"):  # also what stands behind a piece
        return x.astype(np.float32)


def start_of(index: int) -> np.ndarray:
    """The index of an element as two uint32 halves, low and high."""
    return np.array([index & 0xFFFFFFFF, index >> 32], np.uint32)


def _feed(hashers: dict, model: int, start: int, x: np.ndarray) -> None:
    """Hashes elements of a model's leaf, chunk by chunk."""
    for first, last in ranges(0, x.size, CHUNK):
        own = hashers.setdefault((model, (start + first) // CHUNK), files.hasher())
        own.update(x[first:last].view(np.uint8).data)


def _digests(hashers: dict, model: int) -> list[str]:
    """The digests of one model's chunks."""
    return [hasher.hexdigest() for (owner, _), hasher in hashers.items() if owner == model]


class Runner:
    """Runs parts of leaves; any number of threads may share it.

    Args:
        has_base: whether the first tensor of each work is the base's.
        names: keys of the experts' names.
        seed: of all random numbers.
    """

    def __init__(self, has_base: bool, names: np.ndarray, seed: int):
        self._has_base, self._names, self._seed = has_base, names, np.uint32(seed)
        self.inputs, self.outputs = Files(), Files(files.os.O_RDWR | files.os.O_CREAT)
        self._buffers = Buffers()
        self._own: dict[str, Any] = {}  # what leaves measured over themselves
        self._devices, self._own_device = itertools.cycle(jax.local_devices()), threading.local()
        # A program is compiled by the first thread that needs it while others wait.
        self._turns: dict[Any, Any] = collections.defaultdict(threading.Lock)
        self._compiled: set[Any] = set()
        self.broken = threading.Event()  # something is not finite: inputs are still looked at

    def close(self) -> None:
        self.inputs.close()
        self.outputs.close()

    def run(self, work: Work, part: tuple[int, int], seen: Any, due: Due | None, fresh: bool):
        """Reads one part, runs its program and, in the last pass, writes the result.

        Args:
            work: the leaf.
            part: from which element to which.
            seen: what earlier passes measured.
            due: the round to measure, or None in the last pass.
            fresh: whether the inputs are read for the first time: they are checked and hashed.

        Returns:
            An `Outcome`.
        """
        asked = fresh
        bad: list[tuple[str, int]] = []
        hashers: dict[tuple[int, int], Any] = {}
        if work.rounds and work.info.name not in self._own:
            own: dict[str, tuple[Any, ...]] = {}
            totals: dict[str, list[Any]] = {}
            for path, number in work.rounds:
                sweep = self._sweep(work, part, own, (path, number), fresh, bad, hashers)
                fresh = False
                if sweep is None:
                    break
                totals.setdefault(path, []).append(sweep[0])
                own[path] = (*own.get(path, ()), self._solve(work, path, totals[path]))
            self._own[work.info.name] = own
        seen = {**seen, **self._own.get(work.info.name, {})}
        found = self._sweep(work, part, seen, due, fresh, bad, hashers)
        digests = [_digests(hashers, i) for i in range(len(work.tensors))]
        written = _digests(hashers, _OUTPUT) * len(work.targets)
        return Outcome(found, digests if asked else [], written, bad)

    def _solve(self, work: Work, path: str, totals: Sequence[Any]) -> Any:
        assert work.program is not None
        placed = work.program[0]
        place = next(i for i, p in enumerate(placed) if p.path == path)
        reduced = any(p.stage.kind in ("reduce", "fold") for p in placed[:place])
        experts = None if reduced else len(self._names)
        solved = solve_stage(placed[place].stage, experts, totals, work.info.size)
        return jax.tree.map(LEAFWISE.narrow, solved)

    def _sweep(
        self,
        work: Work,
        part: tuple[int, int],
        seen: Any,
        due: Due | None,
        fresh: bool,
        bad: list[tuple[str, int]],
        hashers: dict,
    ) -> Any:
        """Goes through a part once: measures what is due, or writes the result."""
        found = None
        for piece in work.pieces(part, measured=due is not None):
            size, length = piece[1] - piece[0], 0 if due is not None else work.length
            values = [self._read(work, i, piece, length) for i in range(len(work.tensors))]
            inputs = [x[:size] for x in values]
            if fresh:
                for i, x in enumerate(inputs):
                    _feed(hashers, i, piece[0], x)
            # What merges pieces marks its result where an input is not finite, other programs may
            # hide it or never end.
            if fresh and (due is not None or not work.length or self.broken.is_set()):
                bad += self._look_at(work, inputs)
            if self.broken.is_set():
                continue
            result = self._compute(work, values, piece[0], seen, due)
            if due is None:
                result = np.asarray(result).reshape(-1)[:size]
                bad += self._write(work, piece[0], result, inputs, hashers)
            else:
                total = jax.tree.map(LEAFWISE.total, result)
                found = total if found is None else jax.tree.map(np.add, found, total)
        return found

    def _read(self, work: Work, index: int, piece: tuple[int, int], length: int = 0) -> np.ndarray:
        tensor = work.tensors[index]
        return read_piece(tensor, piece, self.inputs, self._buffers, index, length)

    def _look_at(self, work: Work, values: Sequence[np.ndarray]) -> list[tuple[str, int]]:
        """Looks for values that are not finite in what was read."""
        if work.program is None:
            return []
        values = [_narrow(x) for x in values]
        if all(map(files.is_finite, values)):
            return []
        self.broken.set()
        counts = [(o, files.count_non_finite(x)) for o, x in zip(work.owners, values, strict=True)]
        return [(owner, count) for owner, count in counts if count]

    def _compute(self, work: Work, values: Sequence[np.ndarray], start: int, seen, due) -> Any:
        if work.program is None:
            return values[0]
        placed, leaf, local = work.program
        if not work.length:
            values = [x.reshape(work.info.shape) for x in values]
        values = [_narrow(x) for x in values]
        leaf = leaf.replace(start=start_of(start), base=values[0] if self._has_base else None)
        if work.length:
            size = values[0].size
            cut = lambda x: _filled(np.asarray(x).reshape(-1)[start : start + size], size)
            leaf = leaf.replace(stats=jax.tree.map(cut, leaf.stats))
        experts = values[1:] if self._has_base else values
        dtype = jax.dtypes.canonicalize_dtype(work.dtype)
        device = self._device()
        kind = device, due, dtype, *((x.shape, x.dtype) for x in values)
        turn = contextlib.nullcontext() if kind in self._compiled else self._turns[kind]
        with turn, jax.default_device(device):
            found = _program(
                placed, leaf, experts, self._names, self._seed, seen, local, due=due, dtype=dtype
            )
            if kind not in self._compiled:
                give_back()  # compiling takes several times what a program is
            self._compiled.add(kind)
        return found

    def _device(self) -> Any:
        """The device of this thread; threads take turns at all there are."""
        if not hasattr(self._own_device, "device"):
            self._own_device.device = next(self._devices)
        return self._own_device.device

    def _write(
        self,
        work: Work,
        start: int,
        result: np.ndarray,
        inputs: Sequence[np.ndarray],
        hashers: dict,
    ) -> list[tuple[str, int]]:
        merged = result.astype(work.dtype, copy=False)
        changed = work.program is not None or work.tensors[0].dtype != merged.dtype
        if changed and not files.is_finite(merged):
            self.broken.set()
            return self._look_at(work, inputs) or [("", files.count_non_finite(merged))]
        _feed(hashers, _OUTPUT, start, merged)
        for target in work.targets:
            place = section(target, start, start + merged.size)
            self.outputs.write_from(place.path, place.offset, merged.view(np.uint8).data)
        return []

    def digests_of(self, work: Work, part: tuple[int, int]) -> list[list[str]]:
        """The digests of the inputs of a part, as `run` takes them; nothing else is done."""
        hashers: dict[tuple[int, int], Any] = {}
        for piece in work.pieces(part):
            for i in range(len(work.tensors)):
                _feed(hashers, i, piece[0], self._read(work, i, piece))
        return [_digests(hashers, i) for i in range(len(work.tensors))]

    def written(self, work: Work, part: tuple[int, int]) -> list[str]:
        """The digests of what lies on the disk where a part was written."""
        chunks = list(ranges(*part, CHUNK))
        return [self._hash(section(t, *chunk)) for t in work.targets for chunk in chunks]

    def _hash(self, tensor: Tensor) -> str:
        hasher = files.hasher()
        for start, stop in ranges(0, tensor.bytes, 2**20):
            buffer = self._buffers.take("hash", stop - start)
            self.outputs.read_into(tensor.path, tensor.offset + start, buffer)
            hasher.update(buffer)
        return hasher.hexdigest()
