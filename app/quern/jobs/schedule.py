"""Periodic work: a job whose identifier is its name and minute, so that several schedulers make it once.

A missed minute is caught up: after downtime the latest missed tick of each name is made (not each one missed: a
nightly job that missed three nights runs once, for the range it finds undone).
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from pymongo.errors import DuplicateKeyError

from quern.jobs import queue, turns
from quern.jobs.handler import Tick
from quern.store import clock
from quern.store.connection import Store


def latest_tick(tick: Tick, now: datetime) -> datetime:
    """The last minute at or before `now` at which `tick` is due."""
    minutes = int(now.timestamp() // 60)
    return datetime.fromtimestamp((minutes - (minutes - tick.at) % tick.every) * 60, UTC)


def run_due(store: Store, ticks: Sequence[Tick], now: datetime | None = None) -> queue.Opened:
    """Make the job of every tick that is due and not made yet; returns the work opened."""
    db, moment = store.db, now or clock.now()
    opened: queue.Opened = []
    for tick in ticks:
        at = latest_tick(tick, moment)
        seen = db.schedule.find_one({"_id": tick.name})
        if seen and seen["made"] >= at:
            continue
        made = queue.insert(db, [tick.make(at)])
        turns.open_many(db, made)
        # Last: whoever dies before this makes the same job again, which changes nothing.
        db.schedule.update_one({"_id": tick.name}, {"$max": {"made": at}}, upsert=True)
        opened += made
    return opened


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
