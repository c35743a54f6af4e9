"""Load from outside, as careful clients make it: a request is repeated only when that is harmless."""

import http.client
import itertools
import json
import ssl
import threading
import time
import uuid
from types import TracebackType
from typing import Any, Self

_ATTEMPTS = 4


class Load:
    """Clients that submit responses and read their form until stopped; what was acknowledged, and what failed.

    A connection that breaks is opened anew and the request repeated: a GET is harmless, and a POST carries an
    Idempotency-Key. An answer is never asked for again: one of 5xx is a failure.
    """

    def __init__(self, address: str, key: str, form: str, trusting: ssl.SSLContext, clients: int = 4) -> None:
        self.acknowledged: list[str] = []
        self.answered = 0
        self.repeated = 0
        self.failures: list[str] = []
        self._address, self._key, self._form, self._trusting = address, key, form, trusting
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, name=f"client {n}", daemon=True) for n in range(clients)]

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

    def _run(self) -> None:
        connection = self._connect()
        for number in itertools.count():
            if self._stop.wait(0.1):
                return
            if number % 3:
                body = json.dumps({"answers": {"comment": f"number {number}"}})
                connection, answer = self._ask(connection, "POST", f"/api/v1/forms/{self._form}/responses", body)
                if answer is not None:
                    self.acknowledged.append(answer["id"])
            else:
                connection, answer = self._ask(connection, "GET", f"/api/v1/forms/{self._form}", None)

    def _connect(self) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection(self._address, context=self._trusting, timeout=60)

    def _ask(
        self, connection: http.client.HTTPSConnection, method: str, path: str, body: str | None
    ) -> tuple[http.client.HTTPSConnection, Any]:
        headers = {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"}
        if body is not None:
            headers["Idempotency-Key"] = uuid.uuid4().hex
        problem = ""
        for attempt in range(_ATTEMPTS):
            try:
                connection.request(method, path, body, headers)
                answer = connection.getresponse()
                content = answer.read()
            except (OSError, http.client.HTTPException) as error:
                problem = f"{method}: {type(error).__name__}: {error}"
                self.repeated += 1
                connection.close()
                connection = self._connect()
                time.sleep(0.2 * attempt)
                continue
            self.answered += 1
            if answer.status >= 300:
                self.failures.append(f"{method}: {answer.status} {content[:300]!r}")
                return connection, None
            return connection, json.loads(content)
        self.failures.append(problem)
        return connection, None
