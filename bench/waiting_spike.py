"""Spike: what do 1,000 waiting clients cost, and whom? Two designs, run for real, side by side in one run.

``gevent``
    Gunicorn's gevent workers serve normal requests and event streams from one Flask application.
``gthread + …``
    Gunicorn's gthread workers serve normal requests; a Quart service of one process holds the streams on a UNIX
    socket of its own, under Hypercorn, Uvicorn or Gunicorn's own asgi worker.

A normal request is one indexed read of MongoDB, answered as JSON, after ``--burn`` ms of computing (a validation, say).
A stream sends what the job's log holds, then follows one change stream per process; silence is broken by a heartbeat
comment every 15 s. A writer appends events to some jobs in the idle phases too, so that a phase with waiting clients
differs from an idle one by the waiting alone.

Nothing of this is imported by the service. gevent and uvicorn are not among its requirements: give the spike a virtual
environment of its own, with them and with ``requirements.txt``, and run::

    python bench/waiting_spike.py run --mongod /path/to/mongod --clients 1000 --rounds 5

Prints a table and, with ``--json FILE``, every phase's figures. Exits 1 when a stream was refused or cut off, or when
no event came.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

HEARTBEAT_SECONDS = 15.0
BUSY_SHARE = 0.1
"""The share of the jobs that the writer appends events to; the others only wait."""
ROWS = 10_000
START_LIMIT_SECONDS = 60.0
WARM_UP_SECONDS = 2.0
DESIGNS = ("gevent", "gthread + hypercorn", "gthread + uvicorn", "gthread + gunicorn asgi")


def heartbeat() -> bytes:
    return b": still here\n\n"


def frame(entry: dict[str, Any]) -> bytes:
    return b"id: %d\nevent: progress\ndata: %s\n\n" % (entry["seq"], json.dumps(entry).encode())


# --- Served: both applications -----------------------------------------------------------------------------------


def normal_app() -> Any:
    """Flask, with the normal request only (gthread), or with streams as well when SPIKE_STREAMS is set (gevent)."""
    from flask import Flask, Response
    from pymongo import MongoClient

    app = Flask(__name__)
    database: Any = MongoClient(os.environ["SPIKE_MONGO"])["spike"]
    burn = float(os.environ["SPIKE_BURN"]) / 1000

    @app.get("/rows/<int:number>")
    def row(number: int) -> Any:
        end = time.thread_time() + burn
        while time.thread_time() < end:
            pass
        return database.rows.find_one({"number": number}, {"_id": False})

    if os.environ.get("SPIKE_STREAMS"):
        from gevent.queue import Empty, Queue

        watchers: dict[int, set[Any]] = defaultdict(set)

        def hub() -> None:
            with database.jobs.watch([{"$project": {"documentKey": 1}}]) as changes:
                for change in changes:
                    key = change["documentKey"]["_id"]
                    if key in watchers:
                        job = database.jobs.find_one({"_id": key})
                        for queue in list(watchers[key]):
                            queue.put(job)

        threading.Thread(target=hub, daemon=True).start()

        @app.get("/jobs/<int:key>/events")
        def events(key: int) -> Response:
            def stream() -> Iterator[bytes]:
                queue: Any = Queue()
                watchers[key].add(queue)
                sent = -1
                try:
                    job = database.jobs.find_one({"_id": key})
                    while True:
                        for entry in job["log"]:
                            if entry["seq"] > sent:
                                sent = entry["seq"]
                                yield frame(entry)
                        while True:
                            try:
                                job = queue.get(timeout=HEARTBEAT_SECONDS)
                                break
                            except Empty:
                                yield heartbeat()
                finally:
                    watchers[key].discard(queue)
                    if not watchers[key]:
                        del watchers[key]

            return Response(stream(), content_type="text/event-stream")

    return app


def stream_app() -> Any:
    """Quart, with the streams only."""
    from pymongo import AsyncMongoClient
    from quart import Quart, Response

    app = Quart(__name__)
    watchers: dict[int, set[asyncio.Queue[Any]]] = defaultdict(set)
    held: dict[str, Any] = {}

    async def hub() -> None:
        async with await held["database"].jobs.watch([{"$project": {"documentKey": 1}}]) as changes:
            async for change in changes:
                key = change["documentKey"]["_id"]
                if key in watchers:
                    job = await held["database"].jobs.find_one({"_id": key})
                    for queue in watchers[key]:
                        queue.put_nowait(job)

    @app.before_serving
    async def start() -> None:
        client: AsyncMongoClient[Any] = AsyncMongoClient(os.environ["SPIKE_MONGO"])
        held["database"] = client["spike"]
        held["hub"] = asyncio.create_task(hub())

    @app.after_serving
    async def stop() -> None:
        held["hub"].cancel()

    @app.get("/jobs/<int:key>/events")
    async def events(key: int) -> Response:
        async def stream() -> AsyncIterator[bytes]:
            queue: asyncio.Queue[Any] = asyncio.Queue()
            watchers[key].add(queue)
            sent = -1
            try:
                job = await held["database"].jobs.find_one({"_id": key})
                while True:
                    for entry in job["log"]:
                        if entry["seq"] > sent:
                            sent = entry["seq"]
                            yield frame(entry)
                    while True:
                        try:
                            async with asyncio.timeout(HEARTBEAT_SECONDS):
                                job = await queue.get()
                            break
                        except TimeoutError:
                            yield heartbeat()
            finally:
                watchers[key].discard(queue)
                if not watchers[key]:
                    del watchers[key]

        response = Response(stream(), content_type="text/event-stream")
        response.timeout = None
        return response

    return app


def serve_hypercorn(bind: str) -> None:
    from hypercorn.asyncio import serve
    from hypercorn.config import Config

    config = Config()
    config.bind = [f"unix:{bind}"]
    config.backlog = 2048
    config.errorlog = None
    asyncio.run(serve(stream_app(), config))


def gunicorn(worker: str, workers: int, bind: Path, app: str, *more: str) -> list[str]:
    command = [sys.executable, "-m", "gunicorn", "--no-control-socket", "--log-level", "error", "--backlog", "2048"]
    return [*command, "-k", worker, "-w", str(workers), "-b", f"unix:{bind}", *more, app]


def commands(design: str, directory: Path, workers: int) -> dict[str, list[str]]:
    """The processes of one design: socket name to command. ``api`` serves normal requests, ``events`` the streams."""
    api, events = directory / "api.sock", directory / "events.sock"
    if design == "gevent":
        app = "waiting_spike:normal_app()"
        return {"api": gunicorn("gevent", workers, api, app, "--worker-connections", "2000")}
    plain = gunicorn("gthread", workers, api, "waiting_spike:normal_app()", "--threads", "4")
    asgi = {
        "gthread + hypercorn": [sys.executable, __file__, "serve-hypercorn", str(events)],
        "gthread + uvicorn": [
            *(sys.executable, "-m", "uvicorn", "--factory", "--uds", str(events), "--log-level", "error"),
            *("--loop", "asyncio", "--http", "h11", "waiting_spike:stream_app"),
        ],
        "gthread + gunicorn asgi": gunicorn("asgi", 1, events, "waiting_spike:stream_app()", "--timeout", "0"),
    }
    return {"api": plain, "events": asgi[design]}


# --- The three drivers, each a process of its own so that none disturbs another's clock ---------------------------


def probe(path: str, seconds: float, rate: float) -> None:
    """Paced requests, one at a time, each on a fresh connection (so that every worker is sampled); prints latencies."""
    latencies: list[float] = []
    started = time.monotonic()
    count = 0
    while (due := started + count / rate) < started + seconds:
        time.sleep(max(0.0, due - time.monotonic()))
        count += 1
        begun = time.monotonic()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(30)
            connection.connect(path)
            target = f"/rows/{(count * 7919) % ROWS}"
            connection.sendall(f"GET {target} HTTP/1.1\r\nHost: spike\r\nConnection: close\r\n\r\n".encode())
            answer = b""
            while chunk := connection.recv(65536):
                answer += chunk
        latencies.append(time.monotonic() - begun)
        if not answer.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"expected a 200, found {answer[:80]!r}")
    print(json.dumps(sorted(latencies)))


def write(uri: str, clients: int, rate: float) -> None:
    """Appends one event at a time to the busy jobs, ``rate`` a second, until stdin closes; prints how many."""
    from pymongo import MongoClient

    jobs: Any = MongoClient(uri)["spike"].jobs
    busy = max(1, int(clients * BUSY_SHARE))
    closed = threading.Event()

    def wait_for_end() -> None:
        sys.stdin.read()
        closed.set()

    threading.Thread(target=wait_for_end, daemon=True).start()
    started = time.monotonic()
    count = 0
    while not closed.is_set():
        entry = {"seq": time.monotonic_ns(), "at": time.monotonic()}
        jobs.update_one({"_id": count % busy}, {"$push": {"log": {"$each": [entry], "$slice": -5}}})
        count += 1
        closed.wait(max(0.0, started + count / rate - time.monotonic()))
    print(json.dumps(count))


async def hold(path: str, clients: int) -> None:
    """Opens the streams, prints how long that took, holds them until stdin closes, prints what came."""
    delays: list[float] = []
    received = {"events": 0, "heartbeats": 0, "cut": 0, "refused": 0}
    opened = asyncio.Semaphore(64)
    ready: list[float] = []
    all_ready = asyncio.Event()

    async def client(number: int) -> None:
        async with opened:
            try:
                reader, writer = await asyncio.open_unix_connection(path, limit=4096)
                writer.write(f"GET /jobs/{number}/events HTTP/1.1\r\nHost: spike\r\n\r\n".encode())
                status = await reader.readline()
                if b" 200 " not in status:
                    raise ConnectionError(status)
                while not (await reader.readline()).startswith(b"data:"):
                    pass
            except (OSError, asyncio.IncompleteReadError):
                received["refused"] += 1
                return
            ready.append(time.monotonic())
            if len(ready) == clients:
                all_ready.set()
        live = time.monotonic()
        while line := await reader.readline():
            if line.startswith(b"data:"):
                received["events"] += 1
                at = json.loads(line[5:])["at"]
                if at > live:
                    delays.append(time.monotonic() - at)
            elif line.startswith(b":"):
                received["heartbeats"] += 1
        received["cut"] += 1

    begun = time.monotonic()
    tasks = [asyncio.create_task(client(number)) for number in range(clients)]
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(START_LIMIT_SECONDS):
            await all_ready.wait()
    print(json.dumps({"connect_s": max(ready) - begun, "connected": len(ready)}), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    for task in tasks:
        task.cancel()
    print(json.dumps({"delays": sorted(delays), **received}), flush=True)


# --- The run -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """One design in one round. Latencies in ms, memory as PSS, CPU in percent of one core."""

    design: str
    round: int
    idle_p50: float
    idle_p99: float
    waiting_p50: float
    waiting_p99: float
    base_mib: float
    connect_s: float
    kib_per_client: float
    cpu_idle: float
    cpu_waiting: float
    delay_p50: float
    delay_p99: float
    events: int
    heartbeats: int
    refused: int
    cut: int


def quantile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else float("nan")


def tree(roots: list[int]) -> list[Any]:
    import psutil

    parents = [psutil.Process(root) for root in roots]
    return parents + [child for parent in parents for child in parent.children(recursive=True)]


def pss_kib(roots: list[int]) -> int:
    total = 0
    for process in tree(roots):
        for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
    return total


def cpu_seconds(roots: list[int]) -> float:
    times = [process.cpu_times() for process in tree(roots)]
    return float(sum(one.user + one.system for one in times))


class Children:
    """Starts processes and ends each of them by its own id, whatever happens."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, command: list[str], environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
        log: IO[str] = (self.directory / f"{len(self.processes)}.log").open("w")
        process = subprocess.Popen(
            command,
            env=os.environ | (environment or {}),
            cwd=Path(__file__).parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        self.processes.append(process)
        return process

    def drive(self, *arguments: str) -> subprocess.Popen[str]:
        return self.start([sys.executable, __file__, *arguments])

    def stop(self, processes: Sequence[subprocess.Popen[str]]) -> None:
        for process in reversed(processes):
            if process.poll() is None:
                process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def start_mongod(children: Children, binary: str, directory: Path) -> str:
    from pymongo import MongoClient
    from pymongo.errors import PyMongoError

    (directory / "db").mkdir()
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
    options = ["--logpath", str(directory / "mongod.log"), "--wiredTigerCacheSizeGB", "0.25"]
    options += ["--replSet", "spike", "--unixSocketPrefix", str(directory)]
    children.start(
        [binary, "--dbpath", str(directory / "db"), "--bind_ip", "127.0.0.1", "--port", str(port), "--quiet", *options]
    )
    address = f"mongodb://127.0.0.1:{port}/?directConnection=true"
    limit = time.monotonic() + START_LIMIT_SECONDS
    with MongoClient[Any](address, serverSelectionTimeoutMS=1000) as client:
        config = {"_id": "spike", "members": [{"_id": 0, "host": f"127.0.0.1:{port}"}]}
        while True:
            with contextlib.suppress(PyMongoError):
                client.admin.command("replSetInitiate", config)
            with contextlib.suppress(PyMongoError):
                if client.admin.command("hello")["isWritablePrimary"]:
                    break
            if time.monotonic() > limit:
                raise SystemExit(f"mongod did not become primary within {START_LIMIT_SECONDS:.0f} s: see {directory}")
            time.sleep(0.2)
    return f"mongodb://{str(directory / f'mongodb-{port}.sock').replace('/', '%2F')}/?directConnection=true"


def wait_for(path: Path) -> None:
    limit = time.monotonic() + START_LIMIT_SECONDS
    while True:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection, contextlib.suppress(OSError):
            connection.settimeout(5)
            connection.connect(str(path))
            connection.sendall(b"GET /absent HTTP/1.1\r\nHost: spike\r\nConnection: close\r\n\r\n")
            if b" 404 " in connection.recv(100):
                return
        if time.monotonic() > limit:
            raise SystemExit(f"nothing answered on {path} within {START_LIMIT_SECONDS:.0f} s: read the logs beside it")
        time.sleep(0.2)


def told(process: subprocess.Popen[str]) -> Any:
    assert process.stdout
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"{process.args!r} ended without an answer (exit {process.wait()})")
    return json.loads(line)


def release(process: subprocess.Popen[str]) -> Any:
    assert process.stdin
    process.stdin.close()
    answer = told(process)
    process.wait()
    return answer


def measure(children: Children, design: str, number: int, directory: Path, args: argparse.Namespace) -> Phase:
    """One design, started for this alone: an idle phase, then one with the waiting clients."""
    directory.mkdir()
    environment = {
        "SPIKE_MONGO": args.uri,
        "SPIKE_BURN": str(args.burn),
        "SPIKE_STREAMS": "1" if design == "gevent" else "",
    }
    parts = commands(design, directory, args.workers)
    services = [children.start(command, environment) for command in parts.values()]
    roots = [service.pid for service in services]
    for name in parts:
        wait_for(directory / f"{name}.sock")
    api = directory / "api.sock"
    streams = api if design == "gevent" else directory / "events.sock"

    def probed(seconds: float) -> tuple[list[float], float]:
        before, begun = cpu_seconds(roots), time.monotonic()
        driver = children.drive("probe", str(api), str(seconds), str(args.rate))
        latencies = told(driver)
        driver.wait()
        return latencies, 100 * (cpu_seconds(roots) - before) / (time.monotonic() - begun)

    writer = children.drive("write", args.uri, str(args.clients), str(args.events))
    probed(WARM_UP_SECONDS)
    idle, cpu_idle = probed(args.seconds)
    empty = pss_kib(roots)
    holder = children.drive("hold", str(streams), str(args.clients))
    connected = told(holder)
    probed(WARM_UP_SECONDS)
    waiting, cpu_waiting = probed(args.seconds)
    held = pss_kib(roots)
    received = release(holder)
    release(writer)
    children.stop(services)
    return Phase(
        design=design,
        round=number,
        idle_p50=1000 * quantile(idle, 0.5),
        idle_p99=1000 * quantile(idle, 0.99),
        waiting_p50=1000 * quantile(waiting, 0.5),
        waiting_p99=1000 * quantile(waiting, 0.99),
        base_mib=empty / 1024,
        connect_s=connected["connect_s"],
        kib_per_client=(held - empty) / args.clients,
        cpu_idle=cpu_idle,
        cpu_waiting=cpu_waiting,
        delay_p50=1000 * quantile(received["delays"], 0.5),
        delay_p99=1000 * quantile(received["delays"], 0.99),
        events=received["events"],
        heartbeats=received["heartbeats"],
        refused=received["refused"] + args.clients - connected["connected"],
        cut=received["cut"],
    )


def table(phases: list[Phase]) -> str:
    def middle(design: str, value: Any) -> float:
        return float(statistics.median(value(phase) for phase in phases if phase.design == design))

    columns: list[tuple[str, Any, str]] = [
        ("idle p50 ms", lambda p: p.idle_p50, ".2f"),
        ("idle p99 ms", lambda p: p.idle_p99, ".2f"),
        ("waiting p50 ms", lambda p: p.waiting_p50, ".2f"),
        ("waiting p99 ms", lambda p: p.waiting_p99, ".2f"),
        ("p99 ratio", lambda p: p.waiting_p99 / p.idle_p99, ".2f"),
        ("PSS without clients MiB", lambda p: p.base_mib, ".0f"),
        ("PSS per client KiB", lambda p: p.kib_per_client, ".1f"),
        ("connect s", lambda p: p.connect_s, ".2f"),
        ("CPU of waiting %", lambda p: p.cpu_waiting - p.cpu_idle, ".1f"),
        ("event delay p50 ms", lambda p: p.delay_p50, ".1f"),
        ("event delay p99 ms", lambda p: p.delay_p99, ".1f"),
    ]
    designs = [design for design in DESIGNS if any(phase.design == design for phase in phases)]
    lines = ["| median of rounds | " + " | ".join(designs) + " |", "|---" * (len(designs) + 1) + "|"]
    for title, value, style in columns:
        cells = [format(middle(design, value), style) for design in designs]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    from pymongo import MongoClient

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * args.clients + 1000
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise SystemExit(f"{wanted} file descriptors are needed, the hard limit is {hard}: raise it with `ulimit -Hn`")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    if not (binary := args.mongod or shutil.which("mongod")):
        raise SystemExit("no mongod in PATH: name one with --mongod")

    phases: list[Phase] = []
    directory = Path(tempfile.mkdtemp(prefix="spike-"))
    children = Children(directory)
    try:
        args.uri = start_mongod(children, binary, directory)
        with MongoClient[Any](args.uri) as client:
            client.spike.rows.insert_many({"number": n, "title": f"row {n}", "tags": ["a", "b"]} for n in range(ROWS))
            client.spike.rows.create_index("number")
            client.spike.jobs.insert_many({"_id": n, "log": [{"seq": 1, "at": 0.0}]} for n in range(args.clients))

        for number in range(args.rounds):
            for index, design in enumerate(args.designs):
                phase = measure(children, design, number, directory / f"{number}-{index}", args)
                phases.append(phase)
                print(json.dumps(asdict(phase)), file=sys.stderr, flush=True)
    finally:
        children.stop(children.processes)
        if phases:
            shutil.rmtree(directory)

    print(f"{args.clients} clients, {args.rounds} rounds of {args.seconds:.0f} s, {args.rate:.0f} requests/s", end=" ")
    print(f"of {args.burn:.0f} ms of CPU and a read, {args.events:.0f} events/s, {args.workers} API workers,", end=" ")
    print(f"{os.cpu_count()} cores\n")
    print(table(phases))
    if args.json:
        Path(args.json).write_text(json.dumps([asdict(phase) for phase in phases], indent=1))
    return int(any(phase.refused or phase.cut or not phase.events for phase in phases))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    roles = parser.add_subparsers(dest="role", required=True)
    whole = roles.add_parser("run", help="the whole spike")
    whole.add_argument("--mongod", help="the mongod binary (default: from PATH)")
    whole.add_argument("--clients", type=int, default=1000)
    whole.add_argument("--rounds", type=int, default=5)
    whole.add_argument("--seconds", type=float, default=18.0, help="length of a phase; over 15 to see heartbeats")
    whole.add_argument("--rate", type=float, default=100.0, help="normal requests a second")
    whole.add_argument("--events", type=float, default=20.0, help="job events a second, over a tenth of the jobs")
    whole.add_argument("--burn", type=float, default=0.0, help="ms of CPU that a normal request costs on top")
    whole.add_argument("--workers", type=int, default=2 * (os.cpu_count() or 1) + 1)
    whole.add_argument("--designs", nargs="+", choices=DESIGNS, default=list(DESIGNS))
    whole.add_argument("--json", help="write every phase's figures here")
    for role, names in {
        "serve-hypercorn": ["bind"],
        "probe": ["path", "seconds", "rate"],
        "write": ["uri", "clients", "rate"],
        "hold": ["path", "clients"],
    }.items():
        part = roles.add_parser(role, help="(a part of the run)")
        for name in names:
            part.add_argument(name, type={"seconds": float, "rate": float, "clients": int}.get(name, str))
    args = parser.parse_args()
    if args.role == "run":
        return run(args)
    if args.role == "serve-hypercorn":
        serve_hypercorn(args.bind)
    elif args.role == "probe":
        probe(args.path, args.seconds, args.rate)
    elif args.role == "write":
        write(args.uri, args.clients, args.rate)
    else:
        asyncio.run(hold(args.path, args.clients))
    return 0


if __name__ == "__main__":
    sys.exit(main())
