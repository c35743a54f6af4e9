"""Does it stay as fast when there is much? Intake, lists and a job's start, at 10 thousand and a million responses.

A million responses are as real ones are, but bulk-loaded past the API (processed, without an outbox), into the form
and tenant that are then measured, each with an ended job. After that 100 thousand jobs of another tenant wait in the
queue `default`, and one job of a tenant of its own is enqueued again and again: how soon does it start, against the
same in a database where nothing waits? Last, what reads a whole form: a filter and an erasure by an answer nobody gave.

Everything is asked of a real API process over its socket, one request at a time; the two sizes are two databases of one
mongod behind two APIs, measured in turns (small, large, small, …), so that a noisy machine hits both.

    .venv/bin/python bench/scale.py --large 1000000 --waiting 100000 --rounds 5

Prints p50 and p99 (ms) and the ratios. Needs about 2 GB of disk for a million.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpcore2
from intake import ANSWERS, FORM

from quern.config import LiveSettings
from quern.embedded.stack import Stack
from quern.jobs import queue, turns
from quern.jobs.handler import Context, Handler, Registry
from quern.jobs.model import Job, NewJob, Queue, State
from quern.jobs.wake import Waker
from quern.jobs.worker import Worker
from quern.migrations import migrate
from quern.runtime import Runtime
from quern.store import clock, identifier
from quern.store.connection import Db, Document, Store
from quern.tenants import keys, tenant

BATCH = 5_000
WORDS = ("kind", "slow", "the nurse", "the doctor", "two hours", "lost my bill", "called again", "never helped")


class Side:
    """One size: its database, its API and its client."""

    def __init__(self, name: str, stack: Stack, directory: Path) -> None:
        from quern.embedded.process import ChildProcess

        self.name = name
        self.socket = directory / f"api-{name}.sock"
        environment = {
            **stack.environment,
            "QUERN_MONGODB_DATABASE": f"scale_{name}",
            "QUERN_API_BIND": f"unix:{self.socket}",
            "QUERN_METRICS_DIR": str(directory / f"metrics-{name}"),
        }
        self.store = store_of(environment)
        migrate(self.store.db)
        made = tenant.create(self.store.db, "scale", requests_per_minute=0)
        _, self.key = keys.create(self.store.db, made["_id"], "scale")
        self.api = ChildProcess(
            f"api {name}",
            [sys.executable, "-m", "quern.cli.main", "api"],
            log=directory / f"api-{name}.log",
            ready=self.serves,
            environment=environment,
        )
        self.api.start()
        self.pool = httpcore2.ConnectionPool(uds=str(self.socket))
        self.form = self.call("POST", "/api/v1/forms", FORM)["id"]
        self.call("POST", f"/api/v1/forms/{self.form}/publish")
        self.figures: dict[str, list[float]] = {}

    def serves(self) -> bool:
        try:
            with httpcore2.ConnectionPool(uds=str(self.socket)) as pool:
                return pool.request("GET", "http://localhost/healthz").status == 200
        except (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException):
            return False

    def call(self, method: str, path: str, body: Any = None) -> Any:
        headers: dict[bytes | str, bytes | str] = {
            "Authorization": f"Bearer {self.key}",
            "Content-Type": "application/json",
        }
        content = json.dumps(body).encode() if body is not None else b""
        answer = self.pool.request(method, f"http://localhost{path}", headers=headers, content=content)
        if answer.status >= 300:
            raise SystemExit(f"{method} {path}: expected success, found {answer.status} {answer.content[:500]!r}")
        return json.loads(answer.content)

    def time(self, figure: str, do: Callable[[], object]) -> None:
        began = time.monotonic()
        do()
        self.figures.setdefault(figure, []).append(1000 * (time.monotonic() - began))


def store_of(environment: dict[str, str]) -> Store:
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        from quern.config import Settings

        return Runtime(LiveSettings(Settings())).store
    finally:
        os.environ.clear()
        os.environ.update(before)


def load(side: Side, count: int, rng: random.Random) -> None:
    """Fill a side's form up to `count` responses, in the past, as the relay and the workers would have left them."""
    form, owner = side.form, side.store.db.forms.find_one({"_id": side.form}) or {}
    now = clock.now()

    def documents(first: int, last: int) -> Iterator[Document]:
        for number in range(first, last):
            created = now - timedelta(seconds=30 + 30 * (count - number))
            comment = " ".join(rng.choices(WORDS, k=rng.randint(10, 90)))
            yield {
                "_id": identifier.derived("rsp", form, str(number)),
                "tenant": owner["tenant"],
                "form": form,
                "version": 1,
                "status": "processed",
                "created": created,
                "processed": created + timedelta(seconds=4),
                "answers": {**ANSWERS, "rating": rng.randint(1, 5), "comment": comment},
                "audit_key": rng.randbytes(32),
                "steps": {"mail": "done"},
                "results": {"mail": {"message_id": f"<{number}@quern.example>", "sentiment": rng.random()}},
            }

    db = side.store.db
    for first in range(0, count, BATCH):
        made = list(documents(first, min(count, first + BATCH)))
        db.responses.insert_many(made, ordered=False)
        db.jobs.insert_many([ended(response) for response in made], ordered=False)


def ended(response: Document) -> Document:
    """The job of a response's step, as a worker would have left it."""
    identity = NewJob.derived_id(response["tenant"], response["_id"], "mail")
    payload = {"step": "mail"}
    new = NewJob(identity, response["tenant"], Queue.DEFAULT, "email", payload, response["_id"], state=State.DONE)
    then = response["processed"]
    return new.document(then) | {"started": then, "attempt": 1, "forget": clock.now() + timedelta(days=30)}


def scans(side: Side, rounds: int) -> None:
    """What reads every response of the form, since answers are not indexed."""
    base = f"/api/v1/forms/{side.form}"
    nobody = {"field": "comment", "value": "nobody ever said this"}
    for _ in range(rounds):
        side.time("filter by an answer", lambda: side.call("GET", f"{base}/responses?where=comment:nobody"))
        side.time("erase by an answer", lambda: side.call("POST", f"{base}/erasures", nobody))


def measure(side: Side, rounds: int) -> None:
    """Intake, the first page, and a page behind a cursor halfway through what is stored."""
    base = f"/api/v1/forms/{side.form}/responses"
    middle = middle_of(side)
    first = side.call("GET", f"{base}?created_before={middle}&limit=50")
    cursor = first["next_cursor"]
    for _ in range(rounds):
        side.time("intake", lambda: side.call("POST", base, {"answers": ANSWERS}))
        side.time("first page", lambda: side.call("GET", f"{base}?limit=50"))
        path = f"{base}?created_before={middle}&limit=50&cursor={cursor}"
        side.time("page behind a cursor", lambda path=path: side.call("GET", path))  # type: ignore[misc]


def middle_of(side: Side) -> str:
    db = side.store.db
    of = {"tenant": (db.forms.find_one({"_id": side.form}) or {})["tenant"], "form": side.form}
    ends = [db.responses.find_one(of, {"created": 1}, sort=[("created", way)]) for way in (1, -1)]
    oldest, newest = (end["created"] for end in ends if end)
    return clock.rfc3339(oldest + (newest - oldest) / 2)


class Starts:
    """A worker of a database's queue `default`, and how soon single jobs start in it."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.at = 0.0
        self.waker = Waker(store.redis_queue_url)
        registry = Registry([Handler("probe", self._probe), Handler("flood", lambda job, context: None)])
        self.worker = Worker(store, registry, self.waker, Queue.DEFAULT, 4)

    def _probe(self, _: Job, __: Context) -> None:
        self.at = time.monotonic()

    def once(self, number: str) -> float:
        """Milliseconds from before the enqueue to the handler, claimed by a thread that is free."""
        began = time.monotonic()
        opened = queue.insert(self.store.db, [NewJob(number, "ten_single", Queue.DEFAULT, "probe")])
        turns.open_many(self.store.db, opened)
        # One claim is one turn: with a flood waiting, the probe's comes second at the latest. The flood's own jobs are
        # another thread's work in a worker, so they run after the clock has stopped.
        others: list[Job] = []
        for _ in range(3):
            job = queue.claim(self.store.db, Queue.DEFAULT.value, 60)
            if job is None:
                break
            if job.kind != "probe":
                others.append(job)
                continue
            self.worker.run_one(job)
            for other in others:
                self.worker.run_one(other)
            return 1000 * (self.at - began)
        raise SystemExit("expected the single job among the first three claims, found it nowhere")


def flood(db: Db, count: int) -> None:
    for first in range(0, count, BATCH):
        jobs = [
            NewJob(NewJob.derived_id("flood", str(number)), "ten_flood", Queue.DEFAULT, "flood", {"n": number})
            for number in range(first, min(count, first + BATCH))
        ]
        opened = queue.insert(db, jobs)
    turns.open_many(db, opened)


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def row(name: str, small: list[float], large: list[float]) -> str:
    halves = [statistics.median(small), statistics.median(large), quantile(small, 0.99), quantile(large, 0.99)]
    cells = [f"{halves[0]:.2f}", f"{halves[1]:.2f}", f"{halves[1] / halves[0]:.2f}"]
    cells += [f"{halves[2]:.2f}", f"{halves[3]:.2f}", f"{halves[3] / halves[2]:.2f}"]
    return f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=int, default=10_000)
    parser.add_argument("--large", type=int, default=1_000_000)
    parser.add_argument("--waiting", type=int, default=100_000, help="jobs of one tenant that wait")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--requests", type=int, default=40, help="of each kind, of each side, in a round")
    args = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="bench-"))
    stack = Stack(directory, with_engine=False, queues=(), api_workers=1)
    sides: list[Side] = []
    try:
        for service in (stack.smtp, stack.receiver, stack.mongod, stack.redis):
            service.start()
        rng = random.Random(1)
        for name, count in (("small", args.small), ("large", args.large)):
            side = Side(name, stack, directory)
            sides.append(side)
            began = time.monotonic()
            load(side, count, rng)
            size = side.store.db.command("dbstats")["storageSize"] / 1e6
            print(f"loaded {count} responses in {time.monotonic() - began:.0f} s, {size:.0f} MB", flush=True)
            for _ in range(20):
                side.call("POST", f"/api/v1/forms/{side.form}/responses", {"answers": ANSWERS})
        starts = {side.name: Starts(side.store) for side in sides}
        quiet = Starts(store_of({**stack.environment, "QUERN_MONGODB_DATABASE": "scale_quiet"}))
        migrate(quiet.store.db)
        for _ in range(args.rounds):
            for side in sides:
                measure(side, args.requests)
                for _ in range(args.requests):
                    delay = starts[side.name].once(identifier.new("job"))
                    side.figures.setdefault("job start", []).append(delay)
        small, large = sides
        # The flood waits beside the small side's responses, so that nothing but it differs from before.
        flood(small.store.db, args.waiting)
        crowded: list[float] = []
        calm: list[float] = []
        for _ in range(args.rounds):
            for _ in range(args.requests):
                crowded.append(starts["small"].once(identifier.new("job")))
                calm.append(quiet.once(identifier.new("job")))
        for side in sides:
            scans(side, 3)
        print(f"\n{args.rounds} rounds of {args.requests}; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
        print(f"| ms | {args.small} p50 | {args.large} p50 | ratio | {args.small} p99 | {args.large} p99 | ratio |")
        print("|---" * 7 + "|")
        for figure in small.figures:
            print(row(figure, small.figures[figure], large.figures[figure]))
        print(row(f"job start, 0 against {args.waiting} waiting", calm, crowded))
    finally:
        for side in sides:
            side.api.stop()
        stack.stop()
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
