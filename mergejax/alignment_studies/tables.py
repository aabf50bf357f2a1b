"""Tables of studies in Markdown, mean ± spread over seeds."""

from collections.abc import Sequence

from mergejax.eval import seeds


def spread(values: Sequence[float], scale: float = 100, digits: int = 1) -> str:
    """Mean ± standard deviation over seeds, in per cent unless told otherwise.

    Example:
        >>> spread([0.5, 0.7]), spread([1.0], 1, 2), spread([])
        ('60.0 ± 14.1', '1.00', '')
    """
    return seeds.shown(seeds.spread(list(values)), scale, digits)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, the first column to the left.

    Example:
        >>> print(markdown(["method", "accuracy"], [["mean", "50.0"]]))
        | method | accuracy |
        |---|---:|
        | mean | 50.0 |
    """
    marks = "|---" + "|---:" * (len(header) - 1) + "|"
    lines = [f"| {' | '.join(line)} |" for line in (header, *rows)]
    return "\n".join([lines[0], marks, *lines[1:]])
