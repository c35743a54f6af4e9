"""What the ETL counts. `quern_etl_mismatched_days` above zero is an alarm: nothing is published while it is."""

from prometheus_client import Counter, Gauge

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
