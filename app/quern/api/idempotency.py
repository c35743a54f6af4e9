"""Idempotency keys: the same unsafe request twice has one effect and the same answer twice.

After the IETF draft "The Idempotency-Key HTTP Header Field": 409 while the first one runs, 422 for another request
under the same key. The record that the request is done is written in the transaction of what it did, so a crash leaves
either both or neither. The answer is kept encrypted under a key that only the client can give again (it may hold a
secret that is shown once). Records vanish after a day.
"""

import hashlib
import hmac
import re
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

import orjson
from pymongo import ASCENDING, IndexModel
from pymongo.client_session import ClientSession
from pymongo.errors import DuplicateKeyError

from quern.api.problem import Problem
from quern.store import clock, identifier
from quern.store.connection import Db
from quern.store.vault import VaultError, from_client_secret

HEADER: Final = "Idempotency-Key"
MAX_LENGTH: Final = 255
PATTERN: Final = r"^[\x21-\x7e]+$"
_KEPT = timedelta(days=1)
_RUNNING = timedelta(seconds=30)

INDEXES = {"idempotency": [IndexModel([("forget", ASCENDING)], expireAfterSeconds=0, name="forget")]}


@dataclass(frozen=True)
class Kept:
    """The answer given before."""

    status: int
    body: bytes
    headers: dict[str, str]


@dataclass(frozen=True)
class Record:
    """A request under way."""

    id: str
    secret: tuple[str, str]
    attempt: str


def check_key(key: str | None) -> str | None:
    """The key, or None when there is none. Raises Problem for one that is empty, too long or not printable ASCII."""
    if key is None:
        return None
    if len(key) > MAX_LENGTH or not re.fullmatch(PATTERN, key):
        raise Problem(400, f"{HEADER}: expected 1 to {MAX_LENGTH} printable ASCII characters without spaces")
    return key


def begin(db: Db, tenant: str, route: str, key: str, token: str, request: bytes) -> Record | Kept:
    """Start a request under a key, or give the answer it had.

    Args:
        route: method and path. token: what the client presented; part of the encryption key. request: body and query.

    Raises:
        Problem: 409 while another one runs, 422 when the key came with another request.
    """
    identity = identifier.derived("idm", tenant, route, key)
    # Keyed by what only the client knows: a short body, such as an address to erase, could else be guessed from it.
    print_ = hmac.new(key.encode(), request, hashlib.sha256).hexdigest()
    now, attempt = clock.now(), identifier.new("run")
    document = {
        "_id": identity,
        "print": print_,
        "state": "running",
        "attempt": attempt,
        "until": now + _RUNNING,
        "forget": now + _KEPT,
    }
    try:
        db.idempotency.insert_one(document)
        return Record(identity, (token, key), attempt)
    except DuplicateKeyError:
        pass
    found = db.idempotency.find_one({"_id": identity})
    if found is None:
        raise Problem(
            409,
            "the first request with this key has just ended without an effect; try again",
            kind="request-in-progress",
            headers={"Retry-After": "1"},
        )
    if found["print"] != print_:
        raise Problem(422, f"this {HEADER} was used with another request; use a new key", kind="idempotency-key-reused")
    if found["state"] == "done":
        try:
            answer = orjson.loads(from_client_secret(token, key).decrypt(found["answer"]))
        except VaultError:
            raise Problem(
                422,
                f"this {HEADER} was used with another API key, and only that one can read the answer; use a new key",
                kind="idempotency-key-reused",
            ) from None
        return Kept(answer["status"], answer["body"].encode(), answer["headers"])
    taken = db.idempotency.update_one(
        {"_id": identity, "state": "running", "attempt": found["attempt"], "until": {"$lt": now}},
        {"$set": {"attempt": attempt, "until": now + _RUNNING}},
    )
    if taken.matched_count != 1:
        raise Problem(
            409,
            "the first request with this key is still running",
            kind="request-in-progress",
            headers={"Retry-After": "1"},
        )
    return Record(identity, (token, key), attempt)


def finish(db: Db, record: Record, answer: Kept, session: ClientSession) -> None:
    """Keep the answer, inside the transaction of what the request did.

    Raises:
        Problem: 409 when another attempt took over; the transaction must then be aborted.
    """
    plain = orjson.dumps({"status": answer.status, "body": answer.body.decode(), "headers": answer.headers})
    sealed = from_client_secret(*record.secret).encrypt(plain)
    written = db.idempotency.update_one(
        {"_id": record.id, "attempt": record.attempt, "state": "running"},
        {"$set": {"state": "done", "answer": sealed}},
        session=session,
    )
    if written.matched_count != 1:
        raise Problem(
            409, "another request with this key took over", kind="request-in-progress", headers={"Retry-After": "1"}
        )


def abandon(db: Db, record: Record) -> None:
    """Forget a request that failed without an effect, so that it can be sent again."""
    db.idempotency.delete_one({"_id": record.id, "attempt": record.attempt, "state": "running"})
