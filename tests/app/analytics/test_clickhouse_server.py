"""ClickHouse over HTTP: the same answers come that way (`test_questions`); what goes wrong there is said."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from quern.analytics.clickhouse_engine import ClickHouseEngine, Server
from quern.analytics.engine import EngineError, Statement, TimedOutError
from quern.analytics.question import Measure, Question
from quern.analytics.service import ProcessSettings, create_app, make_desk
from tests.app.analytics import chdb_server, plainly
from tests.app.analytics.world import TENANTS, publish, world

_TEXT = pa.schema([pa.field("text", pa.string())])
_NUMBER = pa.schema([pa.field("number", pa.int64())])


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with chdb_server.serve() as found:
        yield found


def _engine(url: str, password: str = chdb_server.PASSWORD) -> ClickHouseEngine:
    return ClickHouseEngine(Server(url, chdb_server.USER, password, 500), Path("/none"), "/none")


def test_parameters_arrive_as_they_are(url: str) -> None:
    hostile = "a&b=c%20+ü🌾'\"\\\t\n{p0:String}'); DROP TABLE x--"
    found = _engine(url).run(Statement("SELECT {p0:String} AS text", _TEXT, {"p0": hostile}), 10)
    assert found.to_pylist() == [{"text": hostile}]


def test_the_wrong_password_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(EngineError, match="AUTHENTICATION_FAILED") as caught:
        _engine(url, "another-secret").run(Statement("SELECT 1 AS number", _NUMBER), 10)
    assert "another-secret" not in str(caught.value)


def test_a_statement_that_takes_too_long_is_ended_by_the_server(url: str) -> None:
    endless = "SELECT toInt64(sum(sipHash64(number))) AS number FROM numbers(1000000000000)"
    with pytest.raises(TimedOutError):
        _engine(url).run(Statement(endless, _NUMBER), 1)


@pytest.mark.parametrize("password", [chdb_server.PASSWORD, "another-secret"])
def test_settings_and_a_credential_make_the_service_answer_by_it(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, password: str
) -> None:
    house, root, credentials = world(2), tmp_path / "warehouse", tmp_path / "credentials"
    root.mkdir()
    publish(house, root)
    credentials.mkdir()
    (credentials / "quern_clickhouse_password").write_text(password)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(credentials))
    chosen = {"ENGINE": "clickhouse", "CLICKHOUSE_URL": url, "CLICKHOUSE_USER": chdb_server.USER}
    for name, value in {**chosen, "CLICKHOUSE_ROOT": str(root)}.items():
        monkeypatch.setenv(f"QUERN_ANALYTICS__SERVICE__{name}", value)
    monkeypatch.setenv("QUERN_ANALYTICS__WAREHOUSE", str(root))
    settings = ProcessSettings()
    desk = make_desk(settings)
    question = Question(measure=Measure.RESPONSE_TIME, dimensions=["answer.sector"], statistics=["count", "max"])
    asked = {"tenant": TENANTS[0], "question": question.model_dump(mode="json", by_alias=True)}
    try:
        answer = create_app(desk, settings).test_client().post("/page", json=asked)
    finally:
        desk.warehouse.engine.close()
    if password == chdb_server.PASSWORD:
        expected = plainly.answer(question, house, TENANTS[0])
        assert answer.get_json()["rows"] == [pytest.approx(row) for row in expected]
        assert len(expected) > 1
    else:
        # It is this server that was asked, and no other engine steps in.
        assert answer.status_code == 500
        assert "AUTHENTICATION_FAILED" in answer.get_json()["text"]


def test_a_server_that_is_not_there_is_an_engine_that_fails() -> None:
    with pytest.raises(EngineError, match="expected ClickHouse at"):
        _engine("http://127.0.0.1:9").run(Statement("SELECT 1 AS number", _NUMBER), 1)
