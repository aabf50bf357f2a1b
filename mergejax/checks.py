"""What is wrong with a chain for so many experts, in the words of whoever wrote it."""

from collections.abc import Sequence
from typing import Any

from mergejax import varying
from mergejax.chains import Chain, Placed, reduces, reduction
from mergejax.core import Stage


def _place(placed: Placed) -> int:
    """Which of a chain's items a stage belongs to."""
    return int(placed.path.split("/")[1])


def _written(method: Chain, placed: Placed) -> str:
    """What the user calls a stage: the method that it is part of, or itself."""
    item = method.items[_place(placed)]
    return (item if isinstance(item, Stage) else placed.stage).factory.name


def check_order(method: Chain, placed: Sequence[Placed]) -> list[str]:
    """One sentence for every item of a chain that cannot stand where it stands."""
    first = reduction(placed)
    problems = [
        f"'{_written(method, p)}' refines a merged delta, but nothing before it in the chain "
        f"{method!r} reduces the experts to one; {_advice(method, p, placed[first:])}"
        for p in placed[:first]
        if p.role == "apply" and p.stage.kind in ("refine", "restore")
    ]
    problems += [
        f"'{_written(method, p)}' needs all experts, but the chain {method!r} has already reduced "
        f"them to one; {_advice(method, p, placed[first:])}"
        for p in placed[first + 1 :]
        if p.role == "apply" and p.stage.kind in ("joint", "reduce", "fold")
    ]
    problems += [
        f"'{_written(method, p)}' gives every expert a model of its own, but the chain {method!r} "
        "goes on; put it last"
        for p in placed[first + 1 : -1]
        if p.stage.kind == "restore"
    ]
    return list(dict.fromkeys(problems))


def _advice(method: Chain, misplaced: Placed, rest: Sequence[Placed]) -> str:
    """Where a stage may go: to the other side of the reduction, with which the rest begins."""
    refines = misplaced.stage.kind in ("refine", "restore")
    here = _place(misplaced)
    if not rest or _place(rest[0]) == here:
        return f"put it {'behind' if refines else 'before'} total(), mean() or a named method"
    if not refines and reduces(method.items[here]):
        return f"keep one of '{_written(method, rest[0])}' and '{_written(method, misplaced)}'"
    items = list(method.items)
    items.insert(_place(rest[0]), items.pop(here))
    return f"write {Chain(items)!r}"


def check_numbers(
    method: Chain, placed: Sequence[Placed], experts: int, has_base: bool
) -> list[str]:
    """One sentence for every number of experts, of values or of models that does not fit."""
    first = reduction(placed)
    problems = []
    for i, p in enumerate(placed):
        if p.role != "apply":
            continue
        factory, label = p.stage.factory, _written(method, p)
        if factory.space == "delta" and not has_base:
            problems.append(f"'{label}' works on deltas and needs a base; pass the base model")
        if factory.experts not in (None, experts):
            several = f"{factory.experts} expert{'' if factory.experts == 1 else 's'}"
            problems.append(f"'{label}' takes exactly {several}, not {experts}")
        if experts < factory.at_least:
            problems.append(f"'{label}' takes at least {factory.at_least} experts, not 1")
        within = "" if label == factory.name else f" of {label}()"
        for name, value in p.stage.data.items():
            number = f"{factory.name}({name}=...){within}"
            single = name not in factory.per_expert or (factory.kind == "each" and i > first)
            problems += _check_length(number, value, experts, single)
            if isinstance(value, varying.Rule) and p.stage.build().rounds:
                problems.append(
                    f"{number} sets one number for the whole model and cannot differ "
                    "from leaf to leaf; give a number, or scope='tensor' where there is one"
                )
    return list(dict.fromkeys(problems))


def _check_length(number: str, value: Any, experts: int, single: bool) -> list[str]:
    if isinstance(value, list | tuple):
        length = len(value)
    elif getattr(value, "ndim", 0) == 1:
        length = value.shape[0]
    else:
        return []
    if single:
        return [f"{number} has {length} numbers, but there it holds for all experts; give one"]
    if length != experts:
        return [f"{number} has {length} numbers, but there are {experts} experts"]
    return []
