"""Moments that clients send: RFC 3339 with a time zone, kept in UTC to the millisecond as the database keeps them."""

import re
from datetime import UTC, datetime
from typing import Annotated, Any, Final

from pydantic import AfterValidator, AwareDatetime, BeforeValidator

_RFC3339: Final = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?([Zz]|[+-][0-9]{2}:[0-9]{2})"
)


def in_utc(moment: datetime) -> datetime:
    """The same moment in UTC, cut to whole milliseconds. Raises ValueError outside the years 1 to 9999, or naive."""
    if moment.tzinfo is None:
        raise ValueError("expected a time zone, for example 2026-11-22T00:00:00Z")
    try:
        moment = moment.astimezone(UTC)
    except OverflowError:
        raise ValueError("expected a moment in the years 1 to 9999, in UTC") from None
    return moment.replace(microsecond=moment.microsecond // 1000 * 1000)


def _rfc3339(value: Any) -> Any:
    # pydantic alone also takes numbers, and days without a time.
    if isinstance(value, datetime):
        return value
    if not isinstance(value, str) or not _RFC3339.fullmatch(value):
        raise ValueError("expected a moment in RFC 3339 with a time zone, for example 2026-11-22T00:00:00Z")
    return value


Moment = Annotated[
    AwareDatetime, BeforeValidator(_rfc3339, json_schema_input_type=AwareDatetime), AfterValidator(in_utc)
]


def parse(text: str) -> datetime:
    """The moment that a cursor holds. Raises ValueError."""
    return in_utc(datetime.fromisoformat(text))
