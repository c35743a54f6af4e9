"""What the responses nearest in meaning cost: DuckDB over all embeddings of a tenant, and exact peers over MongoDB.

    python bench/similar.py make /tmp/similar --rows 200000
    python bench/similar.py ask /tmp/similar                    # time, CPU, peak memory; beside numpy in memory
    python bench/similar.py peer /tmp/similar --rows 20000      # MongoDB, of so many of the same

MongoDB 6.0 has no index of vectors outside its hosted service. Exact answers from it are an aggregation that multiplies
384 numbers a document, or reading all embeddings and multiplying here. Vectors are random and of unit length, float32;
in MongoDB they are lists of doubles, as results have them.
"""

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from analytics import best, cpu_of
from pymongo import MongoClient

from quern.analytics.answer import Warehouse
from quern.analytics.duckdb_engine import DuckDbEngine
from quern.analytics.manifest import Manifest, Source
from quern.analytics.partition import PartitionWriter, batch
from quern.analytics.question import Question
from quern.analytics.schema import FACT_EMBEDDING
from quern.analytics.service_settings import ServiceSettings
from quern.embedded.mongod import Mongod
from quern.store import identifier

_DIMENSIONS = 384
_CHUNK = 20_000
_TENANT = identifier.derived("ten", "similar")
_MEGABYTES: int = ServiceSettings.model_fields["memory_megabytes"].default
_TOP = 100


def run_make(arguments: argparse.Namespace) -> None:
    """One tenant's embeddings, a twelfth of them in each month of a year."""
    random = np.random.default_rng(3)
    parts, each = [], arguments.rows // 12
    for month in range(12):
        start = datetime(2026, month + 1, 1)  # noqa: DTZ001  stored without a zone
        with PartitionWriter(arguments.data, FACT_EMBEDDING, _TENANT, f"{start:%Y-%m}", 1) as writer:
            for first in range(0, each, _CHUNK):
                writer.write_sorted(_vectors(random, start, month * each + first, min(_CHUNK, each - first)))
            parts.append(writer.close())
    manifest = Manifest(arguments.data).with_partitions(FACT_EMBEDDING.name, _TENANT, [part for part in parts if part])
    at = datetime(2027, 1, 1, tzinfo=UTC)
    manifest.publish(keep=timedelta(minutes=15), freshness=at, source=Source(), at=at)


def _vectors(random: np.random.Generator, start: datetime, first: int, count: int) -> pa.RecordBatch:
    made = random.standard_normal((count, _DIMENSIONS), dtype=np.float32)
    made /= np.linalg.norm(made, axis=1, keepdims=True)
    offsets = np.arange(0, (count + 1) * _DIMENSIONS, _DIMENSIONS, dtype=np.int32)
    kind = FACT_EMBEDDING.arrow.field("vector").type
    columns = {
        "tenant": [_TENANT] * count,
        "form": [identifier.derived("frm", _TENANT)] * count,
        "version": [1] * count,
        "response": [identifier.derived("rsp", str(first + number)) for number in range(count)],
        "created": [start] * count,
        "day": [start.date()] * count,
        "step": ["vector"] * count,
        "vector": pa.ListArray.from_arrays(offsets, pa.array(made.ravel()), type=kind),
    }
    return batch(FACT_EMBEDDING, columns)


def _read(data: Path) -> Iterator[tuple[list[str], Any]]:
    """Identifiers and vectors, a row group at a time."""
    manifest = Manifest.load(data)
    for part in manifest.partitions(FACT_EMBEDDING.name, _TENANT):
        for rows in pq.ParquetFile(data / part.path).iter_batches(_CHUNK, columns=["response", "vector"]):
            flat = rows.column("vector").flatten().to_numpy()
            yield rows.column("response").to_pylist(), flat.reshape(-1, _DIMENSIONS)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_ask(arguments: argparse.Namespace) -> None:
    """DuckDB with what the service gives it; then the same in numpy, which says whether the answer is right."""
    before = _peak()
    engine = DuckDbEngine(arguments.data, threads=arguments.threads, memory_megabytes=_MEGABYTES)
    warehouse = Warehouse(arguments.data, engine, seconds=120)
    target = identifier.derived("rsp", "7")
    question = Question.model_validate({"measure": "similar", "of": target, "top": _TOP})
    spent, found = best(
        lambda: warehouse.answer(question, _TENANT).table.to_pylist(), arguments.times, time.process_time
    )
    rows = sum(part.rows for part in Manifest.load(arguments.data).partitions(FACT_EMBEDDING.name, _TENANT))
    print(
        f"{rows} embeddings, {arguments.threads} threads, load {os.getloadavg()[0]:.0f}: DuckDB {spent.clock:.0f} ms, "
        f"{spent.cpu:.0f} of CPU; peak {_peak():.0f} MB, {before:.0f} before the first question",
        flush=True,
    )
    engine.close()
    wanted = next(vectors[names.index(target)] for names, vectors in _read(arguments.data) if target in names)
    clock = cpu = 0.0
    scored: list[tuple[float, str]] = []
    for names, vectors in _read(arguments.data):
        began, used = time.perf_counter(), time.process_time()
        scores = vectors @ wanted
        top = np.argsort(-scores)[: _TOP + 1]
        clock, cpu = clock + time.perf_counter() - began, cpu + time.process_time() - used
        scored += [(float(scores[place]), names[place]) for place in top if names[place] != target]
    nearest = sorted(scored, reverse=True)[:_TOP]
    _check(found, nearest)
    print(f"numpy, the vectors in memory: {clock * 1e3:.0f} ms, {cpu * 1e3:.0f} of CPU; the same {_TOP} responses")


def _check(found: list[dict[str, Any]], nearest: list[tuple[float, str]]) -> None:
    """Raises SystemExit: another response, or a similarity that differs by more than float32 explains."""
    names = [row["response"] for row in found]
    # Two that are as near as float32 can tell may change places.
    if set(names) != {name for _, name in nearest}:
        raise SystemExit(f"expected {[name for _, name in nearest][:5]} …, found {names[:5]} …")
    scores = {name: score for score, name in nearest}
    worst = max(abs(row["similarity"] - scores[row["response"]]) for row in found)
    if worst > 1e-5:
        raise SystemExit(f"expected equal similarities, found a difference of {worst}")


def run_peer(arguments: argparse.Namespace) -> None:
    """The first so many in MongoDB: by an aggregation, and by reading them."""
    target = identifier.derived("rsp", "7")
    with (
        tempfile.TemporaryDirectory(prefix="qs-", dir=arguments.data) as folder,
        Mongod(Path(folder), cache_gigabytes=1.0) as server,
        MongoClient[dict[str, Any]](server.uri) as client,
    ):
        collection, wanted, left = client["quern"]["responses"], None, arguments.rows
        for names, vectors in _read(arguments.data):
            if target in names:
                wanted = vectors[names.index(target)]
            pairs = list(zip(names, vectors.tolist(), strict=True))[:left]
            collection.insert_many([{"_id": name, "vector": vector} for name, vector in pairs])
            left -= len(pairs)
            if not left:
                break
        if wanted is None or server.pid is None:
            raise SystemExit("expected the asked response and a running mongod")
        process = server.pid
        products = [{"$multiply": [{"$arrayElemAt": ["$vector", n]}, x]} for n, x in enumerate(wanted.tolist())]
        pipeline: list[dict[str, Any]] = [
            {"$match": {"_id": {"$ne": target}}},
            {"$project": {"similarity": {"$add": products}}},
            {"$sort": {"similarity": -1}},
            {"$limit": _TOP},
        ]

        def read() -> list[tuple[float, str]]:
            scored: list[tuple[float, str]] = []
            names: list[str] = []
            vectors: list[list[float]] = []
            for row in collection.find({"_id": {"$ne": target}}, {"vector": 1}, batch_size=2000):
                names.append(row["_id"])
                vectors.append(row["vector"])
                if len(names) == 2000:
                    scored += _scored(names, vectors, wanted)
                    names, vectors = [], []
            scored += _scored(names, vectors, wanted) if names else []
            return sorted(scored, reverse=True)[:_TOP]

        inside, rows = best(lambda: list(collection.aggregate(pipeline)), 1, lambda: cpu_of(process))
        outside, nearest = best(read, 1, lambda: cpu_of(process) + time.process_time())
        _check([{"response": row["_id"], "similarity": row["similarity"]} for row in rows], nearest)
    print(
        f"MongoDB, {arguments.rows} embeddings: aggregation {inside.clock:.0f} ms, {inside.cpu:.0f} of CPU; read and "
        f"multiplied here {outside.clock:.0f} ms, {outside.cpu:.0f} of CPU; the same {_TOP} responses"
    )


def _scored(names: list[str], vectors: list[list[float]], wanted: Any) -> list[tuple[float, str]]:
    return list(zip((np.array(vectors, np.float32) @ wanted).tolist(), names, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, do in (("make", run_make), ("ask", run_ask), ("peer", run_peer)):
        command = commands.add_parser(name)
        command.set_defaults(do=do)
        command.add_argument("data", type=Path)
        command.add_argument("--rows", type=int, default=200_000)
        command.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
        command.add_argument("--times", type=int, default=5)
    arguments = parser.parse_args()
    arguments.do(arguments)


if __name__ == "__main__":
    main()
