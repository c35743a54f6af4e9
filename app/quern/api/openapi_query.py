"""A query's members as OpenAPI parameters."""

from typing import Any

from pydantic import BaseModel


def parameters(query: type[BaseModel] | None) -> list[dict[str, Any]]:
    """One parameter object for each member; none for no query."""
    if query is None:
        return []
    schema = query.model_json_schema()
    return [
        {
            "name": name,
            "in": "query",
            "required": name in schema.get("required", []),
            "schema": {key: value for key, value in part.items() if key != "description"},
            "description": part.get("description", ""),
        }
        for name, part in schema["properties"].items()
    ]
