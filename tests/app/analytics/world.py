"""A small house of random forms, responses, jobs and audit entries, as MongoDB would hold them; and its warehouse."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa

from quern.analytics import schema
from quern.analytics.flatten import Flattener, audit_rows, job_rows, own_job_rows
from quern.analytics.manifest import ALL, Manifest, Source
from quern.analytics.partition import PartitionWriter, batch
from quern.analytics.version import Version
from quern.store import identifier

TENANTS = [identifier.derived("ten", "world", str(number)) for number in range(2)]
FORMS = [identifier.derived("frm", "world", str(number)) for number in range(3)]
SECTORS = ["health", "retail", "Ünïcode ß", "o'clock; DROP TABLE \\x", "日本"]
TOPICS = ["price", "speed", "staff"]
LABELS = ["praise", "complaint"]
SENTIMENTS = ["positive", "neutral", "negative"]
WORDS = [
    "parking",
    "ÎLE",
    "straße",
    "x1",
    "it's",
    "数字",
    "Σίσυφος",
    "snake_case",
    "tab\there",
    "né",
    "e\u0301te",
    "İzmir",
]
USERS = [identifier.derived("key", "world", str(number)) for number in range(3)]
#: Around both changes of the clock in Berlin, a leap day and a turn of the year.
TIMES = [
    datetime(2024, 2, 28, 22, tzinfo=UTC),
    datetime(2024, 3, 30, 22, tzinfo=UTC),
    datetime(2024, 10, 26, 22, tzinfo=UTC),
    datetime(2024, 12, 30, 20, tzinfo=UTC),
]
Document = dict[str, Any]


@dataclass
class World:
    """Documents as in MongoDB. `versions`: (form, number) to the version's two JSON texts.

    `names`: of further fields, which every version has: in turn of a text and of a number. `times`: around which days.
    """

    versions: dict[tuple[str, int], tuple[str, str]]
    responses: list[Document]
    jobs: list[Document]
    audit: list[Document]
    names: Sequence[str] = ()
    times: Sequence[datetime] = field(default_factory=lambda: TIMES)

    def owner(self, form: str) -> str:
        return TENANTS[FORMS.index(form) % len(TENANTS)]


def _choice(name: str, values: list[str], kind: str = "choice") -> Document:
    return {"type": kind, "name": name, "options": [{"value": value} for value in values]}


def _definition(source: random.Random, number: int, names: Sequence[str]) -> Document:
    mixed = [{"type": "rating", "name": "mixed"}, _choice("mixed", TOPICS), {"type": "number", "name": "mixed"}]
    optional = [
        mixed[number % 3],
        {"type": "number", "name": "age"},
        {"type": "consent", "name": "terms"},
        _choice("topics", TOPICS, "multiple_choice"),
        {"type": "date", "name": "visit"},
        {"type": "text", "name": "title"},
        {
            "type": "group",
            "name": "place",
            "fields": [_choice("sector", SECTORS[:2]), {"type": "number", "name": "floor"}],
        },
        {
            "type": "group",
            "name": "items",
            "repeated": True,
            "fields": [_choice("kind", TOPICS), {"type": "rating", "name": "stars"}],
        },
    ]
    always = [
        _choice("sector", SECTORS),
        {"type": "rating", "name": "stars", "scale": 5},
        {"type": "email", "name": "email"},
        {"type": "long_text", "name": "comment"},
    ]
    named = [{"type": ("text", "number")[place % 2], "name": name} for place, name in enumerate(names)]
    return {"fields": [*always, *named, *source.sample(optional, source.randint(3, len(optional)))]}


WORKFLOW: dict[str, list[Document]] = {
    "steps": [
        {"type": "classify", "name": "topic", "labels": {"praise": "", "complaint": ""}},
        {"type": "sentiment", "name": "mood"},
        {"type": "embed", "name": "vector"},
    ]
}


def _answer(source: random.Random, field: Document) -> Any:
    match field["type"]:
        case "choice":
            return source.choice(field["options"])["value"]
        case "multiple_choice":
            return source.sample([option["value"] for option in field["options"]], source.randint(0, 3))
        case "rating":
            return source.randint(1, field.get("scale", 5))
        case "number":
            return source.choice([0, 7, -3.25, 0.5, 123456789, 1e15, source.randint(-5, 5)])
        case "consent":
            return source.random() < 0.5
        case "date":
            return (date(2024, 1, 1) + timedelta(days=source.randint(0, 400))).isoformat()
        case "email":
            return source.choice(["ann@example.org", "Bob@example.org", "bob@example.org", "cy@example.org"])
        case "group":
            count = source.randint(0, 3) if field.get("repeated") else 1
            made = [_answers(source, field["fields"]) for _ in range(count)]
            return made if field.get("repeated") else made[0]
    return " ".join(source.choice(WORDS) for _ in range(source.randint(0, 8)))


def _answers(source: random.Random, fields: list[Document]) -> Document:
    return {field["name"]: _answer(source, field) for field in fields if source.random() < 0.8}


def _moment(source: random.Random, times: Sequence[datetime]) -> datetime:
    return source.choice(times) + timedelta(milliseconds=source.randint(0, 3 * 86_400_000))


def world(seed: int, count: int = 60, *, names: Sequence[str] = (), times: Sequence[datetime] = TIMES) -> World:
    """A random house; the same seed makes the same."""
    source = random.Random(seed)
    versions = {}
    for form in FORMS:
        for number in range(1, source.randint(1, 3) + 1):
            definition = _definition(source, number, names)
            versions[form, number] = orjson.dumps(definition).decode(), orjson.dumps(WORKFLOW).decode()
    made = World(versions, [], [], [], names, times)
    grow(made, source, str(seed), count)
    return made


def grow(made: World, source: random.Random, label: str, count: int) -> None:
    """Add random responses, jobs and audit entries; another label makes others."""
    for place in range(count):
        form, number = source.choice(list(made.versions))
        tenant = made.owner(form)
        response = identifier.derived("rsp", label, str(place))
        created = _moment(source, made.times)
        document: Document = {"_id": response, "tenant": tenant, "form": form, "version": number, "created": created}
        if source.random() < 0.08:
            made.responses.append({**document, "status": "erased", "erased": created})
            continue
        _fill(source, made, document, orjson.loads(made.versions[form, number][0])["fields"])
    made.jobs.extend(_without_response(source, made, label, place) for place in range(count // 4))
    for place in range(count // 2):
        tenant = source.choice(TENANTS)
        made.audit.append(
            {
                "_id": identifier.derived("aud", label, str(place)),
                "tenant": tenant,
                "at": _moment(source, made.times),
                "actor": source.choice([*USERS, "operator"]),
                "action": source.choice(["response.submitted", "form.published"]),
                "subject": "x",
            }
        )


def _fill(source: random.Random, made: World, document: Document, fields: list[Document]) -> None:
    created = document["created"]
    status = source.choice(["processed", "processed", "processed", "incomplete", "processing"])
    results: Document = {}
    if source.random() < 0.8:
        results["topic"] = {"label": source.choice(LABELS), "score": 0.5, "scores": {"praise": 0.5, "complaint": 0.25}}
    if source.random() < 0.8:
        results["mood"] = {"label": source.choice(SENTIMENTS), "score": round(source.random(), 3)}
    if source.random() < 0.8:
        results["vector"] = {"vector": [float(part) for part in _float32(source)]}
    states = {step["name"]: source.choice(["done", "done", "dead", "queued"]) for step in WORKFLOW["steps"]}
    document |= {"answers": _answers(source, fields), "results": results, "steps": states, "status": status}
    if source.random() < 0.9:
        document["actor"] = source.choice(USERS)
    if status != "processing":
        document["processed"] = created + timedelta(milliseconds=source.randint(0, 900_000))
    made.responses.append(document)
    for name, state in states.items():
        begun = created + timedelta(milliseconds=source.randint(0, 5000))
        ran = begun + timedelta(milliseconds=source.randint(0, 5000))
        log = [{"type": "queued", "at": created, "seq": 1, "data": {}}]
        if state != "queued":
            log += [{"type": "running", "at": begun, "seq": 2}, {"type": state, "at": ran, "seq": 3}]
        made.jobs.append(
            {
                "_id": identifier.derived("job", document["_id"], name),
                "subject": document["_id"],
                "payload": {"step": name},
                "kind": name,
                "queue": source.choice(["batched", "default"]),
                "state": state,
                "created": created + timedelta(hours=source.choice([0, 0, 30])),
                "due": created,
                "attempt": source.randint(0, 3),
                "failures": 0,
                "log": log,
                "tenant": document["tenant"],
            }
        )


def _without_response(source: random.Random, made: World, label: str, place: int) -> Document:
    """The job of a request to `/v1`."""
    created = _moment(source, made.times)
    begun = created + timedelta(milliseconds=source.randint(0, 5000))
    ended = begun + timedelta(milliseconds=source.randint(0, 5000))
    return {
        "_id": identifier.derived("job", label, str(place)),
        "subject": identifier.derived("air", label, str(place)),
        "payload": {},
        "kind": "openai_chat",
        "queue": source.choice(["high", "batched"]),
        "state": "done",
        "created": created,
        "due": created,
        "attempt": source.randint(1, 3),
        "failures": 0,
        "log": [{"type": name, "at": at} for name, at in (("queued", created), ("running", begun), ("done", ended))],
        "tenant": source.choice(TENANTS),
    }


def _float32(source: random.Random) -> list[float]:
    made: list[float] = pa.array([source.uniform(-1, 1) for _ in range(8)], pa.float32()).to_pylist()
    return made


def publish(made: World, root: Path) -> Manifest:
    """Write the house as a warehouse: a partition a day for recent days, a month for the others."""
    manifest, generation = Manifest(root), 1
    versions = {key: Version.of(*key, *texts) for key, texts in made.versions.items()}
    tables: dict[tuple[str, str, str], list[pa.RecordBatch]] = {}
    periods: dict[tuple[str, str], list[Document]] = {}
    for document in made.responses:
        periods.setdefault((document["tenant"], _period(document["created"])), []).append(document)
    for (tenant, period), documents in periods.items():
        flattener = Flattener()
        for document in documents:
            flattener.add(document, versions[document["form"], document["version"]], 0)
        for table, rows in flattener.batches():
            tables.setdefault((table.name, tenant, period), []).append(rows)
        known = {document["_id"]: document for document in documents}
        jobs = [job for job in made.jobs if job["subject"] in known]
        if jobs:
            tables["fact_job", tenant, period] = [job_rows(jobs, known)]
    for job in made.jobs:
        if not job["subject"].startswith("rsp_"):
            tables.setdefault(("fact_job", job["tenant"], _period(job["created"])), []).append(own_job_rows([job]))
    for tenant in TENANTS:
        entries = [entry for entry in made.audit if entry["tenant"] == tenant]
        for period in {_period(entry["at"]) for entry in entries}:
            chosen = [entry for entry in entries if _period(entry["at"]) == period]
            tables["fact_audit", tenant, period] = [audit_rows(chosen, [0] * len(chosen))]
        leaves = [
            {"tenant": tenant, "form": form, "version": number, **vars(leaf)}
            for (form, number), version in versions.items()
            for leaf in (*version.leaves, *version.steps)
            if made.owner(form) == tenant
        ]
        columns = {name: [leaf[name] for leaf in leaves] for name in schema.DIM_FIELD.names}
        tables["dim_field", tenant, ALL] = [batch(schema.DIM_FIELD, columns)]
    found: dict[tuple[str, str], list[Any]] = {}
    for (name, tenant, period), batches in tables.items():
        with PartitionWriter(root, schema.TABLES[name], tenant, period, generation) as writer:
            for rows in batches:
                writer.write(rows)
            found.setdefault((name, tenant), []).append(writer.close())
    for (name, tenant), partitions in found.items():
        manifest = manifest.with_partitions(name, tenant, partitions)
    now = datetime(2025, 1, 2, tzinfo=UTC)
    return manifest.publish(keep=timedelta(0), freshness=now, source=Source(), at=now)


def _period(moment: datetime) -> str:
    return moment.date().isoformat() if moment.month == 12 else moment.date().isoformat()[:7]
