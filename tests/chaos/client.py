"""The client of the ordeal: submits until it is answered 202, and keeps a log of every answer, for the verdict."""

import random
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import httpcore2
import orjson

_NETWORK = (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException)
_TIMEOUTS = {"connect": 5.0, "read": 15.0, "write": 5.0, "pool": 5.0}


@dataclass(frozen=True)
class Acknowledged:
    """One 202 answer: the number that the client gave, the response's identifier, and each step's job."""

    number: int
    response: str
    jobs: dict[str, str]


class RefusedError(Exception):
    """The service answered what no retry mends (a 4xx): a fault of the service or of the ordeal."""


@dataclass
class Client:
    """Talks to the API over HTTP and nothing else. Thread-safe."""

    url: str
    key: str
    log: list[Acknowledged] = field(default_factory=list)
    tries: int = 0
    in_flight: int = 0
    """Requests without an answer so far."""
    faults: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def call(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Any:
        """The JSON answer of a request, repeated on a broken connection, on 5xx, and on 409 while one runs."""
        given = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json", **(headers or {})}
        pause = 0.05
        while True:
            with self._lock:
                self.tries += 1
                self.in_flight += 1
            try:
                with httpcore2.ConnectionPool() as pool:
                    answer = pool.request(
                        method,
                        self.url + path,
                        headers=list(given.items()),
                        content=orjson.dumps(body) if body is not None else None,
                        extensions={"timeout": _TIMEOUTS},
                    )
            except _NETWORK:
                answer = None
            finally:
                with self._lock:
                    self.in_flight -= 1
            if answer is not None:
                if 200 <= answer.status < 300:
                    return orjson.loads(answer.content) if answer.content else None
                if answer.status < 500 and answer.status not in (409, 429):
                    raise RefusedError(f"{method} {path}: {answer.status} {answer.content[:300]!r}")
            time.sleep(pause)
            pause = min(1.0, pause * 1.5)

    def submit(self, form: str, number: int, seed: int) -> None:
        """Submit answer `number` until it is acknowledged; note the acknowledgement."""
        mood = random.Random(f"{seed}:{number}").choice(_MOODS)
        answers = {"number": number, "comment": f"{mood} (number {number})", "long": number % 10 == 0}
        accepted = self.call(
            "POST",
            f"/api/v1/forms/{form}/responses",
            {"answers": answers},
            {"Idempotency-Key": f"ordeal-{seed}-{number}"},
        )
        jobs = {job["step"]: job["id"] for job in accepted["jobs"]}
        with self._lock:
            self.log.append(Acknowledged(number, accepted["id"], jobs))

    def run(self, form: str, numbers: "Numbers", seed: int) -> None:
        """Submit until `numbers` gives no more. A refusal is noted and ends this thread."""
        try:
            while (number := numbers.take()) is not None:
                self.submit(form, number, seed)
        except RefusedError as error:
            with self._lock:
                self.faults.append(str(error))


_MOODS = (
    "The staff were friendly and everything went very well.",
    "I waited for two hours and nobody could help me.",
    "It was fine, nothing special, about what I expected.",
    "The parcel came broken and I want my money back.",
    "Thank you, the new website is so much easier to use!",
)


class Numbers:
    """Hands out 0, 1, 2 … up to what was released so far, so that there is work from the first kill to the last."""

    def __init__(self, total: int) -> None:
        self._total, self._released, self._next = total, 0, 0
        self._more = threading.Condition()

    def release(self, count: int) -> None:
        """Allow the numbers below `count`."""
        with self._more:
            self._released = max(self._released, min(count, self._total))
            self._more.notify_all()

    def take(self) -> int | None:
        """The next number, as soon as it is released; None after the last."""
        with self._more:
            self._more.wait_for(lambda: self._next < self._released or self._next >= self._total)
            if self._next >= self._total:
                return None
            self._next += 1
            # Whoever still waits for a number that another one took must look again.
            self._more.notify_all()
            return self._next - 1
