"""Some documents of each day, compared field by field with their rows as they stand in the files.

What the rows must say is worked out here from the document in the plainest way, one value at a time, by other code than
the flattening that it judges; of the form it takes what `version` says.
"""

import heapq
import math
from collections.abc import Iterator, Sequence
from datetime import date
from itertools import pairwise
from typing import Any, Final, TypeGuard
from zlib import crc32

import orjson
import pyarrow as pa
import pyarrow.compute as pc

from quern.analytics import schema, source
from quern.analytics.flatten import to_json
from quern.analytics.tally import Tally, leaves_of, rows_as_leaves
from quern.analytics.version import Version, Versions
from quern.store import identifier
from quern.store.connection import Document

#: Documents of each kind for each day: those with the smallest hashes, so any may be chosen.
SAMPLE: Final = 3
#: Fields of a document that are named.
_LISTED: Final = 10
Leaf = tuple[str, str, str]
"""Source, path and item of a value; or table and column."""
#: Columns of `fact_answer` that are compared.
COMPARED: Final = ["response", "source", "path", "item", "value_text", "value_number", "value_bool"]
#: Columns that `Sample.find` needs.
READ: Final[dict[str, list[str]]] = {
    "fact_answer": COMPARED,
    "fact_embedding": [],
    **{table.name: table.names for table in (schema.FACT_RESPONSE, schema.FACT_AUDIT, schema.FACT_JOB)},
}
#: The column that names a row's document.
_KEYS: Final = {"fact_answer": "response", "fact_response": "response", "fact_audit": "entry", "fact_job": "job"}
#: Sums of floating-point numbers depend on their order; this much of their size they may differ by.
_TOLERANCE: Final = 1e-9
_TEXTS: Final = ("text", "long_text")
Row = dict[str, Any]


class Sample:
    """The `size` responses, and the `size` audit entries, with the smallest hashes; and as many jobs."""

    def __init__(self, versions: Versions, size: int = SAMPLE) -> None:
        self._versions = versions
        self._responses, self._audit, self._jobs = (_Smallest(size) for _ in range(3))
        self._found: dict[str, list[Row]] = {table: [] for table in _KEYS}

    def offer(self, part: source.DayChunk) -> None:
        """Choose among some responses of a day."""
        self._responses.offer(part.day, part.documents, part.digests)

    def offer_audit(self, part: source.DayChunk) -> None:
        """Choose among some audit entries of a day."""
        self._audit.offer(part.day, part.documents, part.digests)

    def offer_job(self, day: date, job: Document, form: str | None, version: int | None) -> None:
        """Choose a job or not, by its identifier; `form` and `version`: of the response that it works on."""
        self._jobs.offer(day, [{**job, "form": form, "version": version}], [crc32(job["_id"].encode())])

    def find(self, table: str, rows: pa.RecordBatch) -> None:
        """Take down the sample's rows among some of a table, of which there are the columns `READ`."""
        key = _KEYS.get(table)
        if key is not None:
            kept = {"entry": self._audit, "job": self._jobs}.get(key, self._responses).kept
            names = pa.array([identity for _, identity, _, _ in kept], pa.string())
            chosen = rows.filter(pc.is_in(rows.column(key), names))
            self._found[table] += chosen.select(READ[table]).to_pylist()

    def differences(self, moving: set[str] | frozenset[str] = frozenset()) -> list[tuple[date, str]]:
        """Compare the documents, field by field, with the rows that were found; `moving`: jobs that are left out."""
        return [
            *self._responses_apart(),
            *self._apart("fact_audit", [(*one, _audit_row(one[3], -one[0])) for one in self._audit.kept]),
            *self._apart(
                "fact_job", [(*one, _job_row(one[3], one[2])) for one in self._jobs.kept if one[1] not in moving]
            ),
        ]

    def _responses_apart(self) -> Iterator[tuple[date, str]]:
        answers = self._by_key("fact_answer")
        wanted = []
        for mark, identity, day, document in self._responses.kept:
            leaves, there = leaves_of(document), rows_as_leaves(answers.get(identity, []))
            keys = [key for key in leaves.keys() | there.keys() if not equal(leaves.get(key), there.get(key))]
            if keys:
                yield day, differs(identity, keys)
            version = self._versions.get(document["form"], document["version"])
            wanted.append((mark, identity, day, document, _response_row(document, leaves, version, -mark)))
        yield from self._apart("fact_response", wanted)

    def _apart(self, table: str, wanted: Sequence[tuple[int, str, date, Document, Row]]) -> Iterator[tuple[date, str]]:
        found = self._by_key(table)
        for _, identity, day, _, row in wanted:
            there = found.get(identity, [])
            if len(there) != 1:
                yield day, f"{identity}: expected 1 row in {table}, found {len(there)}"
            elif keys := [(table, name, "") for name in row if not _same(name, row[name], there[0][name])]:
                yield day, differs(identity, keys)

    def _by_key(self, table: str) -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = {}
        for row in self._found[table]:
            found.setdefault(row[_KEYS[table]], []).append(row)
        return found


class _Smallest:
    """The `size` documents with the smallest marks: (-mark, identifier, day, document)."""

    def __init__(self, size: int) -> None:
        self._size = size
        self.kept: list[tuple[int, str, date, Document]] = []

    def offer(self, day: date, documents: Sequence[Document], marks: Sequence[int]) -> None:
        for document, mark in zip(documents, marks, strict=True):
            if len(self.kept) < self._size:
                heapq.heappush(self.kept, (-mark, document["_id"], day, document))
            elif -mark > self.kept[0][0]:
                heapq.heapreplace(self.kept, (-mark, document["_id"], day, document))


def differs(identity: str, keys: list[Leaf]) -> str:
    """Which of a document's fields differ. The values themselves stay out of it: they are a person's."""
    listed = [".".join(filter(None, key)) for key in sorted(keys)]
    more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    return f"{identity}: {', '.join(listed[:_LISTED]) or 'rows'}{more} differs"


def equal(stored: Any, flattened: Any) -> bool:
    if isinstance(stored, bool) or isinstance(flattened, bool):
        return stored is flattened
    if isinstance(stored, int) and isinstance(flattened, float):
        return float(stored) == flattened
    if isinstance(stored, float) and math.isnan(stored):
        return isinstance(flattened, float) and math.isnan(flattened)
    return type(stored) is type(flattened) and bool(stored == flattened)


class _Sum(float):
    """A sum of numbers, and of their sizes."""

    size: float = 0.0


def _same(name: str, wanted: Any, found: Any) -> bool:
    if isinstance(wanted, _Sum) and isinstance(found, float):
        # Where one of them, or their sum, is no finite number, it depends on the order.
        return not math.isfinite(wanted.size) or abs(wanted - found) <= max(wanted.size, 1.0) * _TOLERANCE
    if name == "detail" and wanted is not None:
        return found is not None and bool(orjson.loads(found) == wanted)
    if isinstance(wanted, float) and isinstance(found, float) and math.isclose(wanted, found, rel_tol=_TOLERANCE):
        return True
    return equal(wanted, found)


def _response_row(document: Document, leaves: dict[Leaf, Any], version: Version, digest: int) -> Row:
    """What the response's row of `fact_response` must have; `leaves`: the document's."""
    answers, results = document.get("answers") or {}, document.get("results") or {}
    tally, created, processed = Tally(), document["created"], document.get("processed")
    tally.add_documents([document])
    given = {(path, item): value for (side, path, item), value in leaves.items() if side == "answer"}
    texts = [
        value
        for (path, _), value in given.items()
        if isinstance(value, str) and path in version.by_path and version.by_path[path].kind in _TEXTS
    ]
    states = list((document.get("steps") or {}).values())
    email = next((text for leaf in version.leaves if leaf.kind == "email" for text in _texts(answers, leaf.path)), None)
    row = {
        "tenant": document["tenant"],
        "form": document["form"],
        "version": int(document["version"]),
        "response": document["_id"],
        "created": created,
        "day": created.date(),
        "status": document["status"],
        "processed": processed,
        "erased": document.get("erased"),
        "processing_seconds": (processed - created).total_seconds() if processed else None,
        "user": document.get("actor"),
        "respondent": identifier.derived("usr", document["tenant"], email.lower()) if email is not None else None,
        "fields": len(version.leaves),
        "fields_answered": len({path for path, _ in given}),
        "answer_rows": tally.answers.rows,
        "result_rows": tally.results.rows,
        "text_length": sum(map(len, texts)),
        "words": sum(len(text.split()) for text in texts),
        "number_sum": _sum([value for value in given.values() if _is_number(value)]),
        "sentiment": _text(_at(results, [version.first_sentiment, "label"])),
        "label": _text(_at(results, [version.first_label, "label"])),
        "rating": next(_ratings(answers, version), None),
        "steps": len(states),
        "steps_done": states.count("done"),
        "steps_dead": states.count("dead"),
        "hash": digest,
    }
    copies = {
        column: _at(values, path.split("."))
        for values, columns in ((answers, version.answer_columns), (results, version.result_columns))
        for path, column in columns.items()
    }
    for number in range(1, schema.PROMOTED + 1):
        row[f"text_{number}"] = _text(copies.get(f"text_{number}"))
        copied = copies.get(f"number_{number}")
        row[f"number_{number}"] = float(copied) if _is_number(copied) else None
    return row


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _sum(numbers: list[float]) -> _Sum:
    made = _Sum(sum(numbers))
    made.size = sum(map(abs, numbers), 0.0)
    return made


def _at(value: Any, names: Sequence[str | None]) -> Any:
    """The value below these names; None where there is none, or a list is on the way."""
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _below(value: Any, names: list[str]) -> Iterator[Any]:
    """Every value below these names, through lists."""
    if isinstance(value, list):
        for one in value:
            yield from _below(one, names)
    elif not names:
        yield value
    elif isinstance(value, dict):
        yield from _below(value.get(names[0]), names[1:])


def _texts(answers: Document, path: str) -> Iterator[str]:
    yield from (value for value in _below(answers, path.split(".")) if isinstance(value, str))


def _ratings(answers: Document, version: Version) -> Iterator[float]:
    for leaf in version.leaves:
        if leaf.kind == "rating" and leaf.scale:
            numbers = filter(_is_number, _below(answers, leaf.path.split(".")))
            yield from ((float(number) - 1) / (leaf.scale - 1) for number in numbers)


def _audit_row(document: Document, digest: int) -> Row:
    """What the entry's row of `fact_audit` must have; of `detail`, its JSON read again."""
    detail = document.get("detail") or {}
    form, version = detail.get("form"), detail.get("version")
    return {
        **{name: document[name] for name in ("tenant", "at", "actor", "action", "subject")},
        "entry": document["_id"],
        "day": document["at"].date(),
        "form": _text(form),
        "version": version if isinstance(version, int) and not isinstance(version, bool) else None,
        "detail": orjson.loads(to_json(detail)) if detail else None,
        "request_id": document.get("request_id"),
        "hash": digest,
    }


def _job_row(job: Document, day: date) -> Row:
    """What the job's row of `fact_job` must have."""
    log = job.get("log") or []
    begun = [entry["at"] for entry in log if entry["type"] == "running"]
    tries = [
        (after["at"] - entry["at"]).total_seconds()
        for entry, after in pairwise(log)
        if entry["type"] == "running" and after["type"] != "running"
    ]
    return {
        **{name: job[name] for name in ("form", "version", "kind", "queue", "state", "created", "due")},
        **{name: job.get(name) for name in ("started", "ended")},
        "job": job["_id"],
        "response": job["subject"] if job["form"] is not None else None,
        "day": day,
        "step": str((job.get("payload") or {}).get("step", "")),
        "wait_seconds": (begun[0] - job["created"]).total_seconds() if begun else None,
        "run_seconds": math.fsum(tries) if tries else None,
        "attempts": int(job["attempt"]),
        "failures": int(job["failures"]),
    }
