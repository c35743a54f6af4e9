"""Templates of prompts and messages, rendered in Jinja's sandbox: no way to Python, no loop without end.

A template is the tenant's own text; answers go in only as values, never as template source. The sandbox keeps one
tenant's template from reaching the process; the bounds below keep it from using it up.
"""

from typing import Any, Final

from jinja2 import StrictUndefined, TemplateError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_OUTPUT: Final = 50_000

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
_FORBIDDEN: Final = (
    nodes.For,
    nodes.Macro,
    nodes.CallBlock,
    nodes.Call,
    nodes.Import,
    nodes.FromImport,
    nodes.Include,
    nodes.Extends,
    nodes.Pow,
    nodes.Mul,
    nodes.Block,
    nodes.FilterBlock,
    nodes.AssignBlock,
    nodes.Assign,
)


class _Environment(ImmutableSandboxedEnvironment):
    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return False


_environment = _Environment(undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True)
_environment.filters = {name: found for name, found in _environment.filters.items() if name in _FILTERS}
_environment.globals.clear()


class RenderError(Exception):
    """The template names what is not there, or makes too much text. The message carries no value."""


def check(source: str) -> str:
    """The template itself when it is sound. Raises ValueError naming the first fault (a loop, a call, a macro …)."""
    try:
        tree = _environment.parse(source)
    except TemplateError as error:
        raise ValueError(f"not a template: {error.message}") from None
    for kind in _FORBIDDEN:
        if (found := tree.find(kind)) is not None:
            raise ValueError(f"line {found.lineno}: {kind.__name__.lower()} is not allowed in a template")
    for used in tree.find_all(nodes.Filter):
        if used.name not in _FILTERS:
            raise ValueError(f"line {used.lineno}: no filter {used.name!r}; there are {', '.join(sorted(_FILTERS))}")
    return source


def render(source: str, values: dict[str, Any]) -> str:
    """The text of a template with `values`, plain data.

    Raises:
        RenderError: a name is missing, or the text would exceed MAX_OUTPUT characters.
    """
    parts: list[str] = []
    size = 0
    try:
        for part in _environment.from_string(source).generate(values):
            size += len(part)
            if size > MAX_OUTPUT:
                raise RenderError(f"the text exceeds {MAX_OUTPUT} characters")
            parts.append(part)
    except (TemplateError, TypeError, ValueError, ArithmeticError) as error:
        raise RenderError(f"the template could not be filled in: {type(error).__name__}") from None
    return "".join(parts)
