"""Where a job stands in its queue, and how long it will take.

The queue serves tenants in turns, so ahead of the k-th job of a tenant stand its own k-1 and at most k of every other
tenant of the same priority, and all of the better ones. They start as soon as one of the places that the queue's live
workers have falls free; the time left is until such a place falls free for this job, then its own. The expected time of
a job is an exponentially weighted mean of how long jobs of its kind ran, kept by `learn`; what a running job still
needs is that mean less what it has had, or, once it is over that, a share of it.
"""

from dataclasses import dataclass
from datetime import datetime

from quern.jobs import capacity
from quern.jobs.model import State
from quern.store.connection import EPHEMERAL, Db, Document

#: Beyond this many jobs the place is a lower bound.
MOST = 10_000
#: Of the newest job in the mean: some ten jobs later the old pace is forgotten, for a machine's load changes.
_WEIGHT = 0.2
_UNKNOWN = 1.0
#: Share of its kind's mean that a job is expected to need still when it is over that mean.
_OVERDUE = 0.25


@dataclass(frozen=True)
class Estimate:
    """`place`: 1 is next, None once it runs. `seconds`: expected time until it has ended; None when nobody can say.

    Nobody can say while no worker lives, of a job that waits for others, and of one that has ended.
    """

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
        return Estimate(None, _rest(mean, job, now) if mean is not None else None)
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
    place = sum(ahead.values()) + 1
    places = capacity.of(db, queue)
    if not places:
        return Estimate(place, None)
    overall = sum(means.values()) / len(means) if means else _UNKNOWN
    leased = {"state": State.RUNNING.value, "lease_until": {"$gt": now}, "queue": queue}
    running = db.jobs.find(leased, {"kind": 1, "started": 1}).limit(places)
    rests = [_rest(means.get(other["kind"], overall), other, now) for other in running]
    waiting = [(means.get(kind, overall), count) for kind, count in ahead.items()]
    delay = max(0.0, (job["due"] - now).total_seconds())
    own = means.get(job["kind"], overall)
    return Estimate(place, delay + _until_free(places, rests, waiting) + own)


def _rest(mean: float, job: Document, now: datetime) -> float:
    ran: float = (now - job["started"]).total_seconds()
    return max(mean - ran, mean * _OVERDUE)


def _until_free(places: int, rests: list[float], waiting: list[tuple[float, int]]) -> float:
    """Seconds until a place is free for who stands behind `waiting` (seconds a job, how many of them).

    The order of those that wait is not known, so their work is spread evenly; it is what lies before the moment at
    which one of the places has nothing left to do.
    """
    count = sum(number for _, number in waiting)
    if len(rests) + count < places:
        return 0.0
    if not count:
        return min(rests)
    work = sum(rests) + sum(seconds * number for seconds, number in waiting)
    # When the first place falls free, the others are on average half-way through a job.
    half = work / (len(rests) + count) / 2
    return max(0.0, work / places - half * (places - 1) / places)


def _by_kind(db: Db, query: Document, most: int) -> dict[str, int]:
    pipeline: list[Document] = [
        {"$match": query},
        {"$sort": {"due": 1, "_id": 1}},
        {"$limit": most},
        {"$group": {"_id": "$kind", "n": {"$sum": 1}}},
    ]
    return {row["_id"]: row["n"] for row in db.jobs.aggregate(pipeline)}
