"""What schemas promise: an answer that fits, or none; and no schema that runs away or fetches anything."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from quern.inference import grammar, llama

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def _accepts(model: llama.Model, text: str, answer: str) -> bool:
    rules = llama.Grammar(model.vocabulary, text)
    try:
        for token in model.vocabulary.tokenize(answer, control=False):
            if not rules.allowed(np.array([token], np.int32))[0]:
                return False
            rules.accept(token)
        return bool(rules.allowed(np.array(sorted(model.vocabulary.ends), np.int32)).any())
    finally:
        rules.close()


def test_a_grammar_accepts_what_the_schema_accepts(model: llama.Model) -> None:
    assert _accepts(model, grammar.grammar_for(PERSON), '{"name": "Ann", "age": 3, "tags": ["a", "b"]}')


@pytest.mark.parametrize(
    "answer", ['{"name": "Ann"}', '{"age": 3, "name": "Ann", "tags": []}', "[]", "Sure! {", '{"name": 3']
)
def test_a_grammar_refuses_what_the_schema_does_not_say(model: llama.Model, answer: str) -> None:
    assert not _accepts(model, grammar.grammar_for(PERSON), answer)


@pytest.mark.parametrize("answer", ['{"a": [1, -2.5e3, true, null, {"b": "c\\n"}]}', "{}"])
def test_json_mode_accepts_any_object(model: llama.Model, answer: str) -> None:
    assert _accepts(model, grammar.JSON_OBJECT_GRAMMAR, answer)


def test_json_mode_refuses_endless_blanks(model: llama.Model) -> None:
    assert not _accepts(model, grammar.JSON_OBJECT_GRAMMAR, "{" + " " * 40 + "}")


@pytest.mark.parametrize(
    ("schema", "complaint"),
    [
        ({"$ref": "https://example.org/schema.json"}, "reference within the schema"),
        ({"$ref": "file:///etc/passwd"}, "reference within the schema"),
        ({"$ref": "#/$defs/missing"}, "no grammar"),
        ({"type": "object", "properties": {"a": {"$ref": "http://x"}}}, "/properties/a/\\$ref"),
        ({"type": "no-such-type"}, "not a JSON Schema"),
        ({"type": "object", "properties": []}, "not a JSON Schema"),
        ({"type": "string", "minLength": 10**9}, "expected at most 500"),
        ({"type": "string", "pattern": "^(a{0,3000}){0,3000}$"}, "/pattern: expected a shorter pattern"),
        ({"type": "object", "patternProperties": {"(a+)+$": {}}}, "not supported"),
        ({"enum": ["x" * 70_000]}, "at most 65536 bytes"),
    ],
)
def test_unusable_schemas_are_refused_with_the_place(schema: dict[str, Any], complaint: str) -> None:
    with pytest.raises(grammar.SchemaRefusedError, match=complaint):
        grammar.grammar_for(schema)


def test_an_upper_bound_too_high_for_a_grammar_is_left_to_the_validation(model: llama.Model) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 9000}}, "required": ["a"]}
    assert _accepts(model, grammar.grammar_for(schema), '{"a": "short"}')
    with pytest.raises(grammar.AnswerRefusedError, match="maxLength"):
        grammar.parse_answer('{"a": "' + "x" * 9001 + '"}', schema)


def test_the_highest_bounds_make_a_grammar_that_llama_takes(model: llama.Model) -> None:
    schema = {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": grammar.MAX_REPETITIONS}
    assert _accepts(model, grammar.grammar_for(schema), '["a", "b"]')


def test_a_grammar_that_cannot_be_read_leaves_no_trace_in_a_log(
    model: llama.Model, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(llama.LlamaError):
        llama.Grammar(model.vocabulary, "root ::= SECRET SECRET(")
    assert "SECRET" not in capfd.readouterr().err


def test_a_schema_that_is_too_deep_is_refused() -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(30):
        schema = {"type": "array", "items": schema}
    with pytest.raises(grammar.SchemaRefusedError, match="at most 24 levels"):
        grammar.grammar_for(schema)


def test_a_schema_that_refers_to_itself_makes_a_grammar(model: llama.Model) -> None:
    tree = {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
                "required": ["next"],
            }
        },
    }
    assert _accepts(model, grammar.grammar_for(tree), '{"next": {"next": null}}')


def test_an_answer_is_validated_beyond_the_grammar() -> None:
    # The grammar knows no bounds of numbers, the validation does.
    with pytest.raises(grammar.AnswerRefusedError, match=r"'maximum' at \$\.age"):
        grammar.parse_answer('{"name": "Ann", "age": 151, "tags": []}', PERSON)


def test_a_refusal_never_quotes_the_answer() -> None:
    with pytest.raises(grammar.AnswerRefusedError) as caught:
        grammar.parse_answer('{"name": "SECRET", "age": "SECRET", "tags": []}', PERSON)
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize("text", ['{"name": "Ann", "age": 3', "", "{} {}", '{"a": NaN}', "[" * 100_000])
def test_what_is_not_json_is_refused(text: str) -> None:
    with pytest.raises(grammar.AnswerRefusedError):
        grammar.parse_answer(text, None)


@pytest.mark.parametrize(
    ("text", "inside"),
    [("", False), ('{"a', True), ('{"a"', False), ('{"a\\"', True), ('{"a\\\\"', False), ('{"a": "b\\', True)],
)
def test_it_is_known_whether_a_beginning_ends_within_a_string(text: str, inside: bool) -> None:
    assert grammar.ends_within_string(text) is inside


def test_the_smallest_answer_fits_its_schema() -> None:
    schema = {
        "type": "object",
        "properties": {
            "kind": {"enum": ["a", "bbbb"]},
            "items": {"type": "array", "minItems": 2, "items": {"$ref": "#/$defs/item"}},
            "note": {"type": ["string", "null"], "minLength": 3},
        },
        "required": ["kind", "items", "note"],
        "$defs": {"item": {"type": "object", "properties": {"n": {"type": "number"}}, "required": ["n"]}},
    }
    assert grammar.parse_answer(grammar.smallest_answer(schema), schema)["kind"] == "bbbb"
