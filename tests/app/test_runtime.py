"""What each process is made of: handlers are found by kind, and nobody loads what another process needs."""

import json
import os
import subprocess
import sys

import pytest
from cryptography.fernet import Fernet

from quern.api.app import create_app
from quern.config import LiveSettings, Settings
from quern.jobs.model import Queue
from quern.runtime import Runtime

ENVIRONMENT = {
    "QUERN_MONGODB_URI": "mongodb://127.0.0.1:1/?directConnection=true",
    "QUERN_REDIS_QUEUE_URL": "unix:///nowhere/redis.sock",
}
CIPHERS, HTTP, TEMPLATES, FLASK = "cryptography.fernet", "httpcore2", "jinja2", "flask"
ENGINES = {"duckdb", "pyarrow", "numpy", "matplotlib", "onnxruntime", "llama_cpp"}
NEVER = ENGINES | {"pymongo.pyopenssl_context", "opentelemetry.sdk.metrics", "rich", "jsonschema"}
#: What the process of that name must not hold beside that.
UNLOADED = {
    "api": {"quart", "quern.mail.send", "quern.openai.answering"},
    "events": {CIPHERS, HTTP, "quern.mail.send", "quern.openai.answering"},
    "high": {FLASK, CIPHERS, HTTP, TEMPLATES, "quern.mail.send"},
    "default": {FLASK, CIPHERS, HTTP, "quern.openai.request"},
    "webhooks": {FLASK, "quern.openai.request"},
    "low": {FLASK, CIPHERS, HTTP, TEMPLATES, "quern.mail.send"},
    "batched": {FLASK, CIPHERS, HTTP},
    "relay": {FLASK, CIPHERS, HTTP, "quern.openai.request", "quern.inference.client"},
    "scheduler": {FLASK, CIPHERS, HTTP, TEMPLATES, "quern.openai.request", "quern.inference.client"},
}

#: Does what `quern.cli.services` does before it serves, for each process in a child of its own; prints what it loaded.
LOAD = """
import json, os, sys
import quern.cli.main
import quern.cli.services
from quern.cli.runtime import open_runtime
from quern.jobs.model import Queue

def parts(name):
    runtime = open_runtime()
    if name == "api":
        import quern.api.server
        return quern.api.server.create_app(runtime)
    if name == "events":
        import quern.events.server, quern.events.wiring
        return quern.events.server.create_app(runtime.live, quern.events.wiring.authenticator(runtime), runtime)
    if name == "relay":
        import quern.workflows.relay
        return runtime.store, runtime.waker
    if name == "scheduler":
        import quern.jobs.scheduler
        return runtime.store, runtime.registry, runtime.waker, runtime.ticks, runtime.chores
    import quern.jobs.worker
    runtime.registry.prepare(Queue(name))
    return runtime.store, runtime.waker

for name in sys.argv[1:]:
    if os.fork() == 0:
        parts(name)
        loaded = [module for module, value in sys.modules.items() if value is not None]
        os.write(1, json.dumps([name, loaded]).encode() + b"\\n")
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def loaded() -> dict[str, set[str]]:
    """Process to the modules that it holds when it begins to serve."""
    environment = {"PATH": os.environ["PATH"], **ENVIRONMENT}
    found = subprocess.run(
        [sys.executable, "-c", LOAD, *UNLOADED],
        env=environment,
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return {name: set(modules) for name, modules in map(json.loads, found.stdout.splitlines())}


@pytest.mark.parametrize("process", UNLOADED)
def test_a_process_loads_only_what_it_needs(process: str, loaded: dict[str, set[str]]) -> None:
    assert "quern.store.connection" in loaded[process]
    assert loaded[process] & (NEVER | UNLOADED[process]) == set()


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    settings = Settings(
        mongodb_uri=ENVIRONMENT["QUERN_MONGODB_URI"],
        redis_queue_url=ENVIRONMENT["QUERN_REDIS_QUEUE_URL"],
        secret_keys=Fernet.generate_key().decode(),
    )
    return Runtime(LiveSettings(settings))


def test_every_kind_that_is_announced_has_its_handler(runtime: Runtime) -> None:
    announced = {kind for family in runtime.registry.families for kind in family.queues}
    assert len(announced) > 10
    for kind in announced:
        handler = runtime.registry.get(kind)
        assert handler is not None
        assert handler.kind == kind


def test_every_handler_that_is_made_is_announced(runtime: Runtime) -> None:
    for family in runtime.registry.families:
        assert {handler.kind for handler in family.make()} == set(family.queues)


def test_every_queue_has_work(runtime: Runtime) -> None:
    assert {queue for family in runtime.registry.families for queue in family.queues.values()} == set(Queue)


def test_a_kind_of_another_version_has_no_handler(runtime: Runtime) -> None:
    assert runtime.registry.get("juggle") is None


def test_the_api_is_made_without_a_connection_so_that_its_workers_may_be_forked_from_it(runtime: Runtime) -> None:
    create_app(runtime)
    assert not {"store", "limiter", "waker"} & vars(runtime).keys()
