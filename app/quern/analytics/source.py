"""Reading MongoDB for the warehouse: a tenant's day, or a span of days, as of one moment.

Every document is hashed as the bytes that MongoDB sent, before anything is made of it; how many there should be, the
server counts from its indexes alone. So what was built is compared with the database and not with itself. All of it
happens in one snapshot session (`readConcern: snapshot` outside of a transaction, MongoDB 5.0 and later): what changes
in between is not seen, and comes with the next run.

It needs the rights `find` and `changeStream` on the database (the role `read`) and writes nothing.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from hashlib import blake2b
from itertools import islice
from threading import Lock
from typing import Any, Final

import bson
from bson.codec_options import CodecOptions
from pymongo.client_session import ClientSession

from quern.forms import form as forms
from quern.jobs.model import WITHOUT_RESPONSE
from quern.store.connection import Db, Document

#: What of a document the warehouse is about; the outbox, the audit key and later additions never leave the database.
RESPONSE_FIELDS: Final = dict.fromkeys(
    ("tenant", "form", "version", "status", "created", "processed", "erased", "actor", "answers", "results", "steps"), 1
)
AUDIT_FIELDS: Final = dict.fromkeys(("tenant", "at", "actor", "action", "subject", "detail", "mac", "request_id"), 1)
JOB_FIELDS: Final = dict.fromkeys(
    (
        *("subject", "kind", "queue", "state", "created", "due", "started", "ended", "attempt", "failures"),
        *("payload.step", "log.type", "log.at"),
    ),
    1,
)

#: Documents of one answer of the server, which sends 16 MiB at most.
BATCH: Final = 2000
#: Bytes of their BSON that are flattened together at most: answers can be large.
BATCH_BYTES: Final = 16 << 20
#: Documents that are decoded at once: few enough to stay in a processor's cache until they are done with.
PIECE: Final = 32
#: Moments without a zone, for speed: they are all UTC.
_PLAIN: Final[CodecOptions[Document]] = CodecOptions(tz_aware=False)
_MASK: Final = (1 << 64) - 1
_MOMENT: Final = {"responses": "created", "audit": "at", "jobs": "created"}
#: Their index; the planner takes another one, and goes through all of a tenant's, where it finds none of them.
_OWN_JOBS: Final = "without_response"
#: Whose jobs are a tenant's. Those of the service itself (`quern`) cost no tenant anything.
TENANT_PREFIX: Final = "ten_"


class UnknownTenantError(Exception):
    """A tenant was asked for that neither MongoDB nor the warehouse has anything of; the text says what to run."""


@dataclass(frozen=True)
class Chunk:
    """Some documents, and the hash of each one's bytes."""

    documents: list[Document]
    digests: list[int]
    size: int = 0
    """Bytes of their BSON."""

    def by_day(self, moment: str) -> "Iterator[DayChunk]":
        """Its runs of documents of one day, by the field that holds their moment, of which they are in order."""
        start = 0
        last = self.documents[-1][moment].date()
        if self.documents[0][moment].date() == last:
            yield DayChunk(self.documents, self.digests, day=last)
            return
        while start < len(self.documents):
            day = self.documents[start][moment].date()
            end = start + 1
            while end < len(self.documents) and self.documents[end][moment].date() == day:
                end += 1
            yield DayChunk(self.documents[start:end], self.digests[start:end], day=day)
            start = end


@dataclass(frozen=True, kw_only=True)
class DayChunk(Chunk):
    """Documents of one day."""

    day: date


@contextmanager
def snapshot(db: Db) -> Iterator[ClientSession]:
    """A session whose readings all see the same moment; it must end within 300 seconds, the server's default."""
    with db.client.start_session(snapshot=True) as session:
        yield session


def digest(raw: bytes | memoryview) -> int:
    """64 bits (signed) of BLAKE2b over a document's BSON."""
    return int.from_bytes(blake2b(raw, digest_size=8).digest(), "little", signed=True)


def split(raw: bytes) -> Iterator[memoryview]:
    """The documents in an answer of the server: each begins with its length."""
    view, place = memoryview(raw), 0
    while place < len(raw):
        end = place + int.from_bytes(view[place : place + 4], "little")
        yield view[place:end]
        place = end


def bounds(day: date) -> tuple[datetime, datetime]:
    """First moment of a UTC day, and of the next."""
    start = datetime.combine(day, time(), UTC)
    return start, start + timedelta(days=1) if day < date.max else start


def tenants(db: Db, session: ClientSession | None = None) -> list[str]:
    """Every tenant with a response, an audit entry, a form or a job, by jumps over the indexes."""
    found: set[str] = set()
    for collection in ("responses", "audit", "forms"):
        found |= set(db[collection].distinct("tenant", session=session))
    found |= {name for name in db.jobs.distinct("tenant", session=session) if name.startswith(TENANT_PREFIX)}
    return sorted(found)


def tenants_asked_for(db: Db, kept: Iterable[str], tenant: str | None) -> list[str]:
    """The one, or all: those in MongoDB, and those `kept` by a warehouse.

    Raises:
        UnknownTenantError: the one is not among all.
    """
    every = sorted({*tenants(db), *kept})
    if tenant is None:
        return every
    if tenant not in every:
        raise UnknownTenantError(
            f"expected a tenant with responses or forms, found {tenant!r}; `quern tenant list` has them all"
        )
    return [tenant]


def days(db: Db, tenant: str, since: date | None = None, until: date | None = None) -> dict[date, int]:
    """Days of [since, until) on which a tenant has responses, audit entries or jobs without a response, and how many;
    from the indexes alone."""
    found: dict[date, int] = {}
    span = {"$gte": bounds(since or date.min)[0], "$lt": bounds(until or date.max)[0]}
    of_forms = {"form": {"$in": db.responses.distinct("form", {"tenant": tenant})}}
    matches = {
        "responses": {"tenant": tenant, "created": span, **of_forms},
        "audit": {"tenant": tenant, "at": span},
        "jobs": _own_jobs(tenant, span),
    }
    for collection, match in matches.items():
        options: dict[str, Any] = {"hint": _OWN_JOBS} if collection == "jobs" else {}
        for row in db[collection].aggregate([{"$match": match}, _by_day(_MOMENT[collection])], **options):
            day = row["_id"].date()
            found[day] = found.get(day, 0) + row["count"]
    return found


def _own_jobs(tenant: str, span: Document) -> Document:
    """A tenant's jobs that work on no response, made in a span of time."""
    return {"tenant": tenant if tenant.startswith(TENANT_PREFIX) else None, "created": span, **WITHOUT_RESPONSE}


def _by_day(moment: str) -> Document:
    return {"$group": {"_id": {"$dateTrunc": {"date": f"${moment}", "unit": "day"}}, "count": {"$sum": 1}}}


class SpanReader:
    """A tenant's days from the first to the last, as of one moment, in the order of time where they are several."""

    def __init__(self, db: Db, session: ClientSession, tenant: str, first: date, last: date) -> None:
        self._db, self._session, self._tenant, self._sorted = db, session, tenant, first != last
        self._one_at_a_time = Lock()
        """A session is no two threads' at once."""
        start, end = bounds(first)[0], bounds(last)[1]
        # Each form by name: the index begins with tenant and form.
        listed = db.responses.distinct("form", {"tenant": tenant}, session=session)
        self._responses: Document = {
            "tenant": tenant,
            "form": {"$in": listed},
            "created": {"$gte": start, "$lt": end},
        }
        self._audit: Document = {"tenant": tenant, "at": {"$gte": start, "$lt": end}}
        self._own_jobs: Document = _own_jobs(tenant, {"$gte": start, "$lt": end})

    def responses(self) -> Iterator[Chunk]:
        return self._chunks("responses", self._responses, RESPONSE_FIELDS)

    def audit(self) -> Iterator[Chunk]:
        return self._chunks("audit", self._audit, AUDIT_FIELDS)

    def jobs(self, responses: Sequence[str]) -> list[Document]:
        """The jobs that work on some responses, by index; with moments without a zone, as everywhere here."""
        query = {"subject": {"$in": list(responses)}, "tenant": self._tenant}
        found = self._db.jobs.with_options(codec_options=_PLAIN).find(query, JOB_FIELDS, session=self._session)
        # A day's jobs are the newest: the planner, which tries a hundred, finds these as soon by going through all of
        # the tenant's, and then goes through all.
        found = found.hint("by_subject")
        with self._one_at_a_time:
            return list(found)

    def own_jobs(self) -> Iterator[list[Document]]:
        """The jobs that work on no response, BATCH at most at once: requests to `/v1`, test events and the like."""
        found = self._db.jobs.with_options(codec_options=_PLAIN).find(
            self._own_jobs, {**JOB_FIELDS, "tenant": 1}, session=self._session, batch_size=BATCH, hint=_OWN_JOBS
        )
        while piece := list(islice(found, BATCH)):
            yield piece

    def count_own_jobs(self) -> int:
        """How many those are, counted by the server."""
        return self._db.jobs.count_documents(self._own_jobs, session=self._session, hint=_OWN_JOBS)

    def counts(self) -> dict[str, dict[date, int]]:
        """How many responses and audit entries each day has, counted by the server from its indexes alone."""
        return {
            name: {
                row["_id"].date(): row["count"]
                for row in self._db[name].aggregate([{"$match": query}, _by_day(_MOMENT[name])], session=self._session)
            }
            for name, query in (("responses", self._responses), ("audit", self._audit))
        }

    def count_jobs(self, responses: Sequence[str]) -> int:
        """Jobs of some responses, counted by the server from its index alone."""
        subjects = {"subject": {"$in": list(responses)}}
        with self._one_at_a_time:
            return self._db.jobs.count_documents(subjects, session=self._session, hint="by_subject")

    def hashes(self) -> dict[str, int]:
        """Each response's hash by identifier: to name the rows that differ."""
        return {
            document["_id"]: number
            for chunk in self.responses()
            for document, number in zip(chunk.documents, chunk.digests, strict=True)
        }

    def audit_hashes(self) -> dict[str, int]:
        """Each audit entry's, likewise."""
        return {
            document["_id"]: number
            for chunk in self.audit()
            for document, number in zip(chunk.documents, chunk.digests, strict=True)
        }

    def _raw(self, collection: str, query: Document, fields: dict[str, int]) -> Iterator[bytes]:
        order = [(_MOMENT[collection], 1)] if self._sorted else None
        found = self._db[collection].find_raw_batches(
            query, fields, session=self._session, batch_size=BATCH, sort=order
        )
        return self._ahead(iter(found))

    def _ahead(self, found: Iterator[bytes]) -> Iterator[bytes]:
        """The same, the next always being fetched while the last is worked on: the server need not wait, nor we."""

        def following() -> bytes | None:
            with self._one_at_a_time:
                return next(found, None)

        with ThreadPoolExecutor(1, "ahead") as fetching:
            pending = fetching.submit(following)
            while (raw := pending.result()) is not None:
                pending = fetching.submit(following)
                yield raw

    def _chunks(self, collection: str, query: Document, fields: dict[str, int]) -> Iterator[Chunk]:
        for raw in self._raw(collection, query, fields):
            parts = list(split(raw))
            place = 0
            for first in range(0, len(parts), PIECE):
                piece = parts[first : first + PIECE]
                end = place + sum(map(len, piece))
                yield Chunk(bson.decode_all(raw[place:end], _PLAIN), list(map(digest, piece)), end - place)
                place = end


def signed(number: int) -> int:
    """The lowest 64 bits of a sum as a signed number: how sums of hashes are compared."""
    low = number & _MASK
    return low - (1 << 64) if low >> 63 else low


def versions(db: Db, tenant: str) -> list[Document]:
    """All published versions of a tenant's forms, by form and number."""
    found = db.form_versions.find({"tenant": tenant, "form": {"$in": db.forms.distinct("_id", {"tenant": tenant})}})
    return sorted(found, key=lambda document: (document["form"], document["version"]))


def version(db: Db, form: str, number: int) -> forms.Version | None:
    """One published version."""
    found = db.form_versions.find_one({"_id": f"{form}:{number}"})
    if found is None:
        return None
    return forms.Version(form, found["tenant"], number, found["name"], found["definition"], found["workflow"])


def people(db: Db, tenant: str) -> list[Document]:
    """A tenant's API keys, without their hashes."""
    return list(db.keys.find({"tenant": tenant}, {"name": 1, "kind": 1, "created": 1, "revoked": 1}).sort("_id", 1))


def form_states(db: Db, tenant: str) -> dict[str, str]:
    """The state of each of a tenant's forms."""
    return {row["_id"]: row["status"] for row in db.forms.find({"tenant": tenant}, {"status": 1})}
