"""Whole jobs through the engine, and through llama-server if one is given, in one run on the same model file and
threads.

Two loads: `jobs` (8 at once, 200 tokens of prompt and 64 new ones each, nothing in common) and `prefix` (64 jobs, 300
tokens in common and 60 of their own, 16 new ones). Rounds alternate between the sides, so that other work on the
machine hits both; the median is reported. `--llama-server` takes a binary built from the same llama.cpp
(`vendor/llama.cpp` of the pinned source).

    .venv/bin/python bench/engine_throughput.py --rounds 5 [--llama-server PATH] [--model FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from quern.inference.client import EngineClient, EngineUnavailable
from quern.inference.protocol import GenerateRequest
from quern.inference.registry import default_models_dir

MODEL = default_models_dir() / "smollm2-135m-instruct-q4_1" / "SmolLM2-135M-Instruct.Q4_1.gguf"
#: Words of one token each in the vocabularies of the small models: as many words, as many tokens.
WORDS = [
    "time",
    "year",
    "people",
    "way",
    "day",
    "man",
    "thing",
    "woman",
    "life",
    "child",
    "world",
    "school",
    "state",
    "family",
    "student",
    "group",
    "country",
    "problem",
]
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


@contextlib.contextmanager
def engine(threads: int) -> Iterator[Send]:
    """The engine in a process of its own."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        path = Path(folder) / "e.sock"
        environment = {**os.environ, "QUERN_ENGINE_EMBEDDING_MODEL": "", "QUERN_ENGINE_THREADS": str(threads)}
        command = [sys.executable, "-m", "quern.inference.engine", "--socket", str(path), "--context", "4096"]
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        client = EngineClient(path)
        try:
            _wait(lambda: client.health().status == "ready")
            ends = {0: -1000.0, 2: -1000.0, 4: -1000.0}

            def send(prompt: str, new_tokens: int) -> int:
                request = GenerateRequest(tenant="bench", prompt=prompt, max_tokens=new_tokens, logit_bias=ends)
                return client.generate(request).completion_tokens

            yield send
        finally:
            process.terminate()
            process.wait(30)


@contextlib.contextmanager
def llama_server(binary: Path, model: Path, threads: int) -> Iterator[Send]:
    """llama.cpp's own server, eight slots, its own prompt cache on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(binary), "-m", str(model), "--parallel", "8", "-c", "4096", "-t", str(threads), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def ask(method: str, path: str, body: dict[str, object] | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()

    def send(prompt: str, new_tokens: int) -> int:
        body: dict[str, object] = {"prompt": prompt, "n_predict": new_tokens, "temperature": 0, "cache_prompt": True}
        status, answer = ask("POST", "/completion", {**body, "ignore_eos": True})
        assert status == 200, answer[:200]
        return int(json.loads(answer)["tokens_predicted"])

    try:
        _wait(lambda: ask("GET", "/health")[0] == 200)
        yield send
    finally:
        process.terminate()
        process.wait(30)


def _wait(ready: Callable[[], bool]) -> None:
    for _ in range(600):
        with contextlib.suppress(OSError, EngineUnavailable):
            if ready():
                return
        time.sleep(0.1)
    raise SystemExit("the server did not become ready within 60 s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--llama-server", type=Path)
    parser.add_argument("--model", type=Path, default=MODEL, help="for llama-server; the engine takes its chat model")
    arguments = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {arguments.threads} threads, load {os.getloadavg()[0]:.1f}")
    with contextlib.ExitStack() as stack:
        sides = {"engine": stack.enter_context(engine(arguments.threads))}
        if arguments.llama_server:
            server = llama_server(arguments.llama_server, arguments.model, arguments.threads)
            sides["llama-server"] = stack.enter_context(server)
        for load in ("jobs", "prefix"):
            seconds: dict[str, list[float]] = {name: [] for name in sides}
            for number in range(arguments.rounds):
                # Other words in each round: nothing may be left of the last one in either side's cache.
                for name, send in sides.items():
                    seconds[name].append(run(*make_jobs(load, number), send))
            for name, found in seconds.items():
                jobs = len(make_jobs(load, 0)[0])
                print(f"{load:7} {name:13} {jobs / statistics.median(found):6.2f} jobs/s  (median of {len(found)})")
            if len(sides) == 2:
                ratio = statistics.median(seconds["llama-server"]) / statistics.median(seconds["engine"])
                print(f"{load:7} the engine does {ratio:.2f} times what llama-server does")
        print(f"load at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
