"""Periodic work: a job whose identifier is its name and minute, so that several schedulers make it once.

A missed minute is caught up: after downtime the latest missed tick of each name is made (not each one missed: a
nightly job that missed three nights runs once, for the range it finds undone).
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from pymongo.errors import DuplicateKeyError

from quern.jobs.enqueue import Enqueuer
from quern.jobs.handler import Tick
from quern.store import clock
from quern.store.connection import Store


def latest_tick(tick: Tick, now: datetime) -> datetime:
    """The last minute at or before `now` at which `tick` is due."""
    minutes = int(now.timestamp() // 60)
    return datetime.fromtimestamp((minutes - (minutes - tick.at) % tick.every) * 60, UTC)


def run_due(store: Store, enqueue: Enqueuer, ticks: Sequence[Tick], now: datetime | None = None) -> None:
    """Make the job of every tick that is due and not made yet."""
    db, moment = store.db, now or clock.now()
    for tick in ticks:
        at = latest_tick(tick, moment)
        seen = db.schedule.find_one({"_id": tick.name})
        if seen and seen["made"] >= at:
            continue
        enqueue(tick.make(at))
        # Last: whoever dies before this makes the same job again, which changes nothing.
        db.schedule.update_one({"_id": tick.name}, {"$max": {"made": at}}, upsert=True)


def take_lead(store: Store, name: str, holder: str, seconds: float) -> bool:
    """Hold, or take over, the lease of a role that only one process should play at a time."""
    now = clock.now()
    try:
        store.db.leads.update_one(
            {"_id": name, "$or": [{"holder": holder}, {"until": {"$lt": now}}]},
            {"$set": {"holder": holder, "until": now + timedelta(seconds=seconds)}},
            upsert=True,
        )
    except DuplicateKeyError:
        return False
    return True
