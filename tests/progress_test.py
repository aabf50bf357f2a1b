"""Lines of text, and bars on a terminal."""

import io

import pytest

from mergejax import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_tell_what_is_done_and_left(monkeypatch):
    clock = iter([0.0, 0.0, 4.0, 12.0, 13.0, 20.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    with progress.Printer(stream).progress("train base", 40) as advance:
        for _ in range(3):  # after 4, 12 and 13 seconds
            advance(10)
    assert stream.getvalue().splitlines() == [
        "train base: 20 of 40, 12 s left",
        "train base: 40 steps in 20 s",
    ]


def test_terminal_gets_a_bar_with_the_time_that_remains():
    stream = Terminal()
    with progress.Printer(stream).progress("train base", 4) as advance:
        advance(4)
    assert "4/4" in stream.getvalue()
    assert "0:00:00" in stream.getvalue()
    assert "train base: 4 steps in 0 s" in stream.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_errors_pass_through_and_end_the_bar(stream):
    printer = progress.Printer(stream)
    with pytest.raises(ZeroDivisionError), printer.progress("train base", 4):
        raise ZeroDivisionError
    assert "steps in" not in stream.getvalue()
    with printer.progress("again", 1):
        printer.log("a line")
    assert "a line" in stream.getvalue()
