"""Arguments of a config file: what stands behind the colon of `--config=configs/x.py:arguments`."""

import copy
from collections.abc import Mapping
from typing import Any

import ml_collections

from mergejax import errors

WORDS = {"true": True, "false": False, "1": True, "0": False}


def _cut(text: str, separator: str) -> list[str]:
    """Splits at separators that stand outside brackets and quotes."""
    parts, start, open_brackets, quote = [], 0, 0, ""
    for place, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "([{":
            open_brackets += 1
        elif letter in ")]}":
            open_brackets -= 1
        elif letter == separator and not open_brackets:
            parts.append(text[start:place])
            start = place + 1
    return [part.strip() for part in (*parts, text[start:]) if part.strip()]


def _read(name: str, text: str, default: Any) -> Any:
    """Reads a value of the type of its default."""
    if isinstance(default, tuple):
        return tuple(_cut(text, "+"))
    try:
        return WORDS[text.lower()] if isinstance(default, bool) else type(default)(text)
    except (KeyError, ValueError):
        kind = type(default).__name__
        raise errors.MergeError(
            f"config argument {name}={text}: expected a value of type {kind}, such as {default}"
        ) from None


def parse(argument: str | None, **defaults: Any) -> ml_collections.ConfigDict:
    """Reads `name=value` pairs and bare words, separated by commas outside brackets.

    The type of a value is that of its default; a tuple of strings is written with plus signs
    between; a bare word sets a boolean to true.

    Args:
        argument: what stands behind the colon, or None.
        **defaults: the known names with their defaults: bool, int, float, str or tuple of str.

    Returns:
        All names with their values.

    Raises:
        MergeError: for every unknown name and word, and for values of another type.

    Example:
        >>> found = parse("runlocal,methods=ties(density=0.2,scaling=1)+lines",
        ...               runlocal=False, methods=())
        >>> found.runlocal, found.methods
        (True, ('ties(density=0.2,scaling=1)', 'lines'))

    Source: the idea is big_vision's (Beyer, Zhai and Kolesnikov 2022), configs/common.py.
    """
    found, problems = dict(defaults), []
    for part in _cut(argument or "", ","):
        name, equals, text = (piece.strip() for piece in part.partition("="))
        if name not in defaults:
            known = errors.did_you_mean(name, defaults)
            problems.append(f"config argument '{part}': there is no argument '{name}', {known}")
        elif not equals and not isinstance(defaults[name], bool):
            problems.append(f"config argument '{part}': it needs a value, as in {name}=...")
        else:
            found[name] = _read(name, text, defaults[name]) if equals else True
    errors.raise_all(problems)
    return ml_collections.ConfigDict(found)


def chosen(name: str, value: str, known: Mapping[str, Any]) -> Any:
    """A copy of the entry that an argument names.

    Raises:
        MergeError: there is no such entry.

    Example:
        >>> chosen("model", "small", {"small": {"width": 8}})
        {'width': 8}
    """
    if value not in known:
        hint = errors.did_you_mean(value, known)
        raise errors.MergeError(f"config argument {name}={value}: there is no such {name}, {hint}")
    return copy.deepcopy(known[value])
