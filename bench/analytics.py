"""Each question in DuckDB over the warehouse against MongoDB's aggregation with the best indexes, in one run.

    python bench/etl.py load --data /tmp/etl --responses 1000000
    quern etl run --tenant ten_…                       # see docs/performance-questions.md
    python bench/analytics.py /tmp/etl/warehouse --mongod /tmp/etl/mongod --explain bench/explain

The questions and their peers are in `analytics_cases`. The one who asks is one tenant (by default the largest, 28 % of
all) of many in both; MongoDB has its indexes over that tenant's documents (partial ones) in its cache. Every cell of
both answers is compared. Times are the least of some runs with everything warm, by the clock and of the processor
(which a busy machine bends less); the answers' cache is not used.
`--cached`: the time of answers that are kept, inside the service (no socket, no HTTP), with Redis `cache`.
"""

import argparse
import gzip
import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from analytics_cases import INDEXES, Case, cases
from pymongo import IndexModel, MongoClient

from quern.analytics.answer import Warehouse
from quern.analytics.desk import Desk
from quern.analytics.duckdb_engine import DuckDbEngine
from quern.analytics.kept import Kept
from quern.analytics.manifest import Manifest
from quern.analytics.question import Measure, Question
from quern.analytics.service_settings import ServiceSettings
from quern.embedded.mongod import Mongod
from quern.embedded.redis_server import RedisServer
from quern.store import redis_connection
from quern.store.connection import Db, Document

#: What the service gives its engine unless it is told otherwise.
_MEGABYTES: int = ServiceSettings.model_fields["memory_megabytes"].default

#: Mean, sum and percentiles may differ by this part of themselves: in the order of additions, and in nothing else.
_TOLERANCE = 1e-9
_MEASURED = ("sum", "mean", "min", "max", "p50", "p75", "p90", "p95", "p99")
_COUNTED = ("count", "members", "responses", "occurrences")
#: MongoDB's second run is not waited for if the first took so many seconds.
_LONG = 20.0

Row = dict[str, Any]


def index(db: Db, only: Document | None, collections: Sequence[str]) -> None:
    """Make the indexes, all of a collection by one reading of it; `only`: of one tenant of many."""
    began = time.monotonic()
    partial = {} if only is None else {"partialFilterExpression": only}
    for collection in collections:
        models = [IndexModel(keys, name=name, **partial) for name, keys in INDEXES[collection].items()]
        db[collection].create_indexes(models)
    print(f"indexed in {time.monotonic() - began:.0f} s", flush=True)


@dataclass(frozen=True)
class Spent:
    """The least of some runs, in milliseconds: by the clock, and of all processors together."""

    clock: float
    cpu: float


def best(run: Callable[[], Any], times: int, cpu: Callable[[], float], *, long: float = math.inf) -> tuple[Spent, Any]:
    """The fastest of some runs after one to warm up, and what it returned. `cpu`: seconds used so far.

    What took more than `long` seconds to warm up is not run again: that was its time.
    """
    clock, used = [], []
    found = None
    for number in range(times + 1):
        began, before = time.perf_counter(), cpu()
        found = run()
        clock.append(time.perf_counter() - began)
        used.append(cpu() - before)
        if number == 0 and clock[0] > long:
            break
    warm = slice(1, None) if len(clock) > 1 else slice(None)
    return Spent(min(clock[warm]) * 1e3, min(used[warm]) * 1e3), found


def cpu_of(process: int) -> float:
    """Seconds of CPU that another process has used, to the nanosecond where the kernel says it."""
    total = 0.0
    for thread in Path(f"/proc/{process}/task").iterdir():
        try:
            total += int((thread / "schedstat").read_text().split()[0]) / 1e9
        except (OSError, IndexError):
            continue
    return total


def answered(question: Question, rows: list[Row]) -> dict[tuple[str, ...], Row]:
    """The warehouse's answer: keys to statistics."""
    keys = [name for name in question.columns if name not in (*_MEASURED, *_COUNTED, "share", "stage")]
    return {tuple(_key(row[name]) for name in keys): row for row in rows}


def aggregated(rows: list[Document]) -> dict[tuple[str, ...], Row]:
    """MongoDB's, likewise."""
    return {tuple(map(_key, _flat(row["_id"]))): row for row in rows}


def _flat(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [item for inner in value.values() for item in _flat(inner)]
    return [] if value is None else [value]


def _key(value: Any) -> str:
    return value.date().isoformat() if isinstance(value, datetime) else str(value)


def differences(question: Question, mine: dict[tuple[str, ...], Row], peer: dict[tuple[str, ...], Row]) -> list[str]:
    """Every cell of an answer beside the peer's: counts equal, the rest within the tolerance. Empty: they agree."""
    found = [f"{key} in one answer only" for key in mine.keys() ^ peer.keys()]
    for key in mine.keys() & peer.keys():
        for name in question.columns:
            if name in _COUNTED:
                same = mine[key][name] == peer[key][name]
            elif name in _MEASURED:
                same = math.isclose(mine[key][name], peer[key][name], rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
            elif name == "share":
                same = math.isclose(mine[key][name], _share(question, key, peer), rel_tol=_TOLERANCE)
            else:
                continue
            if not same:
                found.append(f"{key} {name}: {mine[key].get(name)} and {peer[key].get(name)}")
    return found


def _share(question: Question, key: tuple[str, ...], peer: dict[tuple[str, ...], Row]) -> float:
    """Of the bucket's total; of a funnel and of cohorts: of the most of their group."""
    counted = "members" if question.measure is Measure.COHORTS else "count"
    match question.measure:
        case Measure.FUNNEL:
            group = key[:-1]
        case Measure.COHORTS:
            group = key[:1]
        case _:
            group = () if question.grain == "all" else key[:1]
    values = [row[counted] for other, row in peer.items() if other[: len(group)] == group]
    whole = max(values) if question.measure in (Measure.FUNNEL, Measure.COHORTS) else sum(values)
    return float(peer[key][counted] / whole)


def compare(
    warehouse: Warehouse, db: Db, server: int, tenant: str, times: int, explain: Path | None, chosen: list[Case]
) -> None:
    """Print a line a question: times by the clock and of the processor, DuckDB's (this process's) and mongod's."""
    print(f"{'question':40} {'DuckDB':>8} {'MongoDB':>8} {'ratio':>6}  {'DuckDB':>8} {'MongoDB':>8} {'ratio':>6}  rows")
    print(f"{'':40} {'clock ms':>24}  {'CPU ms':>24}")
    for case in chosen:
        question = Question.model_validate(case.asked)

        def ask(question: Question = question) -> list[Row]:
            return warehouse.answer(question, tenant).table.to_pylist()

        def aggregate(case: Case = case) -> list[Document]:
            return list(db[case.collection].aggregate(case.pipeline, hint=case.hint, allowDiskUse=True))

        fast, mine = best(ask, times, time.process_time)
        slow, peer = best(aggregate, 2, lambda: cpu_of(server), long=_LONG)
        wrong = differences(question, answered(question, mine), aggregated(peer))
        if wrong:
            raise SystemExit(f"{case.name}: expected equal answers, found {len(wrong)} differences: {wrong[:5]}")
        mark = "*" if case.heavy else " "
        read = "" if explain is None else f"  {_explain(db, case, explain)} documents read"
        print(
            f"{case.name:39}{mark} {fast.clock:8.1f} {slow.clock:8.1f} {slow.clock / fast.clock:6.1f}  "
            f"{fast.cpu:8.1f} {slow.cpu:8.1f} {slow.cpu / fast.cpu:6.1f}  {len(mine)}{read}",
            flush=True,
        )


def _explain(db: Db, case: Case, folder: Path) -> int:
    """Write MongoDB's plan with what it did; returns how many documents it read beside the index."""
    command = {"aggregate": case.collection, "pipeline": case.pipeline, "hint": case.hint, "cursor": {}}
    plan = db.command("explain", {**command, "allowDiskUse": True}, verbosity="executionStats")
    kept = {key: plan[key] for key in ("stages", "queryPlanner", "executionStats") if key in plan}
    written = {"pipeline": case.pipeline, "hint": INDEXES[case.collection][case.hint], "plan": kept}
    with gzip.GzipFile(
        folder / f"{re.sub('[^a-z0-9]+', '-', case.name.lower()).strip('-')}.json.gz", "wb", mtime=0
    ) as file:
        file.write(json.dumps(written, default=str, indent=1).encode())
    # Each step within a step says it again.
    return max(_values(kept, "totalDocsExamined"), default=0)


def _values(tree: Any, name: str) -> Iterator[int]:
    """The values of a name, wherever it stands in a plan."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key == name:
                yield value
            else:
                yield from _values(value, name)
    elif isinstance(tree, list):
        for item in tree:
            yield from _values(item, name)


def cached(warehouse: Warehouse, tenant: str, count: int) -> None:
    """Print the quantiles of answers that are kept: from Redis, then from the service's memory."""
    with (
        tempfile.TemporaryDirectory(prefix="qb-", dir="/tmp") as directory,
        RedisServer(Path(directory), role="cache") as server,
    ):
        url = server.url
        questions = [Question.model_validate(case.asked) for case in cases(tenant)]
        desk = Desk(warehouse, Kept(redis_connection.connect(lambda: url), 3600))
        for question in questions:
            desk.page(question, tenant, 100, None)
        for name, near in (("from Redis", False), ("from memory", True)):
            took = []
            for number in range(count):
                if not near:
                    desk.kept._near.clear()
                began = time.perf_counter()
                made = desk.page(questions[number % len(questions)], tenant, 100, None).model_dump_json()
                took.append((time.perf_counter() - began) * 1e3)
                assert made
            took.sort()
            middle, high = took[count // 2], took[int(count * 0.99)]
            print(f"cached, {name}: {count} answers, p50 {middle:.2f} ms, p99 {high:.2f} ms", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("warehouse", type=Path)
    parser.add_argument("--mongod", type=Path, help="folder of bench/etl.py's mongod; none: kept answers alone")
    parser.add_argument("--tenant", type=int, default=0, help="0 is the largest")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--explain", type=Path)
    parser.add_argument("--only", action="append", default=[], help="a question's name; again for another")
    parser.add_argument("--cached", type=int, default=2000, help="how many kept answers to ask for; 0: none")
    chosen = parser.parse_args()
    manifest = Manifest.load(chosen.warehouse)
    sizes = {name: sum(item.rows for item in parts) for name, parts in manifest.tables["fact_response"].items()}
    tenant = sorted(sizes, key=lambda name: -sizes[name])[chosen.tenant]
    engine = DuckDbEngine(chosen.warehouse, threads=chosen.threads, memory_megabytes=_MEGABYTES)
    warehouse = Warehouse(chosen.warehouse, engine, seconds=600)
    load = os.getloadavg()[0]
    print(f"{sizes[tenant]} of {sum(sizes.values())} responses, {chosen.threads} threads, load {load:.1f} before")
    if chosen.cached:
        cached(warehouse, tenant, chosen.cached)
    if chosen.mongod is None:
        return
    with (
        Mongod(chosen.mongod, cache_gigabytes=4.0) as server,
        MongoClient[Document](server.uri, tz_aware=True) as client,
    ):
        db = client["quern"]
        index(db, {"tenant": tenant}, list(INDEXES))
        if server.pid is None:
            raise SystemExit("expected a running mongod, found that it has ended")
        asked = [case for case in cases(tenant) if not chosen.only or case.name in chosen.only]
        if chosen.explain is not None:
            chosen.explain.mkdir(parents=True, exist_ok=True)
        compare(warehouse, db, server.pid, tenant, chosen.times, chosen.explain, asked)
    engine.close()


if __name__ == "__main__":
    main()
