"""From MongoDB through the real ETL: every question equals plain Python over the documents that are there."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from quern.analytics.answer import Warehouse
from quern.analytics.duckdb_engine import DuckDbEngine
from quern.analytics.question import Question
from quern.forms.fields import MAX_FIELDS
from tests.app.analytics import plainly
from tests.app.analytics.desk import Desk, moment
from tests.app.analytics.questions import questions
from tests.app.analytics.test_questions import same
from tests.app.analytics.world import FORMS, TENANTS, TIMES, World, world


def keep(desk: Desk, made: World) -> None:
    """Put a random house into MongoDB."""
    desk.db.forms.delete_many({})
    desk.db.form_versions.delete_many({})
    desk.db.tenants.insert_many([{"_id": tenant, "name": tenant, "created": TIMES[0]} for tenant in TENANTS])
    for form in FORMS:
        desk.db.forms.insert_one(
            {"_id": form, "tenant": made.owner(form), "name": "x", "status": "open", "version": 1, "created": TIMES[0]}
        )
    for (form, number), (definition, workflow) in made.versions.items():
        desk.db.form_versions.insert_one(
            {
                "_id": f"{form}:{number}",
                "tenant": made.owner(form),
                "form": form,
                "version": number,
                "name": "x",
                "definition": definition,
                "workflow": workflow,
                "published": TIMES[0],
            }
        )
    desk.db.responses.insert_many(made.responses)
    desk.db.jobs.insert_many(made.jobs)
    desk.db.audit.insert_many(made.audit)


@pytest.mark.parametrize("seed", [11, 12, 13])
def test_every_question_equals_plain_python_over_mongodb(desk: Desk, seed: int) -> None:
    made = world(seed)
    keep(desk, made)
    desk.run(everything=True)
    stored = World(
        made.versions,
        *(list(desk.db[name].find({"tenant": {"$in": TENANTS}})) for name in ("responses", "jobs", "audit")),
    )

    @hypothesis.given(data=st.data())
    @hypothesis.settings(max_examples=40, suppress_health_check=list(hypothesis.HealthCheck), database=None)
    def ask(data: st.DataObject) -> None:
        # None: the operator, who sees all of them.
        tenant = data.draw(st.sampled_from([*TENANTS, None]))
        question = data.draw(questions(made, tenant))
        same(warehouse.answer(question, tenant).table, plainly.answer(question, stored, tenant), question)

    with _warehouse(desk) as warehouse:
        ask()


@contextmanager
def _warehouse(desk: Desk) -> Iterator[Warehouse]:
    root = desk.root / "warehouse"
    engine = DuckDbEngine(root, threads=1, memory_megabytes=500)
    try:
        yield Warehouse(root, engine, seconds=60)
    finally:
        engine.close()


def test_wide_forms_long_texts_and_hostile_names_are_asked_about_like_all_others(desk: Desk) -> None:
    hostile = ["select", "response", "day", "value_text", "drop_table", "constructor"]
    fields: list[dict[str, Any]] = [{"name": name, "type": "text"} for name in hostile]
    fields += [{"name": f"f{number}", "type": "number"} for number in range(MAX_FIELDS - len(hostile) - 2)]
    fields += [
        {"name": "from", "type": "choice", "options": [{"value": value} for value in _VALUES]},
        {"name": "where", "type": "long_text", "max_length": 500_000},
    ]
    desk.publish(fields)
    numbers = {f"f{number}": number * 0.5 for number in range(MAX_FIELDS - len(hostile) - 2)}
    text = "数字 é🌾🌾 " * 70_000
    assert len(text.encode()) > 1_000_000
    for place, value in enumerate([*_VALUES, *_VALUES[:2]]):
        answers = {**numbers, **dict.fromkeys(hostile, value), "from": value}
        desk.submit(moment("2024-02-29", place), {**answers, "where": text} if place == 0 else answers)
    desk.run()
    expected = Counter([*_VALUES, *_VALUES[:2]])
    with _warehouse(desk) as warehouse:

        def ask(**asked: Any) -> list[list[Any]]:
            found = warehouse.answer(Question.model_validate(asked), desk.tenant).table
            return [list(row.values()) for row in found.to_pylist()]

        for name in [*hostile, "from"]:
            by_value = ask(measure="responses", dimensions=[f"answer.{name}"], statistics=["count"])
            assert {row[0]: row[1] for row in by_value} == expected, name
            for value in _VALUES:
                only = [{"dimension": f"answer.{name}", "values": [value]}]
                found = ask(measure="responses", filters=only, statistics=["count"])
                assert found == [[expected[value]]], (name, value)
        last = f"f{len(numbers) - 1}"
        assert ask(measure="answer", of=f"answer.{last}", statistics=["count", "max"]) == [[6, numbers[last]]]
        assert ask(measure="completion", statistics=["max"]) == [[1.0]]
        assert ask(measure="response_length", statistics=["max"]) == [[len(text) + len(hostile) * len(_VALUES[0])]]
        terms = ask(measure="terms", of="answer.where", min_length=1)
        assert terms == [["é", 1, 70_000], ["数字", 1, 70_000]]


#: What would end a statement, a string, a path or a cell of a table.
_VALUES = ["'; DROP TABLE fact_response; --", '"\\x00%s', "=1+1", "é\u202e🌾"]
