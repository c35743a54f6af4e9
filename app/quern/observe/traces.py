"""OpenTelemetry spans: one trace from the request over its jobs to the delivery; exported only if asked for."""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import NonRecordingSpan, ProxyTracerProvider, SpanContext, TraceFlags
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_PROPAGATOR = TraceContextTextMapPropagator()
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_tracer = trace.get_tracer("quern")


def configure(process: str, endpoint: str | None) -> None:
    """Export spans by OTLP over HTTP to `endpoint`; with `None`, ids are still made and passed on, but kept nowhere."""
    if endpoint is None:
        return
    # Much to load for a process that exports nothing.
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": f"quern-{process}"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    trace.set_tracer_provider(provider)


@contextmanager
def span(name: str, parent: str | None = None, **attributes: str | int | float) -> Iterator[str]:
    """A span under the W3C `traceparent` given; yields its own `traceparent`, to be handed on.

    Attributes name things (queue, kind, ids); never answers or addresses.
    """
    context = _PROPAGATOR.extract({"traceparent": parent}) if parent else None
    if isinstance(trace.get_tracer_provider(), ProxyTracerProvider):
        # Nobody records: the ids are all that a span needs.
        with trace.use_span(
            NonRecordingSpan(_successor(context)), record_exception=False, set_status_on_exception=False
        ):
            yield traceparent()
        return
    with _tracer.start_as_current_span(name, context=context, attributes=attributes, record_exception=False):
        yield traceparent()


def ended(name: str, parent: str | None, seconds: float, **attributes: str | int | float) -> None:
    """A span that took `seconds` and is over: for what is known to belong to a trace only afterwards."""
    if isinstance(trace.get_tracer_provider(), ProxyTracerProvider):
        return
    context = _PROPAGATOR.extract({"traceparent": parent}) if parent else None
    now = time.time_ns()
    begun = _tracer.start_span(name, context, attributes=attributes, start_time=now - int(seconds * 1e9))
    begun.end(now)


def traceparent() -> str:
    """The current span's W3C `traceparent`."""
    current = trace.get_current_span().get_span_context()
    return f"00-{current.trace_id:032x}-{current.span_id:016x}-{int(current.trace_flags):02x}"


def _successor(context: Context | None) -> SpanContext:
    """The ids of a new span: of the trace in `context`, else of one of its own, sampled by whoever does record."""
    parent = trace.get_current_span(context).get_span_context()
    trace_id, flags = (parent.trace_id, parent.trace_flags) if parent.is_valid else (_identifier(128), _SAMPLED)
    return SpanContext(trace_id, _identifier(64), is_remote=False, trace_flags=flags)


def _identifier(bits: int) -> int:
    """Random, and not 0, which would be none. It names something and protects nothing."""
    return random.getrandbits(bits) or 1
