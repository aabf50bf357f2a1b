"""What a codec is made of."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mergejax.core import Stage
from mergejax.leaves import LeafInfo

Parts = dict[str, np.ndarray]  # what is stored of a leaf, by part
Sink = Callable[[LeafInfo, Sequence[np.ndarray]], None]
Run = Callable[[Stage, Sink], None]  # runs a stage leaf by leaf; the sink gets each leaf's results


class Codec(NamedTuple):
    """How the deltas that a stage leaves behind are stored.

    Attributes:
        encode: (stage, run) -> parts by leaf; under "" what belongs to no leaf.
        decode: (parts of the leaf and those under "", leaf, stage, experts) -> one delta each.
        bits: (the same) -> what the method's storage formula says, in bits.
        experts: how many deltas are encoded together; None for any number.
    """

    encode: Callable[[Stage, Run], dict[str, Parts]]
    decode: Callable[[Parts, LeafInfo, Stage, int], list[np.ndarray]]
    bits: Callable[[Parts, LeafInfo, Stage, int], float]
    experts: int | None = None


Codecs = Mapping[str, Codec]
