"""The rows of `dim_time`: a day each, with what a calendar says of it."""

from datetime import date, timedelta
from typing import Any, Final

FIRST: Final = date(2000, 1, 1)
LAST: Final = date(2099, 12, 31)


def columns() -> dict[str, list[Any]]:
    """The columns of `dim_time`, leap days included."""
    days = [FIRST + timedelta(days=number) for number in range((LAST - FIRST).days + 1)]
    weeks = [day.isocalendar() for day in days]
    quarters = [(day.month + 2) // 3 for day in days]
    return {
        "day": days,
        "year": [day.year for day in days],
        "quarter": quarters,
        "month": [day.month for day in days],
        "day_of_month": [day.day for day in days],
        "day_of_year": [day.timetuple().tm_yday for day in days],
        "iso_year": [week.year for week in weeks],
        "iso_week": [week.week for week in weeks],
        "weekday": [week.weekday for week in weeks],
        "weekend": [week.weekday >= 6 for week in weeks],
        "week_start": [day - timedelta(days=day.weekday()) for day in days],
        "month_start": [day.replace(day=1) for day in days],
        "quarter_start": [
            day.replace(month=quarter * 3 - 2, day=1) for day, quarter in zip(days, quarters, strict=True)
        ],
        "year_start": [day.replace(month=1, day=1) for day in days],
    }
