"""What is to be done with every leaf, and in which order."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax

from mergejax.chains import Placed
from mergejax.checkpoints import pieces
from mergejax.checkpoints.compare import owner_of
from mergejax.checkpoints.files import CHUNK
from mergejax.checkpoints.job import Job
from mergejax.checkpoints.pieces import Work
from mergejax.checkpoints.safetensors import Tensor
from mergejax.plan import local_numbers
from mergejax.run import LEAFWISE, Values, _as_data, _is_elementwise, _leaf
from mergejax.step import Due


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
