"""Answers are kept, paged, made beforehand, and never older than the tenant's files."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from math import inf, nan
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import duckdb
import pyarrow as pa
import pytest

from quern.analytics import answer
from quern.analytics.answer import Warehouse
from quern.analytics.desk import STANDARD, Desk, GoneError
from quern.analytics.duckdb_engine import DuckDbDialect, DuckDbEngine
from quern.analytics.engine import Part, Statement, TimedOutError
from quern.analytics.kept import Kept
from quern.analytics.manifest import Manifest, NoWarehouseError, Source
from quern.analytics.plan import AskError
from quern.analytics.question import Filter, Measure, Question
from quern.embedded.redis_server import RedisServer
from quern.store import redis_connection
from quern.store.cursor import BadCursorError
from tests.app.analytics import plainly
from tests.app.analytics.world import FORMS, TENANTS, World, publish, world

MINE, OTHERS = TENANTS
TERMS = Question(measure=Measure.TERMS, min_length=1, top=10_000)
EACH = Question(measure=Measure.RESPONSES, grain="hour", dimensions=["form", "version"])


@dataclass
class Place:
    """A warehouse, and how to answer from it."""

    world: World
    root: Path
    engine: DuckDbEngine
    url: str

    def desk(self) -> Desk:
        """A desk as a freshly started service has it."""
        kept = Kept(redis_connection.connect(lambda: self.url, timeout=5), 600)
        return Desk(Warehouse(self.root, self.engine, seconds=60), kept)

    def publish_without(self, tenant: str, table: str = "fact_response") -> Manifest:
        """Publish the same again, less one tenant's rows of the last period."""
        manifest = Manifest.load(self.root)
        fewer = manifest.partitions(table, tenant)[:-1]
        now = datetime(2025, 2, 1, tzinfo=UTC)
        changed = manifest.with_partitions(table, tenant, fewer)
        return changed.publish(keep=timedelta(hours=1), freshness=now, source=Source(), at=now)


@pytest.fixture
def place(tmp_path: Path, redis_cache: RedisServer) -> Iterator[Place]:
    made = world(2)
    publish(made, tmp_path)
    engine = DuckDbEngine(tmp_path, threads=1, memory_megabytes=500)
    with redis_connection.connect(lambda: redis_cache.url) as redis:
        redis.flushall()
    yield Place(made, tmp_path, engine, redis_cache.url)
    engine.close()


def test_an_answer_is_computed_once_and_kept_across_restarts(place: Place) -> None:
    first = place.desk().page(EACH, MINE, 1000, None)
    again = place.desk().page(EACH, MINE, 1000, None)
    assert (first.cached, again.cached) == (False, True)
    assert again.rows == first.rows
    assert again.freshness == first.freshness


def test_what_is_kept_of_one_tenant_answers_no_other(place: Place) -> None:
    desk = place.desk()
    mine, others = (desk.page(EACH, tenant, 1000, None) for tenant in TENANTS)
    assert not others.cached
    forms = {tenant: {form for form in FORMS if place.world.owner(form) == tenant} for tenant in TENANTS}
    assert {row[1] for row in mine.rows} <= forms[MINE]
    assert {row[1] for row in others.rows} <= forms[OTHERS]


def test_pages_together_are_the_answer(place: Place) -> None:
    desk = place.desk()
    whole = desk.page(EACH, MINE, 1000, None)
    rows, cursor, pages = [], None, 0
    while True:
        page = desk.page(EACH, MINE, 7, cursor)
        rows += page.rows
        pages += 1
        if (cursor := page.next_cursor) is None:
            break
    assert rows == whole.rows
    assert pages == -(-whole.total_rows // 7) > 1


def test_a_cursor_serves_its_own_question_and_tenant_only(place: Place) -> None:
    desk = place.desk()
    cursor = desk.page(EACH, MINE, 1, None).next_cursor
    with pytest.raises(BadCursorError):
        desk.page(EACH.model_copy(update={"grain": "day"}), MINE, 1, cursor)
    with pytest.raises(BadCursorError):
        desk.page(EACH, OTHERS, 1, cursor)
    with pytest.raises(BadCursorError):
        desk.page(EACH, MINE, 1, "AAAA")


def test_a_publication_changes_answers_and_leaves_begun_lists_whole(place: Place) -> None:
    desk = place.desk()
    before = desk.page(EACH, MINE, 1000, None)
    begun = desk.page(EACH, MINE, 5, None)
    place.publish_without(MINE)
    after = desk.page(EACH, MINE, 1000, None)
    assert not after.cached
    assert after.total_rows < before.total_rows
    assert after.freshness.generation == before.freshness.generation + 1
    assert desk.page(EACH, MINE, 1000, begun.next_cursor).rows == before.rows[5:]


def test_a_begun_list_whose_answer_is_forgotten_must_begin_again(place: Place, redis_cache: RedisServer) -> None:
    cursor = place.desk().page(EACH, MINE, 5, None).next_cursor
    place.publish_without(MINE)
    with redis_connection.connect(lambda: redis_cache.url) as redis:
        redis.flushall()
    with pytest.raises(GoneError, match="ask again"):
        place.desk().page(EACH, MINE, 5, cursor)


def test_a_publication_of_other_tenants_leaves_what_is_kept_and_renews_its_freshness(place: Place) -> None:
    desk = place.desk()
    before = desk.page(EACH, MINE, 1000, None)
    place.publish_without(OTHERS)
    after = desk.page(EACH, MINE, 1000, None)
    assert after.cached
    assert after.freshness.generation == before.freshness.generation + 1


def test_standard_questions_and_those_asked_lately_are_answered_beforehand(place: Place) -> None:
    place.desk().page(EACH, MINE, 10, None)
    place.publish_without(MINE)
    assert place.desk().answer_beforehand(Event()) > len(STANDARD)
    fresh = place.desk()
    assert all(fresh.page(question, MINE, 10, None).cached for question in [*STANDARD, EACH])


@pytest.mark.parametrize(
    "asked",
    [
        {"measure": "responses", "filters": [{"dimension": "answer.email", "values": ["ann@example.org"]}]},
        {
            "measure": "funnel",
            "stages": [{"name": "x", "filters": [{"dimension": "answer.email", "values": ["ann@example.org"]}]}],
        },
    ],
)
def test_what_somebody_may_have_written_is_not_remembered_with_a_question(place: Place, asked: dict[str, Any]) -> None:
    place.desk().page(Question.model_validate(asked), MINE, 10, None)
    place.desk().page(EACH, MINE, 10, None)
    assert place.desk().kept.remembered(MINE) == [EACH]
    with redis_connection.connect(lambda: place.url) as redis:
        found = [key for key in redis.scan_iter() if redis.type(key) == b"string"]
        # The answers themselves are kept by digests of their questions.
        assert found
        assert not any(b"ann@example.org" in key + (redis.get(key) or b"") for key in found)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (7.0, "7"),
        (-3.25, "-3.25"),
        (-0.0, "0"),
        (1e19, "10000000000000000000"),
        (1e300, "1e+300"),
        (inf, "inf"),
        (-inf, "-inf"),
        (nan, "nan"),
    ],
)
def test_every_stored_number_has_a_text(number: float, text: str) -> None:
    sql = f"SELECT {DuckDbDialect().plain('x')} FROM (SELECT $x::DOUBLE AS x)"  # noqa: S608 - no value is in it
    assert duckdb.execute(sql, {"x": number}).fetchall() == [(text,)]


def test_what_was_kept_before_a_publication_ends_soon_after_it(place: Place, redis_cache: RedisServer) -> None:
    desk = Desk(
        Warehouse(place.root, place.engine, seconds=60), Kept(redis_connection.connect(lambda: place.url), 86_400)
    )
    desk.page(EACH, MINE, 5, None)
    desk.page(EACH, OTHERS, 5, None)
    place.publish_without(MINE)
    desk.retire_former()
    desk.answer_beforehand(Event())
    with redis_connection.connect(lambda: redis_cache.url) as redis:
        ends = {
            tenant: sorted(int(redis.ttl(key)) for key in redis.scan_iter(match=f"*:{tenant}:*{EACH.fingerprint}"))
            for tenant in TENANTS
        }
    assert [end <= 900 for end in ends[MINE]] == [True, False]
    assert [end <= 900 for end in ends[OTHERS]] == [False]


def _parts(redis_cache: RedisServer) -> set[str]:
    """The files of which something is kept."""
    with redis_connection.connect(lambda: redis_cache.url) as redis:
        return {key.decode().split(":")[4] for key in redis.scan_iter(match="*:part:*")}


def _files(tenant: str, root: Path) -> list[str]:
    return [item.path for item in Manifest.load(root).partitions("fact_answer", tenant)]


def test_words_of_a_replaced_file_are_kept_no_more(
    place: Place, redis_cache: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DuckDbDialect, "most_rows", 1)
    desk, (mine, others) = place.desk(), (_files(tenant, place.root) for tenant in TENANTS)
    for tenant in TENANTS:
        desk.ask(TERMS, tenant)
    assert _parts(redis_cache) == {*mine, *others}
    place.publish_without(MINE, "fact_answer")
    desk.retire_former()
    assert _parts(redis_cache) == {*mine[:-1], *others}


def test_words_of_a_file_that_is_replaced_while_they_are_counted_are_not_kept(
    place: Place, redis_cache: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DuckDbDialect, "most_rows", 1)
    mine, put = _files(MINE, place.root), Kept.put_part

    def put_late(kept: Kept, part: Part, rows: pa.Table) -> bool:
        if part.file == mine[-1]:
            place.publish_without(MINE, "fact_answer")
        return put(kept, part, rows)

    monkeypatch.setattr(Kept, "put_part", put_late)
    place.desk().ask(TERMS, MINE)
    assert _parts(redis_cache) == set(mine[:-1])


def test_time_that_ends_between_two_parts_is_said_and_the_next_goes_on_from_there(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DuckDbDialect, "most_rows", 1)
    desk, put, now = place.desk(), Kept.put_part, time.monotonic
    count = len(_files(MINE, place.root))

    def put_and_wait(kept: Kept, part: Part, rows: pa.Table) -> bool:
        monkeypatch.setattr(answer, "time", SimpleNamespace(monotonic=lambda: now() + 1000))
        return put(kept, part, rows)

    with monkeypatch.context() as slow:
        slow.setattr(Kept, "put_part", put_and_wait)
        with pytest.raises(TimedOutError, match=rf"within 60 s, found 1 of {count} parts .* 1 are kept: ask again"):
            desk.page(TERMS, MINE, 1000, None)
    monkeypatch.setattr(answer, "time", time)
    run, ran = DuckDbEngine.run, list[Statement]()

    def watched(engine: DuckDbEngine, statement: Statement, seconds: float) -> pa.Table:
        ran.append(statement)
        return run(engine, statement, seconds)

    monkeypatch.setattr(DuckDbEngine, "run", watched)
    # It was remembered, too.
    assert TERMS in desk.kept.remembered(MINE)
    assert desk.page(TERMS, MINE, 1000, None).total_rows == len(plainly.answer(TERMS, place.world, MINE))
    assert len(ran) == count - 1 + 1


def test_time_that_is_over_before_a_statement_begins_ends_it(place: Place) -> None:
    endless = Statement("SELECT count(*) AS c0 FROM range(100_000_000_000)", pa.schema([("c0", pa.int64())]))
    with pytest.raises(TimedOutError, match="within 0 s"):
        place.engine.run(endless, 0.0)


def test_without_redis_every_question_is_answered(place: Place) -> None:
    away = replace(place, url="unix:///nonexistent/redis.sock")
    assert away.desk().page(EACH, MINE, 1000, None).rows == place.desk().page(EACH, MINE, 1000, None).rows


def test_a_field_that_no_form_of_the_tenant_has_is_unknown(place: Place) -> None:
    desk = place.desk()
    with pytest.raises(AskError, match="has a field"):
        desk.ask(Question(measure=Measure.RESPONSES, dimensions=["answer.nothing"]), MINE)
    with pytest.raises(AskError, match="operator"):
        desk.ask(Question(measure=Measure.RESPONSES, dimensions=["tenant"]), MINE)


def test_a_filter_by_tenant_reaches_no_other_tenant(place: Place) -> None:
    others = Filter(dimension="form", values=[form for form in FORMS if place.world.owner(form) == OTHERS])
    assert place.desk().ask(Question(measure=Measure.RESPONSES, filters=[others]), MINE).answer.table.num_rows == 0


def test_a_tenant_that_nobody_knows_has_no_rows(place: Place) -> None:
    unknown = "ten_00000000000000000000000000"
    assert place.desk().ask(Question(measure=Measure.RESPONSES), unknown).answer.table.num_rows == 0


def test_before_the_first_publication_that_is_said(tmp_path: Path, place: Place) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(NoWarehouseError, match="quern etl run"):
        replace(place, root=empty).desk().ask(EACH, MINE)
