"""What do 1,000 clients on event streams cost the API's other clients? The real processes, through the front door.

Starts nginx, the API, the events service, relay, scheduler, mongod and Redis. Phases alternate: idle, with waiting
clients, idle, … In each, one client reads a job and submits a response by turns, paced, each on a fresh connection.
Job events are written throughout, in the idle phases too, so that the phases differ by the waiting alone. The ratio of
consecutive idle phases, which differ in nothing, is reported beside it: it says how much of a ratio is the machine's.

    .venv/bin/python bench/waiting_clients.py --rounds 5

Exits 1 when a stream was refused, cut, or missed an event that was written while it was open.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from waiting_spike import cpu_seconds, pss_kib, quantile

from quern.embedded.demo import Client
from quern.embedded.stack import Stack, temporary_stack
from quern.jobs.model import NewJob, Queue, State
from quern.store import clock, identifier
from quern.tenants import keys, tenant

BUSY_SHARE = 0.1
START_LIMIT_SECONDS = 120.0
FORM = {
    "name": "Bench",
    "fields": [
        {"name": "comment", "type": "long_text", "max_length": 2000, "required": True},
        {"name": "rating", "type": "rating", "scale": 5, "required": True},
    ],
}


def probe(port: int, key: str, form: str, job: str, seconds: float, rate: float) -> None:
    """Paced requests, a read and a submission by turns; prints both kinds' sorted latencies in seconds."""
    body = json.dumps({"answers": {"comment": "It took long, but it was worth it. " * 5, "rating": 4}})
    head = f"HTTP/1.1\r\nHost: bench\r\nConnection: close\r\nAuthorization: Bearer {key}\r\n"
    content = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    requests = {
        "read": f"GET /api/v1/jobs/{job} {head}\r\n",
        "submit": f"POST /api/v1/forms/{form}/responses {head}{content}",
    }
    latencies: dict[str, list[float]] = {kind: [] for kind in requests}
    started, count = time.monotonic(), 0
    while (due := started + count / rate) < started + seconds:
        time.sleep(max(0.0, due - time.monotonic()))
        kind = ("read", "submit")[count % 2]
        count += 1
        begun = time.monotonic()
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(requests[kind].encode())
            answer = b""
            while chunk := connection.recv(65536):
                answer += chunk
        latencies[kind].append(time.monotonic() - begun)
        if answer[9:12] not in (b"200", b"202"):
            raise SystemExit(f"{kind}: expected 200 or 202, found {answer[:200]!r}")
    print(json.dumps({kind: sorted(values) for kind, values in latencies.items()}))


async def hold(port: int, key: str, jobs: list[str]) -> None:
    """Opens a stream a job, prints how long that took, holds them until a line comes, prints what they got."""
    ready: list[float] = []
    all_ready = asyncio.Event()
    opening = asyncio.Semaphore(64)
    delays: list[float] = []
    got: dict[str, list[int]] = {}
    counts = {"comments": 0, "refused": 0, "cut": 0}

    async def client(job: str) -> None:
        async with opening:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=4096)
                target = f"/api/v1/jobs/{job}/events"
                writer.write(f"GET {target} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n\r\n".encode())
                if b" 200 " not in (status := await reader.readline()):
                    raise ConnectionError(status)
                while not (line := await reader.readline()).startswith(b"data:"):
                    if not line:
                        raise ConnectionError("the stream ended before its first event")
            except OSError:
                counts["refused"] += 1
                return
            ready.append(time.monotonic())
            got[job] = [json.loads(line[5:])["seq"]]
            if len(ready) == len(jobs):
                all_ready.set()
        while line := await reader.readline():
            if line.startswith(b"data:"):
                event = json.loads(line[5:])
                got[job].append(event["seq"])
                if all_ready.is_set() and (sent := event["data"].get("sent", 0.0)) > ready[-1]:
                    delays.append(time.monotonic() - sent)
            elif line.startswith(b":"):
                counts["comments"] += 1
        counts["cut"] += 1

    begun = time.monotonic()
    tasks = [asyncio.create_task(client(job)) for job in jobs]
    async with asyncio.timeout(START_LIMIT_SECONDS):
        await all_ready.wait()
    print(json.dumps(max(ready) - begun), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    # Whatever was written before that line has this long to arrive.
    await asyncio.sleep(2)
    for task in tasks:
        task.cancel()
    gaps = sum(1 for numbers in got.values() if numbers != list(range(1, len(numbers) + 1)))
    last = {job: numbers[-1] for job, numbers in got.items()}
    print(json.dumps({"delays": sorted(delays), "gaps": gaps, "last": last, **counts}), flush=True)


class Writer(threading.Thread):
    """Appends progress to the busy jobs, `rate` events a second, as workers do."""

    def __init__(self, jobs: Any, busy: Sequence[str], rate: float) -> None:
        super().__init__(daemon=True)
        self._jobs, self._busy, self._rate = jobs, busy, rate
        self.written = dict.fromkeys(busy, 1)
        self.stopped = threading.Event()

    def run(self) -> None:
        started, count = time.monotonic(), 0
        while not self.stopped.wait(max(0.0, started + count / self._rate - time.monotonic())):
            job = self._busy[count % len(self._busy)]
            data = {"sent": time.monotonic()}
            entry = {"seq": self.written[job] + 1, "type": "progress", "at": clock.now(), "data": data}
            self._jobs.update_one({"_id": job}, {"$push": {"log": entry}})
            self.written[job] += 1
            count += 1


class Bench:
    """The stack with its form, its jobs, and the drivers, each a process of its own."""

    def __init__(self, stack: Stack, args: argparse.Namespace) -> None:
        self.stack, self.args = stack, args
        self.db = stack.runtime.store.db
        self.tenant: str = tenant.create(self.db, "bench", requests_per_minute=0)["_id"]
        _, self.key = keys.create(self.db, self.tenant, "bench")
        client = Client(stack.url, self.key)
        self.form: str = client.call("POST", "/api/v1/forms", FORM)["id"]
        client.call("POST", f"/api/v1/forms/{self.form}/publish")
        self.roots = {name: [pid] for name in ("api", "events") if (pid := stack.processes[name].pid)}
        self.roots["nginx"] = [pid] if (pid := stack.front.pid) else []

    def new_jobs(self) -> list[str]:
        """As many jobs as there are clients; they wait for what never comes, so no worker takes them."""
        now = clock.now()
        made = [
            NewJob(identifier.new("job"), self.tenant, Queue.LOW, "bench", state=State.BLOCKED).document(now)
            for _ in range(self.args.clients)
        ]
        self.db.jobs.insert_many(made)
        return [document["_id"] for document in made]

    def drive(self, *arguments: str, given: str = "") -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, __file__, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdin
        process.stdin.write(given + "\n")
        process.stdin.flush()
        return process

    def probe(self, job: str, seconds: float) -> tuple[dict[str, list[float]], dict[str, float]]:
        """Latencies by kind, and the CPU that each process used meanwhile, in percent of one core."""
        before, begun = {name: cpu_seconds(roots) for name, roots in self.roots.items()}, time.monotonic()
        arguments = [str(self.stack.front.port), self.key, self.form, job, str(seconds), str(self.args.rate)]
        answer = told(self.drive("--role", "probe", *arguments))
        took = time.monotonic() - begun
        return answer, {name: 100 * (cpu_seconds(roots) - before[name]) / took for name, roots in self.roots.items()}

    def round(self) -> tuple[dict[str, Any], bool]:
        """An idle phase, then one with waiting clients; what was measured, and whether every stream got everything."""
        jobs = self.new_jobs()
        writer = Writer(self.db.jobs, jobs[: max(1, int(len(jobs) * BUSY_SHARE))], self.args.events)
        writer.start()
        try:
            self.probe(jobs[-1], 2)
            idle, idle_cpu = self.probe(jobs[-1], self.args.seconds)
            empty = {name: pss_kib(roots) for name, roots in self.roots.items()}
            holder = self.drive("--role", "hold", str(self.stack.front.port), self.key, given=",".join(jobs))
            connected = told(holder, ends=False)
            self.probe(jobs[-1], 2)
            waiting, waiting_cpu = self.probe(jobs[-1], self.args.seconds)
            held = {name: pss_kib(roots) for name, roots in self.roots.items()}
        finally:
            writer.stopped.set()
            writer.join()
        assert holder.stdin
        holder.stdin.write("\n")
        holder.stdin.flush()
        received = told(holder)
        missed = [job for job, number in writer.written.items() if received["last"].get(job) != number]
        whole = not (received["gaps"] or missed or received["refused"] or received["cut"])
        if not whole:
            print(f"gaps {received['gaps']}, missed {len(missed)}, {received['refused']} refused", file=sys.stderr)
        measured = {
            **{f"idle {kind}": values for kind, values in idle.items()},
            **{f"waiting {kind}": values for kind, values in waiting.items()},
            "connect s": connected,
            "KiB": {name: (held[name] - empty[name]) / len(jobs) for name in held},
            "CPU": {name: waiting_cpu[name] - idle_cpu[name] for name in idle_cpu},
            "delays": received["delays"],
        }
        return measured, whole


def told(process: subprocess.Popen[str], *, ends: bool = True) -> Any:
    """The next line that a driver prints, as JSON."""
    assert process.stdout
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"{process.args!r} ended without an answer (exit {process.wait()})")
    if ends:
        process.communicate()
    return json.loads(line)


def milliseconds(values: list[float], share: float) -> float:
    return 1000 * quantile(values, share)


def report(rounds: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| ms | idle p50 | idle p99 | waiting p50 | waiting p99 | p99 ratio | of idle to idle |", "|---" * 7 + "|"]
    for kind in ("read", "submit"):

        def middle(phase: str, share: float, kind: str = kind) -> float:
            return statistics.median(milliseconds(one[f"{phase} {kind}"], share) for one in rounds)

        idles = [milliseconds(one[f"idle {kind}"], 0.99) for one in rounds]
        ratio = statistics.median(
            milliseconds(one[f"waiting {kind}"], 0.99) / idle for one, idle in zip(rounds, idles, strict=True)
        )
        noise = [max(pair) / min(pair) for pair in itertools.pairwise(idles)] or [float("nan")]
        cells = [middle(phase, share) for phase in ("idle", "waiting") for share in (0.5, 0.99)]
        shown = " | ".join(f"{cell:.1f}" for cell in cells)
        lines.append(f"| {kind} | {shown} | {ratio:.2f} | {min(noise):.2f} to {max(noise):.2f} |")
    lines += ["", "| what waiting costs | events | nginx | api |", "|---|---|---|---|"]
    for title, unit, middle_of in (
        # The first clients make the process grow; those of later rounds find the memory there.
        ("PSS for each client, KiB, first round", "KiB", lambda values: values[0]),
        ("CPU for all clients, % of one core, median", "CPU", statistics.median),
    ):
        middles = [middle_of([one[unit][name] for one in rounds]) for name in ("events", "nginx", "api")]
        lines.append(f"| {title} | " + " | ".join(f"{value:.1f}" for value in middles) + " |")
    delays = [(milliseconds(one["delays"], 0.5), milliseconds(one["delays"], 0.99)) for one in rounds]
    connect = statistics.median(one["connect s"] for one in rounds)
    p50, p99 = (statistics.median(delay[place] for delay in delays) for place in (0, 1))
    lines += [
        "",
        f"All connected in {connect:.1f} s. After that, from write to client: p50 {p50:.0f} ms, p99 {p99:.0f} ms.",
    ]
    return "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    needed = 2 * args.clients + 1000
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise SystemExit(f"{needed} file descriptors are needed, the hard limit is {hard}: raise it with `ulimit -Hn`")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))
    rounds, whole = [], True
    workers = args.workers
    with temporary_stack(with_engine=False, queues=(), api_workers=workers, announce=print_progress) as stack:
        bench = Bench(stack, args)
        for number in range(args.rounds):
            measured, complete = bench.round()
            rounds.append(measured)
            whole = whole and complete
            print_progress(f"round {number + 1} of {args.rounds}")
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{args.clients} clients, {args.rounds} rounds of {args.seconds:.0f} s, {args.rate:.0f} requests/s,", end=" ")
    print(f"{args.events:.0f} events/s, {workers} API workers, {os.cpu_count()} cores, load {load}\n")
    print(report(rounds))
    return 0 if whole else 1


def print_progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20.0, help="length of a phase")
    parser.add_argument("--rate", type=float, default=60.0, help="the API's requests a second")
    parser.add_argument("--events", type=float, default=20.0, help="job events a second, over a tenth of the jobs")
    parser.add_argument("--workers", type=int, default=2 * (os.cpu_count() or 1) + 1)
    parser.add_argument("--role", choices=("run", "probe", "hold"), default="run", help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role == "probe":
        port, key, form, job, seconds, rate = args.rest
        probe(int(port), key, form, job, float(seconds), float(rate))
        return 0
    if args.role == "hold":
        port, key = args.rest
        asyncio.run(hold(int(port), key, sys.stdin.readline().strip().split(",")))
        return 0
    return run(args)


if __name__ == "__main__":
    sys.exit(main())
