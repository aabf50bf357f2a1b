"""Time and memory of a call: the fastest of several runs, and the peak of anonymous memory."""

import contextlib
import pathlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

INTERVAL = 0.002  # seconds between two looks at the memory


class Cost(NamedTuple):
    """Seconds of the fastest run, and bytes of anonymous memory: before, and at the peak."""

    seconds: float
    before: int
    peak: int


def anonymous() -> int:
    """Anonymous resident memory of this process in bytes."""
    status = pathlib.Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@contextlib.contextmanager
def watched() -> Iterator[list[int]]:
    """Notes the peak of the anonymous memory while the body runs."""
    peak, stop = [anonymous()], threading.Event()

    def watch() -> None:
        while not stop.wait(INTERVAL):
            peak[0] = max(peak[0], anonymous())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield peak
    stop.set()
    thread.join()


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
