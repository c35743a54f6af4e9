"""Real models from the cache, and engines on sockets of their own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from quern.inference import llama, registry
from quern.inference.client import EngineClient, EngineUnavailable
from quern.inference.llama_options import BackendOptions
from quern.inference.protocol import Done, FaultRequest

CHAT = "smollm2-135m-instruct-q4_1"
EMBEDDING = "all-minilm-l6-v2-int8"


def _wait_until(condition: Callable[[], bool], what: str, seconds: float = 120.0) -> None:
    """Poll until it holds; the limit is generous because the machine may be busy."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.05)


def _in_threads(calls: list[Callable[[], object]]) -> list[object]:
    """Run all calls at once; each one's result, or the exception that it raised."""
    results: list[object] = [None] * len(calls)

    def run(index: int) -> None:
        try:
            results[index] = calls[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
        assert not thread.is_alive()
    return results


class RunningEngine:
    """An engine in a process of its own."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.socket = folder / "engine.sock"
        self.log = folder / "engine.log"
        # Given, so that no test's engine measures them first.
        settings = {"poll": "0", "batch_size": "512", **settings}
        environment = {**os.environ, **{f"QUERN_ENGINE_{name.upper()}": value for name, value in settings.items()}}
        command = [sys.executable, "-m", "quern.inference.engine", "--socket", str(self.socket)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        self.client = EngineClient(self.socket, timeout=180)

    def wait_ready(self) -> None:
        """Wait until the models are loaded."""

        def ready() -> bool:
            assert self.process.poll() is None, self.log.read_text(encoding="utf-8")
            with contextlib.suppress(EngineUnavailable):
                return self.client.health().status == "ready"
            return False

        _wait_until(ready, "the engine to be ready")

    def answers(self) -> bool:
        """Whether anybody listens."""
        try:
            self.client.health()
        except EngineUnavailable:
            return False
        return True

    def has_model_process(self) -> bool:
        """Whether there is a model process."""
        return bool(self._children())

    def _children(self) -> list[str]:
        return Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text(encoding="ascii").split()

    def model_process(self) -> int:
        """The process id of the model process."""
        return int(self._children()[0])

    def order(self, action: str, text: str = "") -> None:
        """Order a fault."""
        self.client._call(FaultRequest.model_validate({"action": action, "text": text}), Done)

    def stop(self) -> int:
        """Stop it as systemd would; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


@contextlib.contextmanager
def _launched_engine(**settings: str) -> Iterator[RunningEngine]:
    with tempfile.TemporaryDirectory(prefix="qe-") as folder:
        engine = RunningEngine(Path(folder), **settings)
        try:
            yield engine
        finally:
            engine.stop()


@contextlib.contextmanager
def _running_engine(**settings: str) -> Iterator[RunningEngine]:
    with _launched_engine(**settings) as engine:
        engine.wait_ready()
        yield engine


@pytest.fixture(scope="session")
def models_dir() -> Path:
    """The models folder, with the small models in it."""
    folder = registry.default_models_dir()
    for name, kind in ((CHAT, "chat"), (EMBEDDING, "embedding")):
        model = registry.find(name, kind, folder)
        missing = [file.path for file in model.files if not registry.file_path(model, file, folder).exists()]
        assert not missing, f"{folder} lacks {missing} of {name}. Run: scripts/fetch-models"
    return folder


@pytest.fixture(scope="session")
def chat_path(models_dir: Path) -> Path:
    return models_dir / CHAT / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def model(chat_path: Path) -> llama.Model:
    """The chat model, loaded once in the test's own process."""
    llama.start_backend(blas=False)
    return llama.Model(chat_path)


@pytest.fixture(scope="session")
def options() -> BackendOptions:
    return BackendOptions(threads=1, poll=0, blas=False)


@pytest.fixture(scope="session")
def engine(models_dir: Path) -> Iterator[RunningEngine]:
    """An engine that several tests share; faults may be ordered of it."""
    with _running_engine(allow_fault_injection="true", step_timeout="20", context="6144") as running:
        yield running


@pytest.fixture
def client(engine: RunningEngine) -> EngineClient:
    return engine.client


@pytest.fixture
def wait_until() -> Callable[[Callable[[], bool], str], None]:
    """Poll until it holds."""
    return _wait_until


@pytest.fixture
def in_threads() -> Callable[[list[Callable[[], object]]], list[object]]:
    """Run calls at once."""
    return _in_threads


@pytest.fixture
def launch_engine(models_dir: Path) -> Callable[..., contextlib.AbstractContextManager[RunningEngine]]:
    """As `start_engine`, without waiting for the models."""
    return _launched_engine


@pytest.fixture
def start_engine(models_dir: Path) -> Callable[..., contextlib.AbstractContextManager[RunningEngine]]:
    """Another engine, with settings of its own."""
    return _running_engine
