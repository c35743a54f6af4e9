"""A desk with forms and responses in MongoDB, and the warehouse beside it."""

from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import orjson
from pymongo.read_concern import ReadConcern

from quern.analytics import integrity
from quern.analytics.etl import Etl, Range, Report
from quern.analytics.manifest import NAME, Manifest
from quern.analytics.settings import AnalyticsSettings
from quern.audit.entry import content_key, entry
from quern.forms import form as forms
from quern.forms.fields import check_answers, compiled
from quern.jobs.model import NewJob, Queue, State
from quern.responses import response as responses
from quern.store import clock, identifier
from quern.store.connection import Db, Document
from quern.workflows import run as workflows
from quern.workflows.definition import parsed

FIELDS: list[dict[str, Any]] = [
    {"name": "sector", "type": "choice", "options": [{"value": "health"}, {"value": "retail", "label": "Shops"}]},
    {"name": "email", "type": "email"},
    {"name": "score", "type": "rating"},
    {"name": "age", "type": "number"},
    {"name": "code", "type": "text"},
    {"name": "comment", "type": "long_text", "max_length": 500_000},
    {"name": "visited", "type": "date"},
    {"name": "agreed", "type": "consent"},
    {"name": "topics", "type": "multiple_choice", "options": [{"value": "price"}, {"value": "speed"}]},
    {
        "name": "people",
        "type": "group",
        "repeated": True,
        "fields": [{"name": "name", "type": "text"}, {"name": "age", "type": "number"}],
    },
]
STEPS: list[dict[str, Any]] = [
    {"name": "topic", "type": "classify", "labels": {"praise": "", "complaint": ""}},
    {"name": "mood", "type": "sentiment"},
    {"name": "gist", "type": "summarize"},
    {"name": "meaning", "type": "embed"},
]


class Desk:
    """One tenant's forms and responses, put into MongoDB as intake does, at any moment."""

    def __init__(self, db: Db, root: Path, tenant: str | None = None) -> None:
        self.db, self.root = db, root
        self.tenant = tenant or identifier.new("ten")
        self.settings = AnalyticsSettings(
            warehouse=root / "warehouse", extract=root / "extract", keep_replaced_seconds=1, memory="256MB"
        )
        self.form = ""

    def publish(self, fields: list[dict[str, Any]] | None = None, steps: list[dict[str, Any]] | None = None) -> int:
        """Publish a form, or its next version; returns the version."""
        definition = {"fields": FIELDS if fields is None else fields}
        workflow = {"steps": STEPS if steps is None else steps}
        if not self.form:
            self.form = forms.create(self.db, self.tenant, "Survey", definition, workflow)["_id"]
        else:
            forms.save_draft(self.db, self.tenant, self.form, name=None, definition=definition, workflow=workflow)
        with self.db.client.start_session() as session, session.start_transaction():
            made = forms.publish(self.db, self.tenant, self.form, session)
        assert made is not None
        return int(made["version"])

    def submit(self, at: datetime, answers: dict[str, Any], **more: Any) -> str:
        """Keep a validated response with its audit entry and its jobs; returns its identifier."""
        standing = forms.get(self.db, self.tenant, self.form)
        assert standing is not None
        number = more.pop("version", standing["version"])
        version = forms.Versions().get(self.db, self.tenant, self.form, number)
        assert version is not None
        checked = check_answers(compiled(version.definition), answers)
        return self.keep({"answers": checked, "version": number, "created": at, **more})

    def keep(self, document: Document) -> str:
        """Keep a response as it is, with what a stored one has besides."""
        identity = identifier.new("rsp")
        version = forms.Versions().get(self.db, self.tenant, self.form, document["version"])
        assert version is not None
        steps = workflows.begin(parsed(version.workflow), document["answers"])
        whole = {
            "_id": identity,
            "tenant": self.tenant,
            "form": self.form,
            "status": "processing",
            "audit_key": content_key(),
            "steps": steps,
            "results": {},
            "actor": "key_desk",
            **document,
        }
        self.db.responses.insert_one(whole)
        at = document["created"]
        self.db.audit.insert_one(
            entry(self.tenant, "key_desk", "response.submitted", identity, detail={"form": self.form}, at=at)
        )
        jobs = [
            NewJob(
                NewJob.derived_id(self.tenant, identity, step),
                self.tenant,
                Queue.LOW,
                "classify",
                {"step": step},
                identity,
                state=State.QUEUED,
            )
            for step in steps
        ]
        self.db.jobs.insert_many([job.document(at) for job in jobs])
        return identity

    def finish(self, response: str, results: dict[str, Any], seconds: float = 12.5) -> None:
        """Write the results of a response's steps, and its end, as the workers do."""
        found = self.db.responses.find_one({"_id": response})
        assert found is not None
        ended = found["created"] + timedelta(seconds=seconds)
        self.db.responses.update_one(
            {"_id": response},
            {
                "$set": {
                    "results": results,
                    "status": "processed",
                    "processed": ended,
                    "steps": dict.fromkeys(found["steps"], "done"),
                }
            },
        )
        self.db.audit.insert_one(entry(self.tenant, "quern", "response.processed", response))

    def erase(self, response: str) -> None:
        with self.db.client.start_session() as session, session.start_transaction():
            assert responses.erase(self.db, self.tenant, response, "key_desk", None, session)

    def etl(self, **more: Any) -> Etl:
        return Etl(self.db, self.settings, **more)

    def run(self, asked: Range | None = None, *, everything: bool = False) -> Report:
        return self.etl().run(asked, everything=everything)

    @property
    def manifest(self) -> Manifest:
        return Manifest.load(self.root / "warehouse")

    def go_on_from(self, token: dict[str, Any]) -> None:
        """Set the stored resume token, as a crash between two writes would."""
        path = self.root / "warehouse" / NAME
        raw = orjson.loads(path.read_bytes())
        raw["source"]["token"] = token
        path.write_bytes(orjson.dumps(raw))

    def lose_the_token(self) -> None:
        """Make the stored token that of an event of 1970: the oplog has no such event any more."""
        with self.db.with_options(read_concern=ReadConcern("majority")).watch() as stream:
            self.submit(clock.now(), {"code": "d"})
            data = stream.next()["_id"]["_data"]
        self.go_on_from({"_data": f"{data[:2]}0000000100000001{data[18:]}"})

    def rows(self, table: str, where: str = "true") -> list[dict[str, Any]]:
        """This tenant's rows of a table, from the published warehouse, read by DuckDB."""
        files = [str(path) for path in self.manifest.files(table, self.tenant)]
        if not files:
            return []
        with duckdb.connect() as connection:
            found = connection.sql(f"FROM read_parquet($files) WHERE {where}", params={"files": files})
            return list(found.to_arrow_table().to_pylist())

    def holds(self) -> bool:
        """Whether the published warehouse and the extract are whole and equal to MongoDB, every day of them."""
        found = integrity.verify(self.db, self.manifest, extracts=self.settings.extract)
        assert found.holds, (found.findings, found.missing_files)
        assert not found.changed_since, "days have changed since the publication"
        return True

    def files(self) -> list[Path]:
        return sorted(path for path in self.root.rglob("*") if path.is_file())


def moment(day: date | str, hour: int = 12, minute: int = 0) -> datetime:
    day = date.fromisoformat(day) if isinstance(day, str) else day
    return datetime(day.year, day.month, day.day, hour, minute, tzinfo=UTC)


def yesterday() -> date:
    return clock.now().date() - timedelta(days=1)


RESULTS: dict[str, Any] = {
    "topic": {"label": "praise", "score": 0.75, "scores": {"praise": 0.75, "complaint": 0.25}},
    "mood": {"label": "positive", "score": 0.5, "scores": {"positive": 0.5, "neutral": 0.3, "negative": 0.2}},
    "gist": {"text": "All was well."},
    "meaning": {"vector": [0.6, 0.8]},
}
