"""The peak of the memory that this process uses while something runs."""

import contextlib
import ctypes
import pathlib
import threading
from collections.abc import Iterator

INTERVAL = 0.002  # seconds between two looks
STATUS = pathlib.Path("/proc/self/status")


def anonymous() -> int | None:
    """Anonymous resident memory of this process in bytes; None where the system does not tell."""
    if not STATUS.exists():
        return None
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def give_back() -> None:
    """Gives freed memory back to the system, so that using it again is seen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if STATUS.exists() else None
    if trim is not None:
        trim(0)


@contextlib.contextmanager
def watched() -> Iterator[list[int]]:
    """Notes the peak of the anonymous memory while the body runs, in the only item of the list.

    The list is empty where the system does not tell.
    """
    before = anonymous()
    if before is None:
        yield []
        return
    peak, stop = [before], threading.Event()

    def watch() -> None:
        while not stop.wait(INTERVAL):
            peak[0] = max(peak[0], anonymous() or 0)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()
