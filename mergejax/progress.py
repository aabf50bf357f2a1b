"""What a long run tells its user: lines of text, and bars with the time that remains."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Protocol, TextIO

INTERVAL = 10.0  # seconds between two plain lines about one bar


class Reporter(Protocol):
    """Whatever can be told about the progress of a run."""

    def log(self, text: str) -> None:
        """Says one line."""
        ...

    def progress(
        self, description: str, total: int
    ) -> contextlib.AbstractContextManager[Callable[[int], None]]:
        """Opens a bar of `total` steps; the function that it yields moves it on by n steps."""
        ...


class Silent:
    """A reporter that tells nobody."""

    def log(self, text: str) -> None:
        """Says nothing."""

    @contextlib.contextmanager
    def progress(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """Shows nothing."""
        yield lambda n: None


class Printer:
    """The plain reporter: rich bars on a terminal, otherwise a line every ten seconds.

    Args:
        stream: where to write; standard output by default.

    Example:
        >>> printer = Printer()
        >>> printer.log("two experts")
        two experts
        >>> with printer.progress("average", 2) as advance:
        ...     advance(2)
        average: 2 steps in 0 s
    """

    def __init__(self, stream: TextIO | None = None):
        self._stream = stream

    def log(self, text: str) -> None:
        """Prints one line."""
        print(text, file=self._stream or sys.stdout, flush=True)

    @contextlib.contextmanager
    def progress(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """Shows a bar, or lines, while the block runs."""
        stream = self._stream or sys.stdout
        started = time.monotonic()
        with (
            _bar(stream, description, total)
            if stream.isatty()
            else self._lines(description, total) as advance
        ):
            yield advance
        self.log(f"{description}: {total} steps in {time.monotonic() - started:.0f} s")

    @contextlib.contextmanager
    def _lines(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        started = said = time.monotonic()
        done = 0

        def advance(n: int) -> None:
            nonlocal done, said
            done += n
            now = time.monotonic()
            if now - said >= INTERVAL and 0 < done < total:
                said = now
                left = (now - started) / done * (total - done)
                self.log(f"{description}: {done} of {total}, {left:.0f} s left")

        yield advance


@contextlib.contextmanager
def _bar(stream: TextIO, description: str, total: int) -> Iterator[Callable[[int], None]]:
    from rich import console, progress  # only a terminal needs it

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console.Console(file=stream), transient=True) as bars:
        bar = bars.add_task(description, total=total)
        yield lambda n: bars.advance(bar, n)
