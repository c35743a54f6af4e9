"""What the operator decides about the analytics service, which answers questions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

#: For everything about a statement that is neither its start nor itself.
_MARGIN_SECONDS: Final = 2.0


class ServiceSettings(BaseModel):
    """Where it listens and what a question may cost. Durations are in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    socket: Path | None = Field(
        None,
        description="UNIX socket of `quern analytics`; without it the API answers 503 to questions",
        examples=["/run/quern/analytics.sock"],
    )
    patience: float = Field(15.0, gt=0, le=300, description="how long the API waits for an answer")
    breaker_failures: int = Field(3, ge=1, le=100, description="failures in a row until the API stops asking")
    breaker_pause: float = Field(5.0, gt=0, le=600, description="how long it then lets the service alone")
    engine: Literal["duckdb", "clickhouse"] = "duckdb"
    clickhouse_url: str | None = Field(
        None,
        pattern=r"^https?://[^/\s@]+/?$",
        description="of a ClickHouse server that sees the warehouse's folder under its `user_files_path`",
        examples=["http://127.0.0.1:8123"],
    )
    clickhouse_user: str = "default"
    clickhouse_root: str = Field("", description="the warehouse's folder, relative to `user_files_path`")
    seconds: float = Field(12.0, gt=0, le=300, description="of one question")
    threads: Annotated[int, Field(ge=1, le=64)] | None = Field(None, description="default: every core")
    memory_megabytes: int = Field(1024, ge=64, le=1 << 20, description="of the engine")
    at_once: int = Field(8, ge=1, le=64, description="questions answered at the same time")
    keep_seconds: int = Field(86_400, ge=60, le=30 * 86_400, description="how long an answer is kept")
    sql_seconds: float = Field(10.0, gt=0, le=300, description="of one ad-hoc statement, once its process is confined")
    sql_start_seconds: float = Field(15.0, gt=0, le=300, description="until then")
    sql_at_once: int = Field(
        2, ge=1, le=64, description="statements run at the same time, besides `at_once` questions; of one tenant: one"
    )
    sql_memory_megabytes: int = Field(256, ge=64, le=1 << 16, description="of one ad-hoc statement")

    @property
    def sql_patience(self) -> float:
        """How long the API waits for a statement: longer than the service gives it."""
        return self.sql_start_seconds + self.sql_seconds + _MARGIN_SECONDS
