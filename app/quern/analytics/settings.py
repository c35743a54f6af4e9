"""What the operator decides about analytics."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from quern.analytics.service_settings import ServiceSettings


class AnalyticsSettings(BaseModel):
    """Where the warehouse is, when it is filled, and within which limits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    warehouse: Path | None = Field(
        None,
        description="folder of the warehouse; without it there is no ETL",
        examples=["/var/lib/quern/warehouse"],
    )
    extract: Path | None = Field(
        None,
        description="folder of the extract (JSONL and Parquet by tenant and day); without it none is written",
        examples=["/var/lib/quern/extract"],
    )
    jsonl_compression: Literal["zstd", "gzip", "none"] = "zstd"
    nightly_at: int = Field(30, ge=0, lt=1440, description="minutes after midnight, UTC")
    keep_replaced_seconds: float = Field(
        900, ge=1, le=86_400, description="how long a replaced file stays for those who read it; also after an erasure"
    )
    compact_after_days: int = Field(
        3, ge=0, le=366, description="days after a month's end until its days become one file"
    )
    fallback_days: int = Field(
        2, ge=0, le=3660, description="days rewritten before the last run when the change stream is lost"
    )
    follow_seconds: float = Field(30, ge=0.1, le=3600, description="pause between two runs of `quern etl run --follow`")
    memory: str = Field("512MB", pattern=r"^[0-9]+(MB|GB)$", description="of DuckDB in the ETL", examples=["512MB"])
    threads: int = Field(1, ge=1, le=64, description="of DuckDB in the ETL")
    service: ServiceSettings = ServiceSettings()
    nice: int = Field(10, ge=0, le=19, description="the ETL gives way to everything else on the machine")
    processors: int = Field(
        1, ge=1, le=1024, description="that the worker's ETL may use at once; others stay free of it"
    )

    @model_validator(mode="after")
    def _folders_differ(self) -> AnalyticsSettings:
        if self.warehouse is not None and self.extract is not None:
            one, other = self.warehouse.absolute(), self.extract.absolute()
            if one == other or one in other.parents or other in one.parents:
                raise ValueError("expected `warehouse` and `extract` to be folders apart from each other")
        return self
