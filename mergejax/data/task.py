"""What a task is: a name, three splits of labelled images, and the names of its labels."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Split:
    """Labelled images of one split.

    Attributes:
        images: float32 [n, height, width, channels], pixels in [0, 1].
        labels: int32 [n], indices into the task's `labels`.

    Example:
        >>> len(Split(np.zeros([3, 8, 8, 1], np.float32), np.zeros([3], np.int32)))
        3
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)


def joined(first: Split, second: Split) -> Split:
    """The images of two splits with the same labels, one behind the other."""
    return Split(
        np.concatenate([first.images, second.images]),
        np.concatenate([first.labels, second.labels]),
    )


@dataclasses.dataclass(frozen=True)
class Task:
    """One classification problem, with one split for each use.

    Attributes:
        name: the task's name, also the name of its expert.
        train: what the experts and the multi-task model learn from.
        validation: what hyper-parameters are picked on.
        test: what is reported, and used for nothing else.
        labels: names of the classes; the head has one output for each.
        head: the pre-training problem that gives the task its head; several tasks may share one.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    labels: tuple[str, ...]
    head: str
