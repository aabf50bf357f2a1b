"""The executor for checkpoints: the passes of a plan over files, several parts at a time.

Every part that is finished is noted in a journal, and so is what a pass measured; an interrupted
merge continues behind the last note, after proving that its inputs are what they were.
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from mergejax.checkpoints.pieces import Outcome, Runner, Work
from mergejax.checkpoints.staging import Staging, decode, encode
from mergejax.errors import MergeError, raise_all
from mergejax.plan import Plan, solve
from mergejax.run import LEAFWISE

Advance = Callable[[int], None]  # (parts that were gone through)
Part = tuple[Work, tuple[int, int]]
Key = tuple[str, int]  # leaf, first element
Digests = dict[Key, list[list[str]]]  # for each model the digests of the part's chunks


@dataclasses.dataclass
class Memory:
    """What is known so far, from the journal or from this run.

    Attributes:
        totals: by stage, what its rounds summed up to.
        seen: by stage, what its rounds were solved to.
        passes: number of finished passes that measure.
        noted: digests of inputs that an earlier process took.
        digests: digests of inputs that this process took.
        done: parts that are written, with the digests of their chunks.
    """

    totals: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    seen: dict[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    passes: int = 0
    noted: Digests = dataclasses.field(default_factory=dict)
    digests: Digests = dataclasses.field(default_factory=dict)
    done: dict[Key, list[str]] = dataclasses.field(default_factory=dict)

    def learn(self, found: Mapping[str, tuple[Any, Any]]) -> None:
        """Adds one finished pass: by stage, what a round summed up to and was solved to."""
        for path, (total, solved) in found.items():
            self.totals.setdefault(path, []).append(total)
            self.seen[path] = (*self.seen.get(path, ()), solved)
        self.passes += 1

    def keep(self, part: Part, digests: list[list[str]]) -> None:
        """Keeps the digests of a part that was read for the first time."""
        key = key_of(part)
        if self.noted.get(key, digests) != digests:
            pairs = zip(part[0].owners, self.noted[key], digests, strict=True)
            raise MergeError(
                f"leaf '{key[0]}' of {next(o for o, was, now in pairs if was != now)} changed "
                "since this merge was begun; start it again"
            )
        self.digests[key] = digests


def recall(lines: Iterable[Mapping[str, Any]]) -> Memory:
    """What a journal tells."""
    memory = Memory()
    for line in lines:
        for name, start, digests in line.get("in", ()):
            memory.noted[name, start] = digests
        if "pass" in line:
            memory.learn(decode(line["pass"]))
        if "out" in line:
            memory.done[tuple(line["part"])] = line["out"]  # type: ignore[index]
    return memory


def key_of(part: Part) -> Key:
    """What the journal calls a part."""
    return part[0].info.name, part[1][0]


def parts_of(works: Sequence[Work]) -> list[Part]:
    """All parts of all leaves."""
    return [(work, part) for work in works for part in work.parts()]


def input_bytes(part: Part) -> int:
    """The bytes that are read for a part, of all models."""
    count = part[1][1] - part[1][0]
    return sum(tensor.dtype.itemsize * count for tensor in part[0].tensors)


def execute(
    plan: Plan,
    works: Sequence[Work],
    runner: Runner,
    staging: Staging,
    memory: Memory,
    threads: int,
    advance: Advance,
) -> None:
    """Makes the passes of a plan that `memory` does not know yet, and writes what it lacks.

    Args:
        plan: see `plan.make_plan`.
        works: the leaves, in the order in which they are read.
        runner: runs parts of them.
        staging: keeps the journal.
        memory: what is known; it is extended.
        threads: how many parts are worked on at once.
        advance: is told what was gone through.

    Raises:
        MergeError: values that are not finite; inputs that changed since the journal was begun.
    """
    parts = parts_of(works)
    _prove(parts, runner, memory, threads, advance)
    for dues in plan.passes[memory.passes :]:
        chosen = [part for part in parts if part[0].info.name in dues]
        sums: dict[Any, list[Any]] = {}
        fresh = []
        for part, outcome in _run(chosen, runner, memory, dues, threads):
            fresh += [[*key_of(part), outcome.digests]] * bool(outcome.digests)
            due, size = dues[part[0].info.name], part[1][1] - part[1][0]
            before = sums.get(due)
            total = outcome.found if before is None else _sum(before[1], outcome.found)
            sums[due] = [size + (before[0] if before else 0), total]
            advance(1)
        found = {}
        for (path, _), (size, (total, recalled)) in sums.items():
            totals = [*memory.totals.get(path, []), total]
            solved = solve(plan, path, totals, size, recalled, None)
            found[path] = (total, jax.tree.map(LEAFWISE.narrow, solved))
        staging.note({"pass": encode(found), "in": fresh})
        memory.learn(found)
    left = [part for part in parts if key_of(part) not in memory.done]
    for part, outcome in _run(left, runner, memory, None, threads):
        key = key_of(part)
        staging.note({"part": key, "out": outcome.written, "in": [[*key, memory.digests[key]]]})
        memory.done[key] = list(outcome.written)
        advance(1)


def _sum(a: Any, b: Any) -> Any:
    return jax.tree.map(np.add, a, b)


def _run(
    parts: Sequence[Part], runner: Runner, memory: Memory, dues: Any, threads: int
) -> Iterator[tuple[Part, Outcome]]:
    """Runs parts, yields what came of them in their order, and refuses what is not finite."""

    def turn(part: Part) -> Outcome:
        due = None if dues is None else dues[part[0].info.name]
        return runner.run(*part, memory.seen, due, fresh=key_of(part) not in memory.digests)

    bad: dict[tuple[str, str], int] = {}
    for part, outcome in in_order(turn, parts, threads):
        for owner, count in outcome.non_finite:
            place = (part[0].info.name, owner)
            bad[place] = bad.get(place, 0) + count
        if outcome.digests:
            memory.keep(part, outcome.digests)
        if not runner.broken.is_set():
            yield part, outcome
    types = {work.info.name: work.dtype for work, _ in parts}
    raise_all([_non_finite(*place, n, types[place[0]]) for place, n in bad.items()])


def _non_finite(leaf: str, owner: str, count: int, dtype: Any) -> str:
    if owner:
        return (
            f"leaf '{leaf}' of {owner} has {count} non-finite values (NaN or Inf); repair it or "
            "leave it out"
        )
    return (
        f"leaf '{leaf}' of the merged model has {count} values beyond the range of {dtype}; "
        "choose a wider --dtype or a smaller scaling"
    )


def in_order(
    function: Callable[[Any], Any], items: Sequence[Any], threads: int
) -> Iterator[tuple[Any, Any]]:
    """Applies a function in threads and yields (item, result) in the order of the items."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[tuple[Any, Future]] = deque()
        try:
            for item in items:
                waiting.append((item, pool.submit(function, item)))
                if len(waiting) > 2 * threads:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _prove(
    parts: Sequence[Part], runner: Runner, memory: Memory, threads: int, advance: Advance
) -> None:
    """Compares what an earlier process read and wrote with what is there now.

    Parts whose output is not what was written, as after a power cut, are done again.
    """
    done = [part for part in parts if key_of(part) in memory.done]

    def look(part: Part) -> tuple[list[list[str]], list[str]]:
        return runner.digests_of(*part), runner.written(*part)

    for part, (digests, written) in in_order(look, done, threads):
        memory.keep(part, digests)
        if memory.done[key_of(part)] != written:
            del memory.done[key_of(part)]
        advance(1)


def verify(works: Sequence[Work], runner: Runner, memory: Memory, threads: int) -> None:
    """Reads everything that was written and compares it with what was meant to be.

    Raises:
        OSError: the disk holds something else.
    """
    parts = parts_of(works)
    for part, written in in_order(lambda part: runner.written(*part), parts, threads):
        if memory.done[key_of(part)] != written:
            target = part[0].targets[0].path.name
            raise OSError(f"{target} does not hold what was written for leaf '{part[0].info.name}'")
