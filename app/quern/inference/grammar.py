"""A JSON Schema becomes a grammar that the model cannot leave, and the answer is validated again when it is complete.

The grammar cannot say everything that a schema can (the bounds of numbers, say), so the validation decides. Schemas
come from outside: they are bounded in size, depth and repetition, fetch nothing, and their regular expressions are left
to the grammar, which matches them without backtracking.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, ValidationError, best_match
from jsonschema.validators import extend
from llama_cpp.llama_grammar import SchemaConverter

MAX_SCHEMA_BYTES = 64 * 1024
MAX_DEPTH = 24
#: llama.cpp refuses grammars that repeat much more. A higher upper bound is left to the validation.
MAX_REPETITIONS = 500
#: Regular expressions are unrolled by their counts, nested ones by the product of them.
MAX_PATTERN_LENGTH, MAX_PATTERN_PRODUCT = 500, 5_000
MAX_GRAMMAR_BYTES = 512 * 1024
_LOWER_BOUNDS = frozenset({"minLength", "minItems", "minProperties"})
_UPPER_BOUNDS = frozenset({"maxLength", "maxItems"})
#: Keywords that the grammar would let pass and whose check costs more than it is worth, or may run away.
_REFUSED = frozenset(
    {"patternProperties", "unevaluatedProperties", "unevaluatedItems", "$dynamicRef", "$anchor", "$id"}
)
#: JSON as such, with bounded white space: unbounded, a model may fill its whole answer with blanks.
JSON_OBJECT_GRAMMAR = r"""
root ::= object
value ::= object | array | string | number | ("true" | "false" | "null") space
object ::= "{" space ( string ":" space value ("," space string ":" space value)* )? "}" space
array ::= "[" space ( value ("," space value)* )? "]" space
string ::= "\"" char* "\"" space
char ::= [^"\\\x7F\x00-\x1F] | [\\] (["\\bfnrt] | "u" [0-9a-fA-F]{4})
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]{1,16})? ([eE] [-+]? [0-9]{1,3})? space
space ::= | " " | "\n" [ \t]{0,20}
"""

#: What may stand in a JSON string. The converter's own rule lets line breaks through, which JSON does not.
_CHARACTER = r"""[^"\\\x7F\x00-\x1F] | [\\] (["\\bfnrt] | "u" [0-9a-fA-F]{4})"""
#: The binding ships without types.
_CONVERTER: Any = SchemaConverter
_Validator: Any = extend(  # type: ignore[no-untyped-call]
    Draft202012Validator, {"pattern": lambda *_: None, "format": lambda *_: None}
)


class SchemaRefusedError(Exception):
    """The schema cannot be used; the text says where and why."""


class AnswerRefusedError(Exception):
    """The answer is not what the schema asks for."""


def check_schema(schema: dict[str, Any]) -> None:
    """Whether a schema is well-formed, bounded, and needs nothing from elsewhere.

    Raises:
        SchemaRefusedError: it is not.
    """
    if (size := len(json.dumps(schema))) > MAX_SCHEMA_BYTES:
        raise SchemaRefusedError(f"expected a schema of at most {MAX_SCHEMA_BYTES} bytes, found {size}")
    _check_part(schema, "", 0)
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise SchemaRefusedError(f"not a JSON Schema: {error.json_path}: {error.message[:200]}") from error


def _check_part(part: Any, pointer: str, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise SchemaRefusedError(f"expected at most {MAX_DEPTH} levels, found more at {pointer}")
    if isinstance(part, dict):
        for key, value in part.items():
            if key == "$ref" and not (isinstance(value, str) and value.startswith("#/")):
                raise SchemaRefusedError(
                    f"{pointer}/$ref: expected a reference within the schema (#/…), found {value!r}"
                )
            if key in _REFUSED and not pointer.endswith("/properties"):
                raise SchemaRefusedError(f"{pointer}/{key}: this keyword is not supported")
            if key == "pattern" and isinstance(value, str):
                _check_pattern(value, f"{pointer}/{key}")
            if key in _LOWER_BOUNDS and isinstance(value, int) and value > MAX_REPETITIONS:
                raise SchemaRefusedError(f"{pointer}/{key}: expected at most {MAX_REPETITIONS}, found {value}")
            _check_part(value, f"{pointer}/{key}", depth + 1)
    elif isinstance(part, list):
        for index, value in enumerate(part):
            _check_part(value, f"{pointer}/{index}", depth + 1)


def _check_pattern(pattern: str, pointer: str) -> None:
    product = math.prod(max(1, int(count)) for count in re.findall(r"(\d+),?\}", pattern))
    if len(pattern) > MAX_PATTERN_LENGTH or product > MAX_PATTERN_PRODUCT:
        raise SchemaRefusedError(f"{pointer}: expected a shorter pattern with fewer repetitions")


def _without_high_bounds(part: Any) -> Any:
    """A copy in which upper bounds too high for a grammar are left out."""
    if isinstance(part, list):
        return [_without_high_bounds(value) for value in part]
    if not isinstance(part, dict):
        return part
    return {
        key: _without_high_bounds(value)
        for key, value in part.items()
        if not (key in _UPPER_BOUNDS and isinstance(value, int) and value > MAX_REPETITIONS)
    }


def grammar_for(schema: dict[str, Any]) -> str:
    """The GBNF grammar of a schema.

    Raises:
        SchemaRefusedError: the schema is not well-formed, or has no grammar.
    """
    check_schema(schema)
    own = _without_high_bounds(schema)  # a copy: the converter writes into what it is given
    converter: Any = _CONVERTER(prop_order={}, allow_fetch=False, dotall=False, raw_pattern=False)
    try:
        converter.visit(converter.resolve_refs(own, ""), "")
        if "char" in converter._rules:
            converter._rules["char"] = _CHARACTER
        text = converter.format_grammar()
    except RecursionError as error:
        raise SchemaRefusedError("the schema has no grammar: it refers to itself without end") from error
    except (AssertionError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise SchemaRefusedError(f"the schema has no grammar: {type(error).__name__}: {str(error)[:200]}") from error
    if len(text) > MAX_GRAMMAR_BYTES:
        raise SchemaRefusedError(f"expected a grammar of at most {MAX_GRAMMAR_BYTES} bytes, found {len(text)}")
    return str(text)


def parse_answer(text: str, schema: dict[str, Any] | None) -> Any:
    """The answer as JSON, if it is what was asked for.

    Args:
        schema: None for any JSON object.

    Raises:
        AnswerRefusedError: it is not.
    """
    try:
        answer = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise AnswerRefusedError(f"the model's answer is not JSON ({len(text)} characters: cut short?)") from error
    if schema is None:
        if not isinstance(answer, dict):
            raise AnswerRefusedError(f"expected a JSON object, found {type(answer).__name__}")
        return answer
    try:
        problem = best_match(_Validator(schema).iter_errors(answer))
    except (ValidationError, RecursionError) as error:
        raise AnswerRefusedError("the answer cannot be validated") from error
    if problem is not None:
        # The message of jsonschema quotes the answer, which holds a person's words: only where and what rule.
        raise AnswerRefusedError(f"the model's answer breaks {problem.validator!r} at {problem.json_path}")
    return answer


def ends_within_string(text: str) -> bool:
    """Whether a beginning of JSON ends between the quotes of a string."""
    inside = escaped = False
    for character in text:
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = inside
        elif character == '"':
            inside = not inside
    return inside


def smallest_answer(schema: dict[str, Any] | None) -> str:
    """About the shortest JSON that a schema accepts: what an answer needs at least to come to its end."""
    return json.dumps(_smallest(schema or {}, schema or {}, 0))


def _smallest(part: Any, root: dict[str, Any], depth: int) -> Any:
    if not isinstance(part, dict) or depth > MAX_DEPTH:
        return 0
    reference = part.get("$ref")
    if isinstance(reference, str):
        target: Any = root
        for step in reference.removeprefix("#/").split("/"):
            target = target.get(step) if isinstance(target, dict) else None
        return _smallest(target, root, depth + 1)
    if "const" in part:
        return part["const"]
    if isinstance(part.get("enum"), list) and part["enum"]:
        return max(part["enum"], key=lambda value: len(json.dumps(value)))
    for union in ("oneOf", "anyOf"):
        if isinstance(part.get(union), list) and part[union]:
            return max(
                (_smallest(choice, root, depth + 1) for choice in part[union]), key=lambda value: len(json.dumps(value))
            )
    kind = part.get("type")
    kind = kind[0] if isinstance(kind, list) and kind else kind
    if kind == "object" or "properties" in part:
        properties = part.get("properties", {})
        return {name: _smallest(properties.get(name, {}), root, depth + 1) for name in part.get("required", [])}
    if kind == "array":
        return [_smallest(part.get("items", {}), root, depth + 1)] * min(int(part.get("minItems", 0)), 100)
    if kind == "string":
        return "x" * min(int(part.get("minLength", 0)), MAX_REPETITIONS)
    return -0.25 if kind in ("number", "integer") else False


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
