"""No-op jobs a second and idle start latency: Quern's durable queue, Celery with `acks_late`, bare Huey.

All on one redis-server, in turns (Quern, Celery, Huey, Quern, …) so that a noisy machine hits all. Each has the same
number of worker processes and of jobs at once; those that are not measured are stopped (SIGSTOP). Celery runs twice:
with threads, as the others do, and with its default, processes.

``drain``
    Jobs a second from a backlog: enqueued while the workers stand still, then timed until the last has ended.
``through``
    Jobs a second from the first enqueue to the last end, while `--producers` threads of a process enqueue one by one.
``latency``
    From before the enqueue call to the first line of the handler, one job at a time on an idle queue.

What Quern acknowledges at enqueue is in the journal (`w: majority, j: true`); Celery's and Huey's is in Redis's memory,
in its file a second later. A job's handler appends one line to a file; the lines are the clock and the count. A job of
Quern has ended when its end is journaled, one of Celery when Redis has its acknowledgement.

Celery is none of the project's requirements. It gets a virtual environment of its own::

    python3 -m venv /tmp/peers && /tmp/peers/bin/pip install --require-hashes -r bench/requirements-peers.txt
    .venv/bin/python bench/jobs.py run --peers /tmp/peers/bin/python --jobs 2000 --rounds 3

Prints a table of medians, the ratios within each round, and what was lost or begun twice; exits 1 if any was lost.
"""

import argparse
import itertools
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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SYSTEMS = ("quern", "celery", "celery-processes", "huey")
LINE = 34
LIMIT_SECONDS = 60.0
UNENDED = {"tenant": "bench", "state": {"$ne": "done"}}


# --- What the workers do ---------------------------------------------------------------------------------------------


class Ledger:
    """One file a process, one line of LINE bytes a job: its number and when its handler began (monotonic seconds)."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pid = 0
        self._file = -1

    def note(self, number: int) -> None:
        if self._pid != os.getpid():
            self._pid = os.getpid()
            name = self._folder / f"{self._pid}.done"
            self._file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(self._file, b"%012d %020.9f\n" % (number, time.monotonic()))


def counted(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.done")) // LINE


def begun(folder: Path) -> list[tuple[int, float]]:
    lines = [line.split() for path in folder.glob("*.done") for line in path.read_text().splitlines()]
    return [(int(number), float(at)) for number, at in lines]


# --- The three systems: how each works, enqueues, and knows that all has ended ---------------------------------------


def quern_worker(folder: Path, concurrency: int) -> None:
    from quern.config import LiveSettings
    from quern.jobs.handler import Context, Handler, Registry
    from quern.jobs.model import Job, Queue
    from quern.jobs.wake import Waker
    from quern.jobs.worker import Worker
    from quern.store.connection import Store

    ledger = Ledger(folder)

    def run(job: Job, _: Context) -> None:
        ledger.note(job.payload["number"])

    store = Store(LiveSettings())
    registry = Registry([Handler("noop", run)])
    Worker(store, registry, Waker(store.redis_queue_url), Queue.DEFAULT, concurrency).run()


def quern_enqueue() -> Callable[[int], None]:
    from quern.config import LiveSettings
    from quern.jobs.enqueue import Enqueuer
    from quern.jobs.model import NewJob, Queue
    from quern.jobs.wake import Waker
    from quern.store.connection import Store

    store = Store(LiveSettings())
    add = Enqueuer(store, Waker(store.redis_queue_url))

    def enqueue(number: int) -> None:
        identity = NewJob.derived_id("bench", str(number))
        add(NewJob(identity, "bench", Queue.DEFAULT, "noop", {"number": number}))

    return enqueue


def celery_app(folder: Path, broker: str, name: str) -> Any:
    from celery import Celery  # type: ignore[import-not-found]

    app = Celery(name, broker=broker, set_as_current=True)
    app.conf.update(
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        task_ignore_result=True,
        task_default_queue=name,
        broker_connection_retry_on_startup=True,
        worker_hijack_root_logger=False,
        # A set of its own for what is not yet acknowledged, so that its end can be seen.
        broker_transport_options={"unacked_key": f"{name}.unacked", "unacked_index_key": f"{name}.unacked_index"},
    )
    ledger = Ledger(folder)

    @app.task(name="noop")  # type: ignore[untyped-decorator]
    def noop(number: int) -> None:
        ledger.note(number)

    return app


def celery_worker(folder: Path, broker: str, name: str, concurrency: int) -> None:
    pool = "prefork" if name == "celery-processes" else "threads"
    options = ["--pool", pool, "--concurrency", str(concurrency), "--loglevel", "error"]
    quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
    celery_app(folder, broker, name).worker_main(
        ["worker", "--hostname", f"{name}{os.getpid()}@bench", *options, *quiet]
    )


def celery_enqueue(folder: Path, broker: str, name: str) -> Callable[[int], None]:
    task = celery_app(folder, broker, name).tasks["noop"]

    def enqueue(number: int) -> None:
        task.delay(number)

    return enqueue


def huey_of(folder: Path, url: str) -> tuple[Any, Any]:
    from huey import RedisHuey

    huey = RedisHuey("bench", url=url, results=False)
    ledger = Ledger(folder)

    @huey.task(name="noop")  # type: ignore[untyped-decorator]
    def noop(number: int) -> None:
        ledger.note(number)

    return huey, noop


def huey_worker(folder: Path, url: str, concurrency: int) -> None:
    from huey.consumer import Consumer

    huey, _ = huey_of(folder, url)
    Consumer(huey, workers=concurrency, periodic=False, worker_type="thread").run()


def huey_enqueue(folder: Path, url: str) -> Callable[[int], None]:
    _, noop = huey_of(folder, url)

    def enqueue(number: int) -> None:
        noop(number)

    return enqueue


def work(system: str, folder: Path, redis_socket: str, concurrency: int) -> None:
    if system == "quern":
        quern_worker(folder, concurrency)
    elif system == "huey":
        huey_worker(folder, f"unix://{redis_socket}", concurrency)
    else:
        celery_worker(folder, f"redis+socket://{redis_socket}", system, concurrency)


def produce(system: str, folder: Path, redis_socket: str) -> None:
    """Enqueue as told by lines on standard input; answer when it was done."""
    if system == "quern":
        enqueue = quern_enqueue()
    elif system == "huey":
        enqueue = huey_enqueue(folder, f"unix://{redis_socket}")
    else:
        enqueue = celery_enqueue(folder, f"redis+socket://{redis_socket}", system)
    for line in sys.stdin:
        order = json.loads(line)
        numbers = itertools.count(order["first"])
        began: list[float] = []

        def some(count: int, pause: float, numbers: Any = numbers, began: list[float] = began) -> None:
            for _ in range(count):
                number = next(numbers)
                at = time.monotonic()
                enqueue(number)
                began.append(at)
                if pause:
                    time.sleep(pause)

        share, left = divmod(order["count"], order["threads"])
        shares = [share + (position < left) for position in range(order["threads"])]
        threads = [threading.Thread(target=some, args=(count, order["pause"])) for count in shares]
        start = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        at_once = order["threads"] == 1
        print(
            json.dumps({"began": start, "ended": time.monotonic(), "each": began if at_once else []}),
            flush=True,
        )


# --- The run ---------------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """One system: its workers, its producer and what it was given."""

    name: str
    folder: Path
    workers: list[Any]
    producer: subprocess.Popen[str]
    ended: Callable[[], bool]
    """Whether all that was enqueued has ended, not only begun."""
    servers: list[int]
    """Process ids of the servers that work for it: Redis, and Quern's mongod and scheduler."""
    given: int = 0
    figures: dict[str, list[float]] = field(default_factory=dict)

    def signal(self, number: signal.Signals) -> None:
        for worker in self.workers:
            os.killpg(worker.pid, number)

    def enqueue(self, count: int, threads: int, pause: float = 0.0) -> dict[str, Any]:
        assert self.producer.stdin
        assert self.producer.stdout
        order = {"first": self.given, "count": count, "threads": threads, "pause": pause}
        self.given += count
        self.producer.stdin.write(json.dumps(order) + "\n")
        self.producer.stdin.flush()
        answer = self.producer.stdout.readline()
        if not answer:
            raise SystemExit(f"the producer of {self.name} ended; its error is above")
        return dict(json.loads(answer))

    def wait(self) -> float:
        """Until all has ended; returns when that was."""
        limit = time.monotonic() + LIMIT_SECONDS
        while counted(self.folder) < self.given or not self.ended():
            if time.monotonic() > limit:
                tail = self.workers[0].log_tail()
                raise SystemExit(
                    f"{self.name}: {counted(self.folder)} of {self.given} jobs in {LIMIT_SECONDS} s\n{tail}"
                )
            time.sleep(0.005)
        return time.monotonic()

    def cpu(self) -> float:
        """Seconds of processor that its workers, its producer and its servers have used so far."""
        pids = [*(worker.pid for worker in self.workers), self.producer.pid, *self.servers]
        processes = [process for pid in pids for process in family(pid)]
        return sum(sum(process.cpu_times()[:2]) for process in processes)

    def note(self, figure: str, value: float) -> None:
        self.figures.setdefault(figure, []).append(value)


def family(pid: int) -> list[Any]:
    import psutil

    parent = psutil.Process(pid)
    return [parent, *parent.children(recursive=True)]


def drain(bench: Bench, args: argparse.Namespace) -> None:
    bench.signal(signal.SIGSTOP)
    answer = bench.enqueue(args.jobs, args.producers)
    bench.note("enqueue", args.jobs / (answer["ended"] - answer["began"]))
    began = time.monotonic()
    bench.signal(signal.SIGCONT)
    bench.note("drain", args.jobs / (bench.wait() - began))


def through(bench: Bench, args: argparse.Namespace) -> None:
    before = bench.cpu()
    answer = bench.enqueue(args.jobs, args.producers)
    bench.note("through", args.jobs / (bench.wait() - answer["began"]))
    bench.note("cpu", 1e6 * (bench.cpu() - before) / args.jobs)


def latency(bench: Bench, args: argparse.Namespace) -> None:
    first = bench.given
    sent = bench.enqueue(args.singles, 1, pause=0.04)["each"]
    bench.wait()
    started = {number: at for number, at in begun(bench.folder) if number >= first}
    delays = [1000 * (started[first + position] - at) for position, at in enumerate(sent)]
    for delay in delays:
        bench.note("latency", delay)


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def table(benches: dict[str, Bench]) -> str:
    lines = [
        "| | " + " | ".join(benches) + " |",
        "|---" * (len(benches) + 1) + "|",
    ]
    for figure in ("enqueue", "drain", "through"):
        cells = [f"{statistics.median(bench.figures[figure]):.0f}" for bench in benches.values()]
        lines.append(f"| {figure}, jobs/s | " + " | ".join(cells) + " |")
    cells = [f"{statistics.median(bench.figures['cpu']):.0f}" for bench in benches.values()]
    lines.append("| processor of enqueue and drain, µs a job | " + " | ".join(cells) + " |")
    for figure in ("drain", "through"):
        cells = []
        for bench in benches.values():
            pairs = zip(benches["quern"].figures[figure], bench.figures[figure], strict=True)
            cells.append(f"{statistics.median(ours / theirs for ours, theirs in pairs):.2f}")
        lines.append(f"| Quern's {figure} over it | " + " | ".join(cells) + " |")
    for share, name in ((0.5, "p50"), (0.99, "p99")):
        cells = [f"{quantile(bench.figures['latency'], share):.1f}" for bench in benches.values()]
        lines.append(f"| idle start latency {name}, ms | " + " | ".join(cells) + " |")
    counts = {name: Counter(number for number, _ in begun(bench.folder)) for name, bench in benches.items()}
    lines.append("| enqueued | " + " | ".join(str(bench.given) for bench in benches.values()) + " |")
    lost = [str(bench.given - len(counts[name])) for name, bench in benches.items()]
    lines.append("| lost | " + " | ".join(lost) + " |")
    lines.append(
        "| begun twice | " + " | ".join(str(sum(n > 1 for n in counts[name].values())) for name in benches) + " |"
    )
    return "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    from redis import Redis

    from quern.embedded.process import ChildProcess
    from quern.embedded.stack import Stack
    from quern.migrations import migrate

    directory = Path(tempfile.mkdtemp(prefix="bench-"))
    stack = Stack(directory, with_engine=False, queues=())
    children: list[ChildProcess] = []
    producers: list[subprocess.Popen[str]] = []
    benches: dict[str, Bench] = {}
    try:
        stack.smtp.start()
        stack.receiver.start()
        stack.mongod.start()
        stack.redis.start()
        store = stack.runtime.store
        migrate(store.db)
        redis: Redis = Redis.from_url(stack.redis.url)
        socket = str(stack.redis.socket)

        def spawn(name: str, command: list[str], environment: dict[str, str]) -> ChildProcess:
            child = ChildProcess(
                name, command, log=directory / f"{name}.log", ready=lambda: True, environment=environment
            )
            child.start(wait=False)
            children.append(child)
            return child

        # The reconciler is part of what makes nothing lost, so its cost is part of the figures.
        scheduler = spawn("scheduler", [sys.executable, "-m", "quern.cli.main", "scheduler"], stack.environment)
        for name in args.systems:
            folder = directory / name
            folder.mkdir()
            python = str(args.peers) if name.startswith("celery") else sys.executable
            roles = [python, str(Path(__file__).resolve())]
            environment = stack.environment if name == "quern" else {"PATH": os.environ["PATH"]}
            tail = [name, str(folder), socket]
            workers = [
                spawn(f"{name}-{number}", [*roles, "work", *tail, str(args.concurrency)], environment)
                for number in range(args.workers)
            ]
            producer = subprocess.Popen(
                [*roles, "produce", *tail],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            producers.append(producer)
            if name == "quern":
                # Not the periodic ones, which the scheduler makes for itself.
                ended = lambda: store.db.jobs.find_one(UNENDED, {"_id": 1}) is None  # noqa: E731
            elif name == "huey":
                ended = lambda: True  # noqa: E731
            else:
                ended = lambda name=name: not redis.exists(name, f"{name}.unacked")  # type: ignore[misc]  # noqa: E731
            own = [stack.redis.pid, stack.mongod.pid, scheduler.pid] if name == "quern" else [stack.redis.pid]
            servers = [pid for pid in own if pid is not None]
            benches[name] = Bench(name, folder, workers, producer, ended, servers)
        for bench in benches.values():
            # Everything imported, every connection made, before the first clock starts.
            bench.enqueue(50, args.producers)
            bench.wait()
            bench.signal(signal.SIGSTOP)
        for _ in range(args.rounds):
            for measure in (drain, through, latency):
                for bench in benches.values():
                    bench.signal(signal.SIGCONT)
                    time.sleep(0.2)
                    measure(bench, args)
                    bench.signal(signal.SIGSTOP)
        done = store.db.jobs.count_documents({"tenant": "bench", "state": "done"})
        print(f"{args.workers} worker processes of {args.concurrency}, {args.producers} producers")
        print(
            f"{args.rounds} rounds of {args.jobs} jobs and {args.singles} single ones; "
            f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n"
        )
        print(table(benches))
        print(f"\nQuern's ended jobs by its database: {done} of {benches['quern'].given}")
        whole = all(len({n for n, _ in begun(bench.folder)}) == bench.given for bench in benches.values())
        return 0 if whole and done == benches["quern"].given else 1
    finally:
        for producer in producers:
            assert producer.stdin
            producer.stdin.close()
            producer.wait(timeout=20)
        for bench in benches.values():
            bench.signal(signal.SIGCONT)
        for child in children:
            child.stop()
        stack.stop()
        shutil.rmtree(directory, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    roles = parser.add_subparsers(dest="role", required=True)
    whole = roles.add_parser("run", help="the whole bench")
    whole.add_argument("--peers", type=Path, required=True, help="the Python that has Celery")
    whole.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    whole.add_argument("--jobs", type=int, default=2000, help="of one measurement")
    whole.add_argument("--singles", type=int, default=50, help="jobs of one measurement of latency")
    whole.add_argument("--rounds", type=int, default=3)
    whole.add_argument("--workers", type=int, default=2, help="worker processes of each system")
    whole.add_argument("--concurrency", type=int, default=4, help="jobs at once in each of them")
    whole.add_argument("--producers", type=int, default=4, help="threads that enqueue")
    worker = roles.add_parser("work", help="(a part of the run)")
    producer = roles.add_parser("produce", help="(a part of the run)")
    for part in (worker, producer):
        part.add_argument("system", choices=SYSTEMS)
        part.add_argument("folder", type=Path)
        part.add_argument("redis_socket")
    worker.add_argument("concurrency", type=int)
    args = parser.parse_args()
    if args.role == "run":
        return run(args)
    # A file that is named like a module of the standard library or of a peer must not hide it.
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]
    if args.role == "work":
        work(args.system, args.folder, args.redis_socket, args.concurrency)
    else:
        produce(args.system, args.folder, args.redis_socket)
    return 0


if __name__ == "__main__":
    sys.exit(main())
