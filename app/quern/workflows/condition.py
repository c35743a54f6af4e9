"""Conditions: when a step runs. A small language of data, not code, so nothing in it can be executed."""

import operator
from collections.abc import Callable
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Path = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+){0,5}$", max_length=200)]
Value = str | float | bool | None
MAX_DEPTH: Final = 5
_COMPARE: Final[dict[str, Callable[[Any, Any], bool]]] = {
    "lt": operator.lt,
    "lte": operator.le,
    "gt": operator.gt,
    "gte": operator.ge,
}


class _Node(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Test(_Node):
    """Compares one answer (`answers.rating`) or result (`results.mood.label`) with a value."""

    path: Path
    op: Literal["eq", "ne", "lt", "lte", "gt", "gte", "in", "contains", "present", "absent"]
    value: Value | list[Value] = None


class All(_Node):
    all: list["Condition"] = Field(max_length=20)


class AnyOf(_Node):
    any: list["Condition"] = Field(max_length=20)


class Not(_Node):
    not_: "Condition" = Field(alias="not")


Condition = Test | All | AnyOf | Not
for _model in (All, AnyOf, Not):
    _model.model_rebuild()


def depth(condition: Condition) -> int:
    """Levels of nesting; 1 for a single test."""
    match condition:
        case All(all=parts) | AnyOf(any=parts):
            return 1 + max((depth(part) for part in parts), default=0)
        case Not(not_=part):
            return 1 + depth(part)
    return 1


def paths(condition: Condition) -> set[str]:
    """Every path that the condition looks at."""
    match condition:
        case All(all=parts) | AnyOf(any=parts):
            return set().union(*(paths(part) for part in parts)) if parts else set()
        case Not(not_=part):
            return paths(part)
        case Test(path=path):
            return {path}
    raise TypeError(type(condition).__name__)


def holds(condition: Condition, facts: dict[str, Any]) -> bool:
    """Whether the condition holds of `{"answers": …, "results": …}`. What is missing satisfies only `absent`, `ne`."""
    match condition:
        case All(all=parts):
            return all(holds(part, facts) for part in parts)
        case AnyOf(any=parts):
            return any(holds(part, facts) for part in parts)
        case Not(not_=part):
            return not holds(part, facts)
        case Test():
            return _test(condition, _look_up(facts, condition.path))
    raise TypeError(type(condition).__name__)


def _look_up(facts: Any, path: str) -> Any:
    for part in path.split("."):
        if not isinstance(facts, dict) or part not in facts:
            return None
        facts = facts[part]
    return facts


def _test(test: Test, found: Any) -> bool:
    wanted = test.value
    match test.op:
        case "present":
            return found is not None
        case "absent":
            return found is None
        case "eq":
            return bool(found == wanted)
        case "ne":
            return bool(found != wanted)
        case "in":
            return isinstance(wanted, list) and found in wanted
        case "contains":
            if isinstance(found, str) and isinstance(wanted, str):
                return wanted.casefold() in found.casefold()
            return isinstance(found, list) and wanted in found
    numbers = isinstance(found, int | float) and isinstance(wanted, int | float)
    if not numbers and not (isinstance(found, str) and isinstance(wanted, str)):
        return False
    return _COMPARE[test.op](found, wanted)
