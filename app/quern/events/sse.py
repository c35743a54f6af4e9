"""The wire format of event streams: WHATWG HTML, "Server-sent events"."""

from collections.abc import Mapping
from typing import Any

import orjson

CONTENT_TYPE = "text/event-stream"


def event(number: int, kind: str, data: Mapping[str, Any]) -> bytes:
    """One event: `number` becomes the client's Last-Event-ID, `data` one line of JSON."""
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (number, kind.encode(), orjson.dumps(data, default=str))


def comment(text: str) -> bytes:
    """A line that a client ignores, and that proves the connection to everything between."""
    return b": %s\n\n" % text.encode()


def retry(milliseconds: int) -> bytes:
    """How long the client shall wait before it connects again, once this stream has ended."""
    return b"retry: %d\n\n" % milliseconds
