"""ClickHouse in this process, by `chdb`: the same statements and settings that a server gets."""

from collections.abc import Mapping

import chdb

from quern.analytics.clickhouse_engine import SETTINGS
from quern.analytics.engine import EngineError


class Chdb:
    """Carries statements to the ClickHouse that is loaded into this process."""

    def send(self, sql: str, parameters: Mapping[str, str], seconds: float) -> bytes:
        """Raises EngineError."""
        settings = ", ".join(f"{name} = '{value}'" for name, value in SETTINGS.items())
        limited = f"{sql} SETTINGS {settings}, max_execution_time = {seconds:g}"
        try:
            found = chdb.query(limited, "ArrowStream", params=dict(parameters))  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise EngineError(str(error)[:2000]) from error
        raw: bytes = found.bytes()
        return raw

    def close(self) -> None:
        """Nothing is held."""
