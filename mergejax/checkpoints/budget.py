"""The memory that a merge takes, as an upper bound, and how many threads it allows."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from mergejax.checkpoints import pieces
from mergejax.checkpoints.job import Job
from mergejax.checkpoints.orbax_arrays import Stored
from mergejax.checkpoints.pieces import Work
from mergejax.checkpoints.request import show_size

PROGRAM = 120 * 10**6  # bytes that Python and JAX hold on their own
# More for each program beyond the first, measured: for one that measures, for one of whole leaves
# for each character of its text.
_MEASURING, _CHARACTER = 75 * 10**5, 300


class Need(NamedTuple):
    """Bytes that a merge takes.

    Attributes:
        held: all the time, for programs and for decoded chunks of inputs stored compressed.
        parts: for each leaf what working on one part of it takes beside.
    """

    held: int
    parts: Sequence[int]


def need(job: Job, works: Sequence[Work]) -> Need:
    """What the leaves of a merge take, programs compiled for them included."""
    chains: dict[Any, tuple[float, float]] = {}  # bytes an element beside its inputs; of a program
    for work in sorted(works, key=lambda work: work.info.size, reverse=True):
        if _chain(work) not in chains:
            chains[_chain(work)] = _beside(job, work)
    parts = []
    for work in works:
        length = work.length or work.info.size
        stored = sum(tensor.dtype.itemsize for tensor in work.tensors)
        stats = jax.tree.leaves(work.program[1].stats) if work.program else []
        read = sum(min(x.size, length) if work.length else 2 * x.size for x in stats)
        parts.append(round(length * (stored + chains[_chain(work)][0])) + 4 * read + 2**20)
    sources = [tensor.path for work in works for tensor in work.tensors]
    decoded = {id(source.context): source.held for source in sources if isinstance(source, Stored)}
    passes = len(job.plan.passes) + max(len(work.rounds) for work in works)
    whole = {(_chain(work), work.info.shape) for work in works if work.program and not work.length}
    sizes = {
        stop - start for work in works for start, stop in work.pieces((0, work.info.size), True)
    }
    measuring = _MEASURING * len(sizes) * passes
    wholes = sum(chains[chain][1] * (1 + passes) for chain, _ in whole)
    return Need(round(PROGRAM + measuring + wholes + sum(decoded.values())), parts)


def _chain(work: Work) -> Any:
    stages = work.program[0] if work.program else ()
    return work.length > 0, *(placed.stage.factory.name for placed in stages)


def _beside(job: Job, work: Work) -> tuple[float, float]:
    """What a chain takes an element: the result, and deltas not fused into it; and its program."""
    if work.program is None:
        return 0, 0
    if work.length:
        return work.dtype.itemsize, 0
    if any(placed.stage.build().rounds for placed in work.program[0]):
        return 8 * (len(work.tensors) + 2), _MEASURING
    taken, characters = pieces.program_memory(work, job.reads_base)
    return taken / max(work.info.size, 1), _CHARACTER * characters


def threads(job: Job, need: Need) -> int:
    """How many parts are worked on at once: as many as there are processors and memory for."""
    count = max(2, os.cpu_count() or 2)
    budget = (job.request.memory or free_memory() // 2) - need.held
    return max(1, min(count, budget // max(need.parts)))


def problems(job: Job, works: Sequence[Work]) -> list[str]:
    """Why the merge cannot be done in the memory that was asked for."""
    if job.request.memory is None:
        return []
    found = need(job, works)
    most, largest = max(zip(found.parts, works, strict=True), key=lambda x: x[0])
    least = found.held + most
    if job.request.memory >= least:
        return []
    return [
        f"--memory {show_size(job.request.memory)} is too little: the program and leaf "
        f"'{largest.info.name}' take {show_size(least)}; give at least that"
    ]


def free_memory() -> int:
    """Bytes of memory that are free."""
    try:
        text = pathlib.Path("/proc/meminfo").read_text()
        return int(text.split("MemAvailable:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return 4 * 2**30
