"""Function calls: how tools are told to a model, how a call is forced, and how calls are read out of its answer.

A model whose template knows tools gets them through it. Any other is told of them in words, in the form that Hermes
made common (`<tool_call>{"name", "arguments"}</tool_call>`). A forced call needs neither: a grammar lets nothing else
through.
"""

import json
import re
from typing import Any

from pydantic import BaseModel

Function = dict[str, Any]
"""`name`, `description` and `parameters`, a JSON Schema."""

_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
_MARKED = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)
_MISTRAL = "[TOOL_CALLS]"
_INSTRUCTIONS = """You may call functions. Each line is one, with its parameters as JSON Schema:
{functions}
To call one, answer with nothing but <tool_call>{{"name": "…", "arguments": {{…}}}}</tool_call>."""


class Call(BaseModel):
    """One call: the function's name, and its arguments as JSON text."""

    name: str
    arguments: str


def for_template(functions: list[Function]) -> list[dict[str, Any]]:
    """The tools as chat templates expect them."""
    return [{"type": "function", "function": _whole(function)} for function in functions]


def in_words(functions: list[Function]) -> str:
    """The tools as text, for a model whose template has no place for them."""
    lines = "\n".join(json.dumps(_whole(function), ensure_ascii=False) for function in functions)
    return _INSTRUCTIONS.format(functions=lines)


def call_in_words(name: str, arguments: Any) -> str:
    """An earlier call as text."""
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>{call}</tool_call>"


def forced_schema(functions: list[Function]) -> dict[str, Any]:
    """The JSON Schema of an answer that is one call of one of these functions."""
    choices, definitions = [], {}
    for index, function in enumerate(functions):
        place = f"f{index}"
        definitions[place] = _moved(_whole(function)["parameters"], f"#/$defs/{place}")
        choices.append(
            {
                "type": "object",
                "properties": {"name": {"const": function["name"]}, "arguments": {"$ref": f"#/$defs/{place}"}},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    return {"anyOf": choices, "$defs": definitions} if len(choices) > 1 else {**choices[0], "$defs": definitions}


def _moved(part: Any, root: str) -> Any:
    """A schema whose references still hold when it stands at `root` of another one."""
    if isinstance(part, list):
        return [_moved(item, root) for item in part]
    if not isinstance(part, dict):
        return part
    return {
        key: root + value[1:]
        if key == "$ref" and isinstance(value, str) and value.startswith("#")
        else _moved(value, root)
        for key, value in part.items()
    }


def _whole(function: Function) -> Function:
    return {
        "name": function["name"],
        "description": function.get("description") or "",
        "parameters": function.get("parameters") or _NO_PARAMETERS,
    }


def find_calls(text: str, names: set[str]) -> tuple[list[Call], str]:
    """The calls of known functions in an answer, and the text around them.

    Knows the forms of Hermes and Qwen, of Mistral, and bare JSON as Llama 3 writes it (`parameters` for `arguments`).
    What does not parse, or names a stranger, stays text.
    """
    if marked := _MARKED.findall(text):
        calls = [call for part in marked for call in _read(part, names)]
        if len(calls) == len(marked):
            return calls, _MARKED.sub("", text).strip()
        return [], text
    before, found, after = text.partition(_MISTRAL)
    bare = after if found else text
    calls = _read(bare.strip(), names)
    return (calls, before.strip() if found else "") if calls else ([], text)


def _read(text: str, names: set[str]) -> list[Call]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return []
    calls = []
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, dict) or item.get("name") not in names:
            return []
        arguments = item.get("arguments", item.get("parameters", {}))
        calls.append(
            Call(
                name=item["name"],
                arguments=arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False),
            )
        )
    return calls
