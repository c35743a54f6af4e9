"""The OpenAPI 3.1 description, made from the operations: what is documented is what is enforced."""

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from quern.api import idempotency, openapi_v1
from quern.api.openapi_query import parameters
from quern.api.operation import PREFIX_OF, Operation
from quern.api.problem import ProblemDetails
from quern.store import identifier


def describe(operations: Iterable[Operation], version: str) -> dict[str, Any]:
    """The whole description as a JSON value: `operations` below `/api/v1`, and all of `/v1`."""
    made = list(operations)
    models: set[tuple[type[BaseModel], Any]] = {(ProblemDetails, "serialization")}
    for operation in made:
        if operation.body:
            models.add((operation.body, "validation"))
        models |= {(model, "serialization") for model in operation.answers.values() if isinstance(model, type)}
    models |= openapi_v1.models()
    ordered = sorted(models, key=lambda pair: (pair[0].__name__, pair[1]))
    references, definitions = models_json_schema(ordered, ref_template="#/components/schemas/{model}")
    paths: dict[str, Any] = {}
    for operation in made:
        paths.setdefault(f"/api/v1{operation.path}", {})[operation.method.lower()] = _operation(operation, references)
    paths |= openapi_v1.paths(references)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Quern",
            "version": version,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            "description": "Forms in; summaries, labels, extracted fields, embeddings, email and signed webhooks out.",
        },
        "paths": paths,
        "components": {
            "schemas": definitions.get("$defs", {}),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "An API key, `qrn_…`"}},
        },
        "security": [{"key": []}],
    }


def _operation(operation: Operation, references: dict[Any, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {
        "operationId": operation.method.lower() + operation.path.translate({47: "_", 123: None, 125: None}),
        "summary": operation.summary,
        "description": f"{operation.description}\n\nScope: `{operation.scope}`.".strip(),
        "tags": [operation.tag],
        "parameters": [
            *_path_parameters(operation.path),
            *parameters(operation.query),
        ],
        "responses": {str(status): _answer(model, references) for status, model in operation.answers.items()},
    }
    if operation.unsafe:
        made["parameters"].append(
            {
                "name": idempotency.HEADER,
                "in": "header",
                "required": False,
                "schema": {
                    "type": "string",
                    "minLength": 1,
                    "maxLength": idempotency.MAX_LENGTH,
                    "pattern": idempotency.PATTERN,
                },
                "description": "The same request under the same key has one effect and the same answer, for a day.",
            }
        )
    if operation.body:
        schema = references[(operation.body, "validation")]
        made["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if operation.headers:
        shown = {name: {"description": said, "schema": {"type": "string"}} for name, said in operation.headers.items()}
        for answer in made["responses"].values():
            answer["headers"] = shown
    problem = {
        "description": "A problem (RFC 9457)",
        "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/ProblemDetails"}}},
    }
    statuses = ["400", "401", "403", "404", "429", "503"]
    if operation.body:
        statuses += ["413", "415"]
    if operation.query:
        statuses.append("414")
    if operation.body:
        statuses.append("408")
    statuses.append("422")
    if operation.unsafe:
        statuses += ["409", "422"]
    for status in sorted(set(statuses)):
        made["responses"].setdefault(status, problem)
    return made


def _answer(model: type[BaseModel] | str | None, references: dict[Any, Any]) -> dict[str, Any]:
    if model is None:
        return {"description": "Done"}
    if isinstance(model, str):
        names = ["application/jsonl", "text/csv"] if model == "application/jsonl" else model.split(", ")
        return {"description": "A stream", "content": {name: {"schema": {"type": "string"}} for name in names}}
    schema = references[(model, "serialization")]
    return {
        "description": (model.__doc__ or "Done").strip().split("\n")[0],
        "content": {"application/json": {"schema": schema}},
    }


def _path_parameters(path: str) -> list[dict[str, Any]]:
    names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    pattern = identifier.PATTERN.removeprefix("[a-z]{3}")
    return [
        {
            "name": name,
            "in": "path",
            "required": True,
            "schema": {"type": "string", "pattern": f"^{PREFIX_OF[name]}{pattern}$"},
        }
        for name in names
    ]
