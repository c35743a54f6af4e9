"""Every question has the answer that plain Python finds in the documents."""

import math
import random
from collections import Counter
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
from quern.analytics.kept import Kept
from quern.analytics.question import Measure, Question
from quern.analytics.wide import quote
from quern.embedded.redis_server import RedisServer
from quern.store import redis_connection
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


#: Of the files of the houses: all; from inside of one to inside of another; to inside of one.
_CUTS: tuple[dict[str, str], ...] = (
    {},
    {"from": "2024-02-29T05:00:00Z", "before": "2024-12-31T07:00:00Z"},
    {"before": "2024-12-31T07:00:00Z"},
)
_FILTERS: tuple[list[dict[str, Any]], ...] = (
    [],
    [{"dimension": "status", "values": ["processed"]}],
    [{"dimension": "answer.stars", "op": "ge", "values": [2.0]}],
)


@pytest.mark.parametrize("seed", range(6))
def test_terms_counted_file_by_file_and_kept_are_the_same(
    houses: Houses, seed: int, monkeypatch: pytest.MonkeyPatch, redis_cache: RedisServer
) -> None:
    house = houses(seed)
    monkeypatch.setattr(DuckDbDialect, "most_rows", 1)
    ran = _watched(monkeypatch)
    with redis_connection.connect(lambda: redis_cache.url) as redis:
        redis.flushall()
        kept = Kept(redis, 600)
        for tenant in [TENANTS[seed % 2], None]:
            for of in (None, "answer.comment"):
                for shortest, cut, filters in zip((1, 4, 2), _CUTS, _FILTERS, strict=True):
                    asked = {"of": of, "min_length": shortest, "range": cut, "filters": filters}
                    question = Question.model_validate({"measure": "terms", "top": 10_000, **asked})
                    expected = plainly.answer(question, house.world, tenant)
                    for parts in (None, kept, kept):
                        ran.clear()
                        found = house.warehouses["duckdb"].answer(question, tenant, parts=parts).table
                        same(found, expected, question)
                    # What was found in each file is only added up.
                    assert len(ran) == 1


def test_a_file_within_the_range_is_counted_once_for_every_range_and_length(
    houses: Houses, monkeypatch: pytest.MonkeyPatch, redis_cache: RedisServer
) -> None:
    house = houses(0)
    monkeypatch.setattr(DuckDbDialect, "most_rows", 1)
    ran = _watched(monkeypatch)
    with redis_connection.connect(lambda: redis_cache.url) as redis:
        redis.flushall()
        for shortest, cut in ((1, {}), (4, {"before": "2024-12-31T07:00:00Z"})):
            ran.clear()
            question = Question.model_validate({"measure": "terms", "min_length": shortest, "range": cut})
            found = house.warehouses["duckdb"].answer(question, TENANTS[0], parts=Kept(redis, 600)).table
            same(found, plainly.answer(question, house.world, TENANTS[0]), question)
    # The file of the day in which the range ends, and the sum.
    assert len(ran) == 2


@pytest.mark.parametrize("most", [40, 400])
def test_small_files_are_counted_together(houses: Houses, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    house = houses(1)
    monkeypatch.setattr(DuckDbDialect, "most_rows", most)
    ran = _watched(monkeypatch)
    for cut in _CUTS:
        question = Question.model_validate({"measure": "terms", "min_length": 1, "top": 10_000, "range": cut})
        found = house.warehouses["duckdb"].answer(question, None).table
        same(found, plainly.answer(question, house.world, None), question)
    assert len(ran) > len(_CUTS)


def test_words_are_the_same_whatever_stands_between_them(houses: Houses) -> None:
    warehouse = houses(0).warehouses["duckdb"]
    source = random.Random(7)
    between = (
        [chr(number) for number in range(1, 128)] + list("éßİΣς’“…–\u00a0\u2028日🎉\u0301１Ⅳ²") + [" ", ", ", ". "] * 9
    )
    texts = ["".join(source.choice([*between, "word", "Été"]) for _ in range(source.randint(0, 9))) for _ in range(900)]
    rows = ", ".join(f"('{number // 2}', {quote(text)})" for number, text in enumerate(texts))
    listed = f"SELECT * FROM (VALUES {rows}, ('x', NULL)) t(response, text)"  # noqa: S608 - own texts
    sql = warehouse.engine.dialect.terms(listed, "1")
    shape = pa.schema([("c0", pa.string()), ("c1", pa.int64()), ("c2", pa.int64())])
    found = warehouse.engine.run(Statement(sql, shape), 60).to_pylist()
    responses, occurrences = Counter[str](), Counter[str]()
    for one, other in zip(texts[::2], texts[1::2], strict=True):
        words = plainly.terms(one) + plainly.terms(other)
        responses.update(set(words))
        occurrences.update(words)
    assert {row["c0"]: (row["c1"], row["c2"]) for row in found} == {
        word: (responses[word], count) for word, count in occurrences.items()
    }


def _watched(monkeypatch: pytest.MonkeyPatch) -> list[Statement]:
    """The statements that DuckDB runs from now on, but for those that find out which fields there are."""
    ran: list[Statement] = []
    run = DuckDbEngine.run

    def watched(engine: DuckDbEngine, statement: Statement, seconds: float) -> pa.Table:
        if "dim_field" not in statement.sql:
            ran.append(statement)
        return run(engine, statement, seconds)

    monkeypatch.setattr(DuckDbEngine, "run", watched)
    return ran
