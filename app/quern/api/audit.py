"""`/audit`: a tenant's own entries."""

from datetime import datetime
from typing import Annotated, Any

from pydantic import BaseModel, Field, StringConstraints

from quern.api.operation import Call, Edge, Reply
from quern.api.page import Page, PageQuery, page
from quern.audit import entry as store
from quern.store.connection import Document

edge = Edge("audit")


class AuditEntry(BaseModel):
    id: str
    at: datetime
    actor: str
    action: str
    subject: str
    detail: dict[str, Any] | None = None
    request_id: str | None = None
    seq: int | None = Field(None, description="its number in the chain; null until it is sealed")
    seal: str | None = None


class AuditQuery(PageQuery):
    subject: Annotated[str, StringConstraints(max_length=100)] | None = None


class AuditPage(Page[AuditEntry]):
    """Entries, newest first."""


def _show(document: Document) -> AuditEntry:
    return AuditEntry(
        id=document["_id"], **{name: document.get(name) for name in AuditEntry.model_fields if name != "id"}
    )


@edge.operation(
    "GET", "/audit", scope="audit:read", summary="Read the audit log", query=AuditQuery, answers={200: AuditPage}
)
def list_audit(call: Call) -> Reply:
    """Newest first. `quern audit verify` on the host checks the whole chain."""
    query: AuditQuery = call.query
    after = query.moment_position()
    found = store.listing(call.db, call.tenant, after=after, limit=query.limit + 1, subject=query.subject)
    items, following = page(found, query.limit, _show, lambda item: [item["at"].isoformat(), item["_id"]])
    return Reply(AuditPage(items=items, next_cursor=following))
