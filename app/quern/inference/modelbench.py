"""How fast, how big and how good a model file is on this machine; and whether it computes at all.

Everything native runs in a process of its own, so that a file which kills llama.cpp kills nothing else, and memory is
that file's alone. Perplexity is over one text in windows (Jelinek et al., 1977); accuracy is over messages with two
labels, by which label's first token is likelier. Both are small and only tell types of one model apart.

Run as `python -m quern.inference.modelbench probe|measure FILE BLAS(0|1) THREADS`: prints JSON.
"""

from __future__ import annotations

import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from quern.inference.llama_options import Way

PROMPT_TOKENS, ANSWER_TOKENS, WINDOW = 512, 48, 512
#: The first tokens of a window have too little before them to be counted.
UNCOUNTED = 32
REPETITIONS = 3
TIMEOUT = 1800.0
#: The job that speeds are weighed by: as many prompt tokens, as many new ones.
JOB_PROMPT, JOB_ANSWER = 200, 64
#: How much worse than the best a recommended type may be: perplexity as a factor, accuracy as a difference.
PERPLEXITY_SLACK, ACCURACY_SLACK = 1.05, 0.10


class ProbeError(Exception):
    """llama.cpp does not compute with this file; the text says how it ended."""


class Probe(NamedTuple):
    """What a loaded model says of itself. `memory_mib`: resident, without the context's share."""

    memory_mib: float
    trained_context: int
    has_template: bool


class Figures(NamedTuple):
    """Tokens a second, resident MiB, perplexity, and the share of messages labelled rightly."""

    prompt_speed: float
    generation_speed: float
    memory_mib: float
    perplexity: float
    accuracy: float

    @property
    def job_seconds(self) -> float:
        """Seconds for a job of `JOB_PROMPT` and `JOB_ANSWER` tokens, alone."""
        return JOB_PROMPT / self.prompt_speed + JOB_ANSWER / self.generation_speed


def probe(path: Path) -> Probe:
    """Load a file and compute two tokens with it, in another process.

    Raises:
        ProbeError: it cannot be loaded, kills llama.cpp, or computes what is no number.
    """
    return Probe(**_apart("probe", path, Way(blas=False), threads=1))


def measure(path: Path, way: Way, threads: int) -> Figures:
    """All figures of a file, in another process.

    Raises:
        ProbeError: as of `probe`.
    """
    return Figures(**_apart("measure", path, way, threads))


def recommend(found: dict[str, Figures]) -> str:
    """The type with the fastest job among those about as good as the best."""
    perplexity = min(figures.perplexity for figures in found.values())
    accuracy = max(figures.accuracy for figures in found.values())
    good = {
        kind: figures
        for kind, figures in found.items()
        if figures.perplexity <= perplexity * PERPLEXITY_SLACK and figures.accuracy >= accuracy - ACCURACY_SLACK
    }
    # The most accurate and the least perplexed may be two, and neither within the other's slack.
    best = good or {kind: figures for kind, figures in found.items() if figures.perplexity == perplexity}
    return min(best, key=lambda kind: best[kind].job_seconds)


def _apart(what: str, path: Path, way: Way, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "quern.inference.modelbench", what, str(path), str(int(way.blas)), str(threads)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT, check=False, env=way.environment()
        )
    except subprocess.TimeoutExpired as error:
        raise ProbeError(f"{path.name}: no answer within {TIMEOUT:.0f} s") from error
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or [f"llama.cpp died (exit status {done.returncode})"]
        raise ProbeError(f"{path.name}: {said[0]}")
    values: dict[str, Any] = json.loads(done.stdout)
    return values


# ---- in the other process


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 2**20


def _probe(path: Path) -> Probe:
    from quern.inference import llama
    from quern.inference.llama_options import BackendOptions

    before = _resident_mib()
    llama.start_backend(blas=False)
    model = llama.Model(path)
    context = llama.Context(model, 256, 1, 32, BackendOptions(threads=1, poll=0, blas=False))
    batch = llama.Batch(32)
    row = batch.add([model.vocabulary.size // 2, model.vocabulary.size // 3], 0, 0, wants_logits=True)
    context.decode(batch)
    if not math.isfinite(float(context.logits(row).sum())):
        raise llama.LlamaError("the model computes numbers that are none")
    return Probe(_resident_mib() - before, model.trained_context, model.chat_template is not None)


def _measure(path: Path, blas: bool, threads: int) -> Figures:
    from quern.inference import llama
    from quern.inference.llama_options import BackendOptions
    from quern.inference.sampling import log_probabilities

    before = _resident_mib()
    llama.start_backend(blas)
    model = llama.Model(path)
    context = llama.Context(model, 1024, 2, PROMPT_TOKENS, BackendOptions(threads=threads, poll=0, blas=blas))
    batch = llama.Batch(PROMPT_TOKENS)
    held = yaml.safe_load(resources.files(__package__).joinpath("quality.yml").read_text("utf-8"))
    bos = model.vocabulary.adds_bos
    text = model.vocabulary.tokenize(" ".join(held["text"].split()), control=False, bos=bos)

    def seconds(tokens: Sequence[int], start: int) -> float:
        batch.clear()
        batch.add(tokens, start, 0, wants_logits=True)
        started = time.perf_counter()
        context.decode(batch)
        return time.perf_counter() - started

    prompt_times, generation_times = [], []
    prompt = text[:PROMPT_TOKENS]
    for _ in range(REPETITIONS):
        context.clear()
        prompt_times.append(seconds(prompt, 0))
        generation_times += [seconds([text[index]], len(prompt) + index) for index in range(ANSWER_TOKENS)]

    log_loss, counted = 0.0, 0
    for start in range(0, len(text) - UNCOUNTED - 1, WINDOW):
        window = text[start : start + WINDOW]
        context.clear()
        batch.clear()
        first = batch.add(window, 0, 0, wants_logits=True, of_every_token=True) - len(window) + 1
        context.decode(batch)
        for index in range(UNCOUNTED, len(window) - 1):
            value, _ = log_probabilities(context.logits(first + index), window[index + 1], 0)
            log_loss -= value
            counted += 1

    right = 0
    labels = {name: model.vocabulary.tokenize(word, control=False)[0] for name, word in held["labels"].items()}
    scores = []
    for _, message in held["messages"]:
        question = model.vocabulary.tokenize(held["question"].format(message=message), control=False, bos=bos)
        context.clear()
        seconds(question, 0)
        logits = context.logits(len(question) - 1)
        scores.append({name: float(logits[token]) for name, token in labels.items()})
    # A small model leans to one label whatever it reads; against its own mean it shows what it read.
    means = {name: statistics.fmean(score[name] for score in scores) for name in labels}
    for score, (wanted, _) in zip(scores, held["messages"], strict=True):
        right += max(score, key=lambda name, score=score: score[name] - means[name]) == wanted  # type: ignore[misc]
    return Figures(
        prompt_speed=len(prompt) / min(prompt_times),
        generation_speed=1.0 / statistics.median(generation_times),
        memory_mib=_resident_mib() - before,
        perplexity=math.exp(log_loss / counted),
        accuracy=right / len(scores),
    )


def main() -> None:
    """Do one thing with one file in this process."""
    what, path, blas, threads = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "1", int(sys.argv[4])
    os.environ["OPENBLAS_NUM_THREADS"] = str(threads)
    try:
        found = _probe(path) if what == "probe" else _measure(path, blas, threads)
    except Exception as error:
        sys.exit(str(error) or type(error).__name__)
    sys.stdout.write(json.dumps(found._asdict()))


if __name__ == "__main__":
    main()
