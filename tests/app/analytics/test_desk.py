"""Answers are kept, paged, made beforehand, and never older than the tenant's files."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event

import pytest

from quern.analytics.answer import Warehouse
from quern.analytics.desk import STANDARD, Desk, GoneError
from quern.analytics.duckdb_engine import DuckDbEngine
from quern.analytics.kept import Kept
from quern.analytics.manifest import Manifest, NoWarehouseError, Source
from quern.analytics.plan import AskError
from quern.analytics.question import Filter, Measure, Question
from quern.embedded.redis_server import RedisServer
from quern.store import redis_connection
from quern.store.cursor import BadCursorError
from tests.app.analytics.world import FORMS, TENANTS, World, publish, world

MINE, OTHERS = TENANTS
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

    def publish_without(self, tenant: str) -> Manifest:
        """Publish the same again, less one tenant's responses of the last period."""
        manifest = Manifest.load(self.root)
        fewer = manifest.partitions("fact_response", tenant)[:-1]
        now = datetime(2025, 2, 1, tzinfo=UTC)
        changed = manifest.with_partitions("fact_response", tenant, fewer)
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
