"""Leaves whose axes are in another order than in their file, or that are a part or a union of it.

What a converted model consists of: a `Tensor` whose path is a `Rearranged`, so that whatever reads
tensors reads it, and never more of it at once than a budget allows.
"""

import math
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mergejax.checkpoints.files import Files, ranges
from mergejax.checkpoints.safetensors import Tensor

_STRIPE = 2**22  # bytes of a source that are read at once


class Piece(NamedTuple):
    """A tensor, or one of its equal parts, with its axes in another order.

    Attributes:
        tensor: the source.
        axes: of the source, in the order of the result's.
        part, parts: which of so many equal parts along the source's axis axes[-1].
    """

    tensor: Tensor
    axes: tuple[int, ...]
    part: int = 0
    parts: int = 1

    @property
    def limits(self) -> list[tuple[int, int]]:
        """First and last index along each of the source's axes."""
        found = [(0, n) for n in self.tensor.shape]
        if self.parts > 1:
            n = self.tensor.shape[self.axes[-1]] // self.parts
            found[self.axes[-1]] = (self.part * n, (self.part + 1) * n)
        return found

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the result."""
        return tuple(self.limits[axis][1] - self.limits[axis][0] for axis in self.axes)


class Rearranged:
    """The bytes of a leaf that pieces make, one behind the other along one of its axes.

    Args:
        pieces: of equal shapes but for that axis.
        join: the axis.
        budget: bytes of the leaf that are made at once. A leaf of more is made in several stripes,
            and its source is read once for each.
    """

    def __init__(self, pieces: Sequence[Piece], join: int = 0, budget: int = 2**28):
        self._pieces, self._join = pieces, join
        shape = list(pieces[0].shape)
        shape[join : join + 1] = [sum(piece.shape[join] for piece in pieces)] if shape else []
        self.shape, self.dtype = tuple(shape), pieces[0].tensor.dtype
        self._row = math.prod(self.shape[1:]) * self.dtype.itemsize
        self._height = max(1, budget // max(self._row, 1))
        self._held: tuple[int, np.ndarray] = (-1, np.empty(0, np.uint8))

    @property
    def path(self) -> pathlib.Path:
        own = self._pieces[0].tensor.path
        return own if isinstance(own, pathlib.Path) else own.path

    @property
    def name(self) -> str:
        return self.path.name

    def tensor(self) -> Tensor:
        """The leaf."""
        return Tensor(self, self.dtype, self.shape, 0)

    def read_into(self, files: Files, offset: int, target: memoryview) -> None:
        """Fills a buffer with the bytes from `offset` on."""
        done = 0
        stripe = self._height * self._row
        while done < len(target):
            index, start = divmod(offset + done, stripe)
            values = self._stripe(files, index)
            count = min(len(values) - start, len(target) - done)
            target[done : done + count] = values.data[start : start + count]
            done += count
            if offset + done == self.shape[0] * self._row:
                self._held = (-1, values[:0])  # read to its end; the memory is free again

    def _stripe(self, files: Files, index: int) -> np.ndarray:
        if self._held[0] != index:
            self._held = (-1, np.empty(0, np.uint8))
            first = index * self._height
            last = min(first + self._height, self.shape[0])
            block = np.empty((last - first, *self.shape[1:]), self.dtype)
            self._fill(files, block, first, last)
            self._held = (index, block.reshape(-1).view(np.uint8))
        return self._held[1]

    def _fill(self, files: Files, block: np.ndarray, first: int, last: int) -> None:
        """Rows of the leaf from their pieces."""
        start = 0
        for piece in self._pieces:
            length = piece.shape[self._join]
            if self._join:
                place = (slice(None),) * self._join + (slice(start, start + length),)
                _copy(piece, files, block[place], first, last)
            else:
                top, bottom = max(first, start), min(last, start + length)
                if top < bottom:
                    rows = block[top - first : bottom - first]
                    _copy(piece, files, rows, top - start, bottom - start)
            start += length


def _copy(piece: Piece, files: Files, block: np.ndarray, first: int, last: int) -> None:
    """Rows of a piece into their place; the source is read in stripes of whole rows of its own."""
    source, limits = piece.tensor, piece.limits
    axis = piece.axes[0]
    begin = limits[axis][0]
    limits[axis] = (begin + first, begin + last)
    view = block.transpose(np.argsort(piece.axes))
    row = math.prod(source.shape[1:]) * source.dtype.itemsize
    inner = tuple(slice(*limit) for limit in limits[1:])
    for top, bottom in ranges(*limits[0], max(1, _STRIPE // max(row, 1))):
        content = memoryview(bytearray((bottom - top) * row))
        files.read_into(source.path, source.offset + top * row, content)
        stripe = np.frombuffer(content, source.dtype).reshape(bottom - top, *source.shape[1:])
        view[top - limits[0][0] : bottom - limits[0][0]] = stripe[(slice(None), *inner)]
