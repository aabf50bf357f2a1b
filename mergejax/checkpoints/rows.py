"""A leaf put together from parts of others: the output plan of vocabularies.

A model seen through a plan is again a `Model`: its tensors are named as in the output and say where
the values come from. A whole leaf under another name (layers that are stacked) is the source's
`Tensor` itself; a leaf of several parts is a `Tensor` with `Rows`.
"""

import bisect
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

Row = tuple[int, int]  # a model's place in a list, one of its rows


class Run(NamedTuple):
    """Elements that lie one behind the other in their sources.

    Attributes:
        stop: the first element of the leaf behind the run.
        sources: tensors, and where the run begins in each; of several the mean is taken.
    """

    stop: int
    sources: tuple[tuple[Any, int], ...]


class Rows:
    """The parts of a leaf in their order.

    Args:
        runs: they cover the leaf.
    """

    def __init__(self, runs: Sequence[Run]):
        self._runs = runs
        self._stops = [run.stop for run in runs]

    @property
    def tensors(self) -> list[Any]:
        """All tensors that the parts come from, once each."""
        return list({id(t): t for run in self._runs for t, _ in run.sources}.values())

    @property
    def paths(self) -> set[pathlib.Path]:
        """The files that the parts come from."""
        return {path for tensor in self.tensors for path in tensor.paths}

    def within(self, start: int, stop: int) -> Iterator[tuple[int, int, list[tuple[Any, int]]]]:
        """What the elements from `start` to `stop` consist of.

        Returns:
            (first element, one behind the last, tensors with the first element in each).
        """
        i = bisect.bisect_right(self._stops, start)
        while start < stop:
            run, begin = self._runs[i], self._stops[i - 1] if i else 0
            last = min(stop, run.stop)
            yield start, last, [(t, first + start - begin) for t, first in run.sources]
            start, i = last, i + 1

    def read(
        self, start: int, stop: int, dtype: np.dtype, read: Callable[[Any, int, int, int], Any]
    ) -> np.ndarray:
        """The elements from `start` to `stop`.

        Args:
            start, stop: of the leaf.
            dtype: of the result; means are taken in float32.
            read: (tensor, start, stop, number) -> elements of a source, flat.
        """
        values = np.empty(stop - start, dtype)
        for first, last, sources in self.within(start, stop):
            parts = [read(t, at, at + last - first, i) for i, (t, at) in enumerate(sources)]
            mean = parts[0] if len(parts) == 1 else np.mean(np.stack(parts), 0, dtype=np.float32)
            values[first - start : last - start] = mean
        return values


def put_together(places: Sequence[tuple[Row, ...]], tensors: Sequence[Any]) -> Any:
    """A tensor whose rows are rows of others.

    Args:
        places: for each row of the result the rows that it is the mean of, as (place in
            `tensors`, row).
        tensors: of one row length.

    Returns:
        A tensor of the sources' common type; float32 where they differ or a mean is taken.
    """
    used = dict.fromkeys(i for rows in places for i, _ in rows)
    first = tensors[next(iter(used))]
    width = int(np.prod(first.shape[1:], dtype=np.int64))
    dtypes = {tensors[i].dtype for i in used}
    plain = len(dtypes) == 1 and all(len(rows) == 1 for rows in places)
    wide = np.dtype(np.float64) in dtypes
    dtype = dtypes.pop() if plain else np.dtype(np.float64 if wide else np.float32)
    runs: list[Run] = []
    following: tuple[Row, ...] = ()
    for number, rows in enumerate(places):
        stop = (number + 1) * width
        if rows == following:
            runs[-1] = runs[-1]._replace(stop=stop)
        else:
            runs.append(Run(stop, tuple((tensors[i], row * width) for i, row in rows)))
        following = tuple((i, row + 1) for i, row in rows)
    shape = (len(places), *first.shape[1:])
    return first._replace(dtype=dtype, shape=shape, rows=Rows(runs), product=None)
