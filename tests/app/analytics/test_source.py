"""Reading from MongoDB costs what is read, not what is stored."""

from datetime import timedelta
from typing import Any

from quern.analytics.source import SpanReader, snapshot
from quern.store.connection import Store
from tests.app.analytics.desk import moment, yesterday

TENANT = "ten_0123456789ABCDEFGHJKMNPQRS"


def test_a_days_jobs_are_found_without_looking_at_the_tenants_others(store: Store) -> None:
    db = store.db

    def job(number: int) -> dict[str, Any]:
        created = moment(yesterday()) + timedelta(seconds=number)
        return {"_id": f"job_{number:06}", "tenant": TENANT, "subject": f"res_{number // 2:06}", "created": created}

    # As in life: those of the day are the newest, and few of all.
    db.jobs.insert_many([job(number) for number in range(4000)])
    responses = [f"res_{number:06}" for number in range(1800, 2000)]
    with snapshot(db) as session:
        reader = SpanReader(db, session, TENANT, yesterday(), yesterday())
        db.command("profile", 2)
        try:
            found = reader.jobs(responses)
        finally:
            db.command("profile", 0)
    rows = list(db["system.profile"].find({"ns": f"{db.name}.jobs", "op": {"$in": ["query", "getmore"]}}))
    db["system.profile"].drop()
    assert len(found) == 400
    assert sum(row.get("docsExamined", 0) for row in rows) == 400
