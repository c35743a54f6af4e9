"""How the engine computes on this machine against llama.cpp's own build: prompts and generation of one sequence.

The peer is `llama-bench` of `bench/build_llama_server.py` (ggml's kernels, OpenMP). Ours is what `tuning.choose` takes,
with the engine's context: one memory for all sequences. Rounds alternate; of each the best repetition counts, which
others' work disturbed least.

    .venv/bin/python bench/engine_native.py [--rounds 3] [--type q8_0 --type q4_1 --type q4_0] [--threads 2]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from engine_models import ROOT, bench_model, machine

PROMPT, ANSWER, REPETITIONS = 512, 48, 3


def own(path: Path, blas: bool, threads: int, poll: int) -> None:
    """Print tokens a second of prompts and of generation, measured in this process."""
    from quern.inference import llama
    from quern.inference.llama_options import BackendOptions

    llama.start_backend(blas)
    model = llama.Model(path)
    context = llama.Context(model, 4096, 26, PROMPT, BackendOptions(threads, poll, blas))
    batch = llama.Batch(PROMPT)

    def seconds(tokens: list[int], start: int) -> float:
        batch.clear()
        batch.add(tokens, start, 0, wants_logits=True)
        started = time.perf_counter()
        context.decode(batch)
        return time.perf_counter() - started

    prompts, answers = [], []
    for number in range(REPETITIONS + 1):
        context.clear()
        prompt = seconds([500 + 7 * index for index in range(PROMPT)], 0)
        context.clear()
        seconds([500] * 4, 0)
        answer = sum(seconds([900 + index], 4 + index) for index in range(ANSWER))
        if number:  # the first one warms up
            prompts.append(PROMPT / prompt)
            answers.append(ANSWER / answer)
    print(json.dumps([max(prompts), max(answers)]))


def peer(path: Path, threads: int) -> list[float]:
    """The same of llama-bench."""
    build = [sys.executable, str(ROOT / "bench" / "build_llama_server.py")]
    server = Path(subprocess.run(build, check=True, capture_output=True, text=True).stdout.strip())
    sizes = ["-p", str(PROMPT), "-n", str(ANSWER), "-t", str(threads), "-r", str(REPETITIONS), "-o", "json"]
    command = [str(server.with_name("llama-bench")), "-m", str(path), *sizes]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return [
        next(max(row["samples_ts"]) for row in found if bool(row["n_gen"]) is generated) for generated in (False, True)
    ]


def compare(kind: str, rounds: int, threads: int) -> None:
    """Run and print one type of weights."""
    from quern.inference import tuning

    path = bench_model(kind).path
    with tempfile.TemporaryDirectory() as memory:
        options = asyncio.run(tuning.choose(path, kind, Path(memory), threads))
    values = [str(path), str(int(options.blas)), str(options.threads), str(options.poll)]
    command = [sys.executable, __file__, "--own", *values]
    ours: list[list[float]] = []
    theirs: list[list[float]] = []
    for _ in range(rounds):
        theirs.append(peer(path, threads))
        environment = options.way.environment()
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        ours.append(json.loads(done.stdout))
    for index, name in enumerate(("prompt", "generation")):
        one, other = (statistics.median(row[index] for row in rows) for rows in (ours, theirs))
        best, rival = (max(row[index] for row in rows) for rows in (ours, theirs))
        print(
            f"{kind} {name}: {one:.0f} tokens/s by {options.way.name}, native {other:.0f}: {one / other:.2f};"
            f" best rounds {best:.0f}, {rival:.0f}: {best / rival:.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--type", dest="kinds", action="append", choices=["q8_0", "q4_1", "q4_0", "q4_k_m"])
    parser.add_argument("--own", nargs=4, metavar=("FILE", "BLAS", "THREADS", "POLL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.own:
        path, blas, threads, poll = arguments.own
        own(Path(path), blas == "1", int(threads), int(poll))
        return
    print(f"{machine()}, {arguments.threads} threads, {arguments.rounds} rounds")
    for kind in arguments.kinds or ["q8_0", "q4_1", "q4_0"]:
        compare(kind, arguments.rounds, arguments.threads)


if __name__ == "__main__":
    main()
