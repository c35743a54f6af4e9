"""The periodic jobs of the `low` queue: the nightly run, and the deletion of replaced files.

The run is a process of its own: it gives way to everything else on the machine, its memory goes back when it ends, and
nothing that it does can stop the worker's heartbeat.
"""

import logging
import os
import subprocess
import sys
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import orjson

from quern.analytics import metrics
from quern.analytics.settings import AnalyticsSettings
from quern.jobs.handler import Context, Handler, Refused, RetryLater, Tick
from quern.jobs.model import Job, NewJob, Queue

_log = logging.getLogger(__name__)

RUN: Final = "analytics.run"
PRUNE: Final = "analytics.prune"
#: Whose jobs these are: no tenant's.
_OWNER: Final = "quern"
_PRUNE_MINUTES: Final = 15
#: Exit statuses of `quern etl run` and `prune`, see `cli.etl`.
MISMATCH: Final = 3
BUSY: Final = 75
_BUSY_AGAIN: Final = 60.0
_STOP_SECONDS: Final = 10.0
_POLL: Final = 0.2
_ERROR_LENGTH: Final = 300


def ticks(settings: AnalyticsSettings) -> list[Tick]:
    """The nightly run and the pruning; none without a warehouse."""
    if settings.warehouse is None:
        return []
    return [
        Tick(RUN, lambda at: _job(RUN, at), every=1440, at=settings.nightly_at),
        Tick(PRUNE, lambda at: _job(PRUNE, at), every=_PRUNE_MINUTES),
    ]


def _job(kind: str, at: datetime) -> NewJob:
    identity = NewJob.derived_id(_OWNER, kind, at.isoformat(timespec="minutes"))
    return NewJob(identity, _OWNER, Queue.LOW, kind)


def handlers() -> list[Handler]:
    return [Handler(RUN, _run, max_failures=5), Handler(PRUNE, _prune, max_failures=3)]


def _run(_: Job, context: Context) -> dict[str, Any]:
    """Bring the warehouse up to now.

    Raises:
        RetryLater: another run holds the warehouse, MongoDB is away, or what was built differs from MongoDB.
    """
    report = _child("run", context)
    metrics.DOCUMENTS.inc(report["documents"])
    metrics.SECONDS.set(report["seconds"])
    metrics.MISMATCHED.set(report["mismatched_days"])
    metrics.RUNS.labels(report["outcome"]).inc()
    if report["mismatched_days"]:
        _log.error("the warehouse would differ from MongoDB", extra={"problems": report["problems"][:5]})
        raise RetryLater(f"{report['mismatched_days']} days would differ from MongoDB; see `quern etl status`")
    metrics.FRESHNESS.set(datetime.fromisoformat(report["freshness"]).timestamp())
    return {name: report[name] for name in ("outcome", "generation", "days", "documents", "seconds", "said")}


def _prune(_: Job, context: Context) -> dict[str, Any]:
    return _child("prune", context)


def _child(command: str, context: Context) -> dict[str, Any]:
    """Run `quern etl <command>` and return what it prints, also after a mismatch.

    Raises:
        RetryLater: it was busy, was stopped, or failed. Refused: its configuration is not usable.
    """
    settings = context.store.settings.analytics
    first = ["nice", "-n", str(settings.nice)] if settings.nice else []
    arguments = [*first, sys.executable, "-m", "quern.cli.main", "etl", command, "--json"]
    with subprocess.Popen(
        arguments,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as child:
        with suppress(OSError):
            # Where the kernel shares the processor between sessions, niceness counts only within one.
            Path(f"/proc/{child.pid}/autogroup").write_text(str(settings.nice))
        with suppress(OSError):
            # It has several threads, and those who wait for an answer find a processor that is free.
            os.sched_setaffinity(child.pid, sorted(os.sched_getaffinity(0))[-settings.processors :])
        while True:
            try:
                out, error = child.communicate(timeout=_POLL)
                break
            except subprocess.TimeoutExpired:
                if context.stop.is_set():
                    _end(child)
                    raise RetryLater("stopped; the next run goes on from there", after=0, charged=False) from None
    if child.returncode == BUSY:
        raise RetryLater("another run holds the warehouse", after=_BUSY_AGAIN, charged=False)
    if child.returncode == 2:
        raise Refused("the ETL's command was not understood")
    if child.returncode not in (0, MISMATCH):
        last = error.decode(errors="replace").strip().splitlines()[-1:] or ["no word"]
        raise RetryLater(f"the ETL ended with {child.returncode}: {last[0][:_ERROR_LENGTH]}")
    found: dict[str, Any] = orjson.loads(out)
    return found


def _end(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    limit = time.monotonic() + _STOP_SECONDS
    while child.poll() is None and time.monotonic() < limit:
        time.sleep(0.05)
    child.kill()
