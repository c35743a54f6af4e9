"""A day costs a day, however much is stored: what a run touches is counted, not timed."""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from pymongo import MongoClient, monitoring

from quern.analytics.etl import Etl
from quern.embedded.mongod import Mongod
from tests.app.analytics.desk import RESULTS, Desk, moment, yesterday

_TOUCHES = frozenset({"open", "os.scandir", "os.listdir", "os.rename", "os.remove", "os.mkdir", "os.rmdir"})
_counted: list[tuple[str, Counter[str]]] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _counted and event in _TOUCHES and arguments:
        below, counts = _counted[-1]
        if isinstance(arguments[0], str | Path) and os.fspath(arguments[0]).startswith(below):
            counts[event] += 1


@contextmanager
def _touches(below: Path) -> Iterator[Counter[str]]:
    """How often what is below a folder is opened, listed, renamed or deleted."""
    counts: Counter[str] = Counter()
    _counted.append((str(below), counts))
    try:
        yield counts
    finally:
        _counted.pop()


class _Commands(monitoring.CommandListener):
    """Commands to MongoDB, and the documents in their answers."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.documents = 0

    def started(self, event: monitoring.CommandStartedEvent) -> None:
        # How often a stream is asked again depends on the clock.
        if event.command_name != "getMore":
            self.counts[event.command_name] += 1

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None:
        cursor = event.reply.get("cursor", {})
        if cursor.get("ns", "").endswith(("responses", "audit", "jobs")):
            self.documents += len(cursor.get("firstBatch", ())) + len(cursor.get("nextBatch", ()))

    def failed(self, event: monitoring.CommandFailedEvent) -> None:
        self.counts["failed"] += 1


@contextmanager
def _examined(desk: Desk) -> Iterator[list[int]]:
    """Index keys and documents that the server looks at for the collections that grow."""
    found: list[int] = []
    desk.db.command("profile", 2)
    try:
        yield found
    finally:
        desk.db.command("profile", 0)
        ours = [f"{desk.db.name}.{name}" for name in ("responses", "audit", "jobs")]
        rows = list(desk.db["system.profile"].find({"ns": {"$in": ours}}))
        found.append(sum(row.get("keysExamined", 0) + row.get("docsExamined", 0) for row in rows))
        desk.db["system.profile"].drop()


def _of_a_day(desk: Desk, mongod: Mongod) -> tuple[Counter[str], Counter[str], int, int]:
    """What a run touches after three responses of yesterday: files, commands, documents sent, looked at."""
    for number in range(3):
        desk.finish(desk.submit(moment(yesterday(), hour=number), {"sector": "health", "code": "new"}), RESULTS)
    commands = _Commands()
    watched = MongoClient[dict[str, Any]](mongod.uri, tz_aware=True, event_listeners=[commands])
    with watched as client, _touches(desk.root) as files, _examined(desk) as examined:
        Etl(client[desk.db.name], desk.settings).run()
    assert desk.holds()
    return files, commands.counts, commands.documents, examined[0]


def test_what_a_day_touches_does_not_grow_with_what_is_stored(desk: Desk, mongod: Mongod) -> None:
    sys.addaudithook(_hook)
    # What a run deletes depends on the clock, if replaced files become old meanwhile.
    desk.settings = desk.settings.model_copy(update={"keep_replaced_seconds": 3600})
    first = date(2026, 1, 1)
    for number in range(5):
        desk.submit(moment(first + timedelta(days=number)), {"sector": "retail"})
    desk.submit(moment(yesterday()), {"sector": "retail"})
    desk.run()
    _of_a_day(desk, mongod)
    few = _of_a_day(desk, mongod)
    for number in range(200):
        desk.submit(moment(first + timedelta(days=number % 100)), {"sector": "retail"})
    desk.run()
    many = _of_a_day(desk, mongod)
    assert few[0]["open"] and few[0]["os.scandir"] and few[1]["find"]
    assert many[:2] == few[:2]
    # Those of the day itself: three more than before, and their audit entries and jobs.
    assert few[2] < many[2] < few[2] + 40
    assert few[3] < many[3] < few[3] + 150
