"""The long-running processes: `quern api`, `events`, `relay`, `scheduler`, `worker`."""

import os
import signal
import sys
import threading
from types import FrameType

import click

from quern.cli.runtime import open_runtime
from quern.config import Secret
from quern.observe import logs, metrics, traces


def _prepare(process: str, *needs: Secret) -> threading.Event:
    """Logs, traces, metrics and a stop event set by SIGINT or SIGTERM; a secret that it needs must be there."""
    runtime = open_runtime()
    settings = runtime.settings
    for secret in needs:
        settings.required(secret)
    logs.configure(process, settings.log_level, settings.log_file)
    traces.configure(process, settings.otlp_endpoint)
    metrics.serve(settings.metrics_bind)
    stop = threading.Event()

    def end(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGTERM, end)
    return stop


@click.command()
def api() -> None:
    """Serve the API with Gunicorn (QUERN_API_BIND, QUERN_API_WORKERS, QUERN_API_THREADS)."""
    settings = open_runtime().settings
    settings.required("secret_keys")
    logs.configure("api", settings.log_level, settings.log_file)
    if settings.metrics_dir is not None:
        settings.metrics_dir.mkdir(parents=True, exist_ok=True)
        for old in settings.metrics_dir.glob("*.db"):
            old.unlink()
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(settings.metrics_dir)
        # The library decides where values live when it is first imported, which was before.
        os.execv(sys.executable, [sys.executable, "-m", "quern.api"])  # noqa: S606
    from quern.api.server import serve

    serve(settings)


@click.command()
def events() -> None:
    """Serve what waits (QUERN_EVENTS_BIND): event streams, and the OpenAI-shaped /v1."""
    from quern.events.server import main
    from quern.events.wiring import authenticator

    runtime = open_runtime()
    settings = runtime.settings
    logs.configure("events", settings.log_level, settings.log_file)
    traces.configure("events", settings.otlp_endpoint)
    metrics.serve(settings.metrics_bind)
    main(runtime.live, authenticator(runtime), runtime)


@click.command()
def relay() -> None:
    """Turn outboxes into jobs and audit entries."""
    from quern.workflows.relay import main

    stop = _prepare("relay")
    runtime = open_runtime()
    main(runtime.store, runtime.waker, stop)


@click.command()
def scheduler() -> None:
    """Rescue silent jobs, make periodic ones, seal the audit log. Any number may run."""
    from quern.jobs.scheduler import main

    stop = _prepare("scheduler", "audit_key")
    runtime = open_runtime()
    main(runtime.store, runtime.registry, runtime.waker, runtime.ticks, runtime.chores, stop)


@click.command()
@click.argument("queue", type=click.Choice(["high", "default", "webhooks", "low", "batched"]))
@click.option("--concurrency", type=click.IntRange(1, 256), help="Jobs at once; the default depends on the queue.")
def worker(queue: str, concurrency: int | None) -> None:
    """Work on one QUEUE. SIGINT finishes what runs; SIGTERM hands it back at once."""
    from quern.jobs.model import Queue
    from quern.jobs.worker import Worker

    needs: tuple[Secret, ...] = ("secret_keys",) if queue == Queue.WEBHOOKS else ()
    stop = _prepare(f"worker-{queue}", *needs)
    runtime = open_runtime()
    if queue == Queue.BATCHED:
        concurrency = concurrency or runtime.settings.engine_parallel
    runtime.registry.prepare(Queue(queue))
    Worker(runtime.store, runtime.registry, runtime.waker, Queue(queue), concurrency).run(stop)
