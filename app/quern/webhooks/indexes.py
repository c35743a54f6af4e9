"""The indexes that webhooks need, as data for the migration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pymongo import ASCENDING, DESCENDING, IndexModel

from quern.webhooks import deliveries, endpoints

INDEXES: Mapping[str, Sequence[IndexModel]] = {
    endpoints.COLLECTION: (IndexModel([("tenant", ASCENDING), ("_id", ASCENDING)], name="tenant_id"),),
    deliveries.COLLECTION: (
        IndexModel([("tenant", ASCENDING), ("_id", DESCENDING)], name="tenant_newest"),
        IndexModel([("tenant", ASCENDING), ("endpoint", ASCENDING), ("_id", DESCENDING)], name="endpoint_newest"),
        IndexModel([("tenant", ASCENDING), ("job", ASCENDING), ("_id", DESCENDING)], name="job_newest"),
        IndexModel([("tenant", ASCENDING), ("response", ASCENDING), ("_id", DESCENDING)], name="response_newest"),
        IndexModel([("expires_at", ASCENDING)], name="expiry", expireAfterSeconds=0),
    ),
}
