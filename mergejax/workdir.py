"""The files of a run besides checkpoints: each written by renaming, so whole or not at all."""

import contextlib
import os
import pathlib
import re
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mergejax import errors
from mergejax.checkpoints import fingerprint, orbax
from mergejax.progress import Reporter

RESULTS = "results"
STATISTICS = "statistics"
BEST = "checkpoints/best_merge"
NOTE = "checkpoints/best_merge.json"


def write_bytes(path: pathlib.Path, content: bytes) -> None:
    """Writes a file by renaming."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.new")
    staged.write_bytes(content)
    os.replace(staged, path)


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a text file by renaming, in UTF-8 with plain line feeds."""
    write_bytes(path, text.encode())


def file_name(model: str) -> str:
    """A file name for a model's name, which may be any chain; distinct names stay distinct.

    Example:
        >>> file_name("ties"), file_name("drop(rate=0.9)|ties()")
        ('ties', 'drop_rate=0.9_ties_a2267b3a')
    """
    if re.fullmatch(r"\w+", model):
        return model
    plain = re.sub(r"[^\w.=-]+", "_", model).strip("_.")
    return f"{plain[:60]}_{zlib.crc32(model.encode()):08x}"


def check(workdir: pathlib.Path) -> None:
    """Refuses a path that cannot be a workdir, and results whose models are gone.

    Raises:
        MergeError: the path is a file, or holds results without the checkpoints that they are of.
    """
    if workdir.exists() and not workdir.is_dir():
        raise errors.MergeError(f"--workdir={workdir} is a file; choose a folder")
    known = workdir / fingerprint.FOLDER / fingerprint.FILE
    if any((workdir / RESULTS).glob("*.json")) and not known.exists():
        raise errors.MergeError(
            f"{workdir} holds results, but not the checkpoints that they come from; restore "
            f"{known.relative_to(workdir).parent.as_posix()}, or choose another --workdir"
        )


def write_record(results: pathlib.Path, record: dict[str, Any]) -> None:
    """Keeps what is known about one model in a folder of results."""
    name = file_name(record["name"])
    fingerprint.write_json(results / f"{name}.json", record)


def read_records(results: pathlib.Path) -> dict[str, dict[str, Any]]:
    """What a folder of results knows about every model, by its name."""
    paths = sorted(results.glob("[!.]*.json"))
    records = [fingerprint.read_json(path) for path in paths]
    return {record["name"]: record for record in records}


def save_best(workdir: pathlib.Path, chain: str, merged: Any) -> None:
    """Keeps the best merge; the note that names its chain is never beside another checkpoint."""
    (workdir / NOTE).unlink(missing_ok=True)
    orbax.save(workdir / BEST, merged)
    fingerprint.write_json(workdir / NOTE, {"chain": chain})


def saved_best(workdir: pathlib.Path) -> str:
    """The chain of the best merge that is kept, or an empty string."""
    is_there = orbax.is_saved(workdir / BEST)
    return fingerprint.read_json(workdir / NOTE).get("chain", "") if is_there else ""


class Logbook:
    """A reporter that keeps in a file, too, what another reporter says.

    Nothing is written before `keep` is called, so that refused input leaves no trace.

    Args:
        reporter: what the user sees.
    """

    def __init__(self, reporter: Reporter):
        self._reporter = reporter
        self._path: pathlib.Path | None = None
        self._waiting: list[str] = []

    def keep(self, path: pathlib.Path) -> None:
        """Appends to this file from now on, first what was said already."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._write(self._waiting)

    def note(self, text: str) -> None:
        """Keeps a text in the file without saying it."""
        moment = time.strftime("%Y-%m-%d %H:%M:%S")
        lines = [f"{moment}  {line}" for line in text.splitlines()]
        if self._path is None:
            self._waiting += lines
        else:
            self._write(lines)

    def log(self, text: str) -> None:
        """Says one line and keeps it."""
        self._reporter.log(text)
        self.note(text)

    @contextlib.contextmanager
    def progress(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """Shows a bar; its end is kept."""
        started = time.monotonic()
        with self._reporter.progress(description, total) as advance:
            yield advance
        self.note(f"{description}: {total} steps in {time.monotonic() - started:.1f} s")

    def _write(self, lines: Sequence[str]) -> None:
        assert self._path is not None
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
