"""The string language that composes methods; nothing in it is executed."""

import ast
from collections.abc import Callable
from typing import Any

from mergejax import chains
from mergejax.chains import Chain, chain
from mergejax.errors import MergeError, did_you_mean, some
from mergejax.registry import words


def parse(text: str) -> Chain:
    """Reads a chain in the string language; nothing in it is executed.

    Args:
        text: methods and stages with their hyper-parameters, joined by '|', for instance
            'drop(rate=0.9)|ties(density=0.2)'; values are numbers, strings, lists, by_name({...})
            and by_depth([...]).

    Returns:
        The chain; its `repr` is the text again.

    Raises:
        MergeError: anything that is not of this form, with what was expected.

    Example:
        >>> parse('ties(density=by_depth([0.1, 0.3]), scope="tensor")')
        ties(density=by_depth([0.1, 0.3]), scope='tensor')
    """
    node = _read(_syntax(text), text)
    if not isinstance(node, chains.Node):
        raise MergeError(f"'{text}' is a value, not a method; write it as 'ties(density=0.2)'")
    return chain(node)


def read_call(text: str) -> tuple[str, list[Any], dict[str, Any]]:
    """Reads one name with its arguments, for tables of words beside the methods.

    Returns:
        The name, the arguments without and those with a name.

    Raises:
        MergeError: anything that is not of this form.

    Example:
        >>> read_call('svd(rank=8)')
        ('svd', [], {'rank': 8})
    """
    node = _syntax(text)
    match node:
        case ast.Name():
            return node.id, [], {}
        case ast.Call(func=ast.Name(id=name)):
            return name, *_arguments(name, node, text)
    raise MergeError(f"'{text}' is not one name with its parameters; write it as 'svd(rank=8)'")


def _syntax(text: Any) -> ast.expr:
    if not isinstance(text, str) or not text.strip():
        raise MergeError(f"a method is a text such as 'ties(density=0.2)', not {text!r}")
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = getattr(error, "msg", None) or str(error)
        raise MergeError(
            f"method '{text}' cannot be read ({reason}); write it as 'drop(rate=0.9)|ties()'"
        ) from None


def _arguments(name: str, node: ast.Call, text: str) -> tuple[list[Any], dict[str, Any]]:
    given = [keyword.arg for keyword in node.keywords]
    if None in given:
        raise MergeError(f"'{text}': '**' is not part of the language; name the parameters")
    if twice := sorted({k for k in given if k and given.count(k) > 1}):
        raise MergeError(f"{name}() is given {some(twice)} twice; keep one")
    arguments = [_read_value(argument, text) for argument in node.args]
    return arguments, {k.arg: _read_value(k.value, text) for k in node.keywords if k.arg}


def _read(node: ast.expr, text: str) -> Any:
    match node:
        case ast.BinOp(op=ast.BitOr()):
            return chain(_read(node.left, text), _read(node.right, text))
        case ast.Name():
            return _word(node.id)()
        case ast.Call(func=ast.Name(id=name)):
            return _call(_word(name), *_arguments(name, node, text))
    raise MergeError(
        f"'{ast.unparse(node)}' in '{text}' is not a method; write names with their parameters, "
        "joined by '|'"
    )


def _read_value(node: ast.expr, text: str) -> Any:
    match node:
        case ast.Call() | ast.BinOp(op=ast.BitOr()):
            return _read(node, text)
        case ast.List() | ast.Tuple():
            return [_read_value(item, text) for item in node.elts]
        case ast.Dict() if None not in node.keys:
            keys = [_read_value(key, text) for key in node.keys if key is not None]
            return dict(zip(keys, [_read_value(v, text) for v in node.values], strict=True))
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise MergeError(
            f"'{ast.unparse(node)}' in '{text}' is not a value; numbers, quoted strings, lists, "
            "by_name({...}) and by_depth([...]) are"
        ) from None


def _word(name: str) -> Callable[..., Any]:
    known = words()
    if name not in known:
        raise MergeError(f"no method is called '{name}', {did_you_mean(name, known)}")
    return known[name]


def _call(make: Callable[..., Any], arguments: list[Any], named: dict[str, Any]) -> Any:
    try:
        return make(*arguments, **named)
    except TypeError as error:
        raise MergeError(f"{make.__name__}(): {error}") from None


def as_chain(method: Any) -> Chain:
    """A chain from a chain, a stage or a text in the string language."""
    if isinstance(method, chains.Node):
        return chain(method)
    if isinstance(method, str):
        return parse(method)
    raise MergeError(
        f"a method is a chain such as mj.ties(density=0.2) or a text such as 'ties()', "
        f"not {method!r}"
    )
