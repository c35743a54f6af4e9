"""Acknowledged responses a second against bare `insert_one` (w: majority, j: true) on the same mongod.

Both write the same bytes with the same durability, at 1, 16 and 64 clients, in turns (bare, Quern, bare, …) so
that a noisy machine hits both. Quern is driven by `wrk` straight at the API's TCP port; the relay runs, workers do not.
The bare writer is one Python process of as many threads as there are clients, with one MongoClient, on the UNIX socket.

Two limits in the same rounds say what the HTTP stack leaves: the thinnest Flask application, on the API's own Gunicorn
worker class with as many processes and threads, that reads the body and answers 202 (`flask`), and the same one that
makes the bare insert in between (`flask+insert`).

The outboxes of a round are relayed before the next begins; the time that takes is reported (`relayed`), since a burst
may be acknowledged faster than it is relayed.

A second table says where the processors' time goes, for each 202 answer, by process, and what 0.7 of the bare rate
would leave on all cores together. The acknowledged path is the API and mongod alone (Redis too, for keys with a limit);
the relay, which follows it on the same cores, is counted, and so is what it makes mongod do until wrk ends. The
scheduler, `quern events`, `quern analytics` and Redis `cache` run idle beside it (`others`).

    .venv/bin/python bench/intake.py --seconds 8 --rounds 3
"""

import argparse
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import bson
from gunicorn.app.base import BaseApplication
from pymongo import MongoClient

from quern.embedded.demo import Client
from quern.embedded.ports import free_port
from quern.embedded.process import ChildProcess
from quern.embedded.stack import Stack, temporary_stack
from quern.tenants import keys, tenant

ANSWERS = {
    "sector": "health",
    "rating": 4,
    "comment": "The nurse was kind and the doctor explained everything, but I waited for almost two hours. " * 3,
    "consent": True,
}
FORM = {
    "name": "bench",
    "fields": [
        {"name": "sector", "type": "choice", "options": [{"value": "health"}, {"value": "energy"}], "required": True},
        {"name": "rating", "type": "rating", "required": True},
        {"name": "comment", "type": "long_text", "required": True},
        {"name": "consent", "type": "consent", "required": True},
    ],
    "workflow": {
        "steps": [
            {"name": "mail", "type": "email", "to": ["a@example.org"], "subject": "New", "body": "{{ response.id }}"},
        ]
    },
}


def bare(uri: str, clients: int, seconds: float, sample: dict[str, Any]) -> float:
    """insert_one a second with `clients` threads."""
    client: MongoClient[dict[str, Any]] = MongoClient(uri, w="majority", journal=True, maxPoolSize=clients + 1)
    collection = client.bench.bare
    counts = [0] * clients
    stop = threading.Event()

    def work(number: int) -> None:
        position = 0
        while not stop.is_set():
            collection.insert_one({**sample, "_id": f"{time.time_ns()}-{number}-{position}"})
            position += 1
            counts[number] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    began = time.monotonic()
    time.sleep(seconds)
    done = sum(counts)
    elapsed = time.monotonic() - began
    stop.set()
    for thread in threads:
        thread.join()
    collection.drop()
    client.close()
    return done / elapsed


def thin_app(sample: bytes) -> Any:
    """The thinnest Flask applications: `/none` only answers, `/insert` makes one bare insert first."""
    from flask import Flask, Response, request

    document = bson.decode(sample)
    app = Flask("thin", static_folder=None)
    made: dict[int, Any] = {}

    def collection() -> Any:
        if os.getpid() not in made:
            made[os.getpid()] = MongoClient(os.environ["THIN_URI"], w="majority", journal=True).bench.thin
        return made[os.getpid()]

    @app.post("/none")
    def none() -> Response:
        return Response(b"{}" if request.get_data() else b"", 202, mimetype="application/json")

    @app.post("/insert")
    def insert() -> Response:
        json.loads(request.get_data())
        collection().insert_one({**document, "_id": f"{os.getpid()}-{time.time_ns()}-{threading.get_ident()}"})
        return Response(b"{}", 202, mimetype="application/json")

    return app


def serve_thin(port: int, workers: int, threads: int, sample: Path) -> None:
    """Serve `thin_app` as the API is served."""
    from quern.api.patience import worker_class
    from quern.api.server import Server

    class Thin(Server):
        def __init__(self) -> None:
            BaseApplication.__init__(self)

        def load_config(self) -> None:
            options = {"bind": f"127.0.0.1:{port}", "workers": workers, "threads": threads, "keepalive": 30}
            quiet = {"control_socket_disable": True, "loglevel": "warning"}
            for name, value in {**options, **quiet, "worker_class": worker_class(20.0)}.items():
                self.cfg.set(name, value)

        def load(self) -> Any:
            return thin_app(sample.read_bytes())

    Thin().run()


def driven(url: str, key: str, clients: int, seconds: float, folder: Path) -> tuple[float, str]:
    """202 answers a second, and the p99 as wrk prints it."""
    script = folder / "post.lua"
    script.write_text(
        f'wrk.method = "POST"\nwrk.body = {json.dumps(json.dumps({"answers": ANSWERS}))}\n'
        f'wrk.headers["Content-Type"] = "application/json"\nwrk.headers["Authorization"] = "Bearer {key}"\n'
    )
    command = [
        "wrk",
        "-t1",
        f"-c{clients}",
        f"-d{seconds:.0f}s",
        "--timeout",
        "30s",
        "--latency",
        "-s",
        str(script),
        url,
    ]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    if "Non-2xx" in text or "Socket errors" in text:
        raise RuntimeError(f"expected only 202 answers, found\n{text}")
    rate = re.search(r"Requests/sec:\s+([\d.]+)", text)
    tail = re.search(r"99%\s+(\S+)", text)
    if rate is None or tail is None:
        raise RuntimeError(f"expected figures from wrk, found\n{text}")
    return float(rate[1]), tail[1]


Times = dict[str, tuple[float, float]]


def processor_times(roots: dict[str, int]) -> Times:
    """Seconds of processor, of the user and of the kernel, that each process and its living descendants have had."""
    spent: dict[int, tuple[float, float]] = {}
    children: dict[int, list[int]] = {}
    tick = os.sysconf("SC_CLK_TCK")
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            # It has ended meanwhile.
            continue
        process = int(path.parent.name)
        spent[process] = (int(fields[11]) / tick, int(fields[12]) / tick)
        children.setdefault(int(fields[1]), []).append(process)

    def family(process: int) -> list[int]:
        return [process, *(other for child in children.get(process, []) for other in family(child))]

    sums = {}
    for name, root in roots.items():
        found = [spent[process] for process in family(root) if process in spent]
        sums[name] = (sum(user for user, _ in found), sum(kernel for _, kernel in found))
    return sums


def spent_for_each(before: Times, after: Times, answers: float) -> Times:
    """Microseconds for each of `answers`."""
    return {
        name: ((user - before[name][0]) / answers * 1e6, (kernel - before[name][1]) / answers * 1e6)
        for name, (user, kernel) in after.items()
    }


def relayed(db: Any, limit: float = 300.0) -> float:
    """Seconds until every outbox is relayed."""
    began = time.monotonic()
    while db.responses.find_one({"outbox.at": {"$exists": True}}, {"_id": 1}) is not None:
        if time.monotonic() - began > limit:
            raise RuntimeError(f"expected the relay to catch up within {limit} s; see its log")
        time.sleep(0.05)
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=5, help="Gunicorn workers (2 x cores + 1)")
    parser.add_argument("--threads", type=int, default=8, help="of each worker")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--serve-thin", nargs=2, metavar=("PORT", "SAMPLE"), help="(a part of the run)")
    arguments = parser.parse_args()
    if arguments.serve_thin:
        port, sample = arguments.serve_thin
        serve_thin(int(port), arguments.workers, arguments.threads, Path(sample))
        return
    if shutil.which("wrk") is None:
        raise SystemExit("expected wrk, found none; run: apt-get install wrk")
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        measure(arguments, folder)
    finally:
        shutil.rmtree(folder)


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    port, thin_port = free_port(), free_port()
    settings = {"QUERN_API_BIND": f"127.0.0.1:{port}", "QUERN_API_THREADS": str(arguments.threads)}
    with temporary_stack(with_engine=False, queues=(), api_workers=arguments.workers, settings=settings) as stack:
        db = stack.runtime.store.db
        made = tenant.create(db, "bench", requests_per_minute=0)
        _, key = keys.create(db, made["_id"], "bench")
        client = Client(f"http://127.0.0.1:{port}", key)
        form = client.call("POST", "/api/v1/forms", FORM)["id"]
        client.call("POST", f"/api/v1/forms/{form}/publish")
        client.call("POST", f"/api/v1/forms/{form}/responses", {"answers": ANSWERS})
        sample = db.responses.find_one({"form": form}) or {}
        (folder / "sample").write_bytes(bson.encode(sample))
        shape = ["--workers", str(arguments.workers), "--threads", str(arguments.threads)]
        thin = ChildProcess(
            "the thinnest Flask",
            [sys.executable, str(Path(__file__).resolve()), *shape, "--serve-thin", str(thin_port), folder / "sample"],
            log=folder / "thin.log",
            ready=lambda: _listens(thin_port),
            environment={"PATH": os.environ["PATH"], "THIN_URI": stack.mongod.uri},
        )
        thin.start()
        urls = {
            "flask": f"http://127.0.0.1:{thin_port}/none",
            "flask+insert": f"http://127.0.0.1:{thin_port}/insert",
            "quern": f"http://127.0.0.1:{port}/api/v1/forms/{form}/responses",
        }
        roots = {name: process.pid for name, process in {**stack.processes, "thin": thin}.items() if process.pid}
        try:
            compare(arguments, stack, urls, key, sample, folder, roots)
        finally:
            thin.stop()


def compare(
    arguments: argparse.Namespace,
    stack: Stack,
    urls: dict[str, str],
    key: str,
    sample: dict[str, Any],
    folder: Path,
    roots: dict[str, int],
) -> None:
    db = stack.runtime.store.db
    account: list[str] = []
    print(f"{arguments.rounds} rounds of {arguments.seconds:.0f} s, {arguments.workers} workers of {arguments.threads}")
    print(
        "| clients | bare, 1/s | flask | flask+insert | of bare | Quern | of bare | of flask+insert | p99 | relayed |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for clients in arguments.clients:
        rates: dict[str, list[float]] = {name: [] for name in ("bare", *urls, "relayed")}
        costs: dict[str, list[Times]] = {name: [] for name in urls}
        tail = ""
        for _ in range(arguments.rounds):
            rates["bare"].append(bare(stack.mongod.uri, clients, arguments.seconds, sample))
            for name, url in urls.items():
                before = processor_times(roots)
                rate, tail = driven(url, key, clients, arguments.seconds, folder)
                rates[name].append(rate)
                costs[name].append(spent_for_each(before, processor_times(roots), rate * arguments.seconds))
            rates["relayed"].append(relayed(db))
        middle = {name: statistics.median(found) for name, found in rates.items()}

        def over(one: str, other: str, rates: dict[str, list[float]] = rates) -> float:
            return statistics.median(a / b for a, b in zip(rates[one], rates[other], strict=True))

        cells = [
            str(clients),
            *(f"{middle[name]:.0f}" for name in ("bare", "flask", "flask+insert")),
            f"{over('flask+insert', 'bare'):.2f}",
            f"{middle['quern']:.0f}",
            f"{over('quern', 'bare'):.2f}",
            f"{over('quern', 'flask+insert'):.2f}",
            tail,
            f"{middle['relayed']:.1f} s",
        ]
        print("| " + " | ".join(cells) + " |", flush=True)
        left = len(os.sched_getaffinity(0)) * 1e6 / 0.7 / middle["bare"]
        account += [_account(clients, name, costs[name], left) for name in ("flask+insert", "quern")]
    print(
        "\n| clients | | its own, µs an answer | in the kernel | mongod | relay | Redis | others | 0.7 of bare leaves |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    print("\n".join(account))
    print(f"load {os.getloadavg()[0]:.1f}")


def _account(clients: int, name: str, rounds: list[Times], left: float) -> str:
    """A row of the second table; `left`: microseconds of all cores for one answer at 0.7 of the bare rate."""
    middle = {
        process: (
            statistics.median(found[process][0] for found in rounds),
            statistics.median(found[process][1] for found in rounds),
        )
        for process in rounds[0]
    }
    own = "api" if name == "quern" else "thin"
    named = ("mongod", "relay", "redis")
    others = sum(sum(middle[process]) for process in middle if process not in (own, *named))
    cells = [sum(middle[own]), middle[own][1], *(sum(middle[process]) for process in named), others, left]
    return f"| {clients} | {name} | " + " | ".join(f"{cell:.0f}" for cell in cells) + " |"


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


if __name__ == "__main__":
    main()
