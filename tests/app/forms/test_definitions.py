"""Form definitions: every kind of field, and hostile ones, which are refused quickly and in the right place."""

import time
from typing import Any

import pytest

from quern.forms import pattern
from quern.forms.fields import MAX_FIELDS
from tests.app.api.client import Answer, Client, Json


def _create(client: Client, fields: Any, steps: Any = None) -> Answer:
    return client.send("POST", "/forms", {"name": "f", "fields": fields, "workflow": {"steps": steps or []}})


def _group(fields: list[Json], **options: Any) -> Json:
    return {"name": "g", "type": "group", "fields": fields, **options}


def _nested(depth: int) -> Json:
    field: Json = {"name": "leaf", "type": "text"}
    for _ in range(depth):
        field = _group([field])
    return field


TEXT: Json = {"name": "a", "type": "text"}


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ({"type": "text"}, ["", "one line", "émoji 🙂"], [1, None, True, ["x"], "two\nlines", "nul\0", "x" * 501]),
        ({"type": "text", "pattern": "[A-Z]{2}[0-9]{2}"}, ["AB12"], ["AB123", "xAB12", "AB12\n", "ab12", ""]),
        ({"type": "text", "pattern": "a|b"}, ["a", "b"], ["ab", "xb", "ax"]),
        ({"type": "text", "max_length": 3}, ["abc"], ["abcd"]),
        ({"type": "long_text"}, ["two\nlines", ""], [1, "nul\0", "x" * 20_001]),
        ({"type": "number"}, [1, -2.5, 0, 1e15], ["1", True, 1e16, None]),
        ({"type": "number", "minimum": 0.5, "maximum": 2}, [0.5, 2], [0.4, 2.1]),
        ({"type": "number", "integer": True, "minimum": 0.5}, [1, 7], [0, 1.5, "1"]),
        ({"type": "choice", "options": [{"value": "=x"}, {"value": "b"}]}, ["=x", "b"], ["c", "", ["b"], {"$ne": 1}]),
        (
            {"type": "multiple_choice", "options": [{"value": "x"}, {"value": "y"}, {"value": "z"}], "max_chosen": 2},
            [["x"], ["x", "y"], []],
            [["x", "x"], ["x", "y", "z"], "x", ["w"], [1]],
        ),
        ({"type": "email"}, ["maud@example.org"], ["maud", "maud@", "a@b@c.org", "M <maud@example.org>", "a@e.org\n"]),
        (
            {"type": "date", "earliest": "2026-01-01"},
            ["2026-01-01", "9999-12-31"],
            ["2025-12-31", "2026-W01-1", "2026-02-30", "20260101", 20260101, "2026-01-01T00:00:00", "２０２６-01-01"],
        ),
        ({"type": "rating", "scale": 5}, [1, 5], [0, 6, 2.5, "3", True]),
        ({"type": "consent"}, [True, False], ["true", 1, None]),
        ({"type": "consent", "required": True}, [True], [False, None]),
        (_group([{**TEXT, "required": True}]), [{"a": "x"}], [{}, {"a": None}, {"b": "x"}, [], "x"]),
        (
            _group([{**TEXT, "required": True}], repeated=True, max_items=2),
            [[], [{"a": "x"}, {"a": "y"}]],
            [{"a": "x"}, [{"a": "x"}] * 3, [{}], [None]],
        ),
    ],
    ids=lambda value: value.get("type") if isinstance(value, dict) else "",
)
def test_each_kind_of_field_takes_what_it_should(owner: Client, field: Json, good: list[Any], bad: list[Any]) -> None:
    form = owner.form([{**field, "name": "q"}])
    for value in good:
        response = owner.submit(form, {"q": value})
        assert owner.call("GET", f"/responses/{response}")["answers"] == {"q": value}
    for value in bad:
        if value is None and not field.get("required"):
            continue
        answer = owner.send("POST", f"/forms/{form}/responses", {"answers": {"q": value}})
        assert answer.status == 422, value
        assert all(place.startswith("/answers/q") for place in answer.pointers), answer.pointers
    assert len(owner.call("GET", f"/forms/{form}/responses?limit=200")["items"]) == len(good)


def test_a_field_may_be_named_as_anything_in_python(owner: Client) -> None:
    names = ["copy", "json", "model_config", "class", "self", "dict", "validate", "a_b", "None", "schema"]
    form = owner.form([{"name": name, "type": "text"} for name in names])
    answers = {name: name.upper() for name in names}
    assert owner.call("GET", f"/responses/{owner.submit(form, answers)}")["answers"] == answers
    hidden = owner.send("POST", f"/forms/{form}/responses", {"answers": {"a_copy": "x"}})
    assert (hidden.status, hidden.pointers) == (422, ["/answers/a_copy"])


@pytest.mark.parametrize(
    ("field", "place"),
    [
        ({"name": "a.b", "type": "text"}, "/fields/0/name"),
        ({"name": "$where", "type": "text"}, "/fields/0/name"),
        ({"name": "__proto__", "type": "text"}, "/fields/0/name"),
        ({"name": "", "type": "text"}, "/fields/0/name"),
        ({"name": "x" * 64, "type": "text"}, "/fields/0/name"),
        ({"name": "a\n", "type": "text"}, "/fields/0/name"),
        ({"name": "a", "type": "nonsense"}, "/fields/0"),
        ({"name": "a"}, "/fields/0"),
        ({"type": "text"}, "/fields/0/name"),
        ({"name": "a", "type": "text", "odd": 1}, "/fields/0/odd"),
        ({"name": "a", "type": "text", "max_length": 5001}, "/fields/0/max_length"),
        ({"name": "a", "type": "number", "minimum": 2, "maximum": 1}, "/fields/0"),
        ({"name": "a", "type": "number", "integer": True, "minimum": 0.2, "maximum": 0.8}, "/fields/0"),
        ({"name": "a", "type": "number", "maximum": 1e300}, "/fields/0/maximum"),
        ({"name": "a", "type": "choice", "options": []}, "/fields/0/options"),
        ({"name": "a", "type": "choice", "options": [{"value": "x"}, {"value": "x"}]}, "/fields/0/options"),
        ({"name": "a", "type": "multiple_choice", "options": [{"value": "x"}], "min_chosen": 2}, "/fields/0"),
        ({"name": "a", "type": "date", "earliest": "2026-02-01", "latest": "2026-01-01"}, "/fields/0"),
        ({"name": "a", "type": "rating", "scale": 101}, "/fields/0/scale"),
        (_group([]), "/fields/0/fields"),
        (_group([TEXT], max_items=201, repeated=True), "/fields/0/max_items"),
        (_group([TEXT, {"name": "b", "type": "text", "max_length": -1}]), "/fields/0/fields/1/max_length"),
        ("text", "/fields/0"),
        (None, "/fields/0"),
    ],
)
def test_a_wrong_field_is_refused_with_its_place(owner: Client, field: Any, place: str) -> None:
    answer = _create(owner, [field])
    assert (answer.status, answer.pointers) == (422, [place])


@pytest.mark.parametrize(
    "source",
    [
        "(?=a)a",
        r"(a)\1",
        "[",
        "(((",
        "a)|(?:b",
        "(?x)a #",
        "*",
        r"\w{1000}",
        "(a{100}){1000}",
        "(((a{1,99}){1,99}){1,99}){1,99}",
        "(?:[ab]?){50000}b",
        "a{4294967296}",
        "x" * 201,
    ],
)
def test_a_hostile_pattern_is_refused(owner: Client, source: str) -> None:
    answer = _create(owner, [{"name": "a", "type": "text", "pattern": source}])
    assert (answer.status, answer.pointers) == (422, ["/fields/0/pattern"])


def test_a_form_full_of_large_patterns_is_refused(owner: Client) -> None:
    fields = [{"name": f"a{n}", "type": "text", "pattern": r"\w{90}"} for n in range(200)]
    answer = _create(owner, fields)
    assert (answer.status, answer.pointers) == (422, ["/fields"])
    rows = _group([{"name": "a", "type": "text", "pattern": r"\w{20}"}], repeated=True, max_items=200)
    assert _create(owner, [rows]).status == 422


@pytest.mark.parametrize(
    "source", ["(a+)+", "(a|a)*", "(a|aa)+", "(.*a){12}", "([a-z]+)*x", "(x+x+)+y", "(?:[ab]?){900}b"]
)
def test_no_pattern_runs_away_on_any_text(owner: Client, source: str) -> None:
    """In a backtracking engine each of these takes longer than the test's patience for a text of this length."""
    form = owner.form([{"name": "a", "type": "text", "pattern": source, "max_length": 5000}])
    for text in ("a" * 4999 + "!", "x" * 4999 + "!"):
        assert owner.send("POST", f"/forms/{form}/responses", {"answers": {"a": text}}).status == 422


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("ab", 2),
        ("a{10}", 10),
        ("(ab{3}){4}", 16),
        ("[a-z]{2,30}", 30),
        ("[]a]{3}", 3),
        (r"\w", 25),
        (r"\x{41}{3}", 3),
        ("a{3,}", 4),
        (r"[\w&&[^\d]]", 59),
        ("[0-9a-f]{8}-[0-9a-f]{4}", 13),
        (r"\(a\)\{9\}", 6),
    ],
)
def test_the_weight_of_a_pattern(source: str, expected: int) -> None:
    assert pattern.weight(source) == expected


def test_a_form_may_have_five_hundred_fields_and_no_more(owner: Client) -> None:
    fields = [{"name": f"f{n}", "type": "text"} for n in range(MAX_FIELDS)]
    form = owner.form(fields)
    answers = {f"f{n}": "x" for n in range(MAX_FIELDS)}
    assert owner.call("GET", f"/responses/{owner.submit(form, answers)}")["answers"] == answers
    answer = _create(owner, [*fields, {"name": "one_more", "type": "text"}])
    assert (answer.status, answer.pointers) == (422, ["/fields"])


def test_fields_in_groups_count_too(owner: Client) -> None:
    half = [{"name": f"f{n}", "type": "text"} for n in range(MAX_FIELDS // 2)]
    answer = _create(owner, [{**_group(half), "name": "g"}, {**_group(half), "name": "h"}])
    assert (answer.status, answer.pointers) == (422, ["/fields"])


def test_groups_may_nest_three_deep(owner: Client) -> None:
    form = owner.form([_nested(3)])
    answers = {"g": {"g": {"g": {"leaf": "x"}}}}
    assert owner.call("GET", f"/responses/{owner.submit(form, answers)}")["answers"] == answers
    for depth in (4, 14):
        answer = _create(owner, [_nested(depth)])
        assert (answer.status, answer.pointers) == (422, ["/fields"]), depth
    assert _create(owner, [_nested(40)]).status == 400


def test_a_megabyte_of_fields_is_refused_before_anything_is_made_of_it(owner: Client) -> None:
    """Twenty thousand patterns, compiled one by one, would keep a worker busy for a minute."""
    inner = [{"name": f"f{n}", "type": "text", "pattern": r"\w{99}"} for n in range(140)]
    began = time.process_time()
    answer = _create(owner, [{**_group(inner), "name": f"g{n}"} for n in range(120)])
    assert (answer.status, answer.pointers) == (422, ["/fields"])
    assert time.process_time() - began < 30


def test_names_differ_within_a_group_and_may_repeat_across_groups(owner: Client) -> None:
    answer = _create(owner, [TEXT, TEXT])
    assert (answer.status, answer.pointers) == (422, ["/fields"])
    assert "a" in answer.json()["errors"][0]["detail"]
    assert _create(owner, [_group([TEXT, TEXT])]).status == 422
    assert _create(owner, [TEXT, _group([TEXT])]).status == 201


@pytest.mark.parametrize("name", ["", "x" * 201, "two\nlines", "nul\0", 5, None])
def test_a_wrong_name_of_a_form_is_refused(owner: Client, name: Any) -> None:
    answer = owner.send("POST", "/forms", {"name": name, "fields": [TEXT]})
    assert (answer.status, answer.pointers) == (422, ["/name"])


@pytest.mark.parametrize(
    ("step", "place"),
    [
        ({"name": "s", "type": "email", "to": {"field": "a"}, "subject": "x", "body": "y"}, "to/field"),
        ({"name": "s", "type": "email", "to": ["nobody"], "subject": "x", "body": "y"}, "to/0"),
        ({"name": "s", "type": "sentiment", "fields": ["nope"]}, "fields"),
        ({"name": "s", "type": "summarize", "max_words": 0}, "max_words"),
        ({"name": "s", "type": "webhook", "endpoint": "whe_" + "0" * 26}, "endpoint"),
        ({"name": "s", "type": "sentiment", "odd": 1}, "odd"),
        ({"name": "s", "type": "extract", "json_schema": {"type": "array"}}, ""),
    ],
)
def test_a_wrong_step_is_refused_with_its_place(owner: Client, step: Json, place: str) -> None:
    answer = _create(owner, [TEXT], [step])
    assert answer.status == 422
    assert f"/workflow/steps/0/{place}".rstrip("/") in answer.pointers
