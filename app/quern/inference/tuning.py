"""What is fastest for this model on this machine: measured at its first start, remembered for the next ones.

OpenBLAS multiplies floats and so must unpack the weights first; ggml multiplies packed integers. Which is faster
depends on the CPU and on the type of the weights. All ways (on a CPU with AVX-512, OpenBLAS with the kernels that it
picks and with those for AVX-512) are run in processes of their own, on one thread, and compared by the CPU time that
they take, which other work on the machine disturbs little. An OpenBLAS that crashes on this CPU or computes something
else (old ones do, on CPUs that they do not know) is not used.

How many threads, whether they poll, and how many tokens go into one step shows only in the time that passes. So these
are measured when the cores are free; on a busy machine the usual values are taken, and the next start measures again.

Run as `python -m quern.inference.tuning compute|drive MODEL BLAS(0|1) THREADS`: prints JSON.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from quern.inference.llama_options import BackendOptions, Way, cpu_flags, ways
from quern.inference.pace import free_cores

log = logging.getLogger(__name__)

#: Raised when what was remembered before cannot be believed any more.
_LAYOUT = "5"
PROMPT_TOKENS, REPETITIONS = 256, 3
#: Above this size a model's file is measured with a shorter prompt: seconds instead of minutes.
LARGE_FILE, SHORT_PROMPT_TOKENS = 1 << 30, 64
ANSWER_TOKENS = 12
POLLS, BATCHES = (0, 50), (256, 512)
DRIVE_PROMPT_TOKENS, DRIVE_REPETITIONS = 128, 2
#: The cosine of two ways' logits at the least: they round differently, and only that.
LEAST_LIKENESS = 0.98
#: What differs from the usual has to be this much faster: polling, and fewer threads than there are cores.
POLL_GAIN, THREAD_GAIN = 0.97, 0.90
#: A larger step makes everybody else wait longer, so it has to be this much faster for each token.
BATCH_GAIN = 0.97
#: The job that speeds are weighed by: as many prompt tokens, as many new ones.
JOB_PROMPT, JOB_ANSWER = 200, 64
COMPUTE_TIMEOUT, DRIVE_TIMEOUT = 300.0, 60.0


class Measurement(NamedTuple):
    """CPU seconds for one prompt token on one thread, best of some, and the first logits that they led to."""

    seconds: float
    logits: list[float]


class Drive(NamedTuple):
    """Seconds that pass: for a prompt token and a generated one by (polling, threads), for a prompt token by batch."""

    jobs: dict[tuple[int, int], tuple[float, float]]
    batches: dict[int, float]


# ---- in the measuring processes


def _open(path: Path, blas: bool) -> Any:
    from quern.inference import llama

    llama.start_backend(blas)
    return llama.Model(path)


def _tokens(path: Path, count: int) -> list[int]:
    # Any tokens will do; these are ordinary words in every vocabulary.
    return [500 + 7 * index for index in range(count if path.stat().st_size < LARGE_FILE else SHORT_PROMPT_TOKENS)]


def measure(path: Path, blas: bool) -> Measurement:
    """Compute one prompt a few times in this process, on one thread."""
    from quern.inference import llama

    model, tokens = _open(path, blas), _tokens(path, PROMPT_TOKENS)
    context = llama.Context(model, 2 * PROMPT_TOKENS, 1, PROMPT_TOKENS, BackendOptions(threads=1, poll=0, blas=blas))
    batch = llama.Batch(PROMPT_TOKENS)
    row = batch.add(tokens, 0, 0, wants_logits=True)
    best, logits = float("inf"), [0.0]
    for _ in range(REPETITIONS if len(tokens) == PROMPT_TOKENS else 2):
        context.clear()
        started = time.process_time()
        context.decode(batch)
        logits = [float(value) for value in context.logits(row)[:2000]]
        best = min(best, time.process_time() - started)
    return Measurement(best / len(tokens), logits)


def measure_drive(path: Path, blas: bool, threads: int) -> Drive:
    """Time prompts and answers by polling and threads, and prompts by batch, taking turns."""
    from quern.inference import llama

    model, tokens = _open(path, blas), _tokens(path, max(BATCHES))
    ways = [(poll, count) for poll in POLLS for count in sorted({threads, (threads + 1) // 2}, reverse=True)]
    largest = max(BATCHES)
    contexts = {
        way: llama.Context(model, 2 * largest, 1, largest, BackendOptions(way[1], way[0], blas)) for way in ways
    }
    batch = llama.Batch(largest)

    def seconds(context: llama.Context, start: int, part: list[int]) -> float:
        batch.clear()
        batch.add(part, start, 0, wants_logits=True)
        started = time.perf_counter()
        context.decode(batch)
        return time.perf_counter() - started

    jobs: dict[tuple[int, int], tuple[float, float]] = {}
    prompt = tokens[:DRIVE_PROMPT_TOKENS]
    for _ in range(DRIVE_REPETITIONS):
        for way, context in contexts.items():
            context.clear()
            first = seconds(context, 0, prompt) / len(prompt)
            answer = min(seconds(context, len(prompt) + index, [index + 500]) for index in range(ANSWER_TOKENS))
            before = jobs.get(way, (first, answer))
            jobs[way] = (min(first, before[0]), min(answer, before[1]))
    context = contexts[choose_way(jobs, threads)]
    batches: dict[int, float] = {}
    for _ in range(DRIVE_REPETITIONS):
        for size in BATCHES:
            context.clear()
            parts = range(0, len(tokens), size)
            taken = sum(seconds(context, start, tokens[start : start + size]) for start in parts)
            batches[size] = min(taken / len(tokens), batches.get(size, float("inf")))
    return Drive(jobs, batches)


# ---- choosing


def likeness(one: list[float], other: list[float]) -> float:
    """The cosine of two rows of logits about their means."""
    centred = [[value - sum(row) / len(row) for value in row] for row in (one, other)]
    product = sum(a * b for a, b in zip(*centred, strict=True))
    norms = [sum(value * value for value in row) ** 0.5 for row in centred]
    return product / (norms[0] * norms[1]) if all(norms) else 0.0


def decide(found: Mapping[Way, Measurement | None]) -> Way:
    """The fastest way that computes what ggml's own kernels do; None stands for a way that failed."""
    native = found.get(Way(blas=False))
    if native is None:
        return Way(blas=False)
    sound = {
        way: measured.seconds
        for way, measured in found.items()
        if measured is not None and (not way.blas or likeness(native.logits, measured.logits) >= LEAST_LIKENESS)
    }
    return min(sound, key=lambda way: sound[way])


def choose_way(jobs: dict[tuple[int, int], tuple[float, float]], threads: int) -> tuple[int, int]:
    """Polling and threads; the usual ones (no polling, all threads) unless others are clearly faster."""

    def cost(way: tuple[int, int]) -> float:
        prompt, answer = jobs[way]
        gain = (POLL_GAIN if way[0] == 0 else 1.0) * (THREAD_GAIN if way[1] == threads else 1.0)
        return (JOB_PROMPT * prompt + JOB_ANSWER * answer) * gain

    return min(jobs, key=cost)


def choose_batch(batches: dict[int, float]) -> int:
    """The smallest batch that no larger one beats by much."""
    best = min(batches.values())
    return min(size for size, seconds in batches.items() if seconds * BATCH_GAIN <= best)


# ---- measuring apart, and remembering


async def choose(path: Path, sha256: str, memory: Path, threads: int, *, drive: bool = True) -> BackendOptions:
    """How to compute with this model: as remembered in the folder `memory`, or else measured now.

    Args:
        drive: measure what takes free cores, too; without it only OpenBLAS is decided.
    """
    place = memory / f"{_key(sha256, threads)}.json"
    remembered: dict[str, Any] = {}
    try:
        remembered = json.loads(place.read_text(encoding="ascii"))
        options = BackendOptions(**remembered["options"])
        if remembered["complete"] or not drive:
            return options
    except (OSError, ValueError, KeyError, TypeError):
        measured = {way: await _compute(path, way) for way in ways(cpu_flags())}
        options = BackendOptions(threads, 0, **decide(measured)._asdict())
        remembered = {
            "model": path.name,
            "prompt_tokens_per_cpu_second": {
                way.name: round(1 / found.seconds, 1) if found else None for way, found in measured.items()
            },
        }
    complete = False
    if drive and free_cores() >= threads and (found := await _apart("drive", path, options.way, threads)):
        jobs = {(poll, count): (prompt, answer) for poll, count, prompt, answer in found["jobs"]}
        poll, count = choose_way(jobs, threads)
        options = options._replace(poll=poll, threads=count, batch=choose_batch(dict(found["batches"])))
        # Work of others that began meanwhile spoils it: then the next start measures again.
        complete = free_cores() >= threads
        remembered |= found
    remembered |= {"options": options._asdict(), "complete": complete}
    log.info("chosen how to compute", extra={**options._asdict(), "model": path.name, "complete": complete})
    try:
        memory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="ascii", dir=memory, delete=False) as file:
            json.dump(remembered, file, indent=1)
        Path(file.name).replace(place)
    except OSError as error:
        log.warning("the measurement is not remembered", extra={"folder": str(memory), "reason": error.strerror})
    return options


async def _compute(path: Path, way: Way) -> Measurement | None:
    found = await _apart("compute", path, way, threads=1)
    return Measurement(**found) if found else None


async def _apart(what: str, path: Path, way: Way, threads: int) -> dict[str, Any] | None:
    command = [sys.executable, "-m", "quern.inference.tuning", what, str(path), str(int(way.blas)), str(threads)]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, env=way.environment())
    try:
        limit = COMPUTE_TIMEOUT if what == "compute" else DRIVE_TIMEOUT
        output, _ = await asyncio.wait_for(process.communicate(), limit)
        return dict(json.loads(output)) if process.returncode == 0 else None
    except (TimeoutError, ValueError):
        return None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def _key(sha256: str, threads: int) -> str:
    """Everything that the outcome depends on."""
    first = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    cpu = [line for line in first.splitlines() if line.startswith(("model name", "cpu family", "flags"))]
    openblas = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("OPENBLAS_")]
    # Two builds of one version differ in the hashes of their libraries.
    build = metadata.distribution("llama-cpp-python").read_text("RECORD") or ""
    parts = [_LAYOUT, sha256, str(threads), *cpu, *openblas, build]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def main() -> None:
    """Measure one thing in this process."""
    what, path, blas, threads = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "1", int(sys.argv[4])
    if what == "compute":
        sys.stdout.write(json.dumps(measure(path, blas)._asdict()))
        return
    found = measure_drive(path, blas, threads)
    jobs = [[*way, *seconds] for way, seconds in found.jobs.items()]
    sys.stdout.write(json.dumps({"jobs": jobs, "batches": list(found.batches.items())}))


if __name__ == "__main__":
    main()
