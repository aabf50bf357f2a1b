"""The average of several steps of one training run, from its folder to a new one."""

import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mergejax.errors import MergeError, some

_STEP = re.compile(r"(?:.*[-_])?(\d+)")  # 1000, step_1000, checkpoint-1000


def steps_of(run: str | os.PathLike[str]) -> dict[int, pathlib.Path]:
    """The folders of a run's steps by number, in ascending order.

    Args:
        run: the folder of an Orbax `CheckpointManager`, or any whose folders are named by steps:
            1000, step_1000, checkpoint-1000.

    Raises:
        MergeError: no folder, one without steps, two folders of one step.

    Example:
        >>> import tempfile
        >>> run = pathlib.Path(tempfile.mkdtemp())
        >>> for name in ("checkpoint-500", "checkpoint-1000", "logs"):
        ...     (run / name).mkdir()
        >>> list(steps_of(run))
        [500, 1000]
    """
    run = pathlib.Path(run)
    if not run.is_dir():
        raise MergeError(f"{run}: there is no such folder; give the folder of a run")
    steps: dict[int, pathlib.Path] = {}
    for folder in sorted(path for path in run.iterdir() if path.is_dir()):
        match = _STEP.fullmatch(folder.name)
        number = int(match[1]) if match else None
        if number in steps:
            raise MergeError(f"{run}: {steps[number].name} and {folder.name} are one step")
        if number is not None:
            steps[number] = folder
    if not steps:
        raise MergeError(
            f"{run} holds no steps; expected folders such as 1000, step_1000 or checkpoint-1000"
        )
    return dict(sorted(steps.items()))


def choose(
    steps: Mapping[int, pathlib.Path], chosen: str = ":", window: int | None = None
) -> dict[int, pathlib.Path]:
    """The steps that a text names.

    Args:
        steps: see `steps_of`.
        chosen: a range with both ends, '1000:5000', ':5000', '1000:', or single ones, '1000,3000'.
        window: only so many of them, the last ones.

    Raises:
        MergeError: a text that is neither, a step that is not there, no step in the range.

    Example:
        >>> places = {n: pathlib.Path(str(n)) for n in (500, 1000, 1500)}
        >>> list(choose(places, "600:")), list(choose(places, "500,1500"))
        ([1000, 1500], [500, 1500])
    """
    known = f"there are {some(list(map(str, steps)))}"
    if match := re.fullmatch(r"(\d*):(\d*)", chosen):
        low, high = (int(text) if text else None for text in match.groups())
        found = {
            number: path
            for number, path in steps.items()
            if (low is None or number >= low) and (high is None or number <= high)
        }
    elif re.fullmatch(r"\d+(,\d+)*", chosen):
        numbers = [int(text) for text in chosen.split(",")]
        absent = [number for number in numbers if number not in steps]
        if absent:
            raise MergeError(
                f"steps {chosen}: there is no step {some(list(map(str, absent)))}, {known}"
            )
        found = {number: steps[number] for number in sorted(set(numbers))}
    else:
        raise MergeError(f"steps {chosen!r}: expected a range such as 1000:5000, or 1000,3000")
    if window is not None and window < 1:
        raise MergeError(f"window must be at least 1, not {window}")
    found = dict(list(found.items())[-window:]) if window is not None else found
    if len(found) < 2:
        raise MergeError(f"steps {chosen}: fewer than two of them, {known}; choose more")
    return found


def average_checkpoints(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str],
    steps: str = ":",
    *,
    window: int | None = None,
    weights: Sequence[float] | None = None,
    **options: Any,
) -> pathlib.Path:
    r"""Averages steps of one run into a new folder, in bounded memory.

    .. math:: \theta=\sum_t w_t\theta_t \Big/ \sum_t w_t

    Settings, side files and counters are those of the last step, and so is what `exclude` names.

    Args:
        run: see `steps_of`.
        out: the folder to write.
        steps: see `choose`.
        window: only so many of these steps, the last ones.
        weights: w, one number per step in ascending order; equal by default.
        options: of `mj.merge_checkpoints`.

    Returns:
        The folder that was written.

    Raises:
        MergeError: steps that are not there, weights of another number, whatever
            `mj.merge_checkpoints` refuses.

    Example:
        >>> average_checkpoints("no/such/run", "out", "1000:5000")
        Traceback (most recent call last):
        mergejax.errors.MergeError: no/such/run: there is no such folder; give the folder of a run

    Weight averaging along a trajectory (Izmailov et al., 2018, arXiv:1803.05407), of the steps as
    they were saved.
    """
    found = choose(steps_of(run), steps, window)
    if weights is not None and len(weights) != len(found):
        raise MergeError(
            f"there are {len(weights)} weights for {len(found)} steps, "
            f"{some(list(map(str, found)))}; give one for each"
        )
    from mergejax.checkpoints.merge import merge_checkpoints  # here, for it imports JAX

    # The last step comes first: what gives the settings.
    experts = list(found.values())[::-1]
    method = "average()" if weights is None else f"linear(weights={list(weights)[::-1]})"
    return merge_checkpoints(method, None, experts, out, **options)
