"""A report: one HTML file that needs nothing else, with the usual questions as plots and tables."""

import html
from collections.abc import Iterator
from datetime import date, datetime
from typing import Any, Final

from quern.analytics.answer import Answer, Warehouse
from quern.analytics.chart import chart
from quern.analytics.desk import plain_rows
from quern.analytics.plan import Asker
from quern.analytics.question import Question
from quern.store.clock import rfc3339

_MOST_ROWS: Final = 20
_MOST_FIELDS: Final = 12
_STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h2 { margin-top: 2.5rem; font-size: 1.1rem } svg { max-width: 100%; height: auto }
table { border-collapse: collapse; font-size: .85rem } td, th { padding: .2rem .7rem; border-bottom: 1px solid #ddd }
th { text-align: left } td.n { text-align: right; font-variant-numeric: tabular-nums } .dim { color: #777 }
"""


def questions(asker: Asker, bounds: dict[str, Any], zone: str) -> Iterator[tuple[str, Question]]:
    """Titles and questions: those of every house, then one for each choice and rating that its forms ask."""
    common: dict[str, Any] = {"range": bounds, "time_zone": zone}
    fixed: list[tuple[str, dict[str, Any]]] = [
        ("Responses a day", {"measure": "responses", "grain": "day", "statistics": ["count"]}),
        ("Responses by form", {"measure": "responses", "dimensions": ["form"]}),
        ("From arrival to the end of the workflow", {"measure": "response_time", "grain": "week"}),
        ("How far they came", {"measure": "funnel"}),
        ("Answered share of the fields", {"measure": "completion", "dimensions": ["form"]}),
        ("Sentiment", {"measure": "responses", "grain": "week", "dimensions": ["sentiment"], "statistics": ["count"]}),
        ("Labels", {"measure": "responses", "grain": "week", "dimensions": ["label"], "statistics": ["count"]}),
        ("Ratings, scaled to 0…1", {"measure": "rating", "grain": "week"}),
        ("Length of the texts by user", {"measure": "response_length", "dimensions": ["user"]}),
        ("Who came back, by the month of the first response", {"measure": "cohorts", "grain": "month"}),
        ("Words", {"measure": "terms", "min_length": 4, "top": 25}),
        ("What the queues cost", {"measure": "job_run", "dimensions": ["queue", "kind"], "statistics": ["sum", "p95"]}),
    ]
    if asker.operator:
        asked = {"measure": "job_run", "dimensions": ["tenant", "queue"], "statistics": ["sum", "count"]}
        fixed.append(("AI and queues by tenant", asked))
    for title, asked in fixed:
        yield title, Question.model_validate({**asked, **common})
    shown = [name for name, known in sorted(asker.fields.items()) if known.kinds <= {"choice", "rating"}]
    for name in shown[:_MOST_FIELDS]:
        asked = {"measure": "response_time", "dimensions": [name], "statistics": ["mean", "count"]}
        yield f"Time to respond by {name.removeprefix('answer.')}", Question.model_validate({**asked, **common})


def write_report(warehouse: Warehouse, tenant: str | None, start: datetime, until: datetime, zone: str) -> str:
    """The report of a tenant (None: of all) about [start, until), as HTML. Raises as `Warehouse.answer`."""
    manifest = warehouse.current()
    asker = warehouse.asker(manifest, tenant)
    parts = []
    for title, question in questions(asker, {"from": start, "before": until}, zone):
        answer = warehouse.answer(question, tenant)
        drawn = chart(question, answer.table, "svg", title, answer.freshness.complete_until).decode()
        # What stands before the drawing (an XML declaration) is for files of their own.
        parts.append(f"<h2>{html.escape(title)}</h2>{drawn[drawn.index('<svg') :]}{_table(answer)}")
    fresh = rfc3339(manifest.freshness) if manifest.freshness else "–"
    whose = html.escape(tenant or "all tenants")
    head = (
        f"<h1>Responses of {whose}</h1><p>{rfc3339(start)} to {rfc3339(until)}, days in {html.escape(zone)}. "
        f"<span class=dim>Complete until {fresh}, generation {manifest.generation}.</span></p>"
    )
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>Quern report</title>"
        # Nothing in it runs, and nothing is fetched: a label is never more than text.
        "<meta http-equiv=Content-Security-Policy "
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        f"<style>{_STYLE}</style>{head}{''.join(parts)}</html>\n"
    )


def _table(answer: Answer) -> str:
    rows = plain_rows(answer.table.slice(0, _MOST_ROWS))
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in answer.table.column_names)
    body = "".join(f"<tr>{''.join(_cell(value) for value in row)}</tr>" for row in rows)
    beyond = answer.table.num_rows - len(rows)
    more = f"<p class=dim>and {beyond} more rows</p>" if beyond > 0 else ""
    return (
        f"<details><summary>{answer.table.num_rows} rows</summary><table><tr>{heads}</tr>{body}</table>{more}</details>"
    )


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"<td class=n>{value:,.4g}</td>"
    if isinstance(value, int):
        return f"<td class=n>{value:,}</td>"
    if isinstance(value, date):
        return f"<td>{value.isoformat()}</td>"
    return f"<td>{html.escape('–' if value is None else str(value))}</td>"
