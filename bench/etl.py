"""The ETL against the bare rate of reading MongoDB and writing Parquet; its memory; a day's cost; the API meanwhile.

    python bench/etl.py load --data /tmp/etl --responses 1000000 --days 100
    python bench/etl.py rate --data /tmp/etl        # bare rate, the first run of the ETL, its memory, verification
    python bench/etl.py stages --data /tmp/etl      # where the processor's time of a run goes
    python bench/etl.py day  --data /tmp/etl        # one day more, and what it costs
    python bench/etl.py api  --responses 300000     # p99 of the API, with the ETL stopped and running

The bare peer reads every collection with `find()` and writes each with `pyarrow.Table.from_pylist` to one Parquet
file, 5,000 documents at a time. The ETL's rate counts the same documents (responses, audit entries, jobs); it writes
JSONL, Parquet and the star schema, reads them back and compares.
"""

import argparse
import inspect
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if "stages" in sys.argv:
    # As `quern etl` has it; read as Arrow is loaded.
    os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"

import pyarrow as pa
import pyarrow.parquet as pq
from cryptography.fernet import Fernet
from etl_documents import load, register
from pymongo import MongoClient

from quern.analytics import build, extract, flatten, follow, partition, source, tally, warehouse
from quern.analytics.etl import Etl, Range, keep_freed_memory
from quern.analytics.manifest import Manifest, Source
from quern.analytics.settings import AnalyticsSettings
from quern.embedded.mongod import Mongod
from quern.embedded.process import ChildProcess
from quern.embedded.provision import mongod_binary
from quern.embedded.stack import temporary_stack
from quern.migrations import migrate
from quern.store.connection import Db, Document
from tests.app.api.client import House

_BATCH = 5000
_DATABASE = "quern"
_COLLECTIONS = ("responses", "audit", "jobs")
_LAST = date(2026, 11, 20)
_RANGE = ("since", "until", "tenant")


def _mongod(data: Path) -> Mongod:
    return Mongod(data / "mongod", cache_gigabytes=1.0)


def _client(server: Mongod) -> MongoClient[Document]:
    return MongoClient(server.uri, tz_aware=True)


def _state(data: Path) -> dict[str, Any]:
    path = data / "state.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


class _Alone(ChildProcess):
    """mongod without a replica set, and so without an oplog: to fill its folder in half the time."""

    def __init__(self, data: Path) -> None:
        self.socket = data / "mongod" / "mongod.sock"
        (data / "mongod" / "data").mkdir(parents=True, exist_ok=True)
        super().__init__(
            "mongod",
            [
                mongod_binary(),
                *("--dbpath", data / "mongod" / "data", "--bind_ip", self.socket, "--nounixsocket", "--quiet"),
                *("--wiredTigerCacheSizeGB", "1"),
            ],
            log=data / "mongod" / "load.log",
            ready=self.socket.exists,
        )

    @property
    def uri(self) -> str:
        return f"mongodb://{quote(str(self.socket), safe='')}/?directConnection=true"


def run_load(arguments: argparse.Namespace) -> None:
    """Load all days, then make the indexes."""
    data, days = arguments.data, arguments.days
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir(parents=True)
    began = time.monotonic()
    with _Alone(data) as server, MongoClient[Document](server.uri, tz_aware=True) as client:
        db = client[_DATABASE]
        register(db, tenants=arguments.tenants, since=_LAST - timedelta(days=days))
        size = {"responses": arguments.responses, "tenants": arguments.tenants, "days": days}
        for number, made in enumerate(load(db, last=_LAST, jobs_days=30, **size)):
            if number % 30 == 0:
                print(f"{made} responses, {time.monotonic() - began:.0f} s", flush=True)
        migrate(db)
        counts = {name: db[name].estimated_document_count() for name in _COLLECTIONS}
    (data / "state.json").write_text(json.dumps({"last": _LAST.isoformat(), "tenants": arguments.tenants}))
    print(f"{counts}, {time.monotonic() - began:.0f} s, {_size(data)} MB", flush=True)


def bare(db: Db, directory: Path, limit: int) -> tuple[int, float]:
    """Documents and seconds of the peer, over the newest `limit` responses and as large a part of the rest."""
    count, began = 0, time.monotonic()
    sizes = {name: db[name].estimated_document_count() for name in _COLLECTIONS}
    for name in _COLLECTIONS:
        writer: pq.ParquetWriter | None = None
        batch: list[Document] = []
        # An empty object has no column in Parquet.
        cursor = db[name].find({}, {"log.data": 0}).sort("$natural", -1).limit(_part(limit, sizes, name))
        for document in cursor:
            batch.append(document)
            count += 1
            if len(batch) >= _BATCH:
                writer = _flush(writer, batch, directory / f"{name}.parquet")
        if batch:
            writer = _flush(writer, batch, directory / f"{name}.parquet")
        if writer is not None:
            writer.close()
    return count, time.monotonic() - began


def _part(limit: int, sizes: dict[str, int], name: str) -> int:
    return max(1, round(min(1.0, limit / sizes["responses"]) * sizes[name]))


def _flush(writer: pq.ParquetWriter | None, batch: list[Document], path: Path) -> pq.ParquetWriter:
    table = pa.Table.from_pylist(batch, schema=writer.schema if writer else None)
    if writer is None:
        writer = pq.ParquetWriter(path, table.schema, compression="zstd")
    writer.write_table(table)
    batch.clear()
    return writer


def _environment(uri: str, data: Path) -> dict[str, str]:
    return {
        **os.environ,
        "QUERN_MONGODB_URI": uri,
        "QUERN_MONGODB_DATABASE": _DATABASE,
        "QUERN_REDIS_QUEUE_URL": "unix:///run/none.sock",
        "QUERN_SECRET_KEYS": Fernet.generate_key().decode(),
        "QUERN_AUDIT_KEY": "b" * 40,
        "QUERN_ANALYTICS__WAREHOUSE": str(data / "warehouse"),
        "QUERN_ANALYTICS__EXTRACT": str(data / "extract"),
        "QUERN_ANALYTICS__NICE": "0",
    }


def etl(uri: str, data: Path, *command: str) -> tuple[dict[str, Any], list[float]]:
    """What `quern etl …` reports, and its memory (MB) every fifth of a second; the last is its peak."""
    child = subprocess.Popen(
        [sys.executable, "-m", "quern.cli.main", "etl", *command, "--json"],
        env=_environment(uri, data),
        stdout=subprocess.PIPE,
    )
    memory: list[float] = []
    watcher = threading.Thread(target=_watch_memory, args=(child, memory), daemon=True)
    watcher.start()
    out, _ = child.communicate()
    if child.returncode:
        raise SystemExit(f"quern etl {' '.join(command)} ended with {child.returncode}: {out.decode()[-2000:]}")
    watcher.join()
    return dict(json.loads(out)), memory


def _watch_memory(child: "subprocess.Popen[bytes]", memory: list[float]) -> None:
    """Take down `VmRSS` (MB) of a process, and at last the highest `VmHWM`."""
    peak = 0.0
    with suppress(OSError, KeyError):
        while child.poll() is None:
            lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
            status = {name: rest for name, _, rest in (line.partition(":") for line in lines)}
            memory.append(int(status["VmRSS"].split()[0]) / 1024)
            peak = int(status["VmHWM"].split()[0]) / 1024
            time.sleep(0.2)
    memory.append(peak)


def _by_fifths(memory: list[float]) -> str:
    """The highest of each fifth of a run: whether it grows with the rows."""
    size = max(1, len(memory) // 5)
    return ", ".join(f"{max(memory[place : place + size]):.0f}" for place in range(0, size * 5, size) if memory[place:])


def run_rate(arguments: argparse.Namespace) -> None:
    data = arguments.data
    for name in ("warehouse", "extract"):
        shutil.rmtree(data / name, ignore_errors=True)
    with _mongod(data) as server, _client(server) as client:
        stored = client[_DATABASE].responses.estimated_document_count()
        rate, bare_cpu = _bare_rate(client[_DATABASE], server, data, arguments.limit)
        before = _cpu(server.pid)
        command = ["run"]
        asked = [f"--{name}={value}" for name in _RANGE if (value := getattr(arguments, name))]
        if asked:
            _begin_empty(client[_DATABASE], data)
            command += asked
        report, memory = etl(server.uri, data, *command)
        mine = report["documents"] / report["seconds"]
        cpu = (_cpu(server.pid) - before) / report["documents"] * 1e6
        print(
            f"etl: {stored} responses, {report['documents']} documents in {report['seconds']:.1f} s, {mine:.0f}/s, "
            f"{cpu:.0f} µs of CPU each; ratio {mine / rate:.2f} by the clock, {bare_cpu / cpu:.2f} by CPU; "
            f"peak {memory[-1]:.0f} MB, in each fifth of the time {_by_fifths(memory[:-1])}",
            flush=True,
        )
        sizes = {name: _size(data / name) for name in ("warehouse", "extract")}
        print(f"sizes in MB: {sizes}", flush=True)
        rate, bare_cpu = _bare_rate(client[_DATABASE], server, data, arguments.limit)
        print(
            f"ratio to the bare rate afterwards {mine / rate:.2f} by the clock, {bare_cpu / cpu:.2f} by CPU", flush=True
        )


def _begin_empty(db: Db, data: Path) -> None:
    """Publish a warehouse without a row that has seen all changes: the next run builds what it is asked for, only."""
    at = datetime.now(UTC)
    Manifest(data / "warehouse").publish(
        keep=timedelta(minutes=15), freshness=at, source=Source(follow.head(db), at), at=at
    )


def _bare_rate(db: Db, server: Mongod, data: Path, limit: int) -> tuple[float, float]:
    """Documents a second, and microseconds of CPU (this process and mongod) for each."""
    before = _cpu(server.pid)
    with tempfile.TemporaryDirectory(dir=data) as folder:
        count, seconds = bare(db, Path(folder), limit)
    cpu = (_cpu(server.pid) - before) / count * 1e6
    print(f"bare: {count} documents in {seconds:.1f} s, {count / seconds:.0f}/s, {cpu:.0f} µs of CPU each", flush=True)
    return count / seconds, cpu


def _cpu(server: int | None) -> float:
    """Seconds of CPU that this process, its ended children and a server have used: a busy machine's clock lies."""
    of_server = Path(f"/proc/{server}/stat").read_text().rpartition(")")[2].split()[11:13]
    ticks = os.sysconf("SC_CLK_TCK")
    return sum(os.times()[:4]) + sum(map(int, of_server)) / ticks


def _size(directory: Path) -> int:
    return round(sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()) / 1e6)


class _Stages:
    """Seconds of CPU of some functions, those of each without those of others within it, by thread."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._within = threading.local()

    @contextmanager
    def _of(self, stage: str) -> Iterator[None]:
        stack: list[float] = self._within.__dict__.setdefault("stack", [])
        stack.append(0.0)
        began = time.thread_time()
        try:
            yield
        finally:
            spent = time.thread_time() - began
            self.seconds[stage] += spent - stack.pop()
            if stack:
                stack[-1] += spent

    def watch(self, owner: Any, name: str, stage: str) -> None:
        """Count a function; of one that yields, each step."""
        plain = getattr(owner, name)

        def steps(found: Iterator[Any]) -> Iterator[Any]:
            while True:
                with self._of(stage):
                    item = next(found, None)
                if item is None:
                    return
                yield item

        def watched(*positional: Any, **named: Any) -> Any:
            if inspect.isgeneratorfunction(plain) or stage == _DECODING:
                return steps(plain(*positional, **named))
            with self._of(stage):
                return plain(*positional, **named)

        setattr(owner, name, watched)


_DECODING = "decode and hash"
_WATCHED = (
    (source.SpanReader, "responses", _DECODING),
    (source.SpanReader, "audit", _DECODING),
    (source.SpanReader, "counts", "MongoDB's counts, and jobs"),
    (source.SpanReader, "jobs", "MongoDB's counts, and jobs"),
    (source.SpanReader, "count_jobs", "MongoDB's counts, and jobs"),
    (flatten.Flattener, "batches", "flatten"),
    (flatten._Group, "shred", "take values out"),
    (tally.Tally, "add_documents", "sums of MongoDB's side"),
    (build.Sample, "offer", "sample"),
    (extract._DayWriter, "write", "extract: JSON"),
    (extract._DayWriter, "_flush", "extract: Parquet"),
    (extract._DayWriter, "close", "extract: close"),
    (extract, "_open_lines", "extract: open"),
    (extract, "_open_table", "extract: open"),
    (extract.Extract, "replace", "extract: put in place"),
    (partition.PartitionWriter, "_write_out", "Parquet of the facts"),
    (partition.PartitionWriter, "write", "gather"),
    (build, "read_back", "read back and compare"),
    (build, "audit_rows", "rows of the audit"),
    (build.Builder, "build", "rest of building"),
    (warehouse.Assembly, "assemble", "put months together"),
)


def run_stages(arguments: argparse.Namespace) -> None:
    """The peer and a run within this process, their functions timed (which costs a few per cent)."""
    data, stages, peer = arguments.data, _Stages(), _Stages()
    for owner, name, stage in _WATCHED:
        stages.watch(owner, name, stage)
    peer.watch(sys.modules[__name__], "_flush", "Arrow and Parquet")
    with _mongod(data) as server, _client(server) as client:
        _bare_rate(client[_DATABASE], server, data, arguments.limit)
        print(f"of which Arrow and Parquet {sum(peer.seconds.values()):.1f} s of CPU")
        for name in ("warehouse", "extract"):
            shutil.rmtree(data / name, ignore_errors=True)
        asked = Range(arguments.since, arguments.until, arguments.tenant)
        if asked != Range():
            _begin_empty(client[_DATABASE], data)
        keep_freed_memory()
        settings = AnalyticsSettings(warehouse=data / "warehouse", extract=data / "extract")
        before, of_server = os.times(), _cpu(server.pid) - sum(os.times()[:4])
        report = Etl(client[_DATABASE], settings).run(asked)
        after = os.times()
        of_server = _cpu(server.pid) - sum(os.times()[:4]) - of_server
    user, system = after[0] - before[0], after[1] - before[1]
    each = 1e6 / report.documents
    for stage, seconds in stages.seconds.most_common():
        print(f"{stage:32} {seconds * each:6.2f} µs a document")
    rest = user + system - sum(stages.seconds.values())
    print(f"{'the rest, fetching ahead with it':32} {rest * each:6.2f} µs a document")
    print(
        f"{report.documents} documents: {(user + system) * each:.1f} µs of this process "
        f"({system * each:.1f} of the kernel), {of_server * each:.1f} of mongod"
    )


def run_day(arguments: argparse.Namespace) -> None:
    """The days after the last loaded one, each with its run."""
    data, state = arguments.data, _state(arguments.data)
    last = date.fromisoformat(state["last"])
    with _mongod(data) as server, _client(server) as client:
        stored = client[_DATABASE].responses.estimated_document_count()
        for number in range(arguments.times):
            day = last + timedelta(days=number + 1)
            size = {"responses": arguments.responses, "tenants": state["tenants"], "days": 1}
            for _ in load(client[_DATABASE], last=day, jobs_days=1, seed=day.toordinal(), **size):
                pass
            before = _cpu(server.pid)
            report, memory = etl(server.uri, data, "run")
            print(
                f"a day at {stored} responses: {report['days']} tenant days, {report['documents']} documents, "
                f"{report['events']} events, {report['seconds']:.1f} s, {_cpu(server.pid) - before:.1f} s of CPU; "
                f"peak {memory[-1]:.0f} MB",
                flush=True,
            )
            (data / "state.json").write_text(json.dumps({**state, "last": day.isoformat()}))


def run_api(arguments: argparse.Namespace) -> None:
    """Latency of submissions, with the ETL stopped (SIGSTOP) and while it builds the warehouse anew, in short turns.

    A machine's disk and neighbours change from minute to minute: only turns that follow each other at once, and enough
    requests of each kind together, tell what the ETL does from what they do.
    """
    with temporary_stack(with_engine=False) as stack, tempfile.TemporaryDirectory() as folder:
        data, uri = Path(folder), stack.mongod.uri
        with MongoClient[Document](uri, tz_aware=True) as client:
            register(client[_DATABASE], tenants=20, since=_LAST - timedelta(days=10))
            for _ in load(
                client[_DATABASE], responses=arguments.responses, tenants=20, days=10, last=_LAST, jobs_days=10
            ):
                pass
        caller = _Caller(House(stack))
        caller.measure(5)
        idle: list[float] = []
        busy: list[float] = []
        child = _rebuild(uri, data)
        try:
            for turn in range(arguments.turns):
                os.killpg(child.pid, signal.SIGSTOP)
                time.sleep(_SETTLE)
                idle += caller.measure(arguments.seconds)
                if child.poll() is not None:
                    child = _rebuild(uri, data)
                os.killpg(child.pid, signal.SIGCONT)
                time.sleep(_SETTLE)
                found = caller.measure(arguments.seconds)
                if child.poll() is None:
                    busy += found
                else:
                    print(f"turn {turn}: the ETL ended during it; not counted", flush=True)
                    child = _rebuild(uri, data)
                if turn % 10 == 9 or turn == arguments.turns - 1:
                    _compare(turn + 1, idle, busy)
        finally:
            # Also where it is stopped.
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


#: Seconds after the ETL is stopped or goes on.
_SETTLE = 0.5


def _rebuild(uri: str, data: Path) -> "subprocess.Popen[bytes]":
    """`quern etl rebuild` as the worker starts it (see `analytics.handler`), at work already."""
    child = subprocess.Popen(
        ["nice", "-n", "10", sys.executable, "-m", "quern.cli.main", "etl", "rebuild", "--json"],
        env=_environment(uri, data),
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    with suppress(OSError):
        Path(f"/proc/{child.pid}/autogroup").write_text("10")
    os.sched_setaffinity(child.pid, sorted(os.sched_getaffinity(0))[-1:])
    time.sleep(3)
    return child


def _compare(turns: int, idle: list[float], busy: list[float]) -> None:
    print(f"{turns} turns, {len(idle)} requests with the ETL stopped, {len(busy)} while it runs:")
    for share in (50, 90, 95, 99):
        one, other = (statistics.quantiles(times, n=100)[share - 1] for times in (idle, busy))
        print(f"  p{share} {one:.1f} ms, {other:.1f} ms: {other / one:.2f}", flush=True)


class _Caller:
    """Submits at an even pace, as one busy website does."""

    def __init__(self, house: House) -> None:
        self._client = house.client()
        fields = [{"name": "comment", "type": "long_text"}]
        self._path = f"/forms/{self._client.form(fields)}/responses"

    def measure(self, seconds: float, pace: float = 20.0) -> list[float]:
        """What each request took, in milliseconds."""
        times: list[float] = []
        due = time.monotonic()
        end = due + seconds
        while due < end:
            time.sleep(max(0.0, due - time.monotonic()))
            began = time.perf_counter()
            answer = self._client.send("POST", self._path, {"answers": {"comment": "All was well, thank you. " * 10}})
            times.append((time.perf_counter() - began) * 1000)
            if answer.status != 202:
                raise SystemExit(f"expected 202, found {answer.status}")
            due += 1 / pace
        return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, do in (
        ("load", run_load),
        ("rate", run_rate),
        ("stages", run_stages),
        ("day", run_day),
        ("api", run_api),
    ):
        command = commands.add_parser(name)
        command.set_defaults(do=do)
        command.add_argument("--data", type=Path, required=name != "api")
        command.add_argument("--responses", type=int, default=1_000_000)
        command.add_argument("--days", type=int, default=365)
        command.add_argument("--tenants", type=int, default=20)
        command.add_argument("--seconds", type=float, default=4.0, help="of each measurement of the API")
        command.add_argument("--limit", type=int, default=100_000, help="responses for the bare peer")
        command.add_argument("--since", type=date.fromisoformat, help="only these days of what is stored")
        command.add_argument("--until", type=date.fromisoformat)
        command.add_argument("--tenant", help="only this one's")
        command.add_argument("--times", type=int, default=3)
        command.add_argument("--turns", type=int, default=40)
    arguments = parser.parse_args()
    arguments.do(arguments)


if __name__ == "__main__":
    main()
