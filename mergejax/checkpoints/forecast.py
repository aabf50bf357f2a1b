"""What a merge is going to take: disk, memory and time, told before it is begun."""

import os
import time
from typing import Any

from mergejax.checkpoints import output, works
from mergejax.checkpoints.files import Files, ranges
from mergejax.checkpoints.job import Job, predicted_disk
from mergejax.checkpoints.request import show_size

_START = 1.5  # seconds to start and compile
_PROBE = 2**26  # bytes that are read to learn how quick reading is
_PASS = 0.9e9  # bytes a second and processor that a pass works through


def forecast(job: Job) -> dict[str, Any]:
    """Bytes on disk, peak bytes of memory (an upper bound), seconds (roughly), passes."""
    every = works.make_works(job, output.place(job.files, job.reference.path, job.recipe))
    memory = works.part_memory(job, every)
    largest = sorted(memory, reverse=True)[: works.threads(job, every, memory)]
    read = sum(tensor.bytes for work in every for tensor in work.tensors)
    passes = 1 + len(job.plan.passes) + max(len(work.rounds) for work in every)
    speed = min(_speed(job), _PASS * (os.cpu_count() or 1))
    return {
        "tensors": len(every),
        "disk_bytes": predicted_disk(job),
        "memory_bytes": works.held_memory(job, every) + sum(largest),
        "seconds": round(_START + passes * read / speed + output_bytes(job) / _PASS, 1),
        "passes": passes,
    }


def output_bytes(job: Job) -> int:
    """The bytes of values of the result."""
    return sum(tensor.bytes for tensors in job.files.values() for tensor in tensors.values())


def _speed(job: Job) -> float:
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
