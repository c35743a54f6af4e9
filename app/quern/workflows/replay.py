"""A dead job runs again, and its response is under way again."""

from pymongo.client_session import ClientSession

from quern.jobs import queue
from quern.jobs.model import State
from quern.store.connection import Document, Store
from quern.workflows import run


def replay(store: Store, tenant: str | None, job: str, session: ClientSession) -> Document | None:
    """As `queue.replay`, inside the caller's transaction; the step's response is `processing` once more.

    Raises:
        queue.NotPossibleError: the job is not dead, or what it worked on was erased.
    """
    document = queue.replay(store, tenant, job, session)
    if document is None or "subject" not in document:
        return document
    step = document["payload"]["step"]
    if document["_id"] != run.job_id(document["tenant"], document["subject"], step):
        # It sends a message once more and is no step's own job.
        return document
    store.db.responses.update_one(
        {"_id": document["subject"], "tenant": document["tenant"], f"steps.{step}": State.DEAD.value},
        {"$set": {f"steps.{step}": State.QUEUED.value, "status": "processing"}, "$unset": {"processed": ""}},
        session=session,
    )
    return document
