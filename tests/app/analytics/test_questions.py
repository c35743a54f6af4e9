"""Every question has the answer that plain Python finds in the documents."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import hypothesis
import pyarrow as pa
import pytest
from hypothesis import strategies as st

from quern.analytics.answer import Warehouse
from quern.analytics.clickhouse_engine import ClickHouseEngine, Server
from quern.analytics.duckdb_engine import DuckDbDialect, DuckDbEngine
from quern.analytics.engine import Engine, Statement
from quern.analytics.question import Measure, Question
from tests.app.analytics import chdb_server, plainly
from tests.app.analytics.questions import questions
from tests.app.analytics.world import TENANTS, World, publish, world

#: Relative. Vectors are of 32-bit numbers.
_CLOSE = 1e-9
_CLOSE_32 = 1e-5


def same(found: pa.Table, expected: list[list[Any]], question: Question) -> None:
    """Assert that an answer has these rows, numbers with a fraction up to rounding."""
    rows = [list(row.values()) for row in found.to_pylist()]
    assert len(rows) == len(expected), (question, rows, expected)
    close = _CLOSE_32 if question.measure is Measure.SIMILAR else _CLOSE
    for row, wanted in zip(rows, expected, strict=True):
        for value, other in zip(row, wanted, strict=True):
            if isinstance(other, float):
                assert value is not None and math.isclose(value, other, rel_tol=close, abs_tol=close), (
                    question,
                    rows,
                    expected,
                )
            else:
                assert value == other, (question, row, wanted)


@dataclass
class Published:
    """A random house with its warehouse, and the engines on it by name."""

    world: World
    warehouses: dict[str, Warehouse]


@pytest.fixture(scope="module")
def houses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Published]]:
    """The house of a seed, made once."""
    engines: list[Engine] = []

    @lru_cache
    def made(seed: int) -> Published:
        asked, root = world(seed), tmp_path_factory.mktemp(f"world-{seed}")
        publish(asked, root)
        by_name: dict[str, Engine] = {
            "duckdb": DuckDbEngine(root, threads=1, memory_megabytes=500),
            "clickhouse": ClickHouseEngine(Server(url, chdb_server.USER, chdb_server.PASSWORD, 2000), root, str(root)),
        }
        engines.extend(by_name.values())
        return Published(asked, {name: Warehouse(root, engine, seconds=60) for name, engine in by_name.items()})

    with chdb_server.serve() as url:
        yield made
        for engine in engines:
            engine.close()


Houses = Callable[[int], Published]
_every = hypothesis.settings(suppress_health_check=list(hypothesis.HealthCheck))


def _ask(house: Published, engine: str, data: st.DataObject) -> None:
    tenant = data.draw(st.sampled_from([*TENANTS, None]))
    question = data.draw(questions(house.world, tenant))
    found = house.warehouses[engine].answer(question, tenant).table
    same(found, plainly.answer(question, house.world, tenant), question)


@hypothesis.given(data=st.data(), seed=st.integers(0, 5))
@hypothesis.settings(_every, max_examples=150)
def test_every_question_equals_plain_python_over_the_documents(houses: Houses, data: st.DataObject, seed: int) -> None:
    _ask(houses(seed), "duckdb", data)


@hypothesis.given(data=st.data(), seed=st.integers(0, 5))
@hypothesis.settings(_every, max_examples=40)
def test_clickhouse_gives_the_same_answers(houses: Houses, data: st.DataObject, seed: int) -> None:
    _ask(houses(seed), "clickhouse", data)


@pytest.mark.parametrize("measure", sorted(Measure))
def test_every_measure_has_an_answer_that_is_not_empty(houses: Callable[[int], Published], measure: Measure) -> None:
    house = houses(0)
    asked: dict[str, Any] = {"measure": measure}
    if measure is Measure.COHORTS:
        asked["grain"] = "month"
    if measure is Measure.ANSWER:
        asked["of"] = "answer.stars"
    if measure is Measure.SIMILAR:
        asked["of"] = next(item["_id"] for item in house.world.responses if "vector" in item.get("results", {}))
    question = Question.model_validate(asked)
    for warehouse in house.warehouses.values():
        found = warehouse.answer(question, None).table
        assert found.num_rows > 0
        assert found.column_names == question.columns
        same(found, plainly.answer(question, house.world, None), question)


@pytest.mark.parametrize("seed", range(6))
def test_terms_counted_a_few_rows_at_a_time_are_the_same(
    houses: Houses, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = houses(seed)
    monkeypatch.setattr(DuckDbDialect, "most_rows", 1)
    parts: list[int] = []
    rows = DuckDbEngine.run

    def run(engine: DuckDbEngine, statement: Statement, seconds: float) -> pa.Table:
        parts.append(len(statement.parts))
        return rows(engine, statement, seconds)

    monkeypatch.setattr(DuckDbEngine, "run", run)
    for tenant in [*TENANTS, None]:
        for shortest in (1, 4):
            question = Question.model_validate({"measure": "terms", "min_length": shortest, "top": 10_000})
            found = house.warehouses["duckdb"].answer(question, tenant).table
            same(found, plainly.answer(question, house.world, tenant), question)
    assert max(parts) > 1
