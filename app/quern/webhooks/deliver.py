"""One attempt to deliver one message, for real.

Redirects are not followed, proxies of the environment are not used and nothing is retried here: `httpcore2` does none
of these by itself, and `schedule` decides what comes next.
"""

from __future__ import annotations

import re
import ssl
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from importlib.metadata import version

import httpcore2

from quern.webhooks.guard import (
    Budget,
    DeadlineError,
    ForbiddenAddressError,
    ForbiddenURLError,
    NameResolutionError,
    PinnedBackend,
    Resolver,
    ResponseTooLargeError,
    Target,
    TLSError,
    parse_target,
    system_resolver,
)
from quern.webhooks.outcome import DeliveryOutcome, Failure
from quern.webhooks.settings import WebhookSettings
from quern.webhooks.sign import signature_headers

USER_AGENT = f"Quern-Webhooks/{version('quern')}"

# Both come from whoever called the API: what does not look like them is left out.
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")

_HEADER_ALLOWANCE_BYTES = 131_072

_FAILURES: tuple[tuple[type[Exception], Failure], ...] = (
    (ForbiddenAddressError, Failure.FORBIDDEN_ADDRESS),
    (NameResolutionError, Failure.DNS),
    (TLSError, Failure.TLS),
    (DeadlineError, Failure.TIMEOUT),
    (httpcore2.TimeoutException, Failure.TIMEOUT),
    (httpcore2.ConnectError, Failure.CONNECT),
    (ResponseTooLargeError, Failure.PROTOCOL),
    (httpcore2.NetworkError, Failure.PROTOCOL),
    (httpcore2.ProtocolError, Failure.PROTOCOL),
)
_DETAILS = {
    Failure.TIMEOUT: "expected an answer within {seconds:g} s, found none",
    Failure.CONNECT: "expected a connection to port {port}, found it refused or unreachable",
    Failure.PROTOCOL: "expected an HTTP/1.1 answer of bounded size, found a broken or too large one",
}


def client_tls(settings: WebhookSettings) -> ssl.SSLContext:
    """Verifying TLS (1.2 or later) that trusts the system's authorities and `ca_file`. Make it once per process.

    Raises FileNotFoundError or ssl.SSLError for an unusable `ca_file`.
    """
    context = ssl.create_default_context()
    if settings.ca_file is not None:
        context.load_verify_locations(cafile=settings.ca_file)
    return context


def deliver(
    url: str,
    secrets: Sequence[str],
    *,
    message_id: str,
    payload: bytes,
    settings: WebhookSettings,
    tls: ssl.SSLContext,
    now: datetime,
    request_id: str | None = None,
    traceparent: str | None = None,
    resolver: Resolver = system_resolver,
    clock: Callable[[], float] = time.monotonic,
) -> DeliveryOutcome:
    """POST the payload (JSON in UTF-8), signed with every active secret, to the endpoint's URL, once.

    `message_id` must be the same at every attempt for the same message: receivers drop repetitions by it. `now` is the
    attempt's time (aware), which is signed; `clock` measures seconds and never goes back.

    Whatever the receiver or the network does comes back as an outcome; it raises only for a wrong call: ValueError for
    a payload over `max_payload_bytes` or for an id or a secret that cannot be signed with.
    """
    if len(payload) > settings.max_payload_bytes:
        raise ValueError(f"expected a payload of at most {settings.max_payload_bytes} bytes, found {len(payload)}")
    headers = _headers(request_id, traceparent)
    signed = headers | signature_headers(message_id, now, payload, secrets)
    started = clock()
    budget = Budget(
        started + settings.deadline_seconds, settings.max_response_bytes + _HEADER_ALLOWANCE_BYTES, clock=clock
    )
    try:
        target = parse_target(url, settings)
    except ForbiddenURLError as error:
        return DeliveryOutcome(None, Failure.FORBIDDEN_URL, str(error), timedelta(0))
    backend = PinnedBackend(settings, budget, resolver)
    logged = {"host": target.authority} | headers | {"webhook-id": message_id}
    try:
        status, retry_after, excerpt = _post(target, signed, payload, backend, tls, settings)
    except tuple(kind for kind, _ in _FAILURES) as error:
        failure = next(failure for kind, failure in _FAILURES if isinstance(error, kind))
        detail = _DETAILS.get(failure, str(error)).format(seconds=settings.deadline_seconds, port=target.port)
        return DeliveryOutcome(
            None, failure, detail, _since(started, clock), address=backend.address, request_headers=logged
        )
    return DeliveryOutcome(
        status,
        None,
        f"the receiver answered {status}",
        _since(started, clock),
        retry_after=retry_after,
        excerpt=excerpt,
        address=backend.address,
        request_headers=logged,
    )


def _headers(request_id: str | None, traceparent: str | None) -> dict[str, str]:
    headers = {
        "content-type": "application/json",
        "user-agent": USER_AGENT,
        "accept-encoding": "identity",
        "connection": "close",
    }
    if request_id is not None and _REQUEST_ID.fullmatch(request_id):
        headers["x-request-id"] = request_id
    if traceparent is not None and _TRACEPARENT.fullmatch(traceparent):
        headers["traceparent"] = traceparent
    return headers


def _post(
    target: Target,
    headers: dict[str, str],
    payload: bytes,
    backend: PinnedBackend,
    tls: ssl.SSLContext,
    settings: WebhookSettings,
) -> tuple[int, str | None, str]:
    """Status, Retry-After and excerpt of the answer to one POST on a connection of its own."""
    url = httpcore2.URL(scheme=target.scheme, host=target.host, port=target.port, target=target.path)
    request = httpcore2.Request(
        "POST",
        url,
        headers=list(({"host": target.authority, "content-length": str(len(payload))} | headers).items()),
        content=payload,
    )
    with httpcore2.HTTPConnection(url.origin, ssl_context=tls, network_backend=backend) as connection:
        response = connection.handle_request(request)
        retry_after = next(
            (value.decode("latin-1") for name, value in response.headers if name.lower() == b"retry-after"), None
        )
        body = _body(response, settings.max_response_bytes)
        delivered = 200 <= response.status <= 299
        # The body of a success tells nothing, and might hold a copy of the answers that it confirms.
        excerpt = "" if delivered else _printable(body[: settings.excerpt_bytes])
    return response.status, retry_after, excerpt


def _body(response: httpcore2.Response, at_most: int) -> bytes:
    """The start of the body. One that breaks off or never ends changes nothing: the status has arrived."""
    body = bytearray()
    try:
        for chunk in response.iter_stream():
            body += chunk
            if len(body) >= at_most:
                break
    except (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException, TimeoutError, ConnectionError):
        pass
    return bytes(body[:at_most])


def _printable(body: bytes) -> str:
    text = body.decode("utf-8", "replace")
    return "".join(character if character.isprintable() or character == "\n" else " " for character in text)


def _since(started: float, clock: Callable[[], float]) -> timedelta:
    return timedelta(seconds=clock() - started)
