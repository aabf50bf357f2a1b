"""Errors that a user can act on, each one sentence."""

import difflib
from collections.abc import Iterable, Sequence


class MergeError(ValueError):
    """Bad input: every problem that was found, one sentence a line."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns ", did you mean 'x'?" for the nearest of the known names, or their list.

    Example:
        >>> did_you_mean('tis', ['ties', 'slerp'])
        "did you mean 'ties'?"
        >>> did_you_mean('fourier', ['ties', 'slerp'])
        'known: slerp, ties'
    """
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"


def raise_all(problems: Sequence[str]) -> None:
    """Raises one `MergeError` that holds every problem, if there is any."""
    if problems:
        raise MergeError("\n".join(dict.fromkeys(problems)))


def some(names: Sequence[str], limit: int = 3) -> str:
    """Names up to `limit` items and counts the rest.

    Example:
        >>> some(['a', 'b', 'c', 'd', 'e'])
        "'a', 'b', 'c' and 2 more"
    """
    text = ", ".join(f"'{name}'" for name in names[:limit])
    return text if len(names) <= limit else f"{text} and {len(names) - limit} more"
