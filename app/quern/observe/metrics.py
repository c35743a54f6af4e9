"""Prometheus metrics: what every process counts, and how a process shows its own."""

import os
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, make_wsgi_app, multiprocess
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import REGISTRY

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

REQUESTS = Counter("quern_http_requests_total", "Answers given", ["route", "method", "status"])
REQUEST_SECONDS = Histogram("quern_http_request_seconds", "Time to answer", ["route", "method"], buckets=_SECONDS)
ACCEPTED = Counter("quern_responses_accepted_total", "Responses acknowledged with 202")
LIMITED = Counter("quern_rate_limited_total", "Requests refused by a rate limit")
WAKE_FAILED = Counter("quern_wake_failed_total", "Wake-ups that Redis did not take", ["queue"])
CLAIMS = Counter("quern_job_claims_total", "Jobs claimed", ["queue", "kind"])
ENDED = Counter("quern_job_ended_total", "Jobs that left a worker", ["queue", "kind", "state"])
JOB_SECONDS = Histogram("quern_job_seconds", "Time a job ran", ["queue", "kind"], buckets=_SECONDS)
JOB_WAIT_SECONDS = Histogram("quern_job_wait_seconds", "Time from due to claimed", ["queue"], buckets=_SECONDS)
LEASES_LOST = Counter("quern_job_leases_lost_total", "Leases that ran out under their worker", ["queue"])
RESCUED = Counter("quern_job_rescued_total", "Jobs taken back from workers that went silent", ["queue"])
FANNED_OUT = Counter("quern_outbox_relayed_total", "Outboxes turned into jobs and audit entries")
OUTBOX_LAG = Gauge("quern_outbox_lag_seconds", "Age of the oldest outbox", multiprocess_mode="max")
UNRELAYED = Gauge(
    "quern_outbox_unrelayed", "Outboxes set aside because they cannot be relayed", multiprocess_mode="max"
)
QUEUE_DEPTH = Gauge("quern_queue_jobs", "Jobs by queue and state", ["queue", "state"], multiprocess_mode="mostrecent")
QUEUE_AGE = Gauge(
    "quern_queue_oldest_seconds", "Age of the oldest job that is due", ["queue"], multiprocess_mode="mostrecent"
)
SEALED = Counter("quern_audit_sealed_total", "Audit entries chained")
UNSEALED = Gauge("quern_audit_unsealed", "Audit entries not yet chained", multiprocess_mode="mostrecent")
AUDIT_ENTRIES = Gauge("quern_audit_entries", "Audit entries chained, by the last one's number", multiprocess_mode="max")
AUDIT_VERIFIED = Gauge(
    "quern_audit_verified_timestamp_seconds", "When some of the audit log was last verified", multiprocess_mode="max"
)
AUDIT_PROBLEMS = Gauge(
    "quern_audit_problems",
    "What is wrong with the audit log, by the last whole round or the one under way",
    multiprocess_mode="max",
)


def registry() -> CollectorRegistry:
    """This process's registry, or the sum over its siblings where they share a directory."""
    if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        shared = CollectorRegistry()
        multiprocess.MultiProcessCollector(shared)  # type: ignore[no-untyped-call]
        return shared
    return REGISTRY


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        return None

    def address_string(self) -> str:
        return "local"


class _UnixWsgiServer(WSGIServer):
    address_family = socket.AF_UNIX

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "localhost", 0
        self.setup_environ()

    def get_request(self) -> tuple[socket.socket, tuple[str, int]]:
        request, _ = self.socket.accept()
        return request, ("local", 0)


class _Stats:
    """Another process's counters, asked for at each scrape; nothing while it does not answer."""

    def __init__(self, ask: Callable[[], Mapping[str, float]]) -> None:
        self._ask = ask

    def collect(self) -> Iterator[Metric]:
        try:
            values = self._ask()
        except Exception:
            # Whatever it is, a scrape must not fail for it: the absence of the values tells.
            return
        for name, value in values.items():
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            yield kind(name.removesuffix("_total"), "As the engine counts it", value=value)


def serve_stats(bind: str | None, ask: Callable[[], Mapping[str, float]]) -> None:
    """As `serve`, for a process whose counters are asked for: `ask` gives them by their Prometheus name."""
    if bind:
        REGISTRY.register(_Stats(ask))
        serve(bind)


def serve(bind: str | None) -> None:
    """Show this process's metrics over HTTP at `unix:/path` or `host:port`, in a daemon thread; None shows nothing."""
    if not bind:
        return
    if bind.startswith("unix:"):
        path = Path(bind.removeprefix("unix:"))
        path.unlink(missing_ok=True)
        server: WSGIServer = _UnixWsgiServer(str(path), _Quiet)  # type: ignore[arg-type]
        path.chmod(0o660)
    else:
        host, port = bind.rsplit(":", 1)
        server = WSGIServer((host, int(port)), _Quiet)
    server.set_app(make_wsgi_app(registry()))
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
