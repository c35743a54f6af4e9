"""The engine's client: synchronous, safe to share between threads, one connection for each call."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from quern.inference.protocol import (
    EVENT,
    MAX_EVENT_BYTES,
    MAX_REQUEST_BYTES,
    Classification,
    ClassifyRequest,
    CountTokensRequest,
    Done,
    Embeddings,
    EmbedRequest,
    ErrorEvent,
    Event,
    Frame,
    GenerateRequest,
    Generation,
    Health,
    HealthRequest,
    Label,
    Message,
    ModelsRequest,
    Priority,
    PurgeRequest,
    QueuedEvent,
    ResultEvent,
    ServedModel,
    ServedModels,
    Stats,
    StatsRequest,
    TokenCount,
    TokenEvent,
)

Result = TypeVar("Result", bound=BaseModel)
#: How often a call that waits asks `should_stop`, in seconds.
STOP_CHECK_INTERVAL = 0.2


class EngineError(Exception):
    """The engine did not answer with a result."""


class EngineRefused(EngineError):
    """The request is wrong in itself: the same again fails again."""


class EngineBusy(EngineError):
    """The engine has as much as it takes; come again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineUnavailable(EngineError):
    """The engine is not there, or its model is not; nothing is said about the request."""


class EngineAbsent(EngineUnavailable):
    """No engine runs at the socket: what one may have held in memory is gone."""


class EngineDeadline(EngineError):
    """The answer was not ready in time."""


class EngineCrashed(EngineError):
    """The model's process died under the request. `suspect`: it died again when the request ran alone."""

    def __init__(self, message: str, suspect: bool) -> None:
        super().__init__(message)
        self.suspect = suspect


class EngineOutputInvalid(EngineError):
    """The model's answer was not what the schema asks for; another seed or more tokens may help."""


class EngineCancelled(EngineError):
    """The caller's `should_stop` said so."""


def _raise(event: ErrorEvent) -> None:
    match event.kind:
        case "refused":
            raise EngineRefused(event.message)
        case "busy":
            raise EngineBusy(event.message, event.retry_after if event.retry_after is not None else 1.0)
        case "deadline":
            raise EngineDeadline(event.message)
        case "crashed":
            raise EngineCrashed(event.message, event.suspect)
        case "invalid_output":
            raise EngineOutputInvalid(event.message)
        case "unavailable":
            raise EngineUnavailable(event.message)


class EngineClient:
    """Calls to the engine behind a UNIX socket.

    Every call may raise EngineRefused, EngineBusy, EngineUnavailable, EngineDeadline and EngineCrashed.

    Args:
        socket_path: the engine's socket.
        timeout: longest wait for any answer, in seconds, whatever deadline a request brings.
    """

    def __init__(self, socket_path: Path | str, timeout: float = 600.0) -> None:
        self._path = str(socket_path)
        self._timeout = timeout

    def generate(
        self,
        request: GenerateRequest,
        on_progress: Callable[[TokenEvent | QueuedEvent], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Generation:
        """Run a generation to its end.

        Args:
            on_progress: gets the `queued` event and, if `request.stream`, each `token` event.
            should_stop: asked about five times a second; when it says True the engine drops the request.

        Raises:
            EngineOutputInvalid: a schema was asked for and the answer does not fit it.
            EngineCancelled: `should_stop` said so.
        """
        return self._call(request, Generation, on_progress, should_stop)

    def stream(self, request: GenerateRequest) -> Iterator[TokenEvent | Generation]:
        """The answer as it is made; the last item is the whole of it. Leaving the loop cancels the request."""
        with self._connection(request.model_copy(update={"stream": True})) as events:
            for event in events:
                if isinstance(event, TokenEvent):
                    yield event
                elif isinstance(event, ErrorEvent):
                    _raise(event)
                elif isinstance(event, ResultEvent):
                    yield Generation.model_validate(event.data)
                    return

    def embed(
        self, tenant: str, texts: list[str], *, priority: Priority = "batch", deadline: float | None = None
    ) -> list[list[float]]:
        """One vector of length 1 for each text."""
        return self.embeddings(EmbedRequest(tenant=tenant, texts=texts, priority=priority, deadline=deadline)).vectors

    def embeddings(self, request: EmbedRequest, should_stop: Callable[[], bool] | None = None) -> Embeddings:
        """The vectors of a request, with its model and how many tokens were read."""
        return self._call(request, Embeddings, None, should_stop)

    def classify(
        self,
        tenant: str,
        text: str,
        labels: list[Label],
        *,
        priority: Priority = "batch",
        deadline: float | None = None,
    ) -> Classification:
        """The label nearest in meaning to the text."""
        request = ClassifyRequest(tenant=tenant, text=text, labels=labels, priority=priority, deadline=deadline)
        return self._call(request, Classification)

    def count_tokens(self, tenant: str, *, messages: list[Message] | None = None, prompt: str | None = None) -> int:
        """How many tokens a prompt would take."""
        return self._call(CountTokensRequest(tenant=tenant, messages=messages, prompt=prompt), TokenCount).tokens

    def models(self) -> list[ServedModel]:
        """The models that the engine serves."""
        return self._call(ModelsRequest(), ServedModels).models

    def stats(self) -> dict[str, float]:
        """The engine's counters by Prometheus name."""
        return self._call(StatsRequest(), Stats).values

    def health(self) -> Health:
        """Whether the models are loaded."""
        return self._call(HealthRequest(), Health)

    def purge(self, tenant: str) -> None:
        """Forget everything that was kept of a tenant's texts."""
        self._call(PurgeRequest(tenant=tenant), Done)

    def _call(
        self,
        request: Frame,
        result: type[Result],
        on_progress: Callable[[TokenEvent | QueuedEvent], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Result:
        with self._connection(request, should_stop) as events:
            for event in events:
                if isinstance(event, ErrorEvent):
                    _raise(event)
                elif isinstance(event, ResultEvent):
                    return result.model_validate(event.data)
                elif on_progress is not None:
                    on_progress(event)
        raise EngineUnavailable(f"the engine at {self._path} hung up without an answer")

    @contextmanager
    def _connection(self, request: Frame, should_stop: Callable[[], bool] | None = None) -> Iterator[Iterator[Event]]:
        frame = request.model_dump_json(exclude_defaults=False).encode() + b"\n"
        if len(frame) > MAX_REQUEST_BYTES:
            raise EngineRefused(f"expected a request of at most {MAX_REQUEST_BYTES} bytes, found {len(frame)}")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            try:
                connection.settimeout(self._timeout)
                connection.connect(self._path)
                connection.sendall(frame)
            except OSError as error:
                reason = error.strerror or type(error).__name__
                absent = isinstance(error, FileNotFoundError | ConnectionRefusedError)
                raise (EngineAbsent if absent else EngineUnavailable)(
                    f"expected the engine at {self._path}, found: {reason}. Is `quern engine` running?"
                ) from error
            yield self._events(connection, should_stop)

    def _events(self, connection: socket.socket, should_stop: Callable[[], bool] | None) -> Iterator[Event]:
        end = time.monotonic() + self._timeout
        connection.settimeout(STOP_CHECK_INTERVAL if should_stop else self._timeout)
        received = bytearray()
        next_check = 0.0
        while True:
            if should_stop is not None and time.monotonic() >= next_check:
                if should_stop():
                    raise EngineCancelled("the caller stopped waiting")
                next_check = time.monotonic() + STOP_CHECK_INTERVAL
            try:
                chunk = connection.recv(1 << 16)
            except TimeoutError:
                if time.monotonic() >= end:
                    raise EngineDeadline(f"no answer from the engine within {self._timeout:g} s") from None
                continue
            except OSError as error:
                raise EngineUnavailable(f"the engine at {self._path} hung up: {error.strerror or error}") from error
            if not chunk:
                return
            searched = len(received)
            received += chunk
            while (newline := received.find(b"\n", searched)) >= 0:
                line = bytes(received[:newline])
                del received[: newline + 1]
                searched = 0
                try:
                    yield EVENT.validate_json(line)
                except ValidationError as error:
                    raise EngineUnavailable(
                        f"the engine at {self._path} does not speak this protocol: {error}"
                    ) from error
            if len(received) > MAX_EVENT_BYTES:
                raise EngineUnavailable(f"the engine at {self._path} sent a frame beyond {MAX_EVENT_BYTES} bytes")
