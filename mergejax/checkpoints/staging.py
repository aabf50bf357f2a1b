"""An output folder that appears by one renaming: staged beside its place, with a journal."""

import base64
import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import IO, Any

import numpy as np

from mergejax.errors import MergeError

try:
    import fcntl
except ImportError:  # another operating system: two merges at once are not noticed there
    fcntl = None  # type: ignore[assignment]

RECIPE = "mergejax.json"


class Staging:
    """The folder beside a target in which a merge is made, held by one process at a time.

    Args:
        target: where the result will stand.

    Raises:
        MergeError: another process is merging into the target.
    """

    def __init__(self, target: pathlib.Path):
        self.target = target
        self.folder = target.with_name(f".{target.name}.merging")
        self.files = self.folder / "files"
        self._journal = self.folder / "journal.jsonl"
        self._writer: IO[bytes] | None = None
        self._made: list[pathlib.Path] = []
        self._lock: IO[str] | None = None

    def __enter__(self) -> "Staging":
        self._made = [parent for parent in self.target.parents if not parent.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = (self.folder / "lock").open("a+")
        try:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            owner = lock.read().strip() or "unknown"
            lock.close()
            raise MergeError(
                f"{self.target} is being written by process {owner}; wait for it, or choose "
                "another output"
            ) from None
        # A lock that a dead process left behind is free: the system released it.
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        self._lock = lock
        return self

    def __exit__(self, *_: Any) -> None:
        for file in (self._writer, self._lock):
            if file is not None:
                file.close()

    def resume(self, recipe: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What the journal tells of an interrupted merge of this recipe; nothing otherwise.

        A journal of another recipe is deleted with what it was of.
        """
        lines = self._read()
        if not lines or lines[0] != {"recipe": recipe}:
            shutil.rmtree(self.files, ignore_errors=True)
            self._journal.unlink(missing_ok=True)
            self.files.mkdir()
            lines = []
        self._writer = self._journal.open("ab", buffering=0)
        if not lines:
            self.note({"recipe": recipe})
        return lines[1:]

    def _read(self) -> list[dict[str, Any]]:
        if not self._journal.is_file() or not self.files.is_dir():
            return []
        content = self._journal.read_bytes()
        whole = content.rfind(b"\n") + 1
        lines = []
        try:
            lines = [json.loads(line) for line in content[:whole].splitlines()]
        except ValueError:  # a power cut may leave anything
            return []
        if whole < len(content):  # the last line was being written
            os.truncate(self._journal, whole)
        return lines

    def note(self, line: Mapping[str, Any]) -> None:
        """Adds one line to the journal."""
        assert self._writer is not None
        self._writer.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")

    def publish(self) -> None:
        """Puts the finished files into their place and removes what was staged."""
        for path in (*self.files.rglob("*"), self.files):
            _sync(path)
        if self.target.exists():
            former = self.folder / "former"
            shutil.rmtree(former, ignore_errors=True)
            self.target.rename(former)
        self.files.rename(self.target)
        _sync(self.target.parent)
        self.remove()

    def remove(self) -> None:
        """Removes the folder and everything in it, and parents that were made and are empty."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for parent in self._made:
            with contextlib.suppress(OSError):
                parent.rmdir()


def _sync(path: pathlib.Path) -> None:
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def encode(value: Any) -> Any:
    """A pytree of small arrays as JSON.

    Example:
        >>> decode(encode((np.float32(0.5), [np.arange(2)])))
        (array(0.5, dtype=float32), [array([0, 1])])
    """
    match value:
        case None:
            return None
        case tuple():
            return {"tuple": [encode(item) for item in value]}
        case list():
            return [encode(item) for item in value]
        case dict():
            return {"dict": [[key, encode(item)] for key, item in value.items()]}
    array = np.asarray(value)
    text = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    return {"array": [array.dtype.str, list(array.shape), text]}


def decode(value: Any) -> Any:
    """The pytree that `encode` wrote."""
    match value:
        case None:
            return None
        case list():
            return [decode(item) for item in value]
        case {"tuple": items}:
            return tuple(decode(item) for item in items)
        case {"dict": items}:
            return {key: decode(item) for key, item in items}
    dtype, shape, text = value["array"]
    return np.frombuffer(base64.b64decode(text), dtype).reshape(shape)
