"""Fairness: tenants take turns.

One document for each queue, priority and tenant that has work: `{queue, priority, tenant, ready, turn, opening}`.
A claim takes the document whose turn is longest ago (among those of the best priority), puts it at the end, then claims
that tenant's oldest job. So a flood of one tenant delays another's job by at most one job for each tenant that waits.

`opening` is random for each opening: a claimer that found nothing closes the turn only if nobody opened it meanwhile
(a counter would begin again with the next document, and a slow claimer would close a turn that it never saw).
Turns are written unjournaled: a mongod that is killed forgets the newest, and the reconciler opens those that queued
jobs lack.
"""

import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from pymongo import ReturnDocument, UpdateOne

from quern.store.connection import EPHEMERAL, Db, Document


@dataclass(frozen=True)
class Turn:
    """Whose turn it is in a queue at a priority."""

    id: str
    queue: str
    priority: int
    tenant: str
    opening: str


def _id(queue: str, priority: int, tenant: str) -> str:
    return f"{queue}|{priority}|{tenant}"


def open_many(db: Db, work: Iterable[tuple[str, int, str, datetime]]) -> None:
    """Note that there is work: (queue, priority, tenant, due) of each job; earliest due wins."""
    earliest: dict[tuple[str, int, str], datetime] = {}
    for queue, priority, tenant, due in work:
        key = (queue, priority, tenant)
        earliest[key] = min(due, earliest.get(key, due))
    if not earliest:
        return
    now = time.time()
    db.turns.with_options(write_concern=EPHEMERAL).bulk_write(
        [
            UpdateOne(
                {"_id": _id(*key)},
                {
                    "$min": {"ready": due},
                    "$set": {"opening": secrets.token_hex(8)},
                    "$setOnInsert": {"queue": key[0], "priority": key[1], "tenant": key[2], "turn": now},
                },
                upsert=True,
            )
            for key, due in earliest.items()
        ],
        ordered=False,
    )


def take(db: Db, queue: str, now: datetime) -> Turn | None:
    """The next turn of a queue, moved to the end of the round; None when no tenant has work that is due."""
    document = db.turns.with_options(write_concern=EPHEMERAL).find_one_and_update(
        {"queue": queue, "ready": {"$lte": now}},
        {"$set": {"turn": time.time()}},
        sort=[("priority", 1), ("turn", 1)],
        return_document=ReturnDocument.AFTER,
    )
    return _turn(document) if document else None


def due(db: Db, queue: str, now: datetime, most: int) -> list[Turn]:
    """Up to `most` turns of a queue that have work, in no order."""
    return [_turn(document) for document in db.turns.find({"queue": queue, "ready": {"$lte": now}}).limit(most)]


def close(db: Db, turn: Turn, next_due: datetime | None) -> bool:
    """End a turn that has no job due: put off until `next_due`, or drop it when nothing waits.

    False when somebody opened it again, or closed it, since it was read.
    """
    unchanged = {"_id": turn.id, "opening": turn.opening}
    turns = db.turns.with_options(write_concern=EPHEMERAL)
    if next_due is None:
        return turns.delete_one(unchanged).deleted_count == 1
    return turns.update_one(unchanged, {"$set": {"ready": next_due}}).matched_count == 1


def ready_queues(db: Db, now: datetime) -> list[str]:
    """Queues in which some tenant has work that is due."""
    return [str(queue) for queue in db.turns.distinct("queue", {"ready": {"$lte": now}})]


def ready(db: Db) -> dict[tuple[str, int, str], datetime]:
    """From when on there is work: (queue, priority, tenant) → due, of every open turn."""
    return {(turn["queue"], turn["priority"], turn["tenant"]): turn["ready"] for turn in db.turns.find()}


def _turn(document: Document) -> Turn:
    return Turn(document["_id"], document["queue"], document["priority"], document["tenant"], document["opening"])
