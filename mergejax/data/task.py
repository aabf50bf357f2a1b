"""What a task is: a name, three splits of labelled examples, and the names of its labels."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Split:
    """Labelled images or texts of one split.

    Attributes:
        inputs: images, float32 [n, height, width, channels] with pixels in [0, 1], or uint8 for
            models that read bytes; or texts as tokens, int32 [n, length] with -1 behind their end.
        labels: int32 [n], indices into the task's `labels`.

    Example:
        >>> len(Split(np.zeros([3, 8, 8, 1], np.float32), np.zeros([3], np.int32)))
        3
    """

    inputs: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.labels)


def joined(first: Split, second: Split) -> Split:
    """The examples of two splits with the same labels, one behind the other."""
    return Split(
        np.concatenate([first.inputs, second.inputs]),
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
