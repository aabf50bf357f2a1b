"""What is to be done with every leaf, in which order, and by how many threads."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from mergejax.chains import Placed
from mergejax.checkpoints import pieces
from mergejax.checkpoints.compare import owner_of
from mergejax.checkpoints.files import CHUNK
from mergejax.checkpoints.job import Job
from mergejax.checkpoints.orbax_arrays import Stored
from mergejax.checkpoints.pieces import Work
from mergejax.checkpoints.request import show_size
from mergejax.checkpoints.safetensors import Tensor
from mergejax.plan import local_numbers
from mergejax.run import LEAFWISE, Values, _as_data, _is_elementwise, _leaf
from mergejax.step import Due

PROGRAM = 120 * 10**6  # bytes that Python and JAX hold on their own
_COMPILED = 27 * 10**6  # more for each program beyond the first, measured


def make_works(job: Job, targets: Mapping[str, Tensor]) -> list[Work]:
    """Every leaf with its program, in the order in which the reference's files hold them."""
    read = [*([job.base] if job.reads_base and job.base else []), *job.experts]
    owners = [owner_of(model, job.base) for model in read]
    works = []
    length = min(pieces.PIECE, max(info.size for info in job.merged))
    for info in job.merged:
        placed, rounds = in_blocks(job.plan.placed[info.name])
        blocks = _is_elementwise(placed)
        seen = dataclasses.replace(info, role="", layout="") if blocks else info
        turned = {path for path, _ in rounds}  # these measure instead
        numbers = {p: x for p, x in local_numbers(job.plan, info).items() if p not in turned}
        local = jax.tree.map(LEAFWISE.narrow, numbers)
        stats = job.stats.get(info.name, {})
        program = _as_data(placed), _leaf(seen, Values(None, [], stats), 0), local
        tensors = [model.tensors[info.name] for model in read]
        several = [f"{o} ({t.source})" for o, t in zip(owners, tensors, strict=True)]
        places = _places(job, targets, info.name)
        works.append(Work(info, tensors, several, places, length * blocks, program, rounds))
    for info in job.copied:
        tensor = job.reference.tensors[info.name]
        owner = [owner_of(job.reference, job.base)]
        places = _places(job, targets, info.name)
        works.append(Work(info, [tensor], owner, places, min(pieces.PIECE, info.size), None))
    place = {name: (str(min(t.paths)), t.offset) for name, t in job.reference.tensors.items()}
    # Large leaves that are one part come first, so that no processor waits for them at the end.
    alone = lambda work: len(work.parts()) == 1 and work.info.size > CHUNK
    return sorted(works, key=lambda work: (not alone(work), place[work.info.name]))


def _places(job: Job, targets: Mapping[str, Tensor], name: str) -> list[Tensor]:
    """Where a leaf is written: under its own name and those that are tied to it."""
    twins = [twin for twin, kept in job.reference.twins.items() if kept == name]
    return [targets[name], *(targets[twin] for twin in twins)]


def in_blocks(placed: Sequence[Placed]) -> tuple[list[Placed], list[Due]]:
    """The stages in their form for blocks, if all have one, and what is to be measured first."""
    forms = [p.stage if p.stage.elementwise else p.stage.blocked() for p in placed]
    if not all(forms) or any(p.role != "apply" for p in placed):
        return list(placed), []
    turned = [dataclasses.replace(p, stage=f) for p, f in zip(placed, forms, strict=True) if f]
    rounds = [
        (p.path, number)
        for p, before in zip(turned, placed, strict=True)
        if p.stage is not before.stage
        for number in range(len(p.stage.build().rounds))
    ]
    return turned, rounds


def threads(job: Job, works: Sequence[Work], memory: Sequence[int]) -> int:
    """How many parts are worked on at once: as many as there are processors and memory for."""
    count = max(2, os.cpu_count() or 2)
    budget = (job.request.memory or free_memory() // 2) - held_memory(job, works)
    return max(1, min(count, budget // max(memory)))


def memory_problems(job: Job, works: Sequence[Work]) -> list[str]:
    """Why the merge cannot be done in the memory that was asked for."""
    if job.request.memory is None:
        return []
    most, largest = max(zip(part_memory(job, works), works, strict=True), key=lambda x: x[0])
    least = held_memory(job, works) + most
    if job.request.memory >= least:
        return []
    return [
        f"--memory {show_size(job.request.memory)} is too little: the program and leaf "
        f"'{largest.info.name}' take {show_size(least)}; give at least that"
    ]


def part_memory(job: Job, works: Sequence[Work]) -> list[int]:
    """For each leaf an upper bound of what working on one part of it takes, in bytes."""
    beside: dict[Any, float] = {}  # bytes an element that a chain takes beside its inputs
    for work in sorted(works, key=lambda work: work.info.size, reverse=True):
        if _chain(work) not in beside:
            beside[_chain(work)] = _beside(job, work)
    found = []
    for work in works:
        length = work.length or work.info.size
        stored = sum(tensor.dtype.itemsize for tensor in work.tensors)
        stats = jax.tree.leaves(work.program[1].stats) if work.program else []
        read = sum(min(x.size, length) if work.length else 2 * x.size for x in stats)
        found.append(round(length * (stored + beside[_chain(work)])) + 4 * read + 2**20)
    return found


def _chain(work: Work) -> Any:
    stages = work.program[0] if work.program else ()
    return work.length > 0, *(placed.stage.factory.name for placed in stages)


def _beside(job: Job, work: Work) -> float:
    """What a chain takes an element: the result, and deltas that are not fused into it."""
    if work.program is None:
        return 0
    if work.length:
        return work.dtype.itemsize
    if any(placed.stage.build().rounds for placed in work.program[0]):
        return 4 * (3 * len(work.tensors) + 6)
    taken = pieces.program_memory(work, job.reads_base)
    return 1.4 * taken / max(work.info.size, 1)  # LAPACK's own workspace


def held_memory(job: Job, works: Sequence[Work]) -> int:
    """Bytes that are held all the time: programs, decoded chunks of inputs stored compressed."""
    sources = [tensor.path for work in works for tensor in work.tensors]
    held = {id(source.context): source.held for source in sources if isinstance(source, Stored)}
    own = max(len(work.rounds) for work in works)
    whole = any(work.program and not work.length for work in works)
    return PROGRAM + _COMPILED * (len(job.plan.passes) + own + 2 * whole) + sum(held.values())


def free_memory() -> int:
    """Bytes of memory that are free."""
    try:
        text = pathlib.Path("/proc/meminfo").read_text()
        return int(text.split("MemAvailable:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return 4 * 2**30
