"""An answer becomes a picture, whatever its labels are; a report is one file that fetches and runs nothing."""

import re
import xml.etree.ElementTree as ElementTree
from datetime import UTC, date, datetime
from pathlib import Path

import pyarrow as pa
import pytest

from quern.analytics.answer import Warehouse
from quern.analytics.chart import ChartFormat, chart
from quern.analytics.duckdb_engine import DuckDbEngine
from quern.analytics.question import Measure, Question
from quern.analytics.report import write_report
from tests.app.analytics.world import TENANTS, publish, world

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


def test_a_report_stands_alone(tmp_path: Path) -> None:
    publish(world(3), tmp_path)
    engine = DuckDbEngine(tmp_path, threads=1, memory_megabytes=500)
    warehouse = Warehouse(tmp_path, engine, seconds=60)
    start, until = datetime(2024, 1, 1, tzinfo=UTC), datetime(2025, 1, 2, tzinfo=UTC)
    made = write_report(warehouse, TENANTS[0], start, until, "Europe/Berlin")
    engine.close()
    assert made.count("<svg") >= 12
    assert TENANTS[1] not in made
    assert not re.search(r"<script|<link|<iframe|\son\w+=|src=", made)
