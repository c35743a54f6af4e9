"""An answer becomes a picture, whatever its labels are; a report is one file that fetches and runs nothing."""

import re
import struct
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from matplotlib.dates import date2num

from quern.analytics.answer import Warehouse
from quern.analytics.chart import ChartFormat, chart, cohorts, drawn
from quern.analytics.duckdb_engine import DuckDbEngine
from quern.analytics.period import neighbour, period
from quern.analytics.question import Grain, Measure, Question, Range
from quern.analytics.report import write_report
from tests.app.analytics.world import TENANTS, World, publish, world

LABELS = Question(measure=Measure.RESPONSES, dimensions=["label"])
HOSTILE = ["$\\frac{1}{0}$", "<script>alert(1)</script>", "a\nb", "\u202eabc", "日本語" * 30, "", None]


def table(labels: list[str | None]) -> pa.Table:
    count = len(labels)
    return pa.table({"label": labels, "count": list(range(count)), "share": [1.0 / max(count, 1)] * count})


@pytest.mark.parametrize("form", ["svg", "png"])
def test_hostile_labels_are_drawn_as_text(form: ChartFormat) -> None:
    made = chart(LABELS, table(HOSTILE), form)
    if form == "png":
        assert made.startswith(b"\x89PNG")
        return
    root = ElementTree.fromstring(made)  # noqa: S314 - made by ourselves
    assert not [element for element in root.iter() if element.tag.endswith("script")]
    assert "<script>alert(1)</script>" in "".join(root.itertext())


def test_an_answer_without_rows_is_drawn_as_such() -> None:
    assert b"no data" in chart(LABELS, table([]), "svg")


def test_the_same_answer_gives_the_same_bytes() -> None:
    assert chart(LABELS, table(["a", "b"]), "svg") == chart(LABELS, table(["a", "b"]), "svg")


def test_every_series_of_a_trend_is_named() -> None:
    question = Question(measure=Measure.RESPONSES, grain="day", dimensions=["label"], statistics=["count"])
    days = [date(2024, 2, 28), date(2024, 2, 29)]
    rows = pa.table({"bucket": days * 2, "label": ["x"] * 2 + ["y"] * 2, "count": [1, 2, 3, 4]})
    texts = "".join(ElementTree.fromstring(chart(question, rows, "svg")).itertext())  # noqa: S314
    assert {"x", "y"} <= set(texts.split())


#: What each measure needs besides.
NEEDS: dict[Measure, dict[str, Any]] = {
    Measure.ANSWER: {"of": "answer.stars"},
    Measure.COHORTS: {"grain": "month"},
}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[World, Warehouse]]:
    """A random house, and how to ask of it."""
    made, root = world(3), tmp_path_factory.mktemp("house")
    publish(made, root)
    engine = DuckDbEngine(root, threads=1, memory_megabytes=500)
    yield made, Warehouse(root, engine, seconds=60)
    engine.close()


def texts_of(svg: bytes) -> set[str]:
    root = ElementTree.fromstring(svg)  # noqa: S314 - made by ourselves
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    return {text.strip() for element in root.iter("{http://www.w3.org/2000/svg}text") for text in element.itertext()}


@pytest.mark.parametrize("by_week", [False, True])
@pytest.mark.parametrize("measure", sorted(Measure))
def test_every_measure_is_drawn_in_both_formats(
    house: tuple[World, Warehouse], measure: Measure, *, by_week: bool
) -> None:
    made, warehouse = house
    asked = {"measure": measure, **NEEDS.get(measure, {})}
    if measure is Measure.SIMILAR:
        asked["of"] = next(item["_id"] for item in made.responses if "vector" in item.get("results", {}))
    if by_week:
        if measure in (Measure.TERMS, Measure.SIMILAR):
            with pytest.raises(ValueError, match="takes no grain"):
                Question.model_validate({**asked, "grain": "week"})
            return
        asked["grain"] = "week"
    question = Question.model_validate(asked)
    answer = warehouse.answer(question, None)
    assert answer.table.num_rows > 1 or not by_week
    texts = texts_of(chart(question, answer.table, "svg", until=answer.freshness.complete_until))
    assert measure.value.replace("_", " ") in {text.split(" by ")[0] for text in texts}
    assert "no data" not in texts
    # An axis with numbers, and what they are.
    assert any(re.fullmatch(r"\d+(\.\d+)?", text) for text in texts)
    assert any(text.startswith(("count", "mean", "share", "responses", "similarity")) for text in texts)
    png = chart(question, answer.table, "png", until=answer.freshness.complete_until)
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">4sII", png[12:24]) == (b"IHDR", 960, 480)


def test_each_cohort_is_a_line_from_its_first_period_to_the_last_that_is_complete() -> None:
    bounds = Range(start=datetime(2024, 1, 1, tzinfo=UTC), before=datetime(2026, 1, 1, tzinfo=UTC))
    question = Question(measure=Measure.COHORTS, grain="month", range=bounds)
    january, march = date(2024, 1, 1), date(2024, 3, 1)
    rows = {
        "cohort": [january, january, march, march],
        "period": [0, 3, 0, 1],
        "members": [4, 1, 2, 2],
        "share": [1.0, 0.25, 1.0, 1.0],
    }
    (axes,) = drawn(question, pa.table(rows), None, datetime(2024, 5, 20, tzinfo=UTC)).axes
    # Nobody came back in a month without a row: also in May, which has begun.
    assert {str(line.get_label()): list(line.get_ydata()) for line in axes.lines} == {  # type: ignore[arg-type]
        "2024-01-01": [1, 0, 0, 0.25, 0],
        "2024-03-01": [1, 1, 0],
    }
    assert all(list(line.get_xdata()) == list(range(len(line.get_xdata()))) for line in axes.lines)  # type: ignore[arg-type]
    assert axes.get_xlabel() == "months since the first"
    cut = question.model_copy(update={"top": 4})
    found, _ = cohorts(cut, pa.table(rows), datetime(2024, 4, 2, tzinfo=UTC))
    assert [shares for _, shares in found] == [[1, None, None, 0.25], [1, 1]]


def test_of_many_cohorts_the_greatest_are_drawn_and_the_others_counted() -> None:
    question = Question(measure=Measure.COHORTS, grain="week")
    weeks = [date(2024, 1, 1) + timedelta(weeks=number) for number in range(30)]
    rows = [
        (week, at - number, number + 1 if at == number else 1)
        for number, week in enumerate(weeks)
        for at in range(number, 30)
    ]
    names = ("cohort", "period", "members")
    table = pa.table(dict(zip(names, zip(*rows, strict=True), strict=True)) | {"share": [0.5] * len(rows)})
    texts = texts_of(chart(question, table, "svg"))
    assert {text for text in texts if re.fullmatch(r"\d{4}-\d\d-\d\d", text)} == {
        week.isoformat() for week in weeks[-8:]
    }
    assert "and 22 more" in texts


Rows = list[tuple[date, float | None]]


def lines(question: Question, until: datetime | None = None, **columns: Rows) -> dict[str, Rows]:
    """Label to what a chart draws of it; a break is None. `columns`: label to the rows of an answer."""
    value = question.columns[-1]
    data = [(bucket, label, number) for label, rows in columns.items() for bucket, number in rows]
    made: dict[str, list[object]] = {"bucket": [row[0] for row in data], value: [row[2] for row in data]}
    if question.dimensions:
        made[question.dimensions[0]] = [row[1] for row in data]
    if question.grain == "hour":
        made["bucket"] = pa.array(made["bucket"], pa.timestamp("ms"))
    found = {}
    for line in drawn(question, pa.table(made), None, until).axes[0].lines:
        x: Any = line.get_xdata()
        y: Any = line.get_ydata()
        found[str(line.get_label())] = [
            (at, None if value is None else float(value)) for at, value in zip(x, y, strict=True)
        ]
    return found


def wall(day: int, hour: int) -> datetime:
    """Of March 2024, as the clock on the wall has it."""
    return datetime(2024, 3, day, hour)  # noqa: DTZ001 - an hour's bucket has no zone


def responses(**asked: Any) -> Question:
    """How many, of each period."""
    return Question.model_validate({"measure": "responses", "statistics": ["count"], **asked})


def test_empty_days_are_drawn_as_none_and_not_bridged() -> None:
    first, *empty, last = [date(2024, 2, number) for number in (26, 27, 28, 29)]
    assert lines(responses(grain="day"), count=[(first, 5), (last, 7)]) == {
        "count": [(first, 5), (empty[0], 0), (empty[1], 0), (last, 7)]
    }


def test_a_mean_has_a_break_where_nothing_was_measured() -> None:
    mean = Question(measure=Measure.RESPONSE_TIME, grain="month", statistics=["mean"])
    months = [date(2024, number, 1) for number in (11, 12)] + [date(2025, number, 1) for number in (1, 2)]
    drawn_ = lines(mean, mean=[(months[0], 5.0), (months[2], 7.0), (months[3], None)])
    assert drawn_ == {"mean": [(months[0], 5.0), (months[1], None), (months[2], 7.0), (months[3], None)]}


def test_an_axis_shows_the_whole_range_even_where_nothing_was_measured() -> None:
    bounds = Range(start=datetime(2024, 2, 1, tzinfo=UTC), before=datetime(2024, 3, 1, tzinfo=UTC))
    mean = Question(measure=Measure.RESPONSE_TIME, grain="day", statistics=["mean"], range=bounds)
    rows = pa.table({"bucket": [date(2024, 2, 10), date(2024, 2, 11)], "mean": [1.0, 2.0]})
    low, high = drawn(mean, rows, None, None).axes[0].get_xlim()
    first, last = date2num([date(2024, 2, 1), date(2024, 2, 29)])  # type: ignore[no-untyped-call]
    assert low < first < last < high


def test_what_top_cut_off_is_not_drawn_as_nothing() -> None:
    days = [date(2024, 3, number) for number in (1, 2, 3)]
    rows: Rows = [(days[0], 5), (days[2], 7)]
    assert lines(responses(grain="day", top=2), count=rows)["count"] == [rows[0], (days[1], None), rows[1]]
    assert lines(responses(grain="day", top=3), count=rows)["count"] == [rows[0], (days[1], 0), rows[1]]


def test_a_share_is_none_of_a_period_that_has_others_and_of_an_empty_one_there_is_no_share() -> None:
    share = Question(measure=Measure.RESPONSES, grain="day", dimensions=["label"], statistics=["share"])
    days = [date(2024, 3, number) for number in (1, 2, 3)]
    drawn_ = lines(share, x=[(days[0], 1.0)], y=[(days[2], 1.0)])
    assert drawn_ == {
        "x": [(days[0], 1), (days[1], None), (days[2], 0)],
        "y": [(days[0], 0), (days[1], None), (days[2], 1)],
    }


def test_every_series_runs_from_end_to_end_of_the_range_that_was_asked_for() -> None:
    bounds = Range(start=datetime(2024, 12, 24, 23, 30, tzinfo=UTC), before=datetime(2026, 1, 1, tzinfo=UTC))
    question = responses(grain="week", dimensions=["label"], range=bounds, time_zone="Europe/Berlin")
    weeks = [date(2024, 12, 23), date(2024, 12, 30), date(2025, 1, 6), date(2025, 1, 13)]
    # What is not complete yet is not drawn as empty.
    until = datetime(2025, 1, 15, tzinfo=UTC)
    found = lines(question, until, x=[(weeks[1], 3)], y=[(weeks[2], 4)])
    assert found == {
        "x": list(zip(weeks, [0, 3, 0, 0], strict=True)),
        "y": list(zip(weeks, [0, 0, 4, 0], strict=True)),
    }


def test_an_hour_that_the_clock_left_out_is_no_empty_hour() -> None:
    question = responses(grain="hour", time_zone="Europe/Berlin")
    one, three, five = (wall(31, hour) for hour in (1, 3, 5))
    found = lines(question, count=[(one, 1), (three, 2), (five, 3)])
    assert found == {"count": [(one, 1), (three, 2), (wall(31, 4), 0), (five, 3)]}


def test_a_long_gap_costs_two_points() -> None:
    bounds = {"from": "0001-01-01T00:00:00Z", "before": "9999-12-31T23:59:59Z"}
    question = responses(grain="hour", range=bounds, time_zone="America/New_York")
    (found,) = lines(question, count=[(wall(1, 0), 1)]).values()
    assert len(found) == 7
    assert [y for _, y in found] == [0, 0, 0, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("grain", "first", "second"),
    [
        ("day", date(2024, 2, 29), date(2024, 3, 1)),
        ("week", date(2024, 12, 30), date(2025, 1, 6)),
        ("month", date(2024, 12, 1), date(2025, 1, 1)),
        ("quarter", date(2024, 10, 1), date(2025, 1, 1)),
        ("year", date(2024, 1, 1), date(2025, 1, 1)),
    ],
)
def test_periods_follow_each_other(grain: Grain, first: date, second: date) -> None:
    assert neighbour(first, grain, "UTC", 1) == second
    assert neighbour(second, grain, "UTC", -1) == first
    assert period(datetime(second.year, second.month, second.day, tzinfo=UTC), grain, "UTC") == second
    assert period(datetime(second.year, second.month, second.day, tzinfo=UTC), grain, "America/New_York") == first


def test_a_report_stands_alone(tmp_path: Path) -> None:
    publish(world(3), tmp_path)
    engine = DuckDbEngine(tmp_path, threads=1, memory_megabytes=500)
    warehouse = Warehouse(tmp_path, engine, seconds=60)
    start, until = datetime(2024, 1, 1, tzinfo=UTC), datetime(2025, 1, 2, tzinfo=UTC)
    made = write_report(warehouse, TENANTS[0], start, until, "Europe/Berlin")
    engine.close()
    assert made.count("<svg") >= 13
    assert "months since the first" in made
    assert TENANTS[1] not in made
    assert not re.search(r"<script|<link|<iframe|\son\w+=|src=", made)
