"""What one request feels: first token under load, generation against memory bandwidth, the grammar's cost, memory.

- First token of a user-waiting request while 100 batch jobs wait, against the idle engine, and the longest step.
- Single-stream generation against the machine's measured read rate divided by the model's bytes.
- An answer by JSON Schema against one of as many tokens without.
- Resident set against file and context memory.

    .venv/bin/python bench/engine_latency.py [--type q4_1] [--rounds 7]
"""

from __future__ import annotations

import argparse
import os
import statistics
import threading
import time
from collections.abc import Callable

import numpy as np
from engine_models import ENDS, BenchModel, bench_model, engine, machine
from numpy.typing import NDArray

from quern.inference import gguf
from quern.inference.client import EngineClient
from quern.inference.protocol import GenerateRequest, Generation, TokenEvent

ASK = "Please describe how a small library by the river was opened, in a few plain words, for a reader. "
LISTING = {
    "type": "object",
    "properties": {
        "items": {"type": "array", "items": {"type": "string", "maxLength": 24}, "minItems": 6, "maxItems": 6}
    },
    "required": ["items"],
}


def _product_of_halves(part: NDArray[np.float32]) -> object:
    half = len(part) // 2
    return np.dot(part[:half], part[half:])


def read_rate(threads: int, mebibytes: int = 1024) -> float:
    """Bytes a second that all cores together read from memory: the faster of two ways through more than a cache holds.

    A sum would not do: its additions take longer than memory does.
    """
    parts = [np.ones(mebibytes * 2**20 // 4 // threads, np.float32) for _ in range(threads)]

    def once(read: Callable[[NDArray[np.float32]], object]) -> float:
        workers = [threading.Thread(target=read, args=(part,)) for part in parts]
        started = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return time.perf_counter() - started

    return mebibytes * 2**20 / min(once(read) for read in (np.max, _product_of_halves) for _ in range(7))


def first_token(client: EngineClient, number: int) -> float:
    """Seconds to the first token of a user-waiting request whose prompt nobody has computed yet."""
    request = GenerateRequest(
        tenant=f"i{number}", prompt=f"{number} {ASK}", max_tokens=4, priority="interactive", logit_bias=ENDS
    )
    started = time.perf_counter()
    for event in client.stream(request):
        if isinstance(event, TokenEvent):
            return time.perf_counter() - started
    raise AssertionError("no token came")


def under_load(client: EngineClient, rounds: int) -> None:
    """First tokens on the idle engine and while 100 batch jobs wait."""
    idle = [first_token(client, number) for number in range(rounds)]
    stop = threading.Event()

    def work(number: int) -> None:
        while not stop.is_set():
            request = GenerateRequest(
                tenant=f"b{number % 9}", prompt=f"{number} {ASK * 8}", max_tokens=64, logit_bias=ENDS
            )
            client.generate(request, should_stop=stop.is_set)

    threads = [threading.Thread(target=_quietly, args=(work, number)) for number in range(100)]
    for thread in threads:
        thread.start()
    while client.stats()["quern_engine_waiting_batch"] < 80:
        time.sleep(0.2)
    before = client.stats()
    busy = [first_token(client, 1000 + number) for number in range(rounds)]
    after = client.stats()
    stop.set()
    for thread in threads:
        thread.join()
    steps = after["quern_engine_steps_total"] - before["quern_engine_steps_total"]
    step = (after["quern_engine_step_seconds_total"] - before["quern_engine_step_seconds_total"]) / max(steps, 1)
    one, other = statistics.median(idle), statistics.median(busy)
    print(
        f"first token: idle {one * 1000:.0f} ms, with 100 batch jobs {other * 1000:.0f} ms = {other / one:.2f} times;"
        f" a step is {step * 1000:.0f} ms on average; beyond twice idle: {(other - 2 * one) / step:.2f} steps"
    )


def _quietly(work: object, number: int) -> None:
    try:
        work(number)  # type: ignore[operator]
    except Exception as error:
        if type(error).__name__ != "EngineCancelled":
            print(f"batch job {number}: {error}")


def speed(found: Generation) -> float:
    """Generated tokens a second."""
    return (found.completion_tokens - 1) / found.completion_time


def single_stream(client: EngineClient, model: BenchModel, rounds: int, threads: int) -> None:
    """Generation of one sequence against the memory's limit."""
    request = GenerateRequest(tenant="s", prompt="one two three four " * 4, max_tokens=96, logit_bias=ENDS)
    rates, speeds = [], []
    for _ in range(rounds):
        rates.append(read_rate(threads))
        speeds.append(speed(client.generate(request)))
    weights = gguf.read(model.path).weight_bytes
    limit = max(rates) / weights
    print(
        f"generation: best {max(speeds):.0f} tokens/s, memory reads {max(rates) / 1e9:.1f} GB/s ="
        f" {limit:.0f} times {weights / 1e6:.0f} MB a second: {max(speeds) / limit:.2f} of it"
    )


def grammar_cost(client: EngineClient, rounds: int) -> None:
    """An answer by schema against a free one."""
    free, bound = [], []
    for number in range(rounds):
        asked = f"{number} List six things that one finds in a library, as JSON: "
        schema = GenerateRequest(tenant="g", prompt=asked, max_tokens=160, json_schema=LISTING)
        found = client.generate(schema)
        bound.append(found.completion_time / max(1, found.completion_tokens - 1))
        plain = GenerateRequest(tenant="g", prompt=asked, max_tokens=found.completion_tokens, logit_bias=ENDS)
        made = client.generate(plain)
        free.append(made.completion_time / max(1, made.completion_tokens - 1))
    cost = statistics.median(bound) / statistics.median(free) - 1
    print(f"grammar: {cost:+.1%} a token (median), {min(bound) / min(free) - 1:+.1%} (best)")


def memory(client: EngineClient, model: BenchModel, context: int) -> None:
    """Resident set against what must be there."""
    header = gguf.read(model.path)
    resident = client.stats()["quern_engine_resident_bytes"] / 2**20
    needed = header.size / 2**20 + header.context_kib * context / 1024
    print(f"memory: {resident:.0f} MiB resident; file {header.size / 2**20:.0f} and context add up to {needed:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--type", dest="kind", default="q4_1")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    print(f"{machine()}, {arguments.kind}, {arguments.threads} threads")
    model = bench_model(arguments.kind)
    with engine(model, arguments.threads) as (client, _pid):
        memory(client, model, 4096)
        single_stream(client, model, arguments.rounds, arguments.threads)
        grammar_cost(client, arguments.rounds)
        under_load(client, arguments.rounds)
        memory(client, model, 4096)
    print(f"load at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
