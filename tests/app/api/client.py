"""A client of the whole service, as an integrator would write one, and the house that it talks to."""

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import httpcore2
import orjson

from quern.embedded.stack import Stack
from quern.tenants import keys, tenant

Json = dict[str, Any]
PATIENCE_SECONDS = 60.0
_TIMEOUT = {"timeout": {"connect": 10.0, "read": PATIENCE_SECONDS, "write": PATIENCE_SECONDS, "pool": PATIENCE_SECONDS}}


def until(promise: Callable[[], Any], seconds: float = PATIENCE_SECONDS) -> Any:
    """Poll until `promise()` is true, and return it."""
    limit = time.monotonic() + seconds
    while not (kept := promise()):
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.05)
    return kept


@dataclass(frozen=True)
class Answer:
    """An answer, read whole; header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    content: bytes

    def json(self) -> Any:
        return orjson.loads(self.content)

    @property
    def pointers(self) -> list[str]:
        """The places of the faults in a problem."""
        return [fault["pointer"] for fault in self.json().get("errors", [])]


class Client:
    """Talks to one base URL, or to one UNIX socket, with one key."""

    def __init__(self, url: str, key: str | None, socket: str | None = None) -> None:
        self.url, self.key = url, key
        self._socket = socket
        self._pool = httpcore2.ConnectionPool(uds=socket, max_connections=64)

    def with_key(self, key: str | None) -> "Client":
        return Client(self.url, key, self._socket)

    def send(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        raw: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """One request; `path` is below /api/v1 unless it begins with two slashes."""
        target = path[1:] if path.startswith("//") else f"/api/v1{path}"
        given = {"Content-Type": "application/json"} if body is not None or raw is not None else {}
        if self.key is not None:
            given["Authorization"] = f"Bearer {self.key}"
        given |= dict(headers or {})
        content = raw if raw is not None else (b"" if body is None else orjson.dumps(body))
        encoded: list[tuple[bytes | str, bytes | str]] = [(name, text.encode()) for name, text in given.items()]
        found = self._pool.request(method, self.url + target, headers=encoded, content=content, extensions=_TIMEOUT)
        named = {name.decode().lower(): value.decode() for name, value in found.headers}
        return Answer(found.status, named, found.content)

    def call(self, method: str, path: str, body: Any = None, *, status: int = 200, **headers: str) -> Any:
        """The JSON of an answer that must have this status; header names are written with underscores."""
        answer = self.send(method, path, body, headers={name.replace("_", "-"): text for name, text in headers.items()})
        assert answer.status == status, (method, path, answer.status, answer.content[:2000])
        return answer.json() if answer.content else None

    def form(self, fields: list[Json], steps: list[Json] | None = None, *, publish: bool = True) -> str:
        """A form of these fields, published if not said otherwise; returns its identifier."""
        draft = {"name": "a form", "fields": fields, "workflow": {"steps": steps or []}}
        made = str(self.call("POST", "/forms", draft, status=201)["id"])
        if publish:
            self.call("POST", f"/forms/{made}/publish")
        return made

    def submit(self, form: str, answers: Json, **headers: str) -> str:
        """The identifier of a response."""
        accepted = self.call("POST", f"/forms/{form}/responses", {"answers": answers}, status=202, **headers)
        return str(accepted["id"])


@dataclass
class House:
    """A running stack, and its doors."""

    stack: Stack

    def tenant(self, *, requests_per_minute: int | None = 0) -> str:
        """A new tenant, by default without a limit."""
        made = tenant.create(
            self.stack.runtime.store.db, f"test {secrets.token_hex(4)}", requests_per_minute=requests_per_minute
        )
        return str(made["_id"])

    def key(self, owner: str, **options: Any) -> str:
        """A key of a tenant, by default with every scope."""
        return keys.create(self.stack.runtime.store.db, owner, "test", **options)[1]

    def client(self, owner: str | None = None, **options: Any) -> Client:
        """A client through nginx, by default of a new tenant."""
        return Client(self.stack.url, self.key(owner or self.tenant(), **options))

    def direct(self, key: str | None = None) -> Client:
        """A client of Gunicorn's own socket, without nginx."""
        return Client("http://localhost", key, str(self.stack.directory / "api.sock"))
