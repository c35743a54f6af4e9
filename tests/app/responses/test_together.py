"""Responses that arrive together: one trip to the database, one answer each."""

from typing import Any

import pytest
from pymongo.database import Database
from pymongo.errors import DuplicateKeyError, PyMongoError, WriteError

from quern.responses import intake

Db = Database[dict[str, Any]]


def test_a_duplicate_is_told_to_the_one_who_sent_it_and_the_others_are_kept(mongo_db: Db) -> None:
    mongo_db.responses.insert_one({"_id": "b", "first": True})
    outcomes = intake._insert([(mongo_db, {"_id": name}) for name in "abc"])
    assert [type(outcome) for outcome in outcomes] == [type(None), DuplicateKeyError, type(None)]
    assert {document["_id"] for document in mongo_db.responses.find()} == {"a", "b", "c"}
    assert mongo_db.responses.find_one({"_id": "b"}) == {"_id": "b", "first": True}


def test_two_of_one_key_in_one_trip_make_one_response(mongo_db: Db) -> None:
    outcomes = intake._insert([(mongo_db, {"_id": "a", "n": number}) for number in range(3)])
    assert [outcome is None for outcome in outcomes].count(True) == 1
    assert mongo_db.responses.count_documents({}) == 1


def test_what_the_database_refuses_is_told_to_the_one_who_sent_it(mongo_db: Db) -> None:
    mongo_db.create_collection("responses", validator={"n": {"$type": "int"}})
    outcomes = intake._insert([(mongo_db, {"_id": "a", "n": 1}), (mongo_db, {"_id": "b", "n": "no"})])
    assert outcomes[0] is None
    assert isinstance(outcomes[1], WriteError)
    assert [document["_id"] for document in mongo_db.responses.find()] == ["a"]


def test_nothing_is_acknowledged_that_is_not_known_to_be_durable(mongo_db: Db) -> None:
    # One node can never give the acknowledgement of two.
    hopeless = mongo_db.with_options(write_concern=mongo_db.write_concern.__class__(w=2, wtimeout=200))
    with pytest.raises(PyMongoError):
        intake._insert([(hopeless, {"_id": "alone"})])
    outcomes = intake._insert([(hopeless, {"_id": name}) for name in "ab"])
    assert all(isinstance(outcome, PyMongoError) for outcome in outcomes)
