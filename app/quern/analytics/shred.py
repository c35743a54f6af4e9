"""Nested values of many documents, a path at a time instead of a document at a time.

Record shredding as in Melnik et al., "Dremel: Interactive Analysis of Web-Scale Datasets" (VLDB 2010), for values whose
shape nobody promises: what a path holds is found out once for all its values, not for each of them.
"""

from collections.abc import Iterator, Sequence
from enum import Enum
from functools import lru_cache
from itertools import chain
from operator import itemgetter
from typing import Any, Final, NamedTuple


class Kind(Enum):
    """What a leaf is, by its own type."""

    TEXT = "text"
    NUMBER = "number"
    BOOLEAN = "boolean"
    OTHER = "other"
    """What JSON does not know: a moment, bytes."""


class Column(NamedTuple):
    """Values of some documents at one place."""

    path: str
    rows: list[int]
    """Which document each value is of, never falling."""
    items: list[str] | None
    """Indices in the lists above each value, joined by `.`; None: no list is above any."""
    values: list[Any]


class Stripe(NamedTuple):
    """A column whose values are leaves of one kind; none is None."""

    kind: Kind
    path: str
    rows: list[int]
    items: list[str] | None
    values: list[Any]


_KINDS: Final[dict[type, Kind]] = {str: Kind.TEXT, bool: Kind.BOOLEAN, int: Kind.NUMBER, float: Kind.NUMBER}
_NONE: Final = type(None)


def shred(column: Column) -> Iterator[Stripe]:
    """Every leaf in a column of JSON values. Members of objects lengthen the path, indices of lists the items."""
    types = set(map(type, column.values))
    if len(types) > 1 and len({_form_of(one) for one in types}) > 1:
        for form in sorted({_form_of(one) for one in types} - {"none"}):
            yield from shred(_only(column, {one for one in types if _form_of(one) == form}))
        return
    for one in types:
        match _form_of(one):
            case "none":
                pass
            case "object":
                for member in members(column.path, column.rows, column.values, column.items):
                    yield from shred(member)
            case "list":
                yield from shred(_elements(column))
            case form:
                yield Stripe(Kind(form), *column)
        return


def members(
    path: str | None, rows: list[int], objects: Sequence[dict[str, Any]], items: list[str] | None = None
) -> list[Column]:
    """A column for each name that an object has, in the order in which they first come; None where one lacks it."""
    prefix = "" if path is None else f"{path}."
    if objects and len(objects[0]) > 1:
        try:
            # Mostly each object has what the first has: all its values are taken at once.
            values = list(zip(*map(itemgetter(*objects[0]), objects), strict=True))
        except KeyError:
            pass
        else:
            if len(objects[0]) * len(objects) == sum(map(len, objects)):
                return [
                    Column(prefix + name, rows, items, list(found))
                    for name, found in zip(objects[0], values, strict=True)
                ]
    names = dict.fromkeys(chain.from_iterable(objects))
    if len(names) * len(objects) <= 4 * sum(map(len, objects)):
        return [Column(prefix + name, rows, items, [one.get(name) for one in objects]) for name in names]
    # Names that hardly repeat: only the values that are there are touched.
    found = {name: Column(prefix + name, [], None if items is None else [], []) for name in names}
    for place, one in enumerate(objects):
        for name, value in one.items():
            column = found[name]
            column.rows.append(rows[place])
            column.values.append(value)
            if items is not None and column.items is not None:
                column.items.append(items[place])
    return list(found.values())


def split_by_type(column: Column, kind: type) -> tuple[Column, Column]:
    """The values of exactly this type, and the rest."""
    types = set(map(type, column.values))
    if types == {kind}:
        return column, Column(column.path, [], None if column.items is None else [], [])
    return _only(column, {kind}), _only(column, types - {kind})


def _form_of(one: type) -> str:
    """The kind of a type's leaves; `object`, `list`, `none`. Of what the driver makes of 64-bit integers: number."""
    kind = _KINDS.get(one)
    if kind is not None:
        return kind.value
    for base, form in ((dict, "object"), (list, "list"), (_NONE, "none"), (str, "text"), (bool, "boolean")):
        if issubclass(one, base):
            return form
    return "number" if issubclass(one, int | float) else "other"


def _only(column: Column, types: set[type]) -> Column:
    places = [place for place, value in enumerate(column.values) if type(value) in types]
    return Column(
        column.path,
        [column.rows[place] for place in places],
        None if column.items is None else [column.items[place] for place in places],
        [column.values[place] for place in places],
    )


def _elements(column: Column) -> Column:
    rows: list[int] = []
    items: list[str] = []
    values: list[Any] = []
    for place, elements in enumerate(column.values):
        rows += [column.rows[place]] * len(elements)
        values += elements
        above = column.items[place] if column.items is not None else ""
        indices = _indices(len(elements))
        items += [f"{above}.{index}" for index in indices] if above else indices
    return Column(column.path, rows, items, values)


@lru_cache(maxsize=64)
def _indices(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(count)))
