"""Load from outside, as HTTP wants it from clients: a request is repeated where its connection was closed before it."""

import http.client
import itertools
import json
import ssl
import threading
import time
import uuid
from types import TracebackType
from typing import Any, Self

#: What says that a connection was closed before any byte of an answer came.
_CLOSED = (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError, ssl.SSLEOFError)


class Load:
    """Clients that submit responses and read their form until stopped; what was acknowledged, and what failed.

    Every other client opens a connection for each request: whatever breaks there was cut in the middle. The others keep
    theirs, as browsers and libraries do. A server may close such a connection while it is idle, and the next request
    may meet that on its way: where no byte of an answer has come it is repeated, once, on a new connection (a GET is
    harmless, and a POST carries an Idempotency-Key). Anything else is a failure, and so is an answer of 3xx to 5xx.
    """

    def __init__(self, address: str, key: str, form: str, trusting: ssl.SSLContext, clients: int = 4) -> None:
        self.acknowledged: list[str] = []
        self.answered = 0
        self.repeated = 0
        self.failures: list[str] = []
        self._address, self._key, self._form, self._trusting = address, key, form, trusting
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(n % 2 == 0,), name=f"client {n}", daemon=True)
            for n in range(clients)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        deadline = time.monotonic() + 300
        while self.answered < 20 and not self.failures:
            assert time.monotonic() < deadline, "expected answers within five minutes"
            time.sleep(0.1)
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(120)

    def _run(self, keeps: bool) -> None:
        connection: http.client.HTTPSConnection | None = None
        for number in itertools.count():
            if self._stop.wait(0.1):
                return
            if number % 3:
                body = json.dumps({"answers": {"comment": f"number {number}"}})
                connection, answer = self._ask(connection, "POST", f"/api/v1/forms/{self._form}/responses", body)
                if answer is not None:
                    self.acknowledged.append(answer["id"])
            else:
                connection, _ = self._ask(connection, "GET", f"/api/v1/forms/{self._form}", None)
            if connection is not None and not keeps:
                connection.close()
                connection = None

    def _ask(
        self, kept: http.client.HTTPSConnection | None, method: str, path: str, body: str | None, name: str = ""
    ) -> tuple[http.client.HTTPSConnection | None, Any]:
        """The connection, where it may be used again, and the decoded answer, where there is one."""
        headers = {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"}
        name = name or uuid.uuid4().hex
        if body is not None:
            headers["Idempotency-Key"] = name
        connection = kept or http.client.HTTPSConnection(self._address, context=self._trusting, timeout=60)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            if kept is not None and isinstance(error, _CLOSED):
                self.repeated += 1
                return self._ask(None, method, path, body, name)
            return self._failed(f"{method}: {type(error).__name__}: {error}")
        try:
            content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            return self._failed(f"{method}: in the middle of an answer: {type(error).__name__}: {error}")
        self.answered += 1
        if answer.status >= 300:
            connection.close()
            return self._failed(f"{method}: {answer.status} {content[:300]!r}")
        # Closed where the answer said that it is the last.
        return None if connection.sock is None else connection, json.loads(content)

    def _failed(self, problem: str) -> tuple[None, None]:
        self.failures.append(problem)
        return None, None
