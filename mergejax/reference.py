"""The methods' reference page, made from the registry: `python -m mergejax.reference`."""

import inspect
import re
import typing
from collections.abc import Callable
from typing import Any

from mergejax import lowrank
from mergejax.chains import Branch, Chain, Node, Within, walk
from mergejax.core import Stage
from mergejax.errors import MergeError, did_you_mean
from mergejax.hyper import interval_of, least_of
from mergejax.registry import METHODS, PIECES, Entry

_INTRODUCTION = """# Methods

This page is made from the registry by `python -m mergejax.reference > docs/methods.md`; a test
keeps it current. A method is written as in the table's first column, on the command line, in
configs and in `mj.parse`; methods and pieces are joined with `|`:
`drop(rate=0.9)|ties(density=0.2)`. A number may also be a list with one number per expert,
`by_name({'attention': 0.5, '.*': 0.3})` or `by_depth([0.1, 0.9])`.

The last columns of the table say what a method costs: how often the model is read (once, and once
more for each round of numbers of the whole model), and whether it works element by element, in
blocks of any size and at the speed of memory, or needs a leaf as a whole.
"""

_ADAPTERS = """# Methods for adapters

What merges low-rank factors, as a function, `mj.lowrank.svd(adapters, rank=8)`, or as a text,
`mj.lowrank.merge('svd(rank=8)', adapters)`. The dense deltas, `mj.lowrank.dense(adapter)`, go
through every method above.
"""


def page() -> str:
    """The whole page, Markdown.

    Example:
        >>> page().startswith('# Methods')
        True
    """
    methods = [_section(name, entry.make, entry) for name, entry in METHODS.items()]
    pieces = [_section(name, make, None) for name, make in PIECES.items()]
    adapters = [_section(name, make, None) for name, make in lowrank.METHODS.items()]
    parts = [_INTRODUCTION, table(), *methods, "# Pieces", *pieces, _ADAPTERS, *adapters]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def table() -> str:
    """All methods, one a row.

    Example:
        >>> table().splitlines()[0]
        '| method | what it does | stages | needs | readings | works |'
    """
    rows = [
        "| method | what it does | stages | needs | readings | works |",
        "|---|---|---|---|---:|---|",
    ]
    return "\n".join([*rows, *(_row(name, entry) for name, entry in METHODS.items())])


def entry(name: str) -> str:
    """The section of one method or piece.

    Raises:
        MergeError: there is none of that name.

    Example:
        >>> entry('slerp').splitlines()[0]
        '## slerp'
    """
    if name in METHODS:
        return _section(name, METHODS[name].make, METHODS[name])
    if name in PIECES:
        return _section(name, PIECES[name], None)
    raise MergeError(f"no method is called '{name}', {did_you_mean(name, [*METHODS, *PIECES])}")


def _row(name: str, entry: Entry) -> str:
    made = entry.make()
    needs = ["a base"] if any(s.factory.space == "delta" for s in walk(made)) else []
    needs += [f"`{need}`" for stage in walk(made) for need in stage.factory.needs]
    if entry.experts is not None:
        needs.append(f"exactly {entry.experts} expert{'s' if entry.experts > 1 else ''}")
    if entry.at_least > 1:
        needs.append(f"{entry.at_least} experts or more")
    if entry.ordered:
        needs.append("an order")
    if entry.modifier:
        needs.append("a method before it")
    stages = " · ".join(f"`{name}`" for name in _stages(made))
    cells = [f"[`{name}`](#{name})", _summary(entry.make), stages, ", ".join(needs), *_cost(made)]
    return f"| {' | '.join(cells)} |"


def _cost(made: Node) -> tuple[str, str]:
    """How often the model is read, and in what pieces."""
    stages = list(walk(made))
    rounds = sum(len(s.build().rounds) for s in stages if s.kind != "coordinates")
    by_element = all(stage.elementwise for stage in stages)
    return str(1 + rounds), "by element" if by_element else "leaf by leaf"


def _stages(node: Node) -> list[str]:
    match node:
        case Stage(kind="method"):
            return _stages(node.build())
        case Chain():
            return [name for item in node.items for name in _stages(item)]
        case Branch():
            inner = (f"{k}: {' '.join(_stages(item))}" for k, item in node.branches.items())
            return [f"{node.label}({', '.join(inner)})"]
        case Within():
            return [f"within({node.coordinates.factory.name}: {' '.join(_stages(node.inner))})"]
    return [node.factory.name]


def _summary(make: Callable[..., Any]) -> str:
    return (inspect.getdoc(make) or "").splitlines()[0]


def _section(name: str, make: Callable[..., Any], entry: Entry | None) -> str:
    text = inspect.getdoc(make) or ""
    before, *_ = re.split(r"\n(?=Args:|Returns:|Example:)", text, maxsplit=1)
    math = [_dedent(m) for m in re.findall(r"\.\. math::(.*?)(?=\n\n|\Z)", before, re.S)]
    prose = re.sub(r"\.\. math::.*?(?=\n\n|\Z)", "", before, flags=re.S)
    prose = re.sub(r":math:`(.*?)`", r"$\1$", prose, flags=re.S).replace("\n\n\n", "\n\n")
    lines = [f"## {name}", prose.strip(), *(f"$$\n{m}\n$$" for m in math)]
    lines += [_parameters(make, text), _reference(text)]
    return "\n\n".join(line for line in lines if line)


def _dedent(text: str) -> str:
    return "\n".join(line.strip() for line in text.strip().splitlines())


def _parameters(make: Callable[..., Any], text: str) -> str:
    signature = inspect.signature(make).parameters
    parameters = {name: p for name, p in signature.items() if name != "adapters"}
    if not parameters:
        return ""
    hints = typing.get_type_hints(inspect.unwrap(make), include_extras=True)
    listed = re.search(r"\nArgs:\n(.*?)(?=\n\n|\Z)", text, re.S)
    described = dict(re.findall(r"^ {4}(\w+): (.*?)(?=^ {4}\w+: |\Z)", _block(listed), re.M | re.S))
    rows = ["| parameter | default | values | meaning |", "|---|---|---|---|"]
    for name, parameter in parameters.items():
        meaning = re.sub(r"\s+", " ", described.get(name, "")).strip().replace("|", "\\|")
        meaning = re.sub(r":math:`(.*?)`", r"$\1$", meaning)
        required = parameter.default is inspect.Parameter.empty
        default = "required" if required else f"`{parameter.default!r}`"
        rows.append(f"| `{name}` | {default} | {_values(hints[name])} | {meaning} |")
    return "\n".join(rows)


def _block(found: re.Match[str] | None) -> str:
    return found[1] + "\n" if found else ""


def _values(hint: Any) -> str:
    interval = interval_of(hint)
    if interval is not None:
        return str(interval)
    least = least_of(hint)
    if least is not None:
        return f"whole, from {least}"
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{choice!r}`" for choice in typing.get_args(hint))
    return f"`{getattr(hint, '__name__', hint)}`"


def _reference(text: str) -> str:
    """What follows the example: the source and which published variant this is."""
    after = text.split("Example:", 1)[-1]
    paragraphs = [p for p in after.split("\n\n") if p and not p.startswith((" ", "\n"))]
    return re.sub(r":math:`(.*?)`", r"$\1$", "\n\n".join(paragraphs))


if __name__ == "__main__":
    print(page(), end="")
