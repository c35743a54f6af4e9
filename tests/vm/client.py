"""An integrator's client: JSON over TLS by the standard library, with a log of what was acknowledged."""

import json
import ssl
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Any, Self

from tests.vm.guest import PATIENCE_SECONDS, Guest

REQUEST_SECONDS = 120


@dataclass
class Client:
    """Thread-safe."""

    guest: Guest
    key: str
    trusting: ssl.SSLContext
    refusals: list[tuple[int, bytes]] = field(default_factory=list)
    """Every answer that was no success: its status and body."""

    @classmethod
    def of_new_tenant(cls, guest: Guest) -> Self:
        """A client of a new tenant that has no limit."""
        made = json.loads(guest.say("quern tenant create vm-tests --requests-per-minute 0 --json"))
        return cls(guest, str(made["key"]), guest.trusting())

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> Any:
        """One request. Raises OSError (urllib's errors are)."""
        given = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json", **headers}
        content = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self.guest.url + path, content, given, method=method)
        try:
            with urllib.request.urlopen(request, context=self.trusting, timeout=REQUEST_SECONDS) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            self.refusals.append((error.code, error.read()))
            raise

    def insist(self, method: str, path: str, body: Any = None, **headers: str) -> Any:
        """The same, again and again while nobody answers, or the service says that it cannot (5xx, 429)."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return self.call(method, path, body, **headers)
            except urllib.error.HTTPError as error:
                if (error.code < 500 and error.code != 429) or time.monotonic() > deadline:
                    raise
            except OSError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(1)

    def form(self, name: str, *steps: dict[str, Any]) -> str:
        """A published form with a number, a comment and an address."""
        fields = [
            {"name": "number", "type": "number", "integer": True},
            {"name": "email", "type": "email"},
            {"name": "comment", "type": "long_text", "max_length": 100_000, "required": True},
        ]
        form = self.insist(
            "POST", "/api/v1/forms", {"name": name, "fields": fields, "workflow": {"steps": list(steps)}}
        )
        self.insist("POST", f"/api/v1/forms/{form['id']}/publish")
        return str(form["id"])

    def processed(self, response: str) -> Any:
        """The response, once all of its steps are done."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (found := self.insist("GET", f"/api/v1/responses/{response}"))["status"] != "processed":
            assert time.monotonic() < deadline, f"expected {response} to be processed, found {found}"
            time.sleep(2)
        return found

    def all_processed(self, form: str) -> list[Any]:
        """All responses of a form that are processed, once none is being processed any more."""
        path = f"/api/v1/forms/{form}/responses"
        deadline = time.monotonic() + PATIENCE_SECONDS
        while waiting := self.insist("GET", f"{path}?status=processing&limit=1")["items"]:
            assert time.monotonic() < deadline, f"expected all to be processed, found {waiting}"
            time.sleep(2)
        found, query = [], "status=processed&limit=100"
        while True:
            page = self.insist("GET", f"{path}?{query}")
            found += page["items"]
            if page["next_cursor"] is None:
                return found
            query = f"status=processed&limit=100&cursor={page['next_cursor']}"


class Intake:
    """Submits numbered responses from several threads until it is told to stop; knows which were acknowledged."""

    def __init__(self, client: Client, form: str, threads: int = 4) -> None:
        self._client, self._form = client, form
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._next = 0
        self.acknowledged: dict[int, str] = {}
        """Number → identifier, of every 202."""
        self.faults: list[str] = []
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(threads)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(PATIENCE_SECONDS)

    def _run(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                number, self._next = self._next, self._next + 1
            try:
                accepted = self._client.insist(
                    "POST",
                    f"/api/v1/forms/{self._form}/responses",
                    {"answers": {"number": number, "comment": f"Number {number} of the power cut."}},
                    **{"Idempotency-Key": f"{self._form}-{number}"},
                )
            except OSError as error:
                with self._lock:
                    self.faults.append(f"{number}: {error}")
                return
            with self._lock:
                self.acknowledged[number] = accepted["id"]
            # An emulated machine that starts again must get on, too.
            time.sleep(0.2)
