"""Each question in DuckDB over the warehouse against MongoDB's aggregation with the best indexes, in one run.

    python bench/synthetic_warehouse.py /tmp/warehouse --responses 1000000
    python bench/analytics.py /tmp/warehouse --load /tmp/bench-mongod --explain bench/explain
    python bench/analytics.py /tmp/etl/warehouse --load /tmp/etl/mongod --stored    # after bench/etl.py

The responses of one tenant (by default the largest, 28 % of all) are read back from the warehouse and inserted as
documents of the API's shape (with `--stored` they are there, among those of others); MongoDB has the whole of them and
its indexes in its cache. Both answer the same question and the answers are compared. Times are the least of some runs
with everything warm, by the clock and of the processor (which a busy machine bends less); the answers' cache is not
used.
`--cached`: the time of answers that are kept, inside the service (no socket, no HTTP), with Redis `cache`.
"""

import argparse
import gzip
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
from pymongo import IndexModel, MongoClient
from pymongo.collection import Collection

from quern.analytics.answer import Warehouse
from quern.analytics.desk import Desk
from quern.analytics.duckdb_engine import DuckDbEngine
from quern.analytics.kept import Kept
from quern.analytics.manifest import Manifest
from quern.analytics.question import Question
from quern.analytics.service_settings import ServiceSettings
from quern.embedded.mongod import Mongod
from quern.embedded.redis_server import RedisServer
from quern.store import redis_connection

Document = dict[str, Any]
_CHUNK = 5000
#: What the service gives its engine unless it is told otherwise.
_MEGABYTES: int = ServiceSettings.model_fields["memory_megabytes"].default

#: Made for these questions alone; all but `whole` answer without looking at a document.
INDEXES: dict[str, list[tuple[str, int]]] = {
    "time": [("tenant", 1), ("created", 1)],
    "sector": [("tenant", 1), ("created", 1), ("answers.sector", 1), ("processed", 1)],
    "sector_score": [("tenant", 1), ("answers.sector", 1), ("answers.score", 1), ("created", 1), ("processed", 1)],
    "label": [("tenant", 1), ("created", 1), ("results.topic.label", 1)],
    "label_sector": [("tenant", 1), ("answers.sector", 1), ("results.topic.label", 1)],
    "mood": [("tenant", 1), ("created", 1), ("results.mood.label", 1)],
    "score": [("tenant", 1), ("created", 1), ("answers.score", 1)],
    "person": [("tenant", 1), ("answers.email", 1), ("created", 1)],
    "status": [("tenant", 1), ("status", 1)],
    "topics": [("tenant", 1), ("answers.topics", 1)],
}

_SECONDS = {"$divide": [{"$subtract": ["$processed", "$created"]}, 1000]}


def _grouped(key: Any, value: Any = None, match: Document | None = None) -> list[Document]:
    how: Document = {"_id": key, "count": {"$sum": 1}}
    if value is not None:
        how["mean"] = {"$avg": value}
    return [{"$match": match or {}}, {"$group": how}]


def _month(field: str = "$created") -> Document:
    return {"$dateTrunc": {"date": field, "unit": "month"}}


def _median(value: Document) -> list[Document]:
    # 6.0 has no $percentile: the values are sorted, and the one in the middle is taken.
    return [
        {"$project": {"_id": 0, "v": value}},
        {"$sort": {"v": 1}},
        {"$group": {"_id": None, "all": {"$push": "$v"}}},
        {
            "$project": {
                "count": {"$size": "$all"},
                "p50": {"$arrayElemAt": ["$all", {"$floor": {"$divide": [{"$size": "$all"}, 2]}}]},
            }
        },
    ]


def cases(tenant: str) -> list[tuple[str, bool, Document, str, list[Document]]]:
    """Name, whether it is a heavy one, the question, the hint, the pipeline."""
    own = {"tenant": tenant}
    year = {"from": "2026-01-01T00:00:00Z"}
    since = {"tenant": tenant, "created": {"$gte": datetime(2026, 1, 1, tzinfo=UTC)}}
    texts = {"$strLenCP": "$answers.comment"}
    first = [
        {"$match": {"tenant": tenant, "answers.email": {"$type": "string"}}},
        {"$group": {"_id": {"who": "$answers.email", "at": _month()}}},
        {"$group": {"_id": "$_id.who", "first": {"$min": "$_id.at"}, "seen": {"$push": "$_id.at"}}},
        {"$unwind": "$seen"},
        {"$group": {"_id": {"first": "$first", "at": "$seen"}, "count": {"$sum": 1}}},
    ]
    words = [
        {"$match": own},
        {"$project": {"w": {"$split": [{"$toLower": "$answers.comment"}, " "]}}},
        {"$unwind": "$w"},
        {"$group": {"_id": {"w": "$w", "r": "$_id"}, "n": {"$sum": 1}}},
        {"$group": {"_id": "$_id.w", "responses": {"$sum": 1}, "count": {"$sum": "$n"}}},
        {"$match": {"$expr": {"$gte": [{"$strLenCP": "$_id"}, 3]}}},
    ]
    mean = ["count", "mean"]
    return [
        ("responses a month", False, {"measure": "responses", "grain": "month"}, "time", _grouped(_month(), None, own)),
        (
            "length by user",
            True,
            {"measure": "response_length", "dimensions": ["user"], "statistics": mean},
            "time",
            _grouped("$actor", texts, own),
        ),
        (
            "time to respond by sector",
            True,
            {"measure": "response_time", "dimensions": ["answer.sector"], "statistics": mean, "range": year},
            "sector",
            _grouped("$answers.sector", _SECONDS, since),
        ),
        (
            "the same a month",
            True,
            {"measure": "response_time", "dimensions": ["answer.sector"], "statistics": mean, "grain": "month"},
            "sector",
            _grouped({"s": "$answers.sector", "m": _month()}, _SECONDS, own),
        ),
        (
            "time by sector and score",
            True,
            {"measure": "response_time", "dimensions": ["answer.sector", "answer.score"], "statistics": mean},
            "sector_score",
            _grouped({"s": "$answers.sector", "c": "$answers.score"}, _SECONDS, own),
        ),
        (
            "labels a month",
            True,
            {"measure": "responses", "dimensions": ["label"], "grain": "month"},
            "label",
            _grouped({"l": "$results.topic.label", "m": _month()}, None, own),
        ),
        (
            "sentiment a month",
            True,
            {"measure": "responses", "dimensions": ["sentiment"], "grain": "month"},
            "mood",
            _grouped({"l": "$results.mood.label", "m": _month()}, None, own),
        ),
        (
            "labels where sector is health",
            False,
            {
                "measure": "responses",
                "dimensions": ["result.topic.label"],
                "filters": [{"dimension": "answer.sector", "values": ["health"]}],
            },
            "label_sector",
            _grouped("$results.topic.label", None, {**own, "answers.sector": "health"}),
        ),
        (
            "score, mean a month",
            True,
            {"measure": "answer", "of": "answer.score", "statistics": mean, "grain": "month"},
            "score",
            _grouped(_month(), "$answers.score", own),
        ),
        (
            "topics (several a response)",
            True,
            {"measure": "responses", "dimensions": ["answer.topics"]},
            "time",
            [
                {"$match": own},
                {"$unwind": "$answers.topics"},
                {"$group": {"_id": "$answers.topics", "count": {"$sum": 1}}},
            ],
        ),
        (
            "median time to respond",
            True,
            {"measure": "response_time", "statistics": ["count", "p50"]},
            "sector",
            [{"$match": own}, *_median(_SECONDS)],
        ),
        (
            "by status",
            False,
            {"measure": "responses", "dimensions": ["status"]},
            "status",
            _grouped("$status", None, own),
        ),
        ("cohorts a month", True, {"measure": "cohorts", "grain": "month"}, "person", first),
        ("terms", True, {"measure": "terms", "of": "answer.comment", "top": 1000}, "time", words),
    ]


_SELECT = """
    SELECT r.response, any_value(r.form), any_value(r.version), any_value(r.created), any_value(r.processed),
        any_value(r."user"), any_value(r.status),
        any_value(value_text) FILTER (path = 'sector'), any_value(value_text) FILTER (path = 'email'),
        any_value(value_number) FILTER (path = 'score'), any_value(value_number) FILTER (path = 'age'),
        any_value(value_text) FILTER (path = 'comment'), list(value_text) FILTER (path = 'topics'),
        any_value(value_text) FILTER (path = 'summary.text'), any_value(value_text) FILTER (path = 'topic.label'),
        any_value(value_number) FILTER (path = 'topic.score'), any_value(value_text) FILTER (path = 'mood.label'),
        any_value(value_number) FILTER (path = 'mood.score')
    FROM {} r JOIN {} a USING (response) GROUP BY 1
"""


def documents(manifest: Manifest, tenant: str) -> Iterator[list[Document]]:
    """The tenant's responses as MongoDB holds them, in chunks."""
    db = duckdb.connect()
    for part in manifest.partitions("fact_response", tenant):
        answers = next(item for item in manifest.partitions("fact_answer", tenant) if item.period == part.period)
        read = (f"read_parquet('{manifest.root / item.path}')" for item in (part, answers))
        rows = db.execute(_SELECT.format(*read))
        while chunk := rows.fetchmany(_CHUNK):
            yield [_document(tenant, row) for row in chunk]


def _document(tenant: str, row: tuple[Any, ...]) -> Document:
    answers = {
        "sector": row[7],
        "email": row[8],
        "score": int(row[9]),
        "age": row[10],
        "comment": row[11],
        "topics": row[12],
    }
    results = {
        "summary": {"text": row[13]},
        "topic": {"label": row[14], "score": row[15]},
        "mood": {"label": row[16], "score": row[17]},
    }
    return {
        "_id": row[0],
        "tenant": tenant,
        "form": row[1],
        "version": row[2],
        "created": row[3].replace(tzinfo=UTC),
        "processed": row[4].replace(tzinfo=UTC),
        "actor": row[5],
        "status": row[6],
        "answers": answers,
        "results": results,
        "steps": {"summary": "done", "topic": "done", "mood": "done"},
    }


def index_of_tenant(collection: Collection[Document], tenant: str) -> None:
    """The same indexes over one tenant of many: all made by one reading of the collection."""
    began = time.monotonic()
    only = {"tenant": tenant}
    models = [IndexModel(keys, name=name, partialFilterExpression=only) for name, keys in INDEXES.items()]
    collection.create_indexes(models)
    print(f"indexed in {time.monotonic() - began:.0f} s", flush=True)


@dataclass(frozen=True)
class Spent:
    """The least of some runs, in milliseconds: by the clock, and of all processors together."""

    clock: float
    cpu: float


def best(run: Callable[[], Any], times: int, cpu: Callable[[], float]) -> tuple[Spent, Any]:
    """The fastest of some runs after one to warm up, and what it returned. `cpu`: seconds used so far."""
    found = run()
    clock, used = [], []
    for _ in range(times):
        began, before = time.perf_counter(), cpu()
        found = run()
        clock.append(time.perf_counter() - began)
        used.append(cpu() - before)
    return Spent(min(clock) * 1e3, min(used) * 1e3), found


def cpu_of(process: int) -> float:
    """Seconds of CPU that another process has used, to the nanosecond where the kernel says it."""
    total = 0.0
    for thread in Path(f"/proc/{process}/task").iterdir():
        try:
            total += int((thread / "schedstat").read_text().split()[0]) / 1e9
        except (OSError, IndexError):
            continue
    return total


def compare(
    warehouse: Warehouse,
    collection: Collection[Document],
    server: int,
    tenant: str,
    times: int,
    explain: Path | None,
    only: set[str],
) -> None:
    """Print a line a question: times by the clock and of the processor, DuckDB's (this process's) and mongod's."""
    print(f"{'question':32} {'DuckDB':>8} {'MongoDB':>8} {'ratio':>6}  {'DuckDB':>8} {'MongoDB':>8} {'ratio':>6}  rows")
    print(f"{'':32} {'clock ms':>24}  {'CPU ms':>24}")
    for name, heavy, asked, hint, pipeline in cases(tenant):
        if only and name not in only:
            continue
        question = Question.model_validate(asked)
        fast, answer = best(
            lambda question=question: warehouse.answer(question, tenant).table, times, time.process_time
        )  # type: ignore[misc]

        def run(pipeline: list[Document] = pipeline, hint: str = hint) -> list[Document]:
            return list(collection.aggregate(pipeline, hint=hint, allowDiskUse=True))

        slow, found = best(run, 1, lambda: cpu_of(server))
        rows = answer.num_rows
        # Of the median there is one row in both; otherwise the groups are the same, and so is what they count.
        if "count" in answer.column_names:
            assert sum(answer["count"].to_pylist()) == sum(row["count"] for row in found), name
        mark = "*" if heavy else " "
        print(
            f"{name:31}{mark} {fast.clock:8.1f} {slow.clock:8.1f} {slow.clock / fast.clock:6.1f}  "
            f"{fast.cpu:8.1f} {slow.cpu:8.1f} {slow.cpu / fast.cpu:6.1f}  {rows}/{len(found)}",
            flush=True,
        )
        if explain is not None:
            command = {
                "aggregate": collection.name,
                "pipeline": pipeline,
                "hint": hint,
                "cursor": {},
                "allowDiskUse": True,
            }
            plan = collection.database.command("explain", command, verbosity="executionStats")
            kept = {key: plan[key] for key in ("stages", "queryPlanner", "executionStats") if key in plan}
            target = explain / f"{name.replace(' ', '-').replace(',', '').replace('(', '').replace(')', '')}.json.gz"
            with gzip.GzipFile(target, "wb", mtime=0) as file:
                file.write(
                    json.dumps(
                        {"pipeline": pipeline, "hint": INDEXES[hint], "plan": kept}, default=str, indent=1
                    ).encode()
                )


def cached(warehouse: Warehouse, tenant: str, count: int) -> None:
    """Print the quantiles of answers that are kept: from Redis, then from the service's memory."""
    with (
        tempfile.TemporaryDirectory(prefix="qb-", dir="/tmp") as directory,
        RedisServer(Path(directory), role="cache") as server,
    ):
        url = server.url
        questions = [Question.model_validate(asked) for _, _, asked, _, _ in cases(tenant)]
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
    parser.add_argument("--load", type=Path, help="folder of a mongod; kept, so that a second run need not load")
    parser.add_argument(
        "--stored", action="store_true", help="the folder is bench/etl.py's mongod: its own responses are asked"
    )
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
    if chosen.load is None:
        return
    with Mongod(chosen.load, cache_gigabytes=4.0) as server, MongoClient[Document](server.uri, tz_aware=True) as client:
        collection = client["quern" if chosen.stored else "bench"]["responses"]
        if chosen.stored:
            index_of_tenant(collection, tenant)
        elif collection.count_documents({"tenant": tenant}) != sizes[tenant]:
            began = time.monotonic()
            for chunk in documents(manifest, tenant):
                collection.insert_many(chunk, ordered=False)
            for name, keys in INDEXES.items():
                collection.create_index(keys, name=name)
            print(f"loaded and indexed in {time.monotonic() - began:.0f} s", flush=True)
        if server.pid is None:
            raise SystemExit("expected a running mongod, found that it has ended")
        compare(warehouse, collection, server.pid, tenant, chosen.times, chosen.explain, set(chosen.only))
    engine.close()


if __name__ == "__main__":
    main()
