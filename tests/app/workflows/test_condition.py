"""Conditions: data, not code, and no surprise where something is missing."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from quern.workflows.condition import Condition, holds
from quern.workflows.definition import Workflow

FACTS = {
    "answers": {"rating": 2, "name": "Ada", "topics": ["price", "staff"], "group": {"city": "Köln"}, "ok": True},
    "results": {"mood": {"label": "negative", "score": 0.9}},
}


def parse(condition: dict[str, Any]) -> Condition:
    parsed: Condition = TypeAdapter(Condition).validate_python(condition)
    return parsed


@pytest.mark.parametrize(
    ("path", "op", "value", "expected"),
    [
        ("answers.rating", "eq", 2, True),
        ("answers.rating", "ne", 2, False),
        ("answers.rating", "lt", 3, True),
        ("answers.rating", "gte", 3, False),
        ("answers.rating", "in", [1, 2], True),
        ("answers.name", "contains", "AD", True),
        ("answers.topics", "contains", "price", True),
        ("answers.topics", "contains", "pric", False),
        ("answers.group.city", "eq", "Köln", True),
        ("answers.ok", "eq", True, True),
        ("results.mood.label", "eq", "negative", True),
        ("results.mood.score", "gt", 0.5, True),
        ("answers.nothing", "present", None, False),
        ("answers.nothing", "absent", None, True),
        ("answers.nothing", "eq", "x", False),
        ("answers.nothing", "ne", "x", True),
        ("answers.nothing", "lt", 3, False),
        ("answers.name", "lt", 3, False),
        ("answers.name.first", "present", None, False),
    ],
)
def test_what_a_test_says(path: str, op: str, value: Any, expected: bool) -> None:
    assert holds(parse({"path": path, "op": op, "value": value}), FACTS) is expected


TESTS = st.sampled_from(
    [
        {"path": "answers.rating", "op": "eq", "value": 2},
        {"path": "answers.rating", "op": "gt", "value": 2},
        {"path": "answers.nothing", "op": "present"},
        {"path": "results.mood.label", "op": "eq", "value": "negative"},
    ]
)


@given(one=TESTS, two=TESTS)
def test_all_any_and_not_are_logic(one: dict[str, Any], two: dict[str, Any]) -> None:
    first, second = holds(parse(one), FACTS), holds(parse(two), FACTS)
    assert holds(parse({"all": [one, two]}), FACTS) is (first and second)
    assert holds(parse({"any": [one, two]}), FACTS) is (first or second)
    assert holds(parse({"not": one}), FACTS) is (not first)


@pytest.mark.parametrize(
    ("condition", "fault"),
    [
        ({"path": "response.tenant", "op": "eq", "value": "x"}, "begins with"),
        ({"path": "results.other.label", "op": "eq", "value": "x"}, "must be in its `needs`"),
        ({"path": "answers", "op": "present"}, "begins with"),
        ({"not": {"not": {"not": {"not": {"not": {"path": "answers.a", "op": "present"}}}}}}, "nests deeper"),
    ],
)
def test_a_condition_that_cannot_be_meant_is_refused(condition: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValidationError, match=fault):
        Workflow.model_validate({"steps": [{"name": "a", "type": "sentiment", "when": condition}]})


@pytest.mark.parametrize("path", ["answers.$where", "answers.a b", "answers..b", "answers.__class__.x;y", ""])
def test_a_path_is_names_and_dots(path: str) -> None:
    with pytest.raises(ValidationError):
        parse({"path": path, "op": "present"})
