"""Cursors of lists: opaque to the client, a position in a stable order to us."""

import base64
import binascii

import orjson


class BadCursorError(ValueError):
    """The cursor was not made by this list."""


def encode(*position: str) -> str:
    """The cursor that stands after `position`."""
    return base64.urlsafe_b64encode(orjson.dumps(position)).decode().rstrip("=")


def decode(cursor: str, length: int) -> list[str]:
    """The position behind a cursor of `length` parts. Raises BadCursorError."""
    try:
        position = orjson.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
    except (binascii.Error, ValueError):
        raise BadCursorError("not a cursor of this list") from None
    if not isinstance(position, list) or len(position) != length or not all(isinstance(part, str) for part in position):
        raise BadCursorError("not a cursor of this list")
    return position
