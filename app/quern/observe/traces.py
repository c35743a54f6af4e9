"""OpenTelemetry spans: one trace from the request over its jobs to the delivery; exported only if asked for."""

from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_PROPAGATOR = TraceContextTextMapPropagator()
_tracer = trace.get_tracer("quern")


def configure(process: str, endpoint: str | None) -> None:
    """Export spans by OTLP over HTTP to `endpoint`; with `None`, ids are still made and passed on, but kept nowhere."""
    provider = TracerProvider(resource=Resource.create({"service.name": f"quern-{process}"}))
    if endpoint:
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    trace.set_tracer_provider(provider)


@contextmanager
def span(name: str, parent: str | None = None, **attributes: str | int | float) -> Iterator[str]:
    """A span under the W3C `traceparent` given; yields its own `traceparent`, to be handed on.

    Attributes name things (queue, kind, ids); never answers or addresses.
    """
    context = _PROPAGATOR.extract({"traceparent": parent}) if parent else None
    with _tracer.start_as_current_span(name, context=context, attributes=attributes, record_exception=False):
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier)
        yield carrier.get("traceparent", parent or "")
