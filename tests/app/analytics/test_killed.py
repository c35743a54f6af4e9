"""A run that is killed leaves the published warehouse whole and equal to what MongoDB held, and is gone on with."""

import multiprocessing
import os
import random
import signal
import sys
import time
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from pymongo import MongoClient

from quern.analytics import integrity, source
from quern.analytics.flatten import to_json
from quern.analytics.manifest import NAME
from quern.analytics.settings import AnalyticsSettings
from quern.analytics.work import NAME as WORK
from quern.embedded.mongod import Mongod
from tests.app.analytics.desk import RESULTS, Desk, moment, yesterday

_KILLS = 20
#: A run of few days ends before the touch of a file that it was to be killed at.
_ATTEMPTS = 3 * _KILLS
_TOUCHES_FILES = frozenset({"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod"})


def _run(uri: str, database: str, settings: dict[str, Any], kill_at: int, count_into: str) -> None:
    """In a process of its own: run the ETL and be killed at the `kill_at`-th touch of a file below the warehouse."""
    from quern.analytics.etl import Etl

    root, touches = settings["warehouse"].rpartition("/")[0], [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _TOUCHES_FILES and arguments and str(arguments[0]).startswith(root):
            touches[0] += 1
            if touches[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    with MongoClient[dict[str, Any]](uri, tz_aware=True) as client:
        Etl(client[database], AnalyticsSettings.model_validate(settings)).run()
    Path(count_into).write_text(str(touches[0]))


class _Runs:
    """Runs in processes that come from one that has imported everything."""

    def __init__(self, desk: Desk, mongod: Mongod, counts: Path) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["quern.analytics.etl", "tests.app.analytics.test_killed"])
        settings = desk.settings.model_dump(mode="json")
        self._arguments = (mongod.uri, desk.db.name, settings)
        self._counts = counts
        self.seconds = 0.0
        """That the last run took."""

    def __call__(self, kill_at: int = 0, kill_after: float | None = None) -> int | None:
        """Exit status of a run that is killed at some touch of a file (0: not at all), or after some seconds."""
        process = self._context.Process(target=_run, args=(*self._arguments, kill_at, str(self._counts)))
        began = time.monotonic()
        process.start()
        if kill_after is not None:
            process.join(kill_after)
            process.kill()
        process.join(300)
        self.seconds = time.monotonic() - began
        return process.exitcode

    @property
    def touches(self) -> int:
        """Of the last run that was not killed."""
        return int(self._counts.read_text())


def _stored(desk: Desk) -> set[tuple[str, str]]:
    return {(row["_id"], row["status"]) for row in desk.db.responses.find({}, {"status": 1})}


def _published(desk: Desk) -> set[tuple[str, str]]:
    return {(row["response"], row["status"]) for row in desk.rows("fact_response")}


def _extracted(desk: Desk, name: str) -> dict[str, dict[str, Any]]:
    """The extract's documents by identifier: each once, on its own day, the same ones in both files."""
    found: dict[str, dict[str, Any]] = {}
    for path in (desk.root / "extract").glob(f"*/*/{name}.jsonl.zst"):
        with pa.CompressedInputStream(str(path), "zstd") as stream:
            documents = list(map(orjson.loads, stream.read().splitlines()))
        rows = pq.read_table(path.with_name(f"{name}.parquet"), columns=["id"])
        assert rows.column("id").to_pylist() == [document["id"] for document in documents]
        for document in documents:
            at = document["created" if name == "responses" else "at"]
            assert document["id"] not in found
            assert (path.parent.name, path.parent.parent.name) == (at[:10], document["tenant"])
            found[document["id"]] = document
    return found


def _extract_equals_mongodb(desk: Desk) -> bool:
    for name, fields in (("responses", source.RESPONSE_FIELDS), ("audit", source.AUDIT_FIELDS)):
        expected = {}
        for document in desk.db[name].find({"tenant": desk.tenant}, fields):
            identity = document.pop("_id")
            expected[identity] = orjson.loads(to_json({"id": identity, **document}))
        assert _extracted(desk, name) == expected
    return True


def _change(desk: Desk, chance: random.Random, span: int = 40) -> None:
    """A new response, one that ends late, one that is erased; on any of `span` days of two closed months, and now."""
    days = [date(2026, 3, 28) + timedelta(days=chance.randrange(span)), yesterday()]
    for day in days:
        desk.submit(moment(day), {"comment": f"number {chance.random()}"})
    open_ones = [row["_id"] for row in desk.db.responses.find({"status": "processing"}, {"_id": 1}).sort("_id", 1)]
    desk.finish(chance.choice(open_ones), RESULTS)
    alive = [row["_id"] for row in desk.db.responses.find({"erased": None}, {"_id": 1}).sort("_id", 1)]
    desk.erase(chance.choice(alive))


def test_killed_at_any_point_the_published_warehouse_is_whole(desk: Desk, mongod: Mongod, tmp_path: Path) -> None:
    chance = random.Random(20)
    for _ in range(6):
        _change(desk, chance, span=8)
    runs = _Runs(desk, mongod, tmp_path / "touches")
    assert runs() == 0
    assert desk.holds()
    _change(desk, chance, span=8)
    assert runs() == 0
    most, expected, generation, killed = runs.touches, _stored(desk), desk.manifest.generation, 0
    assert most > _KILLS
    for _ in range(_ATTEMPTS):
        _change(desk, chance, span=8)
        killed += runs(kill_at=chance.randrange(1, most)) == -signal.SIGKILL
        if desk.manifest.generation != generation:
            expected, generation = _stored(desk), desk.manifest.generation
        assert integrity.damaged(desk.manifest) == []
        assert _published(desk) == expected
        assert integrity.verify(desk.db, desk.manifest, extracts=desk.settings.extract).holds
        if killed == _KILLS:
            break
    assert killed == _KILLS
    assert runs() == 0
    assert desk.holds()
    assert _published(desk) == _stored(desk)
    assert _extract_equals_mongodb(desk)


def test_killed_after_any_time_the_published_warehouse_is_whole(desk: Desk, mongod: Mongod, tmp_path: Path) -> None:
    # In the middle of anything: while Parquet is written, DuckDB merges or MongoDB is waited for.
    chance, killed = random.Random(21), 0
    runs = _Runs(desk, mongod, tmp_path / "touches")
    for _ in range(4):
        _change(desk, chance, span=8)
    assert runs() == 0
    _change(desk, chance, span=8)
    assert runs() == 0
    seconds = runs.seconds
    for _ in range(5):
        _change(desk, chance, span=8)
        killed += runs(kill_after=seconds * chance.uniform(0.2, 0.9)) == -signal.SIGKILL
        assert integrity.damaged(desk.manifest) == []
        assert integrity.verify(desk.db, desk.manifest, extracts=desk.settings.extract).holds
    assert killed
    assert runs() == 0
    assert desk.holds()
    assert _published(desk) == _stored(desk)
    assert _extract_equals_mongodb(desk)


def test_the_first_run_is_gone_on_with_after_a_kill(desk: Desk, mongod: Mongod, tmp_path: Path) -> None:
    chance = random.Random(3)
    for _ in range(8):
        _change(desk, chance)
    runs = _Runs(desk, mongod, tmp_path / "touches")
    for kill_at in (2, 40, 80, 120, 160):
        assert runs(kill_at) == -signal.SIGKILL
        assert not (desk.root / "warehouse" / NAME).exists()
    assert (desk.root / "warehouse" / WORK).exists()
    _change(desk, chance)
    assert runs() == 0
    assert desk.holds()


def test_what_killed_runs_left_behind_is_deleted(desk: Desk, mongod: Mongod, tmp_path: Path) -> None:
    chance = random.Random(5)
    for _ in range(5):
        _change(desk, chance)
    runs = _Runs(desk, mongod, tmp_path / "touches")
    for kill_at in (30, 60, 90):
        runs(kill_at)
    assert runs() == 0
    there = {path.relative_to(desk.root / "warehouse").as_posix() for path in desk.root.glob("warehouse/tenants/*/*/*")}
    assert there == desk.manifest.paths
    assert [path for path in desk.files() if path.name.endswith(".writing")] == []
    assert not (desk.root / "warehouse" / WORK).exists()
