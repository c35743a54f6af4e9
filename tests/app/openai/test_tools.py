"""How calls are forced, and read out of what a model wrote."""

import json
from typing import Any

import jsonschema
import pytest

from quern.inference.grammar import grammar_for
from quern.openai.tools import Call, find_calls, forced_schema

NAMES = {"get_weather", "get_time"}
WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "parameters": {
        "type": "object",
        "properties": {"place": {"$ref": "#/$defs/place"}},
        "required": ["place"],
        "$defs": {"place": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}},
    },
}


@pytest.mark.parametrize(
    ("text", "calls", "rest"),
    [
        ('<tool_call>{"name": "get_time", "arguments": {}}</tool_call>', ["get_time"], ""),
        ('<tool_call>\n{"name": "get_time", "arguments": {}}\n', ["get_time"], ""),
        (
            'Let me see.\n<tool_call>{"name": "get_time"}</tool_call><tool_call>{"name": "get_weather"}</tool_call>',
            ["get_time", "get_weather"],
            "Let me see.",
        ),
        ('[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}]', ["get_weather"], ""),
        ('{"name": "get_weather", "parameters": {"city": "Paris"}}', ["get_weather"], ""),
        ("It is sunny.", [], "It is sunny."),
        ('<tool_call>{"name": "rm", "arguments": {}}</tool_call>', [], None),
        ('<tool_call>{"name": "get_time", "arg</tool_call>', [], None),
        ('{"name": "rm"}', [], None),
        ("[]", [], None),
        ("[" * 100_000, [], None),
    ],
)
def test_calls_of_known_functions_are_found_and_all_else_stays_text(
    text: str, calls: list[str], rest: str | None
) -> None:
    found, around = find_calls(text, NAMES)
    assert [call.name for call in found] == calls
    assert around == (text if rest is None else rest)


def test_arguments_are_json_whatever_the_model_called_them() -> None:
    [call] = find_calls('{"name": "get_weather", "parameters": {"city": "Zürich"}}', NAMES)[0]
    assert call == Call(name="get_weather", arguments='{"city": "Zürich"}')


def test_a_forced_call_fits_one_function_and_keeps_its_references() -> None:
    alone, together = [WEATHER], [WEATHER, {"name": "get_time"}]
    for functions in (alone, together):
        schema = forced_schema(functions)
        assert grammar_for(schema)
        good = {"name": "get_weather", "arguments": {"place": {"city": "Paris"}}}
        jsonschema.validate(good, schema)
        for bad in (
            {"name": "get_weather", "arguments": {"place": {}}},
            {"name": "rm", "arguments": {}},
            {"name": "get_weather"},
        ):
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(bad, schema)
    assert json.dumps(WEATHER).count("#/$defs/place") == 1
