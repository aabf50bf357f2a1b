"""What a merge is going to take: disk, memory and time, told before it is begun."""

import os
import time
from typing import Any

from mergejax.checkpoints import budget, output, works
from mergejax.checkpoints.files import Files, ranges
from mergejax.checkpoints.job import Job, predicted_disk
from mergejax.checkpoints.request import show_size

_START = 1.0  # seconds to start and to take compiled programs over
_PROBE = 2**26  # bytes that are read, and copied, to learn how quick that is
_PASS = 0.07  # of the speed of copying: what a processor works through in a pass, measured


def forecast(job: Job) -> dict[str, Any]:
    """Bytes on disk, peak bytes of memory (an upper bound), seconds (roughly), passes."""
    every = works.make_works(job, output.place(job.files, job.reference.path, job.recipe))
    need = budget.need(job, every)
    largest = sorted(need.parts, reverse=True)[: budget.threads(job, need)]
    read = sum(tensor.bytes for work in every for tensor in work.tensors)
    passes = 1 + len(job.plan.passes) + max(len(work.rounds) for work in every)
    working = _PASS * _copying() * (os.cpu_count() or 1)
    speed = min(_reading(job), working)
    return {
        "tensors": len(every),
        "disk_bytes": predicted_disk(job),
        "memory_bytes": need.held + sum(largest),
        "seconds": round(_START + passes * read / speed + 2 * output_bytes(job) / working, 1),
        "passes": passes,
    }


def output_bytes(job: Job) -> int:
    """The bytes of values of the result."""
    return sum(tensor.bytes for tensors in job.files.values() for tensor in tensors.values())


def _copying() -> float:
    """Bytes a second that copying in the processor's cache gives, from a short probe."""
    source, target = bytes(2**20), bytearray(2**20)
    started = time.perf_counter()
    for _ in ranges(0, _PROBE, len(source)):
        target[:] = source
    return _PROBE / (time.perf_counter() - started)


def _reading(job: Job) -> float:
    """Bytes a second that reading an input gives, from a short probe."""
    own = [tensor for tensor in job.experts[0].tensors.values() if tensor.rows is None]
    tensor = max(own, key=lambda tensor: tensor.bytes)
    count = min(_PROBE, tensor.bytes)
    buffer = memoryview(bytearray(2**20))
    started = time.perf_counter()
    with Files() as files:
        for start, stop in ranges(0, count, 2**20):
            files.read_into(tensor.path, tensor.offset + start, buffer[: stop - start])
    return max(count, 2**20) / max(time.perf_counter() - started, 1e-3)


def sentence(found: dict[str, Any]) -> str:
    """The forecast in words."""
    passes = f"{found['passes']} pass{'es' if found['passes'] > 1 else ''}"
    return (
        f"{found['tensors']} tensors can be merged in {passes} over the inputs: "
        f"{show_size(found['disk_bytes'])} on disk, at most {show_size(found['memory_bytes'])} of "
        f"memory, about {found['seconds']:.0f} s"
    )
