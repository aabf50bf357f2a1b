"""Short tables of a suite's report beside the large one, as Markdown and as HTML."""

import html
from collections.abc import Sequence
from typing import NamedTuple


class Section(NamedTuple):
    """A table under a title.

    Attributes:
        title: above it.
        header: names of the columns.
        rows: texts, one for each column.
        note: what the numbers are, below it.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str


def markdown(section: Section) -> str:
    """The section in Markdown.

    Example:
        >>> print(markdown(Section("Years", ["a", "b"], [["1", "2"]], "Of a and b.")))
        ## Years
        <BLANKLINE>
        | a | b |
        | --- | --- |
        | 1 | 2 |
        <BLANKLINE>
        Of a and b.
        <BLANKLINE>
    """
    lines = [section.header, ["---"] * len(section.header), *section.rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"## {section.title}\n\n{table}\n\n{section.note}\n"


def page(section: Section) -> str:
    """The section in HTML; words stand left, as in the first column."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in section.header)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>"
        for row in section.rows
    )
    return (
        f"<h2>{html.escape(section.title)}</h2>\n"
        f'<div class="scroll">\n<table class="words">\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table>\n</div>\n<p>{html.escape(section.note)}</p>"
    )
