"""Time and memory of a call: the fastest of several runs, and the peak of anonymous memory."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from mergejax.memory import anonymous, watched


class Cost(NamedTuple):
    """Seconds of the fastest run, by the clock and of all processors; bytes of anonymous memory."""

    seconds: float
    before: int
    peak: int
    processor: float


def cost(call: Callable[[], Any], repeats: int) -> Cost:
    """Runs a call that waits for its result; memory is measured apart from the timed runs."""
    call()
    seconds, processor = [], []
    for _ in range(repeats):
        started, used = time.perf_counter(), time.process_time()
        call()
        seconds.append(time.perf_counter() - started)
        processor.append(time.process_time() - used)
    before = anonymous()
    with watched() as peak:
        call()
    return Cost(min(seconds), before, peak[0], min(processor))
