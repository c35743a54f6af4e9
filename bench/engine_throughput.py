"""Whole jobs through the engine and through llama-server, in one run on the same model file and threads.

Two loads: `jobs` (8 at once, 200 tokens of prompt and 64 new ones each, nothing in common) and `prefix` (64 jobs, 300
tokens in common and 60 of their own, 16 new ones). Rounds alternate between the sides, so that other work on the
machine hits both; medians and best rounds are reported, and the CPU time of each job, which other work disturbs least.

    .venv/bin/python bench/engine_throughput.py [--rounds 5] [--type q8_0 --type q4_1 --type q4_0] [--threads 2]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import statistics
import threading
import time
from collections.abc import Callable

from engine_models import ENDS, WORDS, bench_model, cpu_seconds, engine, llama_server, machine

from quern.inference.protocol import GenerateRequest

Send = Callable[[str, int], int]


def _words(chance: random.Random, count: int) -> str:
    return " ".join(chance.choice(WORDS) for _ in range(count))


def make_jobs(load: str, seed: int) -> tuple[list[str], int, int]:
    """Prompts, new tokens of each, and how many run at once."""
    chance = random.Random(seed)
    if load == "jobs":
        return [_words(chance, 200) for _ in range(8)], 64, 8
    opening = _words(chance, 300)
    return [f"{opening} {_words(chance, 60)}" for _ in range(64)], 16, 8


def run(jobs: list[str], new_tokens: int, at_once: int, send: Send) -> float:
    """Seconds for all jobs; each must yield exactly `new_tokens`."""
    waiting = list(jobs)
    lock = threading.Lock()
    made: list[int] = []

    def work() -> None:
        while True:
            with lock:
                if not waiting:
                    return
                job = waiting.pop()
            made.append(send(job, new_tokens))

    started = time.perf_counter()
    threads = [threading.Thread(target=work) for _ in range(at_once)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    assert made == [new_tokens] * len(jobs), made
    return seconds


def compare(kind: str, loads: list[str], rounds: int, threads: int) -> None:
    """Run and print all loads on one type of weights."""
    model = bench_model(kind)
    with contextlib.ExitStack() as stack:
        client, pid = stack.enter_context(engine(model, threads))
        server = stack.enter_context(llama_server(model.path, threads))

        def through_engine(prompt: str, new_tokens: int) -> int:
            request = GenerateRequest(tenant="bench", prompt=prompt, max_tokens=new_tokens, logit_bias=ENDS)
            return client.generate(request).completion_tokens

        sides: dict[str, tuple[Send, int]] = {"engine": (through_engine, pid), "peer": (server.complete, server.pid)}
        for load in loads:
            seconds: dict[str, list[float]] = {name: [] for name in sides}
            cpu: dict[str, list[float]] = {name: [] for name in sides}
            for number in range(rounds + 1):
                # Other words in each round: nothing may be left of the last one in either side's cache.
                for name, (send, process) in sides.items():
                    before = cpu_seconds(process)
                    taken = run(*make_jobs(load, number), send)
                    if number:  # the first one warms up
                        seconds[name].append(taken)
                        cpu[name].append(cpu_seconds(process) - before)
            jobs = len(make_jobs(load, 0)[0])
            figures = [
                f"{kind} {load}: engine {jobs / statistics.median(seconds['engine']):.2f} jobs/s,"
                f" llama-server {jobs / statistics.median(seconds['peer']):.2f}",
                f"ratio of medians {statistics.median(seconds['peer']) / statistics.median(seconds['engine']):.2f}",
                f"of best rounds {min(seconds['peer']) / min(seconds['engine']):.2f}",
                f"of CPU time {min(cpu['peer']) / min(cpu['engine']):.2f}",
            ]
            print("; ".join(figures), f"(load {os.getloadavg()[0]:.1f})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--type", dest="kinds", action="append", choices=["q8_0", "q4_1", "q4_0", "q4_k_m"])
    parser.add_argument("--load", dest="loads", action="append", choices=["jobs", "prefix"])
    arguments = parser.parse_args()
    print(f"{machine()}, {arguments.threads} threads, {arguments.rounds} rounds")
    for kind in arguments.kinds or ["q8_0", "q4_1", "q4_0"]:
        compare(kind, arguments.loads or ["jobs", "prefix"], arguments.rounds, arguments.threads)


if __name__ == "__main__":
    main()
