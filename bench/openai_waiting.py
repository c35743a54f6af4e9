"""What clients that wait for an answer under `/v1` cost the events process: memory, CPU, threads, and others' time.

    python bench/openai_waiting.py [CLIENTS]

Nobody answers (no worker runs), so that all of them wait, half of them for a stream. Prints JSON.
"""

import asyncio
import json
import statistics
import sys
import time
from pathlib import Path

import psutil

from quern.embedded.stack import temporary_stack
from quern.tenants import keys, tenant

_BODY = {"model": "none", "messages": [{"role": "user", "content": "x" * 500}], "max_tokens": 5}


async def ask(port: int, key: str, stream: bool) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Send one chat completion, and leave the answer where it is."""
    body = json.dumps(_BODY | {"stream": stream}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
    head += "Content-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    await writer.drain()
    return reader, writer


async def times(port: int, key: str, count: int) -> list[float]:
    """Milliseconds of so many lists of files, one after the other."""
    found = []
    for _ in range(count):
        began = time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(
            f"GET /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nConnection: close\r\n\r\n".encode()
        )
        await reader.read()
        writer.close()
        found.append((time.perf_counter() - began) * 1000)
    return found


async def measure(port: int, key: str, events: psutil.Process, clients: int) -> dict[str, float]:
    """Everything, before and while they wait."""
    await times(port, key, 50)
    idle, before = await times(port, key, 200), events.memory_full_info().pss
    began = time.perf_counter()
    held = [await ask(port, key, number % 2 == 0) for number in range(clients)]
    sent = time.perf_counter() - began
    await asyncio.sleep(10)
    used, after = events.cpu_times(), events.memory_full_info().pss
    await asyncio.sleep(20)
    later = events.cpu_times()
    waiting = await times(port, key, 200)
    threads = events.num_threads()
    for _, writer in held:
        writer.close()
    return {
        "clients": clients,
        "seconds_to_send": round(sent, 2),
        "pss_idle_mib": round(before / 2**20, 1),
        "kib_per_client": round((after - before) / clients / 1024, 1),
        "cpu_percent_while_waiting": round((later.user + later.system - used.user - used.system) / 20 * 100, 2),
        "threads": threads,
        "list_p50_ms_idle": round(statistics.median(idle), 2),
        "list_p50_ms_waiting": round(statistics.median(waiting), 2),
    }


def main() -> None:
    clients = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    names = ("MAX_WAITING", "MAX_WAITING_PER_TENANT", "MAX_QUEUED", "MAX_QUEUED_PER_TENANT")
    settings = {f"QUERN_OPENAI__{name}": "5000" for name in names}
    with temporary_stack(with_engine=False, queues=(), settings=settings) as stack:
        owner = tenant.create(stack.runtime.store.db, "bench", requests_per_minute=0)["_id"]
        key = keys.create(stack.runtime.store.db, owner, "bench")[1]
        events = psutil.Process(stack.processes["events"].pid)
        found = asyncio.run(measure(stack.front.port, key, events, clients))
    load = Path("/proc/loadavg").read_text(encoding="ascii").split()[0]
    print(json.dumps({**found, "load_average": float(load)}, indent=1))


if __name__ == "__main__":
    main()
