"""Whether OpenBLAS pays for this model on this machine: measured at the first start, remembered for the next ones.

OpenBLAS multiplies floats and so must unpack the weights first; ggml multiplies packed integers. Which is faster
depends on the CPU and on the type of the weights. Each way is run in a process of its own, on one thread, and compared
by the CPU time that it takes, which other work on the machine disturbs little. An OpenBLAS that crashes on this CPU or
computes something else (old ones do, on CPUs that they do not know) is not used.

Run as `python -m quern.inference.tuning MODEL BLAS(0|1)`: prints a `Measurement` as JSON.
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
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger(__name__)

PROMPT_TOKENS = 256
REPETITIONS = 3
#: The cosine of two ways' logits at the least: they round differently, and only that.
LEAST_LIKENESS = 0.98
TIMEOUT = 180.0
#: Raised when what was remembered before cannot be believed any more.
_LAYOUT = "2"


class Measurement(NamedTuple):
    """CPU seconds for a prompt of `PROMPT_TOKENS`, best of some, and the first logits that it led to."""

    seconds: float
    logits: list[float]


def measure(path: Path, blas: bool) -> Measurement:
    """Compute one prompt a few times in this process."""
    from quern.inference import llama
    from quern.inference.llama_options import BackendOptions

    llama.start_backend(blas)
    model = llama.Model(path)
    context = llama.Context(model, 2 * PROMPT_TOKENS, 1, PROMPT_TOKENS, BackendOptions(threads=1, poll=0, blas=blas))
    batch = llama.Batch(PROMPT_TOKENS)
    # Any tokens will do; these are ordinary words in every vocabulary.
    batch.add([500 + 7 * index for index in range(PROMPT_TOKENS)], 0, 0, wants_logits=True)
    best, logits = float("inf"), [0.0]
    for _ in range(REPETITIONS):
        context.clear()
        started = time.process_time()
        context.decode(batch)
        logits = [float(value) for value in context.logits(PROMPT_TOKENS - 1)[:2000]]
        best = min(best, time.process_time() - started)
    return Measurement(best, logits)


def likeness(one: list[float], other: list[float]) -> float:
    """The cosine of two rows of logits about their means."""
    centred = [[value - sum(row) / len(row) for value in row] for row in (one, other)]
    product = sum(a * b for a, b in zip(*centred, strict=True))
    norms = [sum(value * value for value in row) ** 0.5 for row in centred]
    return product / (norms[0] * norms[1]) if all(norms) else 0.0


def decide(native: Measurement | None, blas: Measurement | None) -> bool:
    """Whether to use OpenBLAS, from what both ways measured; None for a way that failed."""
    if native is None or blas is None:
        return False
    return blas.seconds < native.seconds and likeness(native.logits, blas.logits) >= LEAST_LIKENESS


async def blas_pays(path: Path, sha256: str, memory: Path) -> bool:
    """Whether to use OpenBLAS for this model: as remembered in the folder `memory`, or else measured now."""
    place = memory / f"{_key(sha256)}.json"
    try:
        return bool(json.loads(place.read_text(encoding="ascii"))["blas"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    native, blas = await _measure_apart(path, blas=False), await _measure_apart(path, blas=True)
    choice = decide(native, blas)
    speeds = {
        name: round(PROMPT_TOKENS / found.seconds) if found else None
        for name, found in (("native", native), ("openblas", blas))
    }
    log.info("prompt tokens a second on one thread", extra={**speeds, "uses_openblas": choice})
    try:
        memory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="ascii", dir=memory, delete=False) as file:
            json.dump({"blas": choice, "model": path.name, **speeds}, file)
        Path(file.name).replace(place)
    except OSError as error:
        log.warning("the measurement is not remembered", extra={"folder": str(memory), "reason": error.strerror})
    return choice


async def _measure_apart(path: Path, *, blas: bool) -> Measurement | None:
    command = [sys.executable, "-m", "quern.inference.tuning", str(path), str(int(blas))]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        output, _ = await asyncio.wait_for(process.communicate(), TIMEOUT)
        return Measurement(**json.loads(output)) if process.returncode == 0 else None
    except (TimeoutError, ValueError):
        return None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def _key(sha256: str) -> str:
    """Everything that the outcome depends on."""
    first = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    cpu = [line for line in first.splitlines() if line.startswith(("model name", "cpu family", "flags"))]
    openblas = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("OPENBLAS_")]
    parts = [_LAYOUT, sha256, *cpu, *openblas, metadata.version("llama-cpp-python")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(Path(sys.argv[1]), sys.argv[2] == "1")._asdict()))
