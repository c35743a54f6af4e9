"""Generated responses, audit entries and jobs in MongoDB: realistic sizes, skewed tenants, the same for one seed."""

import random
from datetime import UTC, date, datetime, timedelta
from typing import Any

import bson
import orjson
from bson.raw_bson import RawBSONDocument
from pymongo import WriteConcern

from quern.migrations import migrate
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


def tenant_of(number: int) -> str:
    return identifier.derived("ten", "bench", str(number))


def load(
    db: Db,
    *,
    responses: int,
    tenants: int,
    days: int,
    last: date,
    seed: int = 5,
    jobs_days: int = 30,
    first: bool = False,
) -> dict[str, int]:
    """Fill a database; returns the number of documents by collection. `first`: make its indexes and forms as well.

    Each response has its audit entry; those of the last `jobs_days` days have jobs, as MongoDB forgets older ones.
    """
    if first:
        migrate(db)
    made = {"responses": 0, "audit": 0, "jobs": 0}
    weights = [1 / (number + 1) for number in range(tenants)]
    generators = [_Tenant(number, seed) for number in range(tenants)]
    for generator in generators:
        if first:
            generator.register(db, last - timedelta(days=days))
    for offset in range(days):
        day = last - timedelta(days=days - 1 - offset)
        for generator, weight in zip(generators, weights, strict=True):
            count = max(1, round(responses / days * weight / sum(weights)))
            for start in range(0, count, 2000):
                batch = generator.documents(day, min(2000, count - start), with_jobs=offset >= days - jobs_days)
                for name, documents in batch.items():
                    if documents:
                        db[name].with_options(write_concern=_FAST).insert_many(documents, ordered=False)
                        made[name] += len(documents)
    return made


class _Tenant:
    def __init__(self, number: int, seed: int) -> None:
        self.tenant = tenant_of(number)
        self.random = random.Random(seed * 1000 + number)
        self.forms = [identifier.derived("frm", self.tenant, str(place)) for place in range(2)]
        self.key = identifier.derived("key", self.tenant)
        # Another seed makes other responses.
        self.seed, self.made = seed, 0
        words = _TEXT.split()
        self.texts = [
            " ".join(self.random.choices(words, k=max(3, min(600, int(self.random.lognormvariate(3.4, 0.9))))))
            for _ in range(3000)
        ]

    def register(self, db: Db, first: date) -> None:
        at = datetime(first.year, first.month, first.day, tzinfo=UTC)
        db.tenants.insert_one({"_id": self.tenant, "name": self.tenant, "created": at})
        db.keys.insert_one(
            {
                "_id": self.key,
                "tenant": self.tenant,
                "name": "website",
                "kind": "publishable",
                "created": at,
                "revoked": None,
            }
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

    def documents(self, day: date, count: int, *, with_jobs: bool) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {"responses": [], "audit": [], "jobs": []}
        start = datetime(day.year, day.month, day.day, tzinfo=UTC)
        for _ in range(count):
            response, audit, jobs = self._one(start, with_jobs)
            found["responses"].append(RawBSONDocument(bson.encode(response)))
            found["audit"].append(RawBSONDocument(bson.encode(audit)))
            found["jobs"] += [RawBSONDocument(bson.encode(job)) for job in jobs]
        return found

    def _one(self, start: datetime, with_jobs: bool) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
        random_ = self.random
        self.made += 1
        identity = identifier.derived("rsp", self.tenant, str(self.seed), str(self.made))
        created = start + timedelta(milliseconds=random_.randrange(86_400_000))
        seconds = min(3600.0, random_.lognormvariate(2.5, 1.0))
        processed = created + timedelta(milliseconds=int(seconds * 1000))
        form, comment = random_.choice(self.forms), random_.choice(self.texts)
        answers: dict[str, Any] = {
            "sector": random_.choice(SECTORS),
            "email": f"user{random_.randrange(100_000)}@example.org",
            "score": random_.randrange(1, 6),
            "age": random_.randrange(16, 90),
            "visited": f"2026-{random_.randrange(1, 13):02}-{random_.randrange(1, 29):02}",
            "comment": comment,
            "topics": random_.sample(TOPICS, 2),
            "contact": {"city": "Sheffield", "phone": f"0114 {random_.randrange(10**6)}"},
            "agreed": True,
        }
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
            "actor": self.key,
            "processed": processed,
        }
        audit = {
            "_id": identifier.derived("aud", identity),
            "tenant": self.tenant,
            "at": created,
            "actor": self.key,
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
