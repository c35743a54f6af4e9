"""The part of the OpenAPI description that another process serves: `/v1`, in OpenAI's shapes."""

from typing import Any

from pydantic import BaseModel

from quern.api.openapi_query import parameters
from quern.openai.answermodels import ApiFailure
from quern.openai.endpoints import ENDPOINTS, Endpoint, FileUpload

#: What any route may come to: no key, no scope, too many requests, a part that is away.
_ALWAYS = (401, 403, 429, 503)


def models() -> set[tuple[type[BaseModel], Any]]:
    """Every model that the routes speak of, and in which direction."""
    found: set[tuple[type[BaseModel], Any]] = {(ApiFailure, "serialization")}
    for endpoint in ENDPOINTS:
        if endpoint.body:
            found.add((endpoint.body, "validation"))
        found |= {(model, "serialization") for model in (endpoint.answer, endpoint.event) if model}
    return found


def paths(references: dict[Any, Any]) -> dict[str, Any]:
    """The paths. `references`: (model, direction) to its schema, as pydantic makes it."""
    made: dict[str, Any] = {}
    for endpoint in ENDPOINTS:
        made.setdefault(f"/v1{endpoint.path}", {})[endpoint.method.lower()] = _operation(endpoint, references)
    return made


def _operation(endpoint: Endpoint, references: dict[Any, Any]) -> dict[str, Any]:
    names = [part[1:-1] for part in endpoint.path.split("/") if part.startswith("{")]
    made: dict[str, Any] = {
        "operationId": f"v1_{endpoint.method.lower()}{endpoint.path.translate({47: '_', 123: None, 125: None})}",
        "summary": endpoint.summary,
        "description": f"{endpoint.description}\n\nScope: `{endpoint.scope}`.".strip(),
        "tags": ["openai"],
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
            for name in names
        ]
        + parameters(endpoint.query),
        "responses": {"200": _answer(endpoint, references)},
    }
    if endpoint.is_job:
        schema = {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[ -~]+$"}
        made["parameters"].append(
            {
                "name": "Idempotency-Key",
                "in": "header",
                "required": False,
                "schema": schema,
                "description": "The same key and body join the same request, running or answered.",
            }
        )
    if endpoint.body:
        media = "multipart/form-data" if endpoint.body is FileUpload else "application/json"
        schema = references[(endpoint.body, "validation")]
        made["requestBody"] = {"required": True, "content": {media: {"schema": schema}}}
    failure = references[(ApiFailure, "serialization")]
    error = {"description": "An error in OpenAI's envelope", "content": {"application/json": {"schema": failure}}}
    for status in sorted({*_ALWAYS, *endpoint.refusals, *((400, 413) if endpoint.body else ())}):
        made["responses"][str(status)] = error
    return made


def _answer(endpoint: Endpoint, references: dict[Any, Any]) -> dict[str, Any]:
    if endpoint.answer is None:
        bytes_ = {"schema": {"type": "string", "format": "binary"}}
        return {"description": "The content", "content": {"application/octet-stream": bytes_}}
    content: dict[str, Any] = {"application/json": {"schema": references[(endpoint.answer, "serialization")]}}
    description = (endpoint.answer.__doc__ or "").strip().split("\n")[0]
    if endpoint.event:
        model = f"#/components/schemas/{endpoint.event.__name__}"
        said = f"Server-sent events; the `data` of each is a `{model}`, or the envelope of an error."
        content["text/event-stream"] = {"schema": {"type": "string", "description": said}}
    return {"description": description, "content": content}
