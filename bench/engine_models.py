"""The models that the engine's benches run, and the processes on both sides: the engine, and llama-server beside it.

The types are made from the small chat model by `llama_model_quantize`, once, into `$QUERN_CACHE/bench-models`.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from quern.inference import gguf, modelbench, modelentry, quantize, registry
from quern.inference.client import EngineClient, EngineUnavailable

ROOT = Path(__file__).resolve().parent.parent
FIRST = "smollm2-135m-instruct-q4_1"
#: Tokens that end an answer in SmolLM2: kept out, so that every job yields as many tokens.
ENDS = {0: -1000.0, 2: -1000.0, 4: -1000.0}
#: Words of one token each in the vocabularies of the small models: as many words, as many tokens.
WORDS = "time year people way day man thing woman life child world school state family student group".split()  # noqa: SIM905


@dataclass(frozen=True)
class BenchModel:
    """A model in a folder of its own kind of registry."""

    name: str
    folder: Path
    path: Path


def bench_model(kind: str) -> BenchModel:
    """The small chat model with weights of `kind` (q4_1, q4_0, q8_0, …); made if it is not there."""
    models = registry.default_models_dir()
    first = registry.find(FIRST, "chat", models)
    source = registry.file_path(first, first.files[0], models)
    if kind == "q4_1":
        return BenchModel(FIRST, models, source)
    folder = models.parent / "bench-models"
    name = FIRST.replace("q4_1", kind)
    if name not in registry.known_models(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            target = Path(temporary) / f"{name}.gguf"
            quantize.quantize(source, target, kind)
            header, probed = gguf.read(target), modelbench.probe(target)
            registry.bring_in(
                target,
                folder,
                lambda found: modelentry.entry_for(header, probed, found, name, first.licence, first.context),
                move=True,
            )
    model = registry.find(name, "chat", folder)
    return BenchModel(name, folder, registry.file_path(model, model.files[0], folder))


@contextlib.contextmanager
def engine(model: BenchModel, threads: int, **settings: str) -> Iterator[tuple[EngineClient, int]]:
    """The engine in a process of its own; its client and process id."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        path = Path(folder) / "e.sock"
        values = {
            "embedding_model": "",
            "chat_model": model.name,
            "models": str(model.folder),
            "threads": str(threads),
            "context": "4096",
            "adapt_threads": "false",  # as many as the peer's, whatever else runs
            **settings,
        }
        environment = {**os.environ, **{f"QUERN_ENGINE_{name.upper()}": value for name, value in values.items()}}
        command = [sys.executable, "-m", "quern.inference.engine", "--socket", str(path)]
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        client = EngineClient(path)
        try:
            _wait(lambda: client.health().status == "ready")
            yield client, process.pid
        finally:
            process.terminate()
            process.wait(30)


class LlamaServer:
    """llama.cpp's own server in its default build, eight slots, its own prompt cache on."""

    def __init__(self, port: int, pid: int) -> None:
        self._port, self.pid = port, pid

    def ask(self, method: str, path: str, body: dict[str, object] | None = None) -> tuple[int, bytes]:
        """One request over HTTP."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=600)
        connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()

    def complete(self, prompt: str, new_tokens: int) -> int:
        """Greedy completion; returns the new tokens."""
        body: dict[str, object] = {"prompt": prompt, "n_predict": new_tokens, "temperature": 0, "cache_prompt": True}
        status, answer = self.ask("POST", "/completion", {**body, "ignore_eos": True})
        assert status == 200, answer[:200]
        return int(json.loads(answer)["tokens_predicted"])


@contextlib.contextmanager
def llama_server(model: Path, threads: int) -> Iterator[LlamaServer]:
    """A llama-server built from the engine's own llama.cpp."""
    build = [sys.executable, str(ROOT / "bench" / "build_llama_server.py")]
    binary = subprocess.run(build, check=True, capture_output=True, text=True).stdout.strip()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [binary, "-m", str(model), "--parallel", "8", "-c", "4096", "-t", str(threads), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    server = LlamaServer(port, process.pid)
    try:
        _wait(lambda: server.ask("GET", "/health")[0] == 200)
        yield server
    finally:
        process.terminate()
        process.wait(30)


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and its children so far, in seconds."""
    total = 0.0
    for one in [str(pid), *Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]:
        fields = Path(f"/proc/{one}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def machine() -> str:
    """The machine in a line."""
    lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), "unknown CPU")
    return f"{name}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}"


def _wait(ready: Callable[[], bool]) -> None:
    for _ in range(1800):
        with contextlib.suppress(OSError, EngineUnavailable):
            if ready():
                return
        time.sleep(0.1)
    raise SystemExit("the server did not become ready within 180 s")
