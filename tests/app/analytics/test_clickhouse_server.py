"""ClickHouse over HTTP: the same answers come that way (`test_questions`); what goes wrong there is said."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from quern.analytics.clickhouse_engine import ClickHouseEngine, Server
from quern.analytics.engine import EngineError, Statement, TimedOutError
from tests.app.analytics import chdb_server

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


def test_a_server_that_is_not_there_is_an_engine_that_fails() -> None:
    with pytest.raises(EngineError, match="expected ClickHouse at"):
        _engine("http://127.0.0.1:9").run(Statement("SELECT 1 AS number", _NUMBER), 1)
