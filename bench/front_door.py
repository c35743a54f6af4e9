"""TLS through nginx and the firewall against the API's own socket: requests a second, in turns, in one run.

Both are driven by `wrk` with the same requests; the front door is the role's (roles/nginx as tests/waf renders it, from
Debian's packages). `--waf none` and `--waf detect` show what the firewall costs. The API listens on loopback, as wrk
speaks no UNIX sockets; nginx reaches it there too. The processor time of a request, nginx's and that of all others but
wrk, tells the ratio on a machine that does nothing else, however busy it is.

The relay takes up each response after its answer. A quick turn leaves it work, which a slow one does not: "sustained"
divides the answers by the time until nothing was left.

    .venv/bin/python bench/front_door.py --seconds 6 --rounds 3
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pymongo.database import Database

from bench.intake import ANSWERS, FORM
from quern.embedded.demo import Client
from quern.embedded.ports import free_port
from quern.embedded.stack import temporary_stack
from quern.tenants import keys, tenant
from tests.waf.front_door import FrontDoor


def drive(url: str, key: str, body: str | None, clients: int, seconds: float, folder: Path) -> tuple[float, str]:
    """Answers a second, and the p99 as wrk prints it. Raises RuntimeError when any answer was not a 2xx."""
    script = folder / "request.lua"
    headers = {"Authorization": f"Bearer {key}", "Host": "quern.test", "User-Agent": "bench/1", "Accept": "*/*"}
    lines = [f'wrk.headers["{name}"] = "{value}"' for name, value in headers.items()]
    if body is not None:
        lines += ['wrk.method = "POST"', f"wrk.body = {json.dumps(body)}"]
        lines += ['wrk.headers["Content-Type"] = "application/json"']
    script.write_text("\n".join(lines) + "\n")
    command = [
        "wrk",
        "-t1",
        "--timeout",
        "20s",
        f"-c{clients}",
        f"-d{seconds:.0f}s",
        "--latency",
        "-s",
        str(script),
        url,
    ]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rate, tail = re.search(r"Requests/sec:\s+([\d.]+)", text), re.search(r"99%\s+(\S+)", text)
    if rate is None or tail is None or "Non-2xx" in text or "Socket errors" in text:
        raise RuntimeError(f"expected only 2xx answers, found\n{text}")
    return float(rate[1]), tail[1]


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
def front_door(port: int, waf: str) -> Iterator[FrontDoor]:
    """The role's nginx in front of the API on a loopback port, without the limits for each address."""
    limits: dict[str, Any] = {
        "nginx_requests_per_second": 1_000_000,
        "nginx_burst": 1_000_000,
        "nginx_connections": 10_000,
    }
    with (
        tempfile.TemporaryDirectory(prefix="q-", dir="/tmp") as folder,
        FrontDoor(Path(folder), api=f"127.0.0.1:{port}", nginx_waf=waf, **limits) as door,
    ):
        yield door


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--waf", choices=["block", "detect", "none"], default="block")
    parser.add_argument("--workers", type=int, default=2, help="Gunicorn workers, as on a host of two cores")
    arguments = parser.parse_args()
    if shutil.which("wrk") is None:
        raise SystemExit("expected wrk, found none; run: apt-get install wrk")
    port, folder = free_port(), Path(tempfile.mkdtemp(prefix="bench-"))
    settings = {"QUERN_API_BIND": f"127.0.0.1:{port}"}
    with (
        temporary_stack(with_engine=False, queues=(), api_workers=arguments.workers, settings=settings) as stack,
        front_door(port, arguments.waf) as door,
    ):
        db = stack.runtime.store.db
        made = tenant.create(db, "bench", requests_per_minute=0)
        _, key = keys.create(db, made["_id"], "bench")
        client = Client(f"http://127.0.0.1:{port}", key)
        form = client.call("POST", "/api/v1/forms", FORM)["id"]
        client.call("POST", f"/api/v1/forms/{form}/publish")
        kinds = {
            "POST a response": (f"/api/v1/forms/{form}/responses", json.dumps({"answers": ANSWERS})),
            "GET a form": (f"/api/v1/forms/{form}", None),
        }
        places = {"socket": f"http://127.0.0.1:{port}", "front door": f"https://127.0.0.1:{door.port}"}
        for kind, (path, body) in kinds.items():
            found: dict[str, list[tuple[float, str]]] = {name: [] for name in places}
            spent: dict[str, dict[str, float]] = {name: defaultdict(float) for name in places}
            answered, until_settled = dict.fromkeys(places, 0.0), dict.fromkeys(places, 0.0)
            for _ in range(arguments.rounds):
                for name, base in places.items():
                    before, began = processor_seconds(), time.monotonic()
                    rate, tail = drive(base + path, key, body, arguments.clients, arguments.seconds, folder)
                    settle(db)
                    until_settled[name] += time.monotonic() - began
                    for command, seconds in processor_seconds().items():
                        part = "nginx" if command == "nginx" else "API and database"
                        spent[name][part] += 1000 * (seconds - before.get(command, 0.0))
                    answered[name] += rate * arguments.seconds
                    found[name].append((rate, tail))
            pairs = zip(found["front door"], found["socket"], strict=True)
            ratios = [through[0] / direct[0] for through, direct in pairs]
            for name, figures in found.items():
                rates = ", ".join(f"{rate:.0f}" for rate, _ in figures)
                print(f"{kind}, {name}: {rates} requests/s; p99 {', '.join(tail for _, tail in figures)}")
            cost = {name: {part: ms / answered[name] for part, ms in parts.items()} for name, parts in spent.items()}
            for name, parts in cost.items():
                shown = ", ".join(f"{part} {ms:.2f}" for part, ms in sorted(parts.items()))
                print(f"{kind}, {name}: processor, ms a request: {shown}")
            own, before_it = cost["socket"]["API and database"], cost["front door"]["nginx"]
            print(f"{kind}: by processor time: {own / (own + before_it):.2f}")
            sustained = {name: answered[name] / until_settled[name] for name in places}
            print(f"{kind}: sustained {', '.join(f'{name} {rate:.0f}' for name, rate in sustained.items())} requests/s")
            print(f"{kind}: sustained ratio {sustained['front door'] / sustained['socket']:.2f}")
            print(f"{kind}: ratio {statistics.median(ratios):.2f} ({', '.join(f'{ratio:.2f}' for ratio in ratios)})")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
