"""The nightly run is a periodic job of the `low` queue; `quern etl` is the same by hand."""

import os
import pty
import re
import subprocess
import sys
import threading
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import orjson
import pytest
from click.testing import CliRunner, Result
from prometheus_client.registry import REGISTRY

from quern.analytics import handler
from quern.analytics.answer import Warehouse
from quern.analytics.desk import Desk as AnalyticsDesk
from quern.analytics.duckdb_engine import DuckDbEngine
from quern.analytics.etl import MismatchError
from quern.analytics.follow import head
from quern.analytics.kept import Kept
from quern.analytics.manifest import NAME, NoWarehouseError
from quern.cli.main import main
from quern.cli.runtime import open_runtime
from quern.config import LiveSettings, Settings
from quern.jobs import schedule
from quern.jobs.enqueue import Enqueuer
from quern.jobs.handler import Context, RetryLater
from quern.jobs.model import Job
from quern.runtime import Runtime
from quern.store import clock
from quern.store.connection import Store
from tests.app.analytics.desk import Desk, moment
from tests.app.api.client import until


@pytest.fixture
def configured(desk: Desk, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The environment of a command that finds the desk's database and warehouse."""
    environment = {
        "QUERN_MONGODB_URI": settings.mongodb_uri.get_secret_value(),
        "QUERN_MONGODB_DATABASE": settings.mongodb_database,
        "QUERN_REDIS_QUEUE_URL": settings.redis_queue_url.get_secret_value(),
        "QUERN_ANALYTICS__WAREHOUSE": str(desk.settings.warehouse),
        "QUERN_ANALYTICS__EXTRACT": str(desk.settings.extract),
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    open_runtime.cache_clear()
    return settings.model_copy(update={"analytics": desk.settings})


def _quern(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["etl", *arguments], catch_exceptions=False)


def test_without_a_warehouse_nothing_is_scheduled(settings: Settings) -> None:
    assert Runtime(LiveSettings(settings)).ticks == []


def test_the_nightly_job_fills_the_warehouse(desk: Desk, configured: Settings) -> None:
    desk.submit(moment("2026-10-31"), {"code": "a"})
    live = LiveSettings(configured)
    runtime = Runtime(live)
    store = Store(live)
    now = datetime(2026, 11, 22, 3, 0, tzinfo=UTC)
    for _ in range(2):
        schedule.run_due(store, Enqueuer(store, runtime.waker), runtime.ticks, now)
    jobs = list(store.db.jobs.find({"kind": {"$in": [handler.RUN, handler.PRUNE]}}))
    assert sorted((job["kind"], job["queue"]) for job in jobs) == [(handler.PRUNE, "low"), (handler.RUN, "low")]
    work = runtime.registry.get(handler.RUN)
    assert work is not None
    document = store.db.jobs.find_one({"kind": handler.RUN})
    assert document is not None
    result = work.run(Job.from_document(document), Context(store))
    assert result is not None and result["outcome"] == "published"
    assert desk.holds()
    shown = REGISTRY.get_sample_value("quern_etl_freshness_timestamp_seconds")
    assert shown == pytest.approx(desk.manifest.freshness.timestamp() if desk.manifest.freshness else 0)


@pytest.mark.parametrize(("nice", "processors"), [(0, 1), (3, 2)])
def test_the_run_gives_way_as_the_settings_say(
    configured: Settings, nice: int, processors: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    analytics = configured.analytics.model_copy(update={"nice": nice, "processors": processors})
    store = Store(LiveSettings(configured.model_copy(update={"analytics": analytics})))
    # In the place of Python: says how nice it is, and how many processors it may use once its parent has said so.
    may_use = min(processors, len(os.sched_getaffinity(0)))
    says = tmp_path / "says"
    says.write_text(
        "#!/bin/sh\n"
        f'tries=600; while [ "$(nproc)" != {may_use} ] && [ $tries -gt 0 ]; do tries=$((tries - 1)); sleep 0.1; done\n'
        'echo "{\\"nice\\": $(nice), \\"processors\\": $(nproc)}"\n'
    )
    says.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(says))
    found = handler._child("run", Context(store))
    assert found == {"nice": min(19, os.nice(0) + nice), "processors": may_use}


def test_a_stopping_worker_stops_the_run(desk: Desk, configured: Settings) -> None:
    store = Store(LiveSettings(configured))
    stop = threading.Event()
    stop.set()
    with pytest.raises(RetryLater) as caught:
        handler._child("run", Context(store, stop))
    assert not caught.value.charged


_LOSSY = """
import sys
from quern.analytics import flatten
from quern.cli.main import main

plain = flatten.shred
flatten.shred = lambda column: (stripe for stripe in plain(column) if "lost" not in stripe.values)
main(sys.argv[3:])
"""


def test_a_run_that_would_differ_raises_the_alarm_and_is_tried_again(
    desk: Desk, configured: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.submit(moment("2026-10-31"), {"code": "lost"})
    (tmp_path / "lossy.py").write_text(_LOSSY)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path / "lossy.py"} "$@"\n')
    python.chmod(0o700)
    context = Context(Store(LiveSettings(configured)))
    (run,) = [known for known in handler.handlers() if known.kind == handler.RUN]
    job = Job.from_document(handler.ticks(desk.settings)[0].make(clock.now()).document(clock.now()))
    with monkeypatch.context() as broken:
        broken.setattr(sys, "executable", str(python))
        with pytest.raises(RetryLater, match="1 days would differ") as caught:
            run.run(job, context)
    assert caught.value.charged
    assert REGISTRY.get_sample_value("quern_etl_mismatched_days") == 1
    with pytest.raises(NoWarehouseError):
        desk.manifest  # noqa: B018 - loads it
    run.run(job, context)
    assert REGISTRY.get_sample_value("quern_etl_mismatched_days") == 0
    assert desk.holds()


def test_a_run_by_hand_that_would_differ_raises_the_alarm_too(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.submit(moment("2026-10-31"), {"code": "lost"})
    root, stop = desk.root / "warehouse", threading.Event()
    engine = DuckDbEngine(root, threads=1, memory_megabytes=300)
    service = AnalyticsDesk(Warehouse(root, engine, seconds=60), Kept(None, 60))
    following = threading.Thread(target=service.follow, args=(stop, lambda _: 0, 0.05))
    following.start()
    try:
        with monkeypatch.context() as broken:
            broken.setattr("quern.analytics.flatten.shred", lambda column: iter(()))
            with pytest.raises(MismatchError):
                desk.run()
        until(lambda: REGISTRY.get_sample_value("quern_etl_mismatched_days") == 1)
        desk.run()
        until(lambda: REGISTRY.get_sample_value("quern_etl_mismatched_days") == 0)
    finally:
        stop.set()
        following.join()
        engine.close()


def test_run_status_verify_rebuild(desk: Desk, configured: Settings) -> None:
    desk.submit(moment("2026-10-31"), {"code": "a"})
    ran = orjson.loads(_quern("run", "--json").output)
    assert (ran["outcome"], ran["documents"]) == ("published", 6)
    shown = orjson.loads(_quern("status", "--json").output)
    assert shown["generation"] == 1
    assert {row["table"]: row["rows"] for row in shown["tables"]}["fact_response"] == 1
    assert "fact_answer" in _quern("status").output
    assert "equal." in _quern("verify").output
    assert orjson.loads(_quern("rebuild", "--json").output)["days"] == 1
    assert "0 files deleted." in _quern("prune").output


def test_verify_names_the_rows_that_differ(desk: Desk, configured: Settings) -> None:
    response = desk.submit(moment("2026-10-31"), {"code": "a"})
    _quern("run")
    # Behind the ETL's back: the stored token is moved past the change.
    desk.db.responses.update_one({"_id": response}, {"$set": {"answers.code": "a secret"}})
    path = desk.root / "warehouse" / NAME
    raw = orjson.loads(path.read_bytes())
    raw["source"]["token"] = head(desk.db)
    path.write_bytes(orjson.dumps(raw))
    found = _quern("verify")
    assert found.exit_code == handler.MISMATCH
    assert response in found.output and "answer.code" in found.output
    assert "a secret" not in found.output


def test_a_damaged_file_is_found(desk: Desk, configured: Settings) -> None:
    desk.submit(moment("2026-10-31"), {"code": "a"})
    _quern("run")
    (path,) = desk.manifest.files("fact_answer", desk.tenant)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    found = _quern("verify")
    assert found.exit_code == handler.MISMATCH
    assert "is not what was written" in found.output


@pytest.mark.parametrize("name", ["responses.parquet", "responses.jsonl.zst", "audit.parquet", "audit.jsonl.zst"])
def test_a_file_of_the_extract_that_is_missing_or_cut_short_is_found_by_its_name(
    desk: Desk, configured: Settings, name: str
) -> None:
    for day in ("2026-10-30", "2026-10-31"):
        desk.submit(moment(day), {"code": "a"})
    _quern("run")
    path = desk.root / "extract" / desk.tenant / "2026-10-31" / name
    content = path.read_bytes()
    for end in (len(content) - 1, len(content) // 2, 0, None):
        if end is None:
            path.unlink()
        else:
            path.write_bytes(content[:end])
        found = _quern("verify")
        assert found.exit_code == handler.MISMATCH
        assert f"extract {desk.tenant}/2026-10-31/{name.removesuffix('.zst')}" in found.output
        assert "2026-10-30" not in found.output
    path.write_bytes(content)
    assert "equal." in _quern("verify").output


def test_other_documents_in_the_extract_than_mongodbs_are_found(desk: Desk, configured: Settings) -> None:
    for day in ("2026-10-30", "2026-10-31"):
        desk.submit(moment(day), {"code": "a"})
    _quern("run")
    folder = desk.root / "extract" / desk.tenant
    one, other, gone = (folder / day / "responses.parquet" for day in ("2026-10-30", "2026-10-31", "2026-10-29"))
    one.write_bytes(other.read_bytes())
    gone.parent.mkdir()
    gone.write_bytes(other.read_bytes())
    found = _quern("verify")
    assert found.exit_code == handler.MISMATCH
    assert f"extract {desk.tenant}/2026-10-30/responses.parquet: other documents" in found.output
    assert f"extract {desk.tenant}/2026-10-29/responses.parquet is there" in found.output


def test_a_wrong_day_is_explained(configured: Settings) -> None:
    found = _quern("run", "--since", "yesterday")
    assert found.exit_code == 2
    assert "expected a day as YYYY-MM-DD" in found.output


@pytest.mark.parametrize("command", ["run", "verify"])
def test_days_in_the_wrong_order_are_refused(configured: Settings, command: str) -> None:
    found = _quern(command, "--since", "2026-03-08", "--until", "2026-03-07")
    assert found.exit_code == 2
    assert "expected --since to be before --until" in found.output


def test_a_tenant_that_there_is_not_is_refused_and_nothing_published(desk: Desk, configured: Settings) -> None:
    desk.submit(moment("2026-10-31"), {"code": "a"})
    _quern("run")
    for command in ("run", "verify"):
        found = _quern(command, "--tenant", "ten_none")
        assert found.exit_code == 1
        assert "found 'ten_none'; `quern tenant list`" in found.output
    assert desk.manifest.generation == 1


def test_a_person_at_a_terminal_sees_how_far_a_rebuild_is(desk: Desk, configured: Settings) -> None:
    for month in (8, 9, 10):
        desk.submit(moment(f"2026-{month:02}-07"), {"code": "a"})
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "quern.cli.main", "etl", "rebuild"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environment) as rebuilding:
        os.close(theirs)
        shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", _until_closed(ours).decode())
        assert rebuilding.stdout is not None
        said = rebuilding.stdout.read().decode()
        assert rebuilding.wait(60) == 0
    # A response, its audit entry and four jobs, three times.
    assert re.search(r"━ 3/3 0:\d\d:\d\d 18 documents, publishing", shown), shown
    # What it says at the end is for programs, too, and these see no bar.
    assert "18 documents" in said and "\x1b" not in said
    assert _quern("rebuild").stderr == ""


def _until_closed(terminal: int) -> bytes:
    made = b""
    # Reading fails once the other side is closed by all.
    with suppress(OSError):
        while part := os.read(terminal, 4096):
            made += part
    os.close(terminal)
    return made


def test_following_brings_each_change_until_it_is_stopped(
    desk: Desk, configured: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUERN_ANALYTICS__FOLLOW_SECONDS", "0.2")
    command = [sys.executable, "-m", "quern.cli.main", "etl", "run", "--follow"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as following:
        for count in (1, 2):
            desk.submit(clock.now(), {"code": "a"})
            until(partial(_has, desk, count))
        following.terminate()
        assert following.wait(60) == 0
    assert desk.holds()


def _has(desk: Desk, responses: int) -> bool:
    try:
        return len(desk.rows("fact_response")) == responses
    except NoWarehouseError:
        return False
