"""The service beside the API: on a UNIX socket, without MongoDB, and the API lives when it does not."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from quern.analytics.client import AnalyticsAwayError, AnalyticsClient, AnalyticsError
from quern.analytics.desk import STANDARD
from quern.analytics.question import Measure, Question
from quern.analytics.service_settings import ServiceSettings
from quern.embedded.process import ChildProcess
from quern.embedded.redis_server import RedisServer
from quern.store.clock import rfc3339
from tests.app.analytics.world import TENANTS, publish, world

MINE, OTHERS = TENANTS
BY_SECTOR = Question(measure=Measure.RESPONSE_TIME, dimensions=["answer.sector"], statistics=["count", "mean"])


@pytest.fixture(scope="module")
def service(
    session_directory: Path, tmp_path_factory: pytest.TempPathFactory, redis_cache: RedisServer
) -> Iterator[ChildProcess]:
    root, socket = tmp_path_factory.mktemp("service"), session_directory / "analytics.sock"
    publish(world(4), root)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("QUERN_")}
    process = ChildProcess(
        "quern analytics",
        [sys.executable, "-m", "quern.cli.main", "analytics"],
        log=root / "service.log",
        ready=socket.exists,
        environment={
            **kept,
            "QUERN_ANALYTICS__WAREHOUSE": str(root),
            "QUERN_ANALYTICS__SERVICE__SOCKET": str(socket),
            "QUERN_REDIS_CACHE_URL": redis_cache.url,
            # One place for questions and one for statements.
            "QUERN_ANALYTICS__SERVICE__AT_ONCE": "1",
            "QUERN_ANALYTICS__SERVICE__SQL_AT_ONCE": "1",
            "QUERN_ANALYTICS__SERVICE__SQL_SECONDS": "120",
            "QUERN_ANALYTICS__SERVICE__SQL_START_SECONDS": "120",
        },
    )
    with process:
        yield process


@pytest.fixture
def client(service: ChildProcess, session_directory: Path) -> AnalyticsClient:
    settings = ServiceSettings(
        socket=session_directory / "analytics.sock", patience=60, sql_seconds=120, sql_start_seconds=120
    )
    return AnalyticsClient(settings)


def test_what_will_be_asked_is_answered_by_another_process(client: AnalyticsClient, service: ChildProcess) -> None:
    deadline = time.monotonic() + 300
    while "questions answered beforehand" not in service.log.read_text():
        assert time.monotonic() < deadline, service.log.read_text()
        time.sleep(0.1)
    assert all(client.page(question, MINE, 100, None).cached for question in STANDARD)
    # The one that serves has opened no DuckDB for it, until somebody asks what nobody foresaw.
    assert not maps_duckdb(service)
    assert not client.page(BY_SECTOR, MINE, 100, None).cached
    assert maps_duckdb(service)


def maps_duckdb(service: ChildProcess) -> bool:
    """Whether a process of the service has loaded it."""
    children = Path(f"/proc/{service.pid}/task/{service.pid}/children").read_text().split()
    return any("duckdb" in Path(f"/proc/{process}/maps").read_text() for process in [service.pid, *children])


def test_it_answers_pages_files_charts_and_sql(client: AnalyticsClient) -> None:
    page = client.page(BY_SECTOR, MINE, 100, None)
    assert [column.name for column in page.columns] == BY_SECTOR.columns
    assert page.total_rows == len(page.rows) > 1
    parquet = pyarrow.parquet.read_table(pa.BufferReader(client.file(BY_SECTOR, MINE, "parquet").content))
    arrow = pa.ipc.open_stream(client.file(BY_SECTOR, MINE, "arrow").content).read_all()
    assert (
        parquet.to_pylist()
        == arrow.to_pylist()
        == [dict(zip(BY_SECTOR.columns, row, strict=True)) for row in page.rows]
    )
    assert b"generation" in arrow.schema.metadata[b"freshness"]
    csv = pyarrow.csv.read_csv(pa.BufferReader(client.file(BY_SECTOR, MINE, "csv").content))
    assert csv.num_rows == page.total_rows
    assert client.file(BY_SECTOR, MINE, "svg").content.startswith(b"<?xml")
    assert client.file(BY_SECTOR, MINE, "png").content.startswith(b"\x89PNG")
    assert client.sql("SELECT DISTINCT tenant FROM fact_response", MINE, 10).rows == [[MINE]]


@pytest.mark.parametrize("form", ["csv", "parquet", "arrow", "svg", "png"])
def test_every_file_and_chart_says_how_new_it_is(client: AnalyticsClient, form: str) -> None:
    until = client.page(BY_SECTOR, MINE, 1, None).freshness.complete_until
    assert until is not None
    assert client.file(BY_SECTOR, MINE, form).complete_until == rfc3339(until)
    assert client.sql("SELECT 1", MINE, 1).freshness.complete_until == until


def statements_of(process: int) -> list[int]:
    """The processes of the statements that a service runs."""
    made = []
    for listed in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):
            for child in map(int, listed.read_text().split()):
                if b"sandbox_child" in Path(f"/proc/{child}/cmdline").read_bytes():
                    made.append(child)
                made += statements_of(child)
    return made


def test_questions_are_answered_beside_as_many_statements_as_may_be(
    client: AnalyticsClient, service: ChildProcess
) -> None:
    ended: list[AnalyticsError] = []

    def sleep() -> None:
        with pytest.raises(AnalyticsError) as caught:
            client.sql("SELECT pg_sleep(3600)", MINE, 1)
        ended.append(caught.value)

    sleeping = threading.Thread(target=sleep, daemon=True)
    sleeping.start()
    deadline = time.monotonic() + 100
    assert service.pid is not None
    while not statements_of(service.pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for tenant, kind in ((MINE, "turn"), (OTHERS, "busy")):
        with pytest.raises(AnalyticsError) as caught:
            client.sql("SELECT 1", tenant, 1)
        assert caught.value.kind == kind
    fresh = Question(measure=Measure.RESPONSES, dimensions=["version", "weekday"])
    assert not client.page(fresh, OTHERS, 10, None).cached
    assert sleeping.is_alive()
    for process in statements_of(service.pid):
        os.kill(process, signal.SIGKILL)
    sleeping.join(100)
    assert [error.kind for error in ended] == ["sql"]
    assert client.sql("SELECT 1", OTHERS, 1).rows == [[1]]


@pytest.mark.parametrize("sql", ["DROP VIEW fact_response", "SELECT * FROM read_text('/etc/passwd')", "SELECT"])
def test_sql_that_may_not_be_run_is_refused_with_its_reason(client: AnalyticsClient, sql: str) -> None:
    with pytest.raises(AnalyticsError) as caught:
        client.sql(sql, MINE, 10)
    assert caught.value.kind == "sql"


def test_a_question_that_cannot_be_answered_is_no_failure_of_the_service(client: AnalyticsClient) -> None:
    unknown = Question(measure=Measure.RESPONSES, dimensions=["answer.nothing"])
    for _ in range(5):
        with pytest.raises(AnalyticsError) as caught:
            client.page(unknown, MINE, 10, None)
        assert caught.value.kind == "ask"
    assert not client.breaker.is_open


def test_the_group_may_connect_and_others_may_not(client: AnalyticsClient, session_directory: Path) -> None:
    assert (session_directory / "analytics.sock").stat().st_mode & 0o777 == 0o660


def test_a_service_that_hangs_costs_the_patience_and_then_nothing(
    service: ChildProcess, session_directory: Path
) -> None:
    settings = ServiceSettings(
        socket=session_directory / "analytics.sock", patience=0.3, breaker_failures=2, breaker_pause=600
    )
    hasty = AnalyticsClient(settings.model_copy(update={"sql_start_seconds": 0.1, "sql_seconds": 0.1}))
    assert service.pid is not None
    group = os.getpgid(service.pid)
    os.killpg(group, signal.SIGSTOP)
    try:
        for _ in range(2):
            with pytest.raises(AnalyticsAwayError, match="nothing came"):
                hasty.sql("SELECT 1", MINE, 1)
        with pytest.raises(AnalyticsAwayError, match="let alone"):
            hasty.sql("SELECT 1", MINE, 1)
        # That was no question's failure.
        for _ in range(2):
            with pytest.raises(AnalyticsAwayError, match="nothing came"):
                hasty.page(BY_SECTOR, MINE, 10, None)
        with pytest.raises(AnalyticsAwayError, match="let alone") as caught:
            hasty.page(BY_SECTOR, MINE, 10, None)
        assert caught.value.retry_after > 300
    finally:
        os.killpg(group, signal.SIGCONT)


def test_a_service_that_is_not_there_is_away(tmp_path: Path) -> None:
    with pytest.raises(AnalyticsAwayError, match="ConnectError"):
        AnalyticsClient(ServiceSettings(socket=tmp_path / "none.sock")).page(BY_SECTOR, MINE, 10, None)
    with pytest.raises(AnalyticsAwayError, match="not set up"):
        AnalyticsClient(ServiceSettings()).page(BY_SECTOR, MINE, 10, None)


def test_its_process_loads_nothing_of_mongodb_and_the_apis_loads_no_engine() -> None:
    large = {"pymongo", "bson", "duckdb", "pyarrow", "matplotlib"}
    found = {}
    for module in ("quern.analytics.service", "quern.api.app"):
        script = f"import sys, {module}; print(*sys.modules)"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True)
        found[module] = large & set(done.stdout.split())
    assert found == {"quern.analytics.service": {"pyarrow"}, "quern.api.app": {"pymongo", "bson"}}
