"""The API's way to the analytics service: over its UNIX socket, with a time-out and a circuit breaker.

Loads neither an engine nor Arrow. Safe to share between threads.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import httpcore2
import orjson
from pydantic import BaseModel

from quern.analytics.question import FRESHNESS_HEADER, AnswerPage, Freshness, Question
from quern.analytics.service_settings import ServiceSettings
from quern.breaker import Breaker, CircuitOpenError

Kind = Literal["ask", "cursor", "sql", "turn", "busy", "gone", "slow", "empty", "sandbox", "engine"]
_GOOD: Final = 200


class AnalyticsError(Exception):
    """The service answered that it cannot; `kind` says why."""

    def __init__(self, kind: Kind, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class AnalyticsAwayError(Exception):
    """The service is not there, hangs, or is let alone after failures; come again after `retry_after` seconds."""

    def __init__(self, text: str, retry_after: float) -> None:
        super().__init__(text)
        self.retry_after = retry_after


class _FailedError(Exception):
    """What the breaker counts: no answer at all, or one that is no answer."""


@dataclass(frozen=True)
class AnswerFile:
    """A whole answer, and the moment (RFC 3339) before which it is complete."""

    content: bytes
    complete_until: str | None


class SqlRows(BaseModel):
    """What a statement gave: values that JSON lacks come as text."""

    columns: list[str]
    types: list[str]
    rows: list[list[Any]]
    more: bool
    freshness: Freshness


class AnalyticsClient:
    """One service's client."""

    def __init__(self, settings: ServiceSettings) -> None:
        self._socket, self._patience, self._sql_patience = settings.socket, settings.patience, settings.sql_patience
        # What strangers' SQL does must not keep anybody from asking.
        self.breaker, self._sql_breaker = (
            Breaker(settings.breaker_failures, settings.breaker_pause, (_FailedError,)) for _ in range(2)
        )
        self._pool = httpcore2.ConnectionPool(uds=_text(settings.socket), max_connections=32, retries=0)

    def page(self, question: Question, tenant: str, limit: int, cursor: str | None) -> AnswerPage:
        """One page of an answer. Raises AnalyticsError, AnalyticsAwayError."""
        asked = self._asked(question, tenant) | {"limit": limit, "cursor": cursor}
        return AnswerPage.model_validate_json(self._post("/page", asked).content)

    def file(self, question: Question, tenant: str, form: str) -> AnswerFile:
        """A whole answer as csv, parquet, arrow, svg or png. Raises AnalyticsError, AnalyticsAwayError."""
        answer = self._post("/file", self._asked(question, tenant) | {"format": form})
        stamps = [value.decode() for name, value in answer.headers if name.lower() == FRESHNESS_HEADER.lower().encode()]
        return AnswerFile(answer.content, stamps[0] if stamps else None)

    def sql(self, sql: str, tenant: str, rows: int) -> SqlRows:
        """The rows of one statement over a tenant's tables. Raises AnalyticsError, AnalyticsAwayError."""
        asked = {"tenant": tenant, "sql": sql, "rows": rows}
        return SqlRows.model_validate_json(self._post("/sql", asked, self._sql_patience, self._sql_breaker).content)

    @staticmethod
    def _asked(question: Question, tenant: str) -> dict[str, Any]:
        return {"tenant": tenant, "question": question.model_dump(mode="json", by_alias=True)}

    def _post(
        self, path: str, body: dict[str, Any], patience: float | None = None, breaker: Breaker | None = None
    ) -> httpcore2.Response:
        if self._socket is None:
            raise AnalyticsAwayError("analytics is not set up on this server", 60.0)
        try:
            with (breaker or self.breaker).guard():
                answer = self._send(path, orjson.dumps(body), patience or self._patience)
        except CircuitOpenError as error:
            raise AnalyticsAwayError("the analytics service failed lately and is let alone", error.seconds) from None
        except _FailedError as error:
            raise AnalyticsAwayError(f"the analytics service did not answer: {error}", 2.0) from None
        if answer.status != _GOOD:
            fault = orjson.loads(answer.content)
            raise AnalyticsError(fault["kind"], fault["text"])
        return answer

    def _send(self, path: str, body: bytes, patience: float) -> httpcore2.Response:
        timeout = {"connect": 1.0, "write": 5.0, "pool": 1.0, "read": patience}
        try:
            answer = self._pool.request(
                "POST",
                f"http://analytics{path}",
                headers={"Content-Type": "application/json"},
                content=body,
                extensions={"timeout": timeout},
            )
        except httpcore2.TimeoutException:
            raise _FailedError(f"nothing came within {patience:g} s") from None
        except (httpcore2.NetworkError, httpcore2.ProtocolError) as error:
            raise _FailedError(type(error).__name__) from None
        if answer.status != _GOOD and not answer.content.startswith(b'{"kind"'):
            raise _FailedError(f"it answered {answer.status}")
        return answer


def _text(path: Path | None) -> str:
    return str(path) if path is not None else "/nonexistent"
