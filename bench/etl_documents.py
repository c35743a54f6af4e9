"""Generated responses, audit entries and jobs in MongoDB: realistic sizes, skewed tenants."""

import random
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from typing import Any

import bson
import numpy as np
import orjson
from bson.raw_bson import RawBSONDocument
from pymongo import WriteConcern

from quern.store import identifier
from quern.store.connection import Db

SECTORS = ["health", "retail", "education", "energy", "transport", "public", "finance", "farming"]
TOPICS = ["price", "speed", "staff", "place", "website"]
_TEXT = (
    "the service was quick and friendly but parking is hard to find near station prices went up since last year "
    "please answer mail sooner staff helped me with form online opening hours queue long waiting great thanks"
)
DEFINITION = {
    "fields": [
        {"name": "sector", "type": "choice", "required": True, "options": [{"value": item} for item in SECTORS]},
        {"name": "email", "type": "email"},
        {"name": "score", "type": "rating", "required": True},
        {"name": "age", "type": "number", "integer": True},
        {"name": "visited", "type": "date"},
        {"name": "comment", "type": "long_text"},
        {"name": "topics", "type": "multiple_choice", "options": [{"value": item} for item in TOPICS]},
        {
            "name": "contact",
            "type": "group",
            "fields": [{"name": "city", "type": "text"}, {"name": "phone", "type": "text"}],
        },
        {"name": "agreed", "type": "consent"},
    ]
}
WORKFLOW = {
    "steps": [
        {"name": "summary", "type": "summarize"},
        {
            "name": "topic",
            "type": "classify",
            "labels": dict.fromkeys(("praise", "complaint", "question", "idea"), ""),
        },
        {"name": "mood", "type": "sentiment"},
        {
            "name": "mail",
            "type": "email",
            "to": ["desk@example.org"],
            "subject": "New response",
            "body": "{{ answers.comment }}",
            "needs": ["summary"],
        },
    ]
}

_FAST = WriteConcern(w=1, j=False)


#: Tenants of a bulk load share this many different responses each, the first more and the last fewer.
_STENCILS = 3000
_ALPHABET = np.frombuffer(b"0123456789abcdefghjkmnpqrstvwxyz", dtype=np.uint8)
_BATCH = 5000
#: API keys of a tenant, by which its responses come: the first brings a sixth of them, the last one in two thousand.
_USERS = 300


def tenant_of(number: int) -> str:
    return identifier.derived("ten", "bench", str(number))


def register(db: Db, *, tenants: int, since: date, seed: int = 5) -> None:
    """The tenants with their forms and keys."""
    for number in range(tenants):
        _Tenant(number, seed).register(db, since)


def load(
    db: Db, *, responses: int, tenants: int, days: int, last: date, jobs_days: int, seed: int = 5
) -> Iterator[int]:
    """Fill a database, day by day; yields the number of responses made so far.

    Each response has its audit entry; those of the last `jobs_days` days have jobs, as MongoDB forgets older ones. For
    speed some thousand documents of a tenant are made and encoded, and come again and again with other identifiers
    (ULIDs, as intake's are) and moments.
    """
    weights = [1 / (number + 1) for number in range(tenants)]
    makers = [_Stencils(_Tenant(number, seed), max(200, _STENCILS // (number + 1))) for number in range(tenants)]
    made = 0
    for offset in range(days):
        day = last - timedelta(days=days - 1 - offset)
        for maker, weight in zip(makers, weights, strict=True):
            count = max(1, round(responses / days * weight / sum(weights)))
            made += count
            for start in range(0, count, _BATCH):
                batch = maker.documents(day, min(_BATCH, count - start), with_jobs=offset >= days - jobs_days)
                for name, documents in batch.items():
                    for first in range(0, len(documents), _BATCH):
                        part = [RawBSONDocument(item) for item in documents[first : first + _BATCH]]
                        db[name].with_options(write_concern=_FAST).insert_many(part, ordered=False)
        yield made


class _Stencils:
    """Some encoded responses of a tenant with their audit entries and jobs, and where in them what changes stands."""

    def __init__(self, tenant: "_Tenant", count: int) -> None:
        self.random = np.random.default_rng(tenant.random.randrange(2**32))
        self.start = datetime(2020, 1, 1, tzinfo=UTC)
        self.stencils = []
        for _ in range(count):
            response, audit, jobs = tenant.one(self.start, True)
            old = response["_id"]
            encoded = [bson.encode(item) for item in (response, audit, *jobs)]
            self.stencils.append([self._places(raw, old.encode(), audit["_id"].encode()) for raw in encoded])

    def _places(
        self, raw: bytes, response: bytes, audit: bytes
    ) -> tuple[bytes, list[int], list[int], list[tuple[int, int]]]:
        """A document; where it has its response's identifier (after the prefix), its own, and moments (with offset)."""
        moments = []
        low, high = (int(at.timestamp() * 1000) for at in (self.start, self.start + timedelta(days=3)))
        for place in range(len(raw) - 8):
            # A moment is type 9, a name, a zero byte and 8 bytes.
            value = int.from_bytes(raw[place : place + 8], "little", signed=True)
            if low <= value < high and raw[place - 1] == 0:
                moments.append((place, value - low))
        own = [] if response in raw[:60] or audit in raw[:60] else [raw.index(b"job_") + 4]
        spans = [place + 4 for place in _all(raw, response)]
        return raw, spans, own + [place + 4 for place in _all(raw, audit)], moments

    def documents(self, day: date, count: int, *, with_jobs: bool) -> dict[str, list[bytes]]:
        random_ = self.random
        midnight = int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp() * 1000)
        created = np.sort(random_.integers(midnight, midnight + 86_400_000, count))
        chosen = random_.integers(0, len(self.stencils), count)
        identities = self._identities(created)
        others = [self._identities(created) for _ in range(5 if with_jobs else 1)]
        found: dict[str, list[bytes]] = {"responses": [], "audit": [], "jobs": []}
        for number, (which, moment) in enumerate(zip(chosen.tolist(), created.tolist(), strict=True)):
            stencil = self.stencils[which]
            base = moment - stencil[0][3][0][1]
            for kind, parts in enumerate(stencil if with_jobs else stencil[:2]):
                raw, ids, own, moments = parts
                made = bytearray(raw)
                for place in ids:
                    made[place : place + 26] = identities[number]
                for place in own:
                    made[place : place + 26] = others[kind - 1][number]
                for place, offset in moments:
                    made[place : place + 8] = (base + offset).to_bytes(8, "little")
                found["responses" if kind == 0 else "audit" if kind == 1 else "jobs"].append(bytes(made))
        return found

    def _identities(self, moments: Any) -> list[bytes]:
        """ULIDs without their prefix."""
        digits = np.empty((len(moments), 26), dtype=np.uint8)
        for place in range(10):
            digits[:, place] = _ALPHABET[(moments >> (5 * (9 - place))) & 31]
        digits[:, 10:] = _ALPHABET[self.random.integers(0, 32, (len(moments), 16))]
        raw = digits.tobytes()
        return [raw[place : place + 26] for place in range(0, len(raw), 26)]


def _all(raw: bytes, wanted: bytes) -> Iterator[int]:
    place = raw.find(wanted)
    while place >= 0:
        yield place
        place = raw.find(wanted, place + 1)


class _Tenant:
    def __init__(self, number: int, seed: int) -> None:
        self.tenant = tenant_of(number)
        self.random = random.Random(seed * 1000 + number)
        self.forms = [identifier.derived("frm", self.tenant, str(place)) for place in range(2)]
        self.keys = [
            identifier.derived("key", self.tenant, *([str(place)] if place else [])) for place in range(_USERS)
        ]
        self.shares = [1 / (place + 1) for place in range(_USERS)]
        self.seed, self.made = seed, 0
        words = _TEXT.split()
        self.texts = [
            " ".join(self.random.choices(words, k=max(3, min(600, int(self.random.lognormvariate(3.4, 0.9))))))
            for _ in range(3000)
        ]

    def register(self, db: Db, first: date) -> None:
        at = datetime(first.year, first.month, first.day, tzinfo=UTC)
        db.tenants.insert_one({"_id": self.tenant, "name": self.tenant, "created": at})
        db.keys.insert_many(
            {
                "_id": key,
                "tenant": self.tenant,
                "name": f"website {place}",
                "kind": "publishable",
                "created": at,
                "revoked": None,
            }
            for place, key in enumerate(self.keys)
        )
        texts = {"definition": orjson.dumps(DEFINITION).decode(), "workflow": orjson.dumps(WORKFLOW).decode()}
        for form in self.forms:
            db.forms.insert_one(
                {
                    "_id": form,
                    "tenant": self.tenant,
                    "name": "Survey",
                    "status": "open",
                    "version": 1,
                    "draft": None,
                    "created": at,
                    "updated": at,
                }
            )
            db.form_versions.insert_one(
                {
                    "_id": f"{form}:1",
                    "tenant": self.tenant,
                    "form": form,
                    "version": 1,
                    "name": "Survey",
                    **texts,
                    "published": at,
                }
            )

    def one(self, start: datetime, with_jobs: bool) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
        random_ = self.random
        self.made += 1
        identity = identifier.derived("rsp", self.tenant, str(self.seed), str(self.made))
        created = start + timedelta(milliseconds=random_.randrange(86_400_000))
        seconds = min(3600.0, random_.lognormvariate(2.5, 1.0))
        processed = created + timedelta(milliseconds=int(seconds * 1000))
        form, comment = random_.choice(self.forms), random_.choice(self.texts)
        actor = random_.choices(self.keys, self.shares)[0]
        answers: dict[str, Any] = {
            "sector": random_.choice(SECTORS),
            "email": f"user{random_.randrange(100_000)}@example.org",
            "score": random_.randrange(1, 6),
            "age": random_.randrange(16, 90),
            "comment": comment,
            "topics": random_.sample(TOPICS, 2),
            "contact": {"city": "Sheffield"},
            "agreed": True,
        }
        # Not everybody answers everything.
        if random_.random() < 0.8:
            answers["visited"] = f"2026-{random_.randrange(1, 13):02}-{random_.randrange(1, 29):02}"
        if random_.random() < 0.7:
            answers["contact"]["phone"] = f"0114 {random_.randrange(10**6)}"
        scores = {name: round(random_.random(), 4) for name in ("praise", "complaint", "question", "idea")}
        moods = {name: round(random_.random(), 4) for name in ("positive", "neutral", "negative")}
        label, mood = max(scores, key=scores.__getitem__), max(moods, key=moods.__getitem__)
        results = {
            "summary": {"text": comment[:160]},
            "topic": {"label": label, "score": scores[label], "scores": scores},
            "mood": {"label": mood, "score": moods[mood], "scores": moods},
            "mail": {"sent": True, "message_id": f"<{identity}@example.org>", "rejected": 0},
        }
        response = {
            "_id": identity,
            "tenant": self.tenant,
            "form": form,
            "version": 1,
            "status": "processed",
            "created": created,
            "answers": answers,
            "audit_key": random_.randbytes(32),
            "steps": dict.fromkeys(results, "done"),
            "results": results,
            "actor": actor,
            "processed": processed,
        }
        audit = {
            "_id": identifier.derived("aud", identity),
            "tenant": self.tenant,
            "at": created,
            "actor": actor,
            "action": "response.submitted",
            "subject": identity,
            "detail": {"form": form, "version": 1},
            "mac": random_.randbytes(32).hex(),
            "request_id": identity[4:],
            "seal": random_.randbytes(32).hex(),
        }
        jobs = []
        for place, step in enumerate(WORKFLOW["steps"] if with_jobs else ()):
            began = created + timedelta(milliseconds=int(seconds * 200 * place))
            ended = began + timedelta(milliseconds=int(seconds * 150))
            log = [("queued", created), ("running", began), ("done", ended)]
            jobs.append(
                {
                    "_id": identifier.derived("job", self.tenant, identity, step["name"]),
                    "tenant": self.tenant,
                    "queue": "default" if step["type"] == "email" else "batched",
                    "kind": step["type"],
                    "payload": {"step": step["name"]},
                    "priority": 5,
                    "state": "done",
                    "due": created,
                    "created": created,
                    "attempt": 1,
                    "failures": 0,
                    "lost": 0,
                    "log": [{"seq": seq + 1, "type": kind, "at": at, "data": {}} for seq, (kind, at) in enumerate(log)],
                    "subject": identity,
                    "started": began,
                    "ended": ended,
                    "error": None,
                }
            )
        return response, audit, jobs
