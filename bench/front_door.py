"""TLS through nginx and the firewall against the API's own sockets: requests a second, in turns, in one run.

Both are driven by `wrk` with the same requests; the front door is the role's (roles/nginx as tests/waf renders it, from
Debian's packages). `--waf none` and `--waf detect` show what the firewall costs. As on a host, the API has two
instances, and nginx goes before them; each turn has one wrk for each instance, so that a lucky distribution of
connections does not decide. They listen on loopback, as wrk speaks no UNIX sockets; nginx reaches them there too.

Clients are not on an appliance: wrk, which speaks TLS in one kind of turn and not in the other, has a processor of its
own, and all else shares the others. `--beside` lets it compete with what it measures. The processor time of a request,
nginx's and that of all others but wrk, tells the ratio on a machine that does nothing else, however busy it is.

The relay takes up each response after its answer. A quick turn leaves it work, which a slow one does not: "sustained"
divides the answers by the time until nothing was left.

    .venv/bin/python bench/front_door.py --seconds 6 --rounds 3
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
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pymongo.database import Database

from bench.intake import ANSWERS, FORM
from quern.embedded.demo import Client
from quern.embedded.ports import free_port
from quern.embedded.process import ChildProcess
from quern.embedded.stack import Stack, temporary_stack
from quern.tenants import keys, tenant
from tests.waf.front_door import FrontDoor

#: Three times the share of a process of niceness 0.
_NICER = 5


class Figure(NamedTuple):
    """Answers a second, and the 99th percentile of the time for one, in ms."""

    rate: float
    p99: float


_SUMMARY = """
function done(summary, latency)
    local errors = summary.errors
    local failed = errors.connect + errors.read + errors.write + errors.status + errors.timeout
    local rate = summary.requests / summary.duration * 1e6
    io.write(string.format('{"rate": %f, "p99": %f, "failed": %d}\\n', rate, latency:percentile(99) / 1000, failed))
end"""


def drive(
    urls: Sequence[str], key: str, body: str | None, clients: int, seconds: float, folder: Path, processors: set[int]
) -> Figure:
    """Load on `urls` at once, the clients shared out, from `processors`. Raises RuntimeError for an answer not 2xx."""
    script = folder / "request.lua"
    headers = {"Authorization": f"Bearer {key}", "Host": "quern.test", "User-Agent": "bench/1", "Accept": "*/*"}
    lines = [f'wrk.headers["{name}"] = "{value}"' for name, value in headers.items()]
    if body is not None:
        lines += ['wrk.method = "POST"', f"wrk.body = {json.dumps(body)}"]
        lines += ['wrk.headers["Content-Type"] = "application/json"']
    lines += [_SUMMARY]
    script.write_text("\n".join(lines) + "\n")
    shared = ["wrk", "-t1", "--timeout", "20s", f"-c{clients // len(urls)}", f"-d{seconds:.0f}s", "-s", str(script)]
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, processors)  # Inherited by wrk and its threads.
    running = [subprocess.Popen([*shared, url], stdout=subprocess.PIPE, text=True) for url in urls]
    os.sched_setaffinity(0, own)
    rate, tail = 0.0, 0.0
    for process in running:
        text = process.communicate()[0]
        found = json.loads(text.splitlines()[-1]) if process.returncode == 0 else {"failed": 1}
        if found["failed"]:
            raise RuntimeError(f"expected only 2xx answers, found\n{text}")
        rate, tail = rate + found["rate"], max(tail, found["p99"])
    return Figure(rate, tail)


def settle(db: Database[Any], seconds: float = 300) -> None:
    """Wait until the relay has taken up what a turn left, which would otherwise be paid for by the next one."""
    deadline = time.monotonic() + seconds
    while db.responses.count_documents({"outbox.at": {"$exists": True}}, limit=1):
        if time.monotonic() > deadline:
            raise RuntimeError(f"expected all outboxes to be relayed within {seconds:.0f} s, found some left")
        time.sleep(0.2)


def processor_seconds() -> dict[str, float]:
    """Time that living descendants of this process have taken, by command."""
    parents, taken = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, rest = re.fullmatch(r"\d+ \((.*)\) (.*)\n", path.read_text()).groups()  # type: ignore[union-attr]
        except OSError:
            continue
        fields = rest.split()
        parents[int(path.parent.name)] = int(fields[1])
        taken[int(path.parent.name)] = (name, (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"))
    found: dict[str, float] = {}
    for process, (name, seconds) in taken.items():
        ancestor = process
        while ancestor in parents and ancestor != os.getpid():
            ancestor = parents[ancestor]
        if ancestor == os.getpid() and process != os.getpid():
            found[name] = found.get(name, 0.0) + seconds
    return found


@contextmanager
def front_door(ports: Sequence[int], waf: str) -> Iterator[FrontDoor]:
    """The role's nginx in front of the API on loopback ports, without the limits for each address."""
    limits: dict[str, Any] = {
        "nginx_requests_per_second": 1_000_000,
        "nginx_burst": 1_000_000,
        "nginx_connections": 10_000,
    }
    with (
        tempfile.TemporaryDirectory(prefix="q-", dir="/tmp") as folder,
        FrontDoor(Path(folder), api=[f"127.0.0.1:{port}" for port in ports], nginx_waf=waf, **limits) as door,
    ):
        # What the unit's CPUWeight= is to the API's.
        for process in children(door.pid):
            os.setpriority(os.PRIO_PROCESS, process, os.getpriority(os.PRIO_PROCESS, process) - _NICER)
        yield door


@contextmanager
def second_instance(stack: Stack, port: int) -> Iterator[None]:
    """An instance of the API beside the stack's own."""
    own = {"QUERN_API_BIND": f"127.0.0.1:{port}", "QUERN_METRICS_DIR": str(stack.directory / "metrics-2")}
    process = ChildProcess(
        "quern api",
        [sys.executable, "-m", "quern.cli.main", "api"],
        log=stack.directory / "api-2.log",
        ready=lambda: answers(port),
        environment={"QUERN_METRICS_BIND": f"unix:{stack.directory}/metrics-api-2.sock", **stack.environment, **own},
        directory=stack.directory,
    )
    with process:
        yield


def answers(port: int) -> bool:
    """Whether something accepts connections."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2):
            return True
    except OSError:
        return False


def children(parent: int | None) -> list[int]:
    """The ids of a process's children."""
    return [int(word) for word in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--waf", choices=["block", "detect", "none"], default="block")
    parser.add_argument("--workers", type=int, default=1, help="of each of the API's two instances")
    parser.add_argument("--beside", action="store_true", help="wrk on the same processors as all else")
    arguments = parser.parse_args()
    processors = os.sched_getaffinity(0)
    clients_processors = processors if arguments.beside else {min(processors)}
    if not arguments.beside:
        if len(processors) < 2:
            raise SystemExit("expected two processors, one of them for the clients, found one; run: with --beside")
        os.sched_setaffinity(0, processors - clients_processors)
    if shutil.which("wrk") is None:
        raise SystemExit("expected wrk, found none; run: apt-get install wrk")
    ports, folder = (free_port(), free_port()), Path(tempfile.mkdtemp(prefix="bench-"))
    settings = {"QUERN_API_BIND": f"127.0.0.1:{ports[0]}"}
    with (
        temporary_stack(with_engine=False, queues=(), api_workers=arguments.workers, settings=settings) as stack,
        second_instance(stack, ports[1]),
        front_door(ports, arguments.waf) as door,
    ):
        db = stack.runtime.store.db
        made = tenant.create(db, "bench", requests_per_minute=0)
        _, key = keys.create(db, made["_id"], "bench")
        client = Client(f"http://127.0.0.1:{ports[0]}", key)
        form = client.call("POST", "/api/v1/forms", FORM)["id"]
        client.call("POST", f"/api/v1/forms/{form}/publish")
        kinds = {
            "POST a response": (f"/api/v1/forms/{form}/responses", json.dumps({"answers": ANSWERS})),
            "GET a form": (f"/api/v1/forms/{form}", None),
        }
        bases = {
            "socket": [f"http://127.0.0.1:{port}" for port in ports],
            "front door": [f"https://127.0.0.1:{door.port}"] * len(ports),
        }
        for kind, (path, body) in kinds.items():
            found: dict[str, list[Figure]] = {name: [] for name in bases}
            spent: dict[str, dict[str, float]] = {name: defaultdict(float) for name in bases}
            answered, until_settled = dict.fromkeys(bases, 0.0), dict.fromkeys(bases, 0.0)
            for _ in range(arguments.rounds):
                for name, places in bases.items():
                    before, began = processor_seconds(), time.monotonic()
                    urls = [place + path for place in places]
                    figure = drive(urls, key, body, arguments.clients, arguments.seconds, folder, clients_processors)
                    settle(db)
                    until_settled[name] += time.monotonic() - began
                    for command, seconds in processor_seconds().items():
                        part = "nginx" if command == "nginx" else "API and database"
                        spent[name][part] += 1000 * (seconds - before.get(command, 0.0))
                    answered[name] += figure.rate * arguments.seconds
                    found[name].append(figure)
            pairs = zip(found["front door"], found["socket"], strict=True)
            ratios = [through.rate / direct.rate for through, direct in pairs]
            for name, figures in found.items():
                rates, tails = (", ".join(f"{value:.0f}" for value in column) for column in zip(*figures, strict=True))
                print(f"{kind}, {name}: {rates} requests/s; p99 {tails} ms")
            cost = {name: {part: ms / answered[name] for part, ms in parts.items()} for name, parts in spent.items()}
            for name, parts in cost.items():
                shown = ", ".join(f"{part} {ms:.2f}" for part, ms in sorted(parts.items()))
                print(f"{kind}, {name}: processor, ms a request: {shown}")
            own, before_it = cost["socket"]["API and database"], cost["front door"]["nginx"]
            print(f"{kind}: by processor time: {own / (own + before_it):.2f}")
            sustained = {name: answered[name] / until_settled[name] for name in bases}
            print(f"{kind}: sustained {', '.join(f'{name} {rate:.0f}' for name, rate in sustained.items())} requests/s")
            print(f"{kind}: sustained ratio {sustained['front door'] / sustained['socket']:.2f}")
            print(f"{kind}: ratio {statistics.median(ratios):.2f} ({', '.join(f'{ratio:.2f}' for ratio in ratios)})")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
