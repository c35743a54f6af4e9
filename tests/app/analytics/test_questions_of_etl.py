"""From MongoDB through the real ETL: every question equals plain Python over the documents that are there."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from quern.analytics.answer import Warehouse
from quern.analytics.clickhouse_engine import ClickHouseEngine, Server
from quern.analytics.duckdb_engine import DuckDbEngine
from quern.analytics.engine import Engine
from quern.analytics.question import Question
from quern.forms.fields import MAX_FIELDS, NAME
from quern.store import clock
from quern.store.connection import Store
from tests.app.analytics import chdb_server, plainly
from tests.app.analytics.desk import Desk, moment
from tests.app.analytics.questions import questions
from tests.app.analytics.test_questions import same
from tests.app.analytics.world import FORMS, TENANTS, TIMES, Document, World, grow, world


def keep(desk: Desk, made: World) -> None:
    """Put a random house into MongoDB."""
    for name in ("forms", "form_versions", "tenants", "responses", "jobs", "audit"):
        desk.db[name].delete_many({})
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


@pytest.fixture(scope="module")
def clickhouse() -> Iterator[str]:
    """The URL of a ClickHouse."""
    with chdb_server.serve() as url:
        yield url


@contextmanager
def _warehouses(desk: Desk, clickhouse: str) -> Iterator[list[Warehouse]]:
    """What a desk has published, for each engine."""
    root = desk.root / "warehouse"
    server = Server(clickhouse, chdb_server.USER, chdb_server.PASSWORD, 2000)
    engines: list[Engine] = [
        DuckDbEngine(root, threads=1, memory_megabytes=500),
        ClickHouseEngine(server, root, str(root)),
    ]
    try:
        yield [Warehouse(root, engine, seconds=60) for engine in engines]
    finally:
        for engine in engines:
            engine.close()


#: Names of fields that a form may have, beside those that the house's own fields have.
_NAMES = st.from_regex(NAME.strip("^$"), fullmatch=True).filter(
    lambda name: (
        name.lower() not in {"sector", "stars", "email", "comment", "mixed", "age", "terms", "topics"}
        and name.lower() not in {"visit", "title", "place", "items"}
    )
)


@hypothesis.given(
    seed=st.integers(0, 2**32), names=st.lists(_NAMES, min_size=2, max_size=3, unique_by=lambda name: name.lower())
)
@hypothesis.settings(
    max_examples=3,
    # A house is not made smaller: its seed says which it was.
    phases=[hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
    database=None,
)
def test_every_question_equals_plain_python_over_mongodb(
    store: Store, tmp_path_factory: pytest.TempPathFactory, clickhouse: str, seed: int, names: list[str]
) -> None:
    desk = Desk(store.db, tmp_path_factory.mktemp("house"))
    now = clock.now()
    # In the month that is open, and before it, besides.
    made = world(seed, names=names, times=[*TIMES, now - timedelta(days=3), now - timedelta(days=40)])
    keep(desk, made)
    desk.run(everything=True)
    assert {len(item.period) for item in desk.manifest.partitions("fact_response", TENANTS[0])} == {7, 10}
    _ask(desk, made, clickhouse)
    forgotten = _go_on(desk, made, random.Random(seed))
    assert desk.run().outcome == "published"
    _ask(desk, made, clickhouse, forgotten)


def _go_on(desk: Desk, made: World, source: random.Random) -> list[Document]:
    """Late responses and new ones; some end, some are erased; jobs that MongoDB forgets, which it returns."""
    before = [item for item in made.responses if item["status"] != "erased"]
    grow(made, source, f"later-{source.random()}", 20)
    known = {item["_id"] for item in desk.db.responses.find({}, {"_id": 1})}
    desk.db.responses.insert_many([item for item in made.responses if item["_id"] not in known])
    for collection, documents in ((desk.db.jobs, made.jobs), (desk.db.audit, made.audit)):
        there = {item["_id"] for item in collection.find({}, {"_id": 1})}
        collection.insert_many([item for item in documents if item["_id"] not in there])
    source.shuffle(before)
    for item in [item for item in before if item["status"] == "processing"][:3]:
        desk.tenant = item["tenant"]
        desk.finish(item["_id"], before[0]["results"])
    for item in before[:4]:
        desk.tenant = item["tenant"]
        desk.erase(item["_id"])
    # As their time to live does, where the day was long ago.
    lasting = {item["_id"] for item in before[4:] if item["created"] < TIMES[-1] + timedelta(days=9)}
    forgotten = [job for job in made.jobs if job["subject"] in lasting and job["state"] == "done"][:9]
    assert forgotten
    desk.db.jobs.delete_many({"_id": {"$in": [job["_id"] for job in forgotten]}})
    return forgotten


def _ask(desk: Desk, made: World, clickhouse: str, forgotten: Sequence[Document] = ()) -> None:
    """Random questions, to each engine; `forgotten`: jobs that only the warehouse still knows."""
    responses, jobs, audit = (
        list(desk.db[name].find({"tenant": {"$in": TENANTS}})) for name in ("responses", "jobs", "audit")
    )
    stored = replace(made, responses=responses, jobs=[*jobs, *forgotten], audit=audit)

    @hypothesis.given(data=st.data())
    @hypothesis.settings(max_examples=20, suppress_health_check=list(hypothesis.HealthCheck), database=None)
    def ask(data: st.DataObject) -> None:
        # None: the operator, who sees all of them.
        tenant = data.draw(st.sampled_from([*TENANTS, None]))
        question = data.draw(questions(stored, tenant))
        expected = plainly.answer(question, stored, tenant)
        for warehouse in warehouses:
            same(warehouse.answer(question, tenant).table, expected, question)

    with _warehouses(desk, clickhouse) as warehouses:
        ask()


def test_wide_forms_long_texts_and_hostile_names_are_asked_about_like_all_others(desk: Desk, clickhouse: str) -> None:
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
    with _warehouses(desk, clickhouse) as warehouses:
        for warehouse in warehouses:
            _ask_the_wide_form(warehouse, desk.tenant, hostile, numbers, text)


def _ask_the_wide_form(
    warehouse: Warehouse, tenant: str, hostile: list[str], numbers: dict[str, float], text: str
) -> None:
    expected = Counter([*_VALUES, *_VALUES[:2]])

    def ask(**asked: Any) -> list[list[Any]]:
        found = warehouse.answer(Question.model_validate(asked), tenant).table
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
