"""One tenant's dear questions leave places to all others."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from flask import Flask

from quern.analytics.answer import Warehouse
from quern.analytics.desk import Desk
from quern.analytics.duckdb_engine import DuckDbEngine
from quern.analytics.engine import Statement
from quern.analytics.kept import Kept
from quern.analytics.places import BusyError, Places
from quern.analytics.service import ProcessSettings, create_app
from quern.analytics.service_settings import ServiceSettings
from quern.analytics.settings import AnalyticsSettings
from tests.app.analytics.world import TENANTS, publish, world

MINE, OTHERS = TENANTS
QUESTION = {"measure": "responses", "grain": "month"}


class DearEngine(DuckDbEngine):
    """Does not begin what threads named `dear` ask before `go_on` is set."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, threads=1, memory_megabytes=256)
        self.begun, self.go_on = threading.Semaphore(0), threading.Event()

    def run(self, statement: Statement, seconds: float) -> pa.Table:
        if threading.current_thread().name == "dear":
            self.begun.release()
            assert self.go_on.wait(300)
        return super().run(statement, seconds)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[DearEngine]:
    publish(world(4), tmp_path)
    made = DearEngine(tmp_path)
    yield made
    made.go_on.set()
    made.close()


@pytest.fixture
def app(engine: DearEngine, tmp_path: Path) -> Flask:
    settings = AnalyticsSettings(warehouse=tmp_path, service=ServiceSettings(at_once=3, sql_at_once=1))
    return create_app(
        Desk(Warehouse(tmp_path, engine, seconds=600), Kept(None, 600)), ProcessSettings(analytics=settings)
    )


def ask(app: Flask, tenant: str, path: str = "/page") -> tuple[int, Any]:
    answer = app.test_client().post(path, json={"tenant": tenant, "question": QUESTION})
    return answer.status_code, answer


def test_another_tenant_is_answered_beside_dear_questions_and_their_tenant_is_told(
    app: Flask, engine: DearEngine
) -> None:
    told: list[int] = []
    dear = [threading.Thread(target=lambda: told.append(ask(app, MINE)[0]), name="dear") for _ in range(2)]
    for thread in dear:
        thread.start()
        assert engine.begun.acquire(timeout=300)
    for path in ("/page", "/file"):
        status, answer = ask(app, MINE, path)
        assert (status, answer.get_json()["kind"]) == (429, "turn")
        assert ask(app, OTHERS, path)[0] == 200
    engine.go_on.set()
    for thread in dear:
        thread.join(300)
    assert told == [200, 200]
    assert ask(app, MINE)[0] == 200


def test_a_place_is_refused_at_once_to_who_has_his_share_and_to_all_when_none_is_left() -> None:
    places = Places(2, 1, "statements")
    with places.take(MINE):
        with pytest.raises(BusyError) as own, places.take(MINE):
            raise AssertionError
        with places.take(OTHERS), pytest.raises(BusyError) as others, places.take("a third"):
            raise AssertionError
        with places.take("a third"):
            pass
    with places.take(MINE):
        pass
    assert (own.value.own, others.value.own) == (True, False)
