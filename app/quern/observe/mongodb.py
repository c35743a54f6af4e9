"""What MongoDB says of itself (the command serverStatus), as metrics: no exporter that is maintained speaks to it."""

from collections.abc import Mapping
from typing import Any, Final

from prometheus_client import Gauge

#: Sections of serverStatus that are not read, and costly or long.
LEFT_OUT: Final = dict.fromkeys(("locks", "metrics", "mirroredReads", "tcmalloc", "transportSecurity", "repl"), 0)

_MODE: Final = "mostrecent"
UP = Gauge("quern_mongodb_up_seconds", "Since mongod started", multiprocess_mode=_MODE)
CONNECTIONS = Gauge("quern_mongodb_connections", "Connections by state", ["state"], multiprocess_mode=_MODE)
OPERATIONS = Gauge(
    "quern_mongodb_operations", "Operations since mongod started, by kind", ["kind"], multiprocess_mode=_MODE
)
CACHE = Gauge("quern_mongodb_cache_bytes", "What WiredTiger's cache holds", multiprocess_mode=_MODE)
CACHE_MAX = Gauge("quern_mongodb_cache_max_bytes", "What it may hold", multiprocess_mode=_MODE)
CACHE_DIRTY = Gauge("quern_mongodb_cache_dirty_bytes", "What of it waits to be written", multiprocess_mode=_MODE)
QUEUED = Gauge("quern_mongodb_operations_waiting", "Operations that wait for a lock", ["kind"], multiprocess_mode=_MODE)


def record(status: Mapping[str, Any]) -> None:
    """Set the gauges from an answer to serverStatus; a section that this version of mongod lacks is passed over."""
    UP.set(status["uptime"])
    for state in ("current", "available", "active"):
        CONNECTIONS.labels(state).set(status["connections"].get(state, 0))
    for kind, count in status.get("opcounters", {}).items():
        if isinstance(count, int):
            OPERATIONS.labels(kind).set(count)
    cache = status.get("wiredTiger", {}).get("cache", {})
    for gauge, name in (
        (CACHE, "bytes currently in the cache"),
        (CACHE_MAX, "maximum bytes configured"),
        (CACHE_DIRTY, "tracked dirty bytes in the cache"),
    ):
        if name in cache:
            gauge.set(cache[name])
    for kind, count in status.get("globalLock", {}).get("currentQueue", {}).items():
        QUEUED.labels(kind).set(count)
