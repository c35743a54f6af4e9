"""Acknowledged responses a second against bare `insert_one` (w: majority, j: true) on the same mongod.

Both write the same bytes with the same durability, at 1, 16 and 64 clients, in turns (bare, Quern, bare, …) so
that a noisy machine hits both. Quern is driven by `wrk` straight at the API's TCP port; the relay runs, workers do not.
The bare writer is one Python process of as many threads as there are clients, with one MongoClient, on the UNIX socket.

    .venv/bin/python bench/intake.py --seconds 8 --rounds 3
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from pymongo import MongoClient

from quern.embedded.ports import free_port
from quern.embedded.stack import temporary_stack
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


def quern(port: int, form: str, key: str, clients: int, seconds: float, folder: Path) -> tuple[float, str]:
    """202 answers a second, and the p99 as wrk prints it."""
    script = folder / "post.lua"
    script.write_text(
        f'wrk.method = "POST"\nwrk.body = {json.dumps(json.dumps({"answers": ANSWERS}))}\n'
        f'wrk.headers["Content-Type"] = "application/json"\nwrk.headers["Authorization"] = "Bearer {key}"\n'
    )
    url = f"http://127.0.0.1:{port}/api/v1/forms/{form}/responses"
    command = ["wrk", "-t1", f"-c{clients}", f"-d{seconds:.0f}s", "--latency", "-s", str(script), url]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    if "Non-2xx" in text or "Socket errors" in text:
        raise RuntimeError(f"expected only 202 answers, found\n{text}")
    rate = re.search(r"Requests/sec:\s+([\d.]+)", text)
    tail = re.search(r"99%\s+(\S+)", text)
    if rate is None or tail is None:
        raise RuntimeError(f"expected figures from wrk, found\n{text}")
    return float(rate[1]), tail[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=5, help="Gunicorn workers (2 x cores + 1)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64])
    arguments = parser.parse_args()
    if shutil.which("wrk") is None:
        raise SystemExit("expected wrk, found none; run: apt-get install wrk")
    port = free_port()
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    with temporary_stack(
        with_engine=False, queues=(), api_workers=arguments.workers, settings={"QUERN_API_BIND": f"127.0.0.1:{port}"}
    ) as stack:
        db = stack.runtime.store.db
        made = tenant.create(db, "bench", requests_per_minute=0)
        _, key = keys.create(db, made["_id"], "bench")
        from quern.embedded.demo import Client

        client = Client(f"http://127.0.0.1:{port}", key)
        form = client.call("POST", "/api/v1/forms", FORM)["id"]
        client.call("POST", f"/api/v1/forms/{form}/publish")
        client.call("POST", f"/api/v1/forms/{form}/responses", {"answers": ANSWERS})
        sample = db.responses.find_one({"form": form}) or {}
        print(f"{'clients':>8} {'bare/s':>9} {'quern/s':>9} {'ratio':>6} {'p99':>9}   ({arguments.rounds} rounds)")
        for clients in arguments.clients:
            rates: list[tuple[float, float, str]] = []
            for _ in range(arguments.rounds):
                plain = bare(stack.mongod.uri, clients, arguments.seconds, sample)
                ours, tail = quern(port, form, key, clients, arguments.seconds, folder)
                rates.append((plain, ours, tail))
            plain, ours = (statistics.median(rate[position] for rate in rates) for position in (0, 1))
            ratio = statistics.median(rate[1] / rate[0] for rate in rates)
            print(f"{clients:>8} {plain:>9.0f} {ours:>9.0f} {ratio:>6.2f} {rates[-1][2]:>9}", flush=True)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
