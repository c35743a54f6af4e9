"""Request bodies: bytes to JSON, or a clear 4xx."""

import json
from typing import Any, Final

import orjson
from flask import Request
from werkzeug.exceptions import ClientDisconnected, RequestEntityTooLarge

from quern.api.patience import receiving
from quern.api.problem import Problem

MAX_DEPTH: Final = 32


class _TwiceError(Exception):
    pass


def read_json(request: Request, limit: int, seconds: float) -> tuple[Any, bytes]:
    """The JSON value of a request and its bytes, which may take `seconds` to arrive.

    Raises:
        Problem: 408 for a body that is late, 415 for another media type, 413 over `limit` bytes, 400 for what is not
            strict JSON in UTF-8, names a member twice, or nests deeper than MAX_DEPTH.
    """
    if request.mimetype != "application/json" and not request.mimetype.endswith("+json"):
        found = request.mimetype or "none"
        raise Problem(415, f"expected Content-Type: application/json, found {found[:100]}")
    if request.content_encoding:
        raise Problem(415, "expected no Content-Encoding; send the JSON as it is")
    if (request.content_length or 0) > limit:
        raise Problem(413, f"the body has {request.content_length} bytes; at most {limit} are accepted")
    try:
        with receiving(request.environ.get("gunicorn.socket"), seconds):
            raw = request.get_data(cache=False)
    except ClientDisconnected:
        raise Problem(408, "the body did not arrive in time, or not whole") from None
    except RequestEntityTooLarge:
        raise Problem(413, f"the body is too large; at most {limit} bytes are accepted") from None
    return parse(raw, limit), raw


def parse(raw: bytes, limit: int) -> Any:
    """Strict JSON from bytes; raises Problem as `read_json` does."""
    if len(raw) > limit:
        raise Problem(413, f"the body has {len(raw)} bytes; at most {limit} are accepted")
    try:
        value = orjson.loads(raw)
        # orjson keeps the last of two members of one name; another reader may keep the first.
        json.loads(raw.decode(), object_pairs_hook=_once)
    except _TwiceError:
        raise Problem(400, "an object names a member twice") from None
    except (ValueError, RecursionError):
        raise Problem(
            400, "the body is not JSON in UTF-8 (RFC 8259, without NaN, Infinity or lone surrogates)"
        ) from None
    if _deeper_than(value, MAX_DEPTH):
        raise Problem(400, f"the body nests deeper than {MAX_DEPTH} levels")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _TwiceError
    return found


def _deeper_than(value: Any, levels: int) -> bool:
    layer = [value]
    for _ in range(levels + 1):
        layer = [
            item
            for parent in layer
            if isinstance(parent, dict | list)
            for item in (parent.values() if isinstance(parent, dict) else parent)
        ]
        if not layer:
            return False
    return True
