"""Time and memory of a call: the fastest of several runs, and the peak of anonymous memory."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from mergejax.eval.memory import anonymous, watched


class Cost(NamedTuple):
    """Seconds of the fastest run, and bytes of anonymous memory: before, and at the peak."""

    seconds: float
    before: int
    peak: int


def cost(call: Callable[[], Any], repeats: int) -> Cost:
    """Runs a call that waits for its result; memory is measured apart from the timed runs."""
    call()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    before = anonymous()
    with watched() as peak:
        call()
    return Cost(min(seconds), before, peak[0])
