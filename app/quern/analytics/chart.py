"""An answer as a chart: lines over time, a line for each cohort, else bars. SVG or PNG, drawn without a display."""

import io
import threading
import warnings
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from typing import Any, Final, Literal

import pyarrow as pa
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.dates import date2num
from matplotlib.figure import Figure

from quern.analytics import calendar
from quern.analytics.period import neighbour, period
from quern.analytics.question import BUCKET, MEASURES, Measure, Question

ChartFormat = Literal["svg", "png"]

#: Colour-blind safe (M. Okabe and K. Ito, "Color Universal Design").
_COLOURS: Final = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000"]
_MOST_SERIES: Final = 8
_MOST_BARS: Final = 25
_LONGEST: Final = 40
_MARGIN: Final = 0.03
#: Where nothing is, these are 0.
_ZERO: Final = ("count", "sum")
#: Its label, its periods, and a value (or None: a break) for each.
Line = tuple[str, list[date], list[float | None]]
#: Its label, and the share of it that was there in each period from its first.
Cohort = tuple[str, list[float | None]]
#: The warehouse's calendar: an axis goes no further, whatever range is asked for.
_FIRST, _LAST = (datetime(day.year, day.month, day.day, tzinfo=UTC) for day in (calendar.FIRST, calendar.LAST))
#: matplotlib keeps fonts and caches for the whole process.
_lock = threading.Lock()


def chart(
    question: Question, table: pa.Table, form: ChartFormat, title: str | None = None, until: datetime | None = None
) -> bytes:
    """Draw an answer: its first number, by its first column; further dimensions become series, and so do cohorts.

    The same answer gives the same bytes. A line goes through every period from the start of the question's range to
    its end, or to `until` (before which the warehouse is complete) if that is earlier: see `series`.
    """
    with _lock:
        return _rendered(drawn(question, table, title, until), form)


def drawn(question: Question, table: pa.Table, title: str | None, until: datetime | None) -> Figure:
    """The figure of an answer, see `chart`."""
    figure = Figure(figsize=(8, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    value = _value(question)
    if table.num_rows == 0:
        axes.text(0.5, 0.5, "no data", ha="center", va="center", transform=axes.transAxes)
        axes.set_axis_off()
    elif BUCKET in table.column_names:
        _lines(axes, question, table, value, until)
    elif question.measure is Measure.COHORTS:
        _cohorts(axes, question, table, until)
    else:
        _bars(axes, question, table, value)
    axes.set_title(_safe(title or _title(question)), loc="left", fontsize=11, parse_math=False)
    return figure


def series(question: Question, table: pa.Table, value: str, until: datetime | None) -> tuple[list[Line], int]:
    """The greatest lines of an answer with buckets; and how many there are besides.

    A period without rows is 0 where something is counted or summed (and in a share, where its period has others), and
    else, or where `top` may have cut it off, a break: None. Of periods in a row without rows the first and the last
    stand for all: the line is the same.
    """
    keys = [name for name in table.column_names if name in question.dimensions or name == "stage"]
    found: dict[tuple[Any, ...], dict[date, float | None]] = {}
    for row in table.to_pylist():
        found.setdefault(tuple(row[name] for name in keys), {})[row[BUCKET]] = row[value]
    there = {bucket for points in found.values() for bucket in points}
    ends = {*_ends(question, until), min(there), max(there)}
    # What the question cut off may be anything.
    whole = question.top is None or table.num_rows < question.top
    zero, share = whole and value in _ZERO, whole and value == "share"

    def at(bucket: date) -> float | None:
        return 0 if zero or (share and bucket in there) else None

    ordered = sorted(found.items(), key=lambda item: (-sum(part or 0 for part in item[1].values()), _label(item[0])))
    also = ends | there if zero or share else ends
    made = [
        (_label(key) if keys else value, *_filled(points, also, question, at)) for key, points in ordered[:_MOST_SERIES]
    ]
    return made, max(0, len(ordered) - _MOST_SERIES)


def cohorts(question: Question, table: pa.Table, until: datetime | None) -> tuple[list[Cohort], int]:
    """The greatest cohorts in order of time; and how many there are besides.

    Each goes on until the end of the question's range, or what is complete of it: where nobody came back the share is
    0, or where `top` may have cut it off a break.
    """
    found: dict[date, dict[int, float]] = {}
    members: dict[date, int] = {}
    for row in table.to_pylist():
        found.setdefault(row["cohort"], {})[row["period"]] = row["share"]
        members[row["cohort"]] = max(members.get(row["cohort"], 0), row["members"])
    shown = sorted(sorted(found, key=lambda cohort: (-members[cohort], cohort))[:_MOST_SERIES])
    last = max([*_ends(question, until), *found])
    nobody = 0.0 if question.top is None or table.num_rows < question.top else None
    made = []
    for cohort in shown:
        count, bucket = 0, cohort
        while bucket <= last or count <= max(found[cohort]):
            count, bucket = count + 1, neighbour(bucket, question.grain, question.time_zone, 1)
        made.append((cohort.isoformat(), [found[cohort].get(period_, nobody) for period_ in range(count)]))
    return made, len(found) - len(made)


def _filled(
    points: dict[date, float | None], also: set[date], question: Question, at: Callable[[date], float | None]
) -> tuple[list[date], list[float | None]]:
    """The points, those of `also`, and the ends of each gap that is left between; `at` gives what is missing."""
    buckets = {*points, *also}
    for before, after in pairwise(sorted(buckets)):
        first = neighbour(before, question.grain, question.time_zone, 1)
        if first < after:
            buckets |= {first, neighbour(after, question.grain, question.time_zone, -1)}
    shown = sorted(buckets)
    return shown, [points[bucket] if bucket in points else at(bucket) for bucket in shown]


def _ends(question: Question, until: datetime | None) -> set[date]:
    """The first and the last period that the question asks for, where its range has these ends."""
    start, before = question.range.start, question.range.before
    last = min(before, until or before) if before else None
    moments = [start] if start else []
    if last and (start is None or start < last):
        moments.append(last - timedelta.resolution)
    return {period(min(max(moment, _FIRST), _LAST), question.grain, question.time_zone) for moment in moments}


def _rendered(figure: Figure, form: ChartFormat) -> bytes:
    from matplotlib import rc_context

    sink = io.BytesIO()
    # Text stays text, identifiers and dates do not change from run to run.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "quern"}), warnings.catch_warnings():
        # A character that the font lacks is drawn as a box, and stands in the SVG as itself.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        if form == "svg":
            FigureCanvasSVG(figure).print_svg(sink, metadata={"Date": None, "Creator": None})  # type: ignore[no-untyped-call]
        else:
            FigureCanvasAgg(figure).print_png(sink, metadata={"Software": None})  # type: ignore[no-untyped-call]
    return sink.getvalue()


def _value(question: Question) -> str:
    if question.measure is Measure.COHORTS:
        return "share"
    for name in question.columns:
        if name in ("mean", "sum", "p50", "count", "responses", "similarity", "min", "max", "p75", "p90", "p95", "p99"):
            return _preferred(question) or name
    return question.columns[-1]


def _preferred(question: Question) -> str | None:
    # The count of a mean is not what was asked for.
    return next((name for name in question.columns if name in ("mean", "sum")), None)


def _title(question: Question) -> str:
    by = [*question.dimensions, *([] if question.grain == "all" else [question.grain])]
    return question.measure.value.replace("_", " ") + (f" by {', '.join(by)}" if by else "")


def _safe(text: Any) -> str:
    shown = "–" if text is None else "".join(part if part.isprintable() else "·" for part in str(text))
    return shown if len(shown) <= _LONGEST * 2 else shown[: _LONGEST * 2 - 1] + "…"


def _label(parts: Sequence[Any]) -> str:
    text = ", ".join(_safe(part) for part in parts)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _unit(question: Question, value: str) -> str:
    unit = MEASURES[question.measure].unit
    return f"{value} ({unit})" if unit and value not in ("count", "share") else value


def _lines(axes: Any, question: Question, table: pa.Table, value: str, until: datetime | None) -> None:
    # The greatest series are shown; how many are not is said.
    found, beyond = series(question, table, value, until)
    for colour, (name, x, y) in zip(_COLOURS, found, strict=False):
        # A period between two breaks would not be seen without a mark.
        marker = "." if len(x) < 60 or None in y else None
        axes.plot(x, y, color=colour, label=name, marker=marker, linewidth=1.5)
    # What begins or ends with a break is none the less asked for.
    dates = [at for _, x, _ in found for at in x]
    low, high = date2num([min(dates), max(dates)])  # type: ignore[no-untyped-call]
    if low < high:
        axes.set_xlim(low - (high - low) * _MARGIN, high + (high - low) * _MARGIN)
    axes.set_ylabel(_unit(question, value))
    axes.set_ylim(bottom=0 if all((part or 0) >= 0 for _, _, y in found for part in y) else None)
    axes.grid(axis="y", alpha=0.3)
    axes.figure.autofmt_xdate()
    if len(found) > 1:
        _legend(axes, beyond)


def _cohorts(axes: Any, question: Question, table: pa.Table, until: datetime | None) -> None:
    found, beyond = cohorts(question, table, until)
    for colour, (name, shares) in zip(_COLOURS, found, strict=False):
        axes.plot(range(len(shares)), shares, color=colour, label=name, marker=".", linewidth=1.5)
    axes.set_xlabel(f"{question.grain}s since the first")
    axes.set_ylabel("share")
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", alpha=0.3)
    _legend(axes, beyond)


def _legend(axes: Any, beyond: int) -> None:
    made = axes.legend(fontsize=8, title=f"and {beyond} more" if beyond > 0 else None)
    for text in made.get_texts():
        # A label is data: a dollar sign in it is no formula.
        text.set_parse_math(False)


def _bars(axes: Any, question: Question, table: pa.Table, value: str) -> None:
    shown = {"count", "share", "sum", "mean", "min", "max", "p50", "p75", "p90", "p95", "p99"}
    shown |= {"responses", "occurrences", "members", "similarity", "position"}
    keys = [name for name in table.column_names if name not in shown]
    rows = table.slice(0, _MOST_BARS).to_pylist()
    labels = [_label([row[name] for name in keys]) if keys else question.measure.value for row in rows]
    places = list(range(len(rows)))
    axes.barh(places, [row[value] or 0 for row in rows], color=_COLOURS[0])
    axes.set_yticks(places, labels, fontsize=8, parse_math=False)
    axes.invert_yaxis()
    beyond = f"; {table.num_rows - _MOST_BARS} more are not shown" if table.num_rows > _MOST_BARS else ""
    axes.set_xlabel(_unit(question, value) + beyond)
    axes.grid(axis="x", alpha=0.3)
