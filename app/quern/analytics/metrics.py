"""What the ETL counts. `quern_etl_mismatched_days` above zero is an alarm: nothing is published while it is."""

from typing import Any, Final

from prometheus_client import Counter, Gauge

#: How a run ends that compared all it built; one that failed says nothing of what differs.
_COMPARED: Final = frozenset({"published", "unchanged", "mismatch"})

MISMATCHED = Gauge(
    "quern_etl_mismatched_days",
    "Tenants' days on which MongoDB and the warehouse differ",
    multiprocess_mode="mostrecent",
)
FRESHNESS = Gauge(
    "quern_etl_freshness_timestamp_seconds",
    "Every response accepted before this moment is in the warehouse",
    multiprocess_mode="mostrecent",
)
DOCUMENTS = Counter("quern_etl_documents_total", "Documents read by the ETL")
RUNS = Counter("quern_etl_runs_total", "Runs of the ETL", ["outcome"])
SECONDS = Gauge("quern_etl_last_run_seconds", "Time that the last run took", multiprocess_mode="mostrecent")


def show_last_run(report: dict[str, Any] | None) -> None:
    """Set what differed in the last run by its report, whoever started it: at night, by hand or following."""
    if report is not None and report["outcome"] in _COMPARED:
        MISMATCHED.set(report["mismatched_days"])
