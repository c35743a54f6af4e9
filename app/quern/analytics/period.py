"""The periods of a grain, named as the column `bucket` names them: by their first day, of hours by their first moment.

All of it is a time zone's wall-clock time, as in the answers.
"""

from datetime import UTC, date, datetime, timedelta
from typing import Final
from zoneinfo import ZoneInfo

from quern.analytics.question import Grain

_MONTHS: Final = {"month": 1, "quarter": 3, "year": 12}
_DAYS: Final = {"day": 1, "week": 7}
_HOUR: Final = timedelta(hours=1)
#: No clock was ever set forward by more at once, but where a zone left a day out.
_MOST_HOURS_LEFT_OUT: Final = 25


def period(moment: datetime, grain: Grain, zone: str) -> date:
    """The period that a moment is in: a date, of the grain `hour` a datetime without a zone."""
    local = moment.astimezone(ZoneInfo(zone)).replace(tzinfo=None)
    if grain == "hour":
        return local.replace(minute=0, second=0, microsecond=0)
    day = local.date()
    if grain == "week":
        return day - timedelta(days=day.weekday())
    months = _MONTHS.get(grain)
    return day if months is None else day.replace(month=(day.month - 1) // months * months + 1, day=1)


def neighbour(bucket: date, grain: Grain, zone: str, step: int) -> date:
    """The period after (step 1) or before (step -1) one. Raises OverflowError and ValueError beyond the calendar."""
    if isinstance(bucket, datetime):
        made = bucket + step * _HOUR
        for _ in range(_MOST_HOURS_LEFT_OUT):
            if _exists(made, zone):
                break
            made += step * _HOUR
        return made
    if (days := _DAYS.get(grain)) is not None:
        return bucket + timedelta(days=days * step)
    months = bucket.year * 12 + bucket.month - 1 + _MONTHS[grain] * step
    return bucket.replace(year=months // 12, month=months % 12 + 1)


def _exists(local: datetime, zone: str) -> bool:
    # An hour that the clock left out has no moment: what it would be is another hour's.
    there = local.replace(tzinfo=ZoneInfo(zone))
    return there.astimezone(UTC).astimezone(there.tzinfo).replace(tzinfo=None) == local
