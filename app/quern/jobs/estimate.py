"""Where a job stands in its queue, and how long it will take.

The queue serves tenants in turns, so ahead of the k-th job of a tenant stand its own k-1 and at most k of every other
tenant of the same priority, and all of the better ones. The time left is their expected work divided by what the
queue's workers do at once, then the job's own. Expected work of a kind is an exponentially weighted mean of how long
its jobs ran, kept by `learn`.
"""

from dataclasses import dataclass
from datetime import datetime

from quern.jobs.model import CONCURRENCY, Queue, State
from quern.store.connection import EPHEMERAL, Db, Document

#: Beyond this many jobs the place is a lower bound.
MOST = 10_000
_WEIGHT = 0.1
_UNKNOWN = 1.0


@dataclass(frozen=True)
class Estimate:
    """`place`: 1 is next, None once it runs. `seconds`: expected time until it has ended; None when nobody can say."""

    place: int | None
    seconds: float | None


def learn(db: Db, queue: str, kind: str, seconds: float) -> None:
    """Take one run's duration into the mean of its kind."""
    db.durations.with_options(write_concern=EPHEMERAL).update_one(
        {"_id": f"{queue}|{kind}"},
        [
            {
                "$set": {
                    "queue": queue,
                    "kind": kind,
                    "n": {"$add": [{"$ifNull": ["$n", 0]}, 1]},
                    "mean": {
                        "$let": {
                            # The first few count in full, so that the mean is right soon.
                            "vars": {"w": {"$max": [_WEIGHT, {"$divide": [1, {"$add": [{"$ifNull": ["$n", 0]}, 1]}]}]}},
                            "in": {
                                "$add": [
                                    {"$multiply": [{"$ifNull": ["$mean", seconds]}, {"$subtract": [1, "$$w"]}]},
                                    {"$multiply": [seconds, "$$w"]},
                                ]
                            },
                        }
                    },
                }
            }
        ],
        upsert=True,
    )


def _means(db: Db, queue: str) -> dict[str, float]:
    return {row["kind"]: row["mean"] for row in db.durations.find({"queue": queue})}


def estimate(db: Db, job: Document, now: datetime) -> Estimate:
    """Place and time left of a job document. Reads indexes only; at most MOST entries."""
    state = State(job["state"])
    queue = job["queue"]
    if state is State.RUNNING:
        mean = _means(db, queue).get(job["kind"])
        ran = (now - job["started"]).total_seconds()
        return Estimate(None, max(mean - ran, mean * 0.1) if mean is not None else None)
    if state is not State.QUEUED:
        return Estimate(None, None)
    means = _means(db, queue)
    lane = {"queue": queue, "state": State.QUEUED.value}
    before = {"$or": [{"due": {"$lt": job["due"]}}, {"due": job["due"], "_id": {"$lt": job["_id"]}}]}
    mine = _by_kind(db, {**lane, "priority": job["priority"], "tenant": job["tenant"], **before}, MOST)
    own_place = sum(mine.values()) + 1
    ahead = mine
    for turn in db.turns.find({"queue": queue, "ready": {"$lte": now}, "priority": {"$lte": job["priority"]}}):
        if turn["priority"] == job["priority"] and turn["tenant"] == job["tenant"]:
            continue
        most = own_place if turn["priority"] == job["priority"] else MOST
        theirs = {**lane, "priority": turn["priority"], "tenant": turn["tenant"], "due": {"$lte": now}}
        for kind, count in _by_kind(db, theirs, most).items():
            ahead[kind] = ahead.get(kind, 0) + count
    overall = sum(means.values()) / len(means) if means else _UNKNOWN
    work = sum(count * means.get(kind, overall) for kind, count in ahead.items())
    leased = {"state": State.RUNNING.value, "lease_until": {"$gt": now}, "queue": queue}
    for running in db.jobs.find(leased, {"kind": 1, "started": 1}).limit(256):
        mean = means.get(running["kind"], overall)
        work += max(mean - (now - running["started"]).total_seconds(), mean * 0.1)
    delay = max(0.0, (job["due"] - now).total_seconds())
    own = means.get(job["kind"], overall)
    return Estimate(sum(ahead.values()) + 1, delay + work / CONCURRENCY[Queue(queue)] + own)


def _by_kind(db: Db, query: Document, most: int) -> dict[str, int]:
    pipeline: list[Document] = [
        {"$match": query},
        {"$sort": {"due": 1, "_id": 1}},
        {"$limit": most},
        {"$group": {"_id": "$kind", "n": {"$sum": 1}}},
    ]
    return {row["_id"]: row["n"] for row in db.jobs.aggregate(pipeline)}
