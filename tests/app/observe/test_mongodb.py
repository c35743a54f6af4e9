from typing import Any

from prometheus_client import REGISTRY
from pymongo import MongoClient

from quern.observe import mongodb


def test_mongodb_is_measured_by_what_it_says_of_itself(mongo_client: MongoClient[dict[str, Any]]) -> None:
    def sample(name: str, **labels: str) -> float:
        found = REGISTRY.get_sample_value(f"quern_mongodb_{name}", labels)
        assert found is not None, name
        return found

    mongodb.record(mongo_client.admin.command({"serverStatus": 1, **mongodb.LEFT_OUT}))
    inserts = sample("operations", kind="insert")
    mongo_client.observed.things.insert_many([{} for _ in range(3)])
    mongodb.record(mongo_client.admin.command({"serverStatus": 1, **mongodb.LEFT_OUT}))
    mongo_client.drop_database("observed")
    assert sample("operations", kind="insert") >= inserts + 3
    assert sample("connections", state="current") >= 1
    assert 0 < sample("cache_bytes") < sample("cache_max_bytes")
