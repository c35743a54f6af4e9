"""After an erasure the engine drops what its caches hold of a tenant's texts: a durable job of its own.

The API asks the engine at once, too. The job asks again when nobody can submit the erased words any more: a worker that
read them just before the erasure has lost its lease by then.
"""

from datetime import datetime, timedelta
from typing import Any

from quern.inference.client import EngineAbsent, EngineClient, EngineError
from quern.jobs.handler import Context, Handler, RetryLater
from quern.jobs.model import Job, NewJob, Queue

KIND = "forget"


def forgetting(tenant: str, now: datetime, lease: float) -> NewJob:
    """The job that follows an erasure at `now`; erasures of the same minute share one. `lease`: seconds of a claim."""
    due = now.replace(second=0, microsecond=0) + timedelta(minutes=1, seconds=lease)
    return NewJob(
        id=NewJob.derived_id(tenant, KIND, due.isoformat()), tenant=tenant, queue=Queue.LOW, kind=KIND, due=due
    )


def handler(engine: EngineClient) -> Handler:
    """Asks the engine, and goes on asking one that does not answer."""

    def run(job: Job, _context: Context) -> dict[str, Any]:
        try:
            engine.purge(job.tenant)
        except EngineAbsent:
            # Its caches live in memory only.
            return {"forgotten": True, "engine": "away"}
        except EngineError as error:
            raise RetryLater(
                f"the engine could not be asked to forget: {type(error).__name__}", charged=False
            ) from None
        return {"forgotten": True}

    return Handler(KIND, run)
