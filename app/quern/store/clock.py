"""Time as Quern keeps it: UTC, to the millisecond that MongoDB stores."""

from datetime import UTC, datetime


def now() -> datetime:
    """The present moment in UTC, cut to whole milliseconds so that what is written equals what is read."""
    moment = datetime.now(UTC)
    return moment.replace(microsecond=moment.microsecond // 1000 * 1000)


def rfc3339(moment: datetime) -> str:
    """RFC 3339 with milliseconds and `Z`, for example `2026-11-22T01:02:03.004Z`."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
