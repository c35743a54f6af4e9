"""Templates of prompts and messages, rendered in Jinja's sandbox: no way to Python, no loop without end.

A template is the tenant's own text; answers go in only as values, never as template source. What may stand in a
template is listed, not what may not: text, values and their parts, conditions, comparisons, tests and a few filters.
Nothing that is listed can make a text much longer than what it is given, so a template cannot use the process up
(without a list, `with` doubles a text at each level, `%` pads it to a gigabyte, and `replace` multiplies two of them).
"""

from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Final

from jinja2 import StrictUndefined, Template, TemplateError, Undefined, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_OUTPUT: Final = 50_000

_ALLOWED: Final = (
    nodes.Template,
    nodes.Output,
    nodes.TemplateData,
    nodes.Name,
    nodes.Const,
    nodes.List,
    nodes.Tuple,
    nodes.Getattr,
    nodes.Getitem,
    nodes.Slice,
    nodes.If,
    nodes.CondExpr,
    nodes.Compare,
    nodes.Operand,
    nodes.And,
    nodes.Or,
    nodes.Not,
    nodes.Neg,
    nodes.Filter,
    nodes.Keyword,
    nodes.Test,
)

_FILTERS: Final = frozenset(
    [
        "capitalize",
        "default",
        "e",
        "escape",
        "first",
        "float",
        "int",
        "join",
        "last",
        "length",
        "lower",
        "replace",
        "round",
        "title",
        "trim",
        "truncate",
        "upper",
    ]
)
_TESTS: Final = frozenset(
    [
        "defined",
        "undefined",
        "none",
        "string",
        "number",
        "boolean",
        "true",
        "false",
        "in",
        "even",
        "odd",
        "lower",
        "upper",
    ]
)


class RenderError(Exception):
    """The template names what is not there, or makes too much text. The message carries no value."""


class _Environment(ImmutableSandboxedEnvironment):
    """Names look into mappings only: `answers.items` is the answer to the field `items`, never a method."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        return self.getitem(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        try:
            return obj[argument]
        except (LookupError, TypeError, AttributeError):
            return self.undefined(obj=obj, name=argument if isinstance(argument, str) else "")

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return False


def _bounded(length: int) -> None:
    if length > MAX_OUTPUT:
        raise RenderError(f"the text exceeds {MAX_OUTPUT} characters")


def _join(values: Iterable[Any], separator: str = "") -> str:
    if isinstance(values, Undefined):
        return str(values)
    parts = [str(value) for value in values]
    _bounded(sum(map(len, parts)) + len(str(separator)) * len(parts))
    return str(separator).join(parts)


def _replace(value: Any, old: str, new: str) -> str:
    text, old, new = str(value), str(old), str(new)
    _bounded(len(text) + text.count(old) * len(new))
    return text.replace(old, new)


def _round(value: float, precision: int = 0) -> float:
    return round(value, max(-15, min(15, precision)))


_environment = _Environment(undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True)
_environment.filters = {name: found for name, found in _environment.filters.items() if name in _FILTERS}
_environment.filters.update(join=_join, replace=_replace, round=_round)
_environment.tests = {name: found for name, found in _environment.tests.items() if name in _TESTS}
_environment.globals.clear()


def check(source: str) -> str:
    """The template itself when it is sound. Raises ValueError naming the first fault (a loop, a call, a macro …)."""
    try:
        _check(source)
        # Python's own compiler has less patience than Jinja's parser.
        _compiled(source)
    except TemplateError as error:
        raise ValueError(f"not a template: {error.message}") from None
    except (RecursionError, SyntaxError, MemoryError):
        raise ValueError("not a template: it nests too deeply") from None
    return source


def _check(source: str) -> None:
    tree = _environment.parse(source)
    for node in (tree, *tree.find_all(nodes.Node)):
        if not isinstance(node, _ALLOWED):
            raise ValueError(f"line {node.lineno}: {type(node).__name__.lower()} is not allowed in a template")
        if isinstance(node, nodes.Name) and node.name == "self":
            raise ValueError(f"line {node.lineno}: self is not allowed in a template")
    for used in tree.find_all(nodes.Filter):
        if used.name not in _FILTERS:
            raise ValueError(f"line {used.lineno}: no filter {used.name!r}; there are {', '.join(sorted(_FILTERS))}")
    for test in tree.find_all(nodes.Test):
        if test.name not in _TESTS:
            raise ValueError(f"line {test.lineno}: no test {test.name!r}; there are {', '.join(sorted(_TESTS))}")


@lru_cache(maxsize=512)
def _compiled(source: str) -> Template:
    return _environment.from_string(source)


def render(source: str, values: dict[str, Any]) -> str:
    """The text of a template with `values`, plain data.

    Raises:
        RenderError: a name is missing, or the text would exceed MAX_OUTPUT characters.
    """
    parts: list[str] = []
    size = 0
    try:
        for part in _compiled(source).generate(values):
            size += len(part)
            _bounded(size)
            parts.append(part)
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        raise RenderError(f"the template could not be filled in: {type(error).__name__}") from None
    return "".join(parts)
