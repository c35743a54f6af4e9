"""From documents to rows: nested answers and AI results, flattened by the version of the form that was answered.

Pure: documents in, Arrow batches out. A value goes to the column of its own type, never guessed: a text of digits stays
a text. What a version does not explain (it cannot come in by the API) still becomes rows, of kind `unknown`, so that
nothing that is in MongoDB is missing in the warehouse.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Any, Final, NamedTuple

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from quern.analytics import schema
from quern.analytics.partition import batch
from quern.analytics.shred import Column, Kind, Stripe, members, shred, split_by_type
from quern.analytics.version import Leaf, Version
from quern.store import identifier
from quern.store.connection import Document

_FIRST_DAY: Final = date(1900, 1, 1)
_LAST_DAY: Final = date(2299, 12, 31)
_TEXTS: Final = frozenset({"text", "long_text"})
#: Members of a response's document that are columns.
_OWN: Final = ("_id", "created", "processed", "erased", "status", "actor")
#: Documents whose values are taken out at once, before they have left the processor's cache.
_AT_ONCE: Final = 32


class Flattener:
    """Turns response documents into batches; made anew for every few thousand of them, whose values it holds."""

    def __init__(self) -> None:
        self.explained = True
        """After `batches`: whether every value was what its version says; else `fact_response` lacks copies of some."""
        self.count = 0
        self._groups: dict[tuple[str, str, int], _Group] = {}

    def add(self, document: Document, version: Version, digest: int) -> None:
        """Add one response; `digest` is the hash of its BSON."""
        key = document["tenant"], version.form, version.number
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Group(document["tenant"], version)
        self.count += 1
        group.digests.append(digest)
        group.waiting.append(document)
        if len(group.waiting) >= _AT_ONCE:
            group.shred()

    def batches(self) -> Iterator[tuple[schema.Table, pa.RecordBatch]]:
        """What was added, in batches of which each is of one form, those of answers also of one path."""
        for _, group in sorted(self._groups.items(), key=lambda item: item[0]):
            group.shred()
            flat = _Flat(group)
            yield from flat.batches()
            self.explained = self.explained and flat.explained


class _Place(NamedTuple):
    """Of what some values are, and of which type: a path's values of one place become a batch of `fact_answer`."""

    source: str
    path: str
    kind: str
    type: Kind
    single: bool
    """No list is above them."""
    member: tuple[str, str] | None = None
    """Of a result: step and member, where the value is the member itself."""


@dataclass
class _Values:
    rows: list[int] = field(default_factory=list)
    items: list[str] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)


class _Group:
    """The values of responses of one tenant to one version of a form."""

    def __init__(self, tenant: str, version: Version) -> None:
        self.tenant, self.version = tenant, version
        self.digests: list[int] = []
        self.waiting: list[Document] = []
        self.own: dict[str, list[Any]] = {name: [] for name in _OWN}
        """Members of the documents."""
        self.states: list[list[str]] = []
        self.places: dict[_Place, _Values] = {}
        self.vectors: dict[str, _Values] = {}
        self.explained = True

    def shred(self) -> None:
        """Take the values out of the waiting documents: few at a time, since they do not fit in a processor's cache."""
        documents, first = self.waiting, len(self.digests) - len(self.waiting)
        self.waiting = []
        for name, values in self.own.items():
            values += [document.get(name) for document in documents]
        self.states += [list((document.get("steps") or {}).values()) for document in documents]
        rows = list(range(first, first + len(documents)))
        self._read_answers(rows, documents)
        self._read_results(rows, documents)

    def _read_answers(self, rows: list[int], documents: list[Document]) -> None:
        by_path = self.version.by_path
        for column in members(None, rows, [document.get("answers") or {} for document in documents]):
            for stripe in shred(column):
                leaf = by_path.get(stripe.path)
                kind = leaf.kind if leaf is not None and stripe.kind is not Kind.OTHER else "unknown"
                self._put(_Place("answer", stripe.path, kind, stripe.kind, stripe.items is None), stripe)

    def _read_results(self, rows: list[int], documents: list[Document]) -> None:
        for column in members(None, rows, [document.get("results") or {} for document in documents]):
            step = column.path
            kind = self.version.step_kinds.get(step, "")
            if not kind:
                self.explained = False
            results, rest = split_by_type(column, dict)
            self._plain("other", rest)
            for member in members(None, results.rows, results.values):
                self._read_member(kind, step, member.path, member._replace(path=f"{step}.{member.path}"))

    def _read_member(self, step_kind: str, step: str, member: str, column: Column) -> None:
        if member == "vector":
            vectors, column = split_by_type(column, list)
            found = self.vectors.setdefault(step, _Values())
            found.rows += vectors.rows
            found.values += vectors.values
        elif member == "scores":
            scores, column = split_by_type(column, dict)
            for label in members(None, scores.rows, scores.values):
                self._plain("scores", label._replace(path=column.path, items=[label.path] * len(label.rows)))
        kind = _RESULT_KINDS.get((step_kind, member), _MEMBER_KINDS.get(member, "other"))
        self._plain(kind, column, (step, member))

    def _plain(self, kind: str, column: Column, member: tuple[str, str] | None = None) -> None:
        """Take a column of JSON values by their own types."""
        for stripe in shred(column):
            own = member if stripe.path == column.path else None
            self._put(_Place("result", stripe.path, kind, stripe.kind, stripe.items is None, own), stripe)

    def _put(self, place: _Place, stripe: Stripe) -> None:
        found = self.places.get(place)
        if found is None:
            found = self.places[place] = _Values()
        found.rows += stripe.rows
        found.values += stripe.values
        if stripe.items is not None:
            found.items += stripe.items


class _Answers(NamedTuple):
    """Rows of `fact_answer` of one place; `rows` None: one for each response."""

    place: _Place
    rows: Any
    items: list[str]
    values: pa.Array


class _Flat:
    """The batches of a group of responses; what rows have in common shares its memory."""

    def __init__(self, group: _Group) -> None:
        self.explained = group.explained
        self._group, self._version, self._count = group, group.version, len(group.digests)
        self._constants: dict[tuple[Any, int], pa.Array] = {}
        self._key = self._keys()
        self._copies: dict[str, pa.Array] = {}
        """Columns of `fact_response` that repeat a value."""
        names = ("answered", "answer_rows", "result_rows", "length", "words")
        self._figures: dict[str, Any] = {name: np.zeros(self._count, np.int64) for name in names}
        self._figures["sum"] = np.zeros(self._count)

    def batches(self) -> Iterator[tuple[schema.Table, pa.RecordBatch]]:
        answers = [self._of_place(place, found) for place, found in sorted(self._group.places.items(), key=_by_path)]
        self._count_answered(answers)
        yield schema.FACT_RESPONSE, self._responses()
        for found in answers:
            yield schema.FACT_ANSWER, self._answer_rows(found)
        for step, vectors in self._group.vectors.items():
            if vectors.rows:
                columns = {**self._keys_of(np.array(vectors.rows), len(vectors.rows)), "vector": vectors.values}
                columns["step"] = self._constant(step, len(vectors.rows))
                yield schema.FACT_EMBEDDING, batch(schema.FACT_EMBEDDING, columns)

    def _keys(self) -> dict[str, pa.Array]:
        own = self._group.own
        created = pa.array(own["created"], pa.timestamp("ms"))
        processed = pa.array(own["processed"], pa.timestamp("ms"))
        milliseconds = pc.subtract(processed.cast(pa.int64()), created.cast(pa.int64()))
        return {
            "response": pa.array(own["_id"], pa.string()),
            "created": created,
            "day": created.cast(pa.date32(), safe=False),
            "processed": processed,
            "processing_seconds": pc.divide(milliseconds.cast(pa.float64()), 1000.0),
        }

    def _keys_of(self, rows: Any, count: int) -> dict[str, pa.Array]:
        """The keys of the responses of some rows; None: of all."""
        names = ("response", "created", "day", "processing_seconds")
        if rows is None:
            found = {name: self._key[name] for name in names}
        else:
            places = pa.array(rows)
            found = {name: self._key[name].take(places) for name in names}
        same = (self._group.tenant, self._version.form, self._version.number)
        return found | {
            name: self._constant(value, count) for name, value in zip(("tenant", "form", "version"), same, strict=True)
        }

    def _constant(self, value: Any, count: int, kind: pa.DataType | None = None) -> pa.Array:
        """`count` times a value; None: NULL of a type."""
        key = (kind if value is None else value, count)
        found = self._constants.get(key)
        if found is None:
            found = pa.nulls(count, kind) if value is None else pa.repeat(_scalar(value), count)
            self._constants[key] = found
        return found

    def _of_place(self, place: _Place, found: _Values) -> _Answers:
        rows = np.array(found.rows, np.int32)
        whole = place.single and len(rows) == self._count and bool((rows == np.arange(self._count)).all())
        answers = _Answers(place, None if whole else rows, found.items, _array(place, found.values))
        if place.source == "answer":
            self._count_in("answer_rows", answers.rows, 1)
            self._explain_answer(answers)
            if place.type is Kind.NUMBER:
                self._count_in("sum", answers.rows, answers.values.to_numpy())
            elif place.type is Kind.TEXT and place.kind in _TEXTS:
                self._count_in("length", answers.rows, pc.utf8_length(answers.values).to_numpy())
                self._count_in("words", answers.rows, [len(text.split()) for text in found.values])
        else:
            self._count_in("result_rows", answers.rows, 1)
            self._explain_result(answers)
        return answers

    def _explain_answer(self, answers: _Answers) -> None:
        path = answers.place.path
        column = self._version.answer_columns.get(path)
        if column is not None:
            self._copy(column, answers)
        elif path not in self._version.by_path:
            self.explained = False

    def _explain_result(self, answers: _Answers) -> None:
        place = answers.place
        if place.member is None:
            # Inside of what should be a single value.
            inner = [path for path in self._version.result_columns if place.path.startswith(f"{path}.")]
            self.explained = self.explained and not inner
            return
        step, member = place.member
        column = self._version.result_columns.get(place.path)
        if column is not None:
            self._copy(column, answers)
        if member == "label" and place.type is Kind.TEXT and place.single:
            for name, first in (("sentiment", self._version.first_sentiment), ("label", self._version.first_label)):
                if step == first:
                    self._copies[name] = self._spread(answers)

    def _copy(self, column: str, answers: _Answers) -> None:
        """Put single values into a column of `fact_response`, where they are of the column's type."""
        fits = answers.place.type is (Kind.TEXT if column.startswith("text") else Kind.NUMBER)
        if not (answers.place.single and fits) or column in self._copies:
            self.explained = False
        else:
            self._copies[column] = self._spread(answers)

    def _spread(self, answers: _Answers) -> pa.Array:
        """A value for each response, NULL for those of no row."""
        if answers.rows is None:
            return answers.values
        places = np.full(self._count, -1, np.int32)
        places[answers.rows] = np.arange(len(answers.rows))
        return answers.values.take(pa.array(places, mask=places < 0))

    def _count_in(self, figure: str, rows: Any, values: Any) -> None:
        if rows is None:
            self._figures[figure] += values
        else:
            np.add.at(self._figures[figure], rows, values)

    def _count_answered(self, answers: list[_Answers]) -> None:
        by_path: dict[str, list[_Answers]] = {}
        for found in answers:
            if found.place.source == "answer":
                by_path.setdefault(found.place.path, []).append(found)
        for listed in by_path.values():
            rows = listed[0].rows
            if rows is not None or len(listed) > 1:
                every = np.arange(self._count)
                rows = np.unique(np.concatenate([every if item.rows is None else item.rows for item in listed]))
            self._count_in("answered", rows, 1)

    def _responses(self) -> pa.RecordBatch:
        group, figures = self._group, self._figures
        empty = {name: self._constant(None, self._count, kind) for name, kind in _EMPTY.items()}
        columns: dict[str, Any] = {
            **empty,
            **self._keys_of(None, self._count),
            "processed": self._key["processed"],
            "status": group.own["status"],
            "erased": group.own["erased"],
            "user": group.own["actor"],
            "respondent": self._respondents(),
            "rating": self._ratings(),
            "fields": self._constant(len(self._version.leaves), self._count),
            "fields_answered": figures["answered"],
            "answer_rows": figures["answer_rows"],
            "result_rows": figures["result_rows"],
            "text_length": figures["length"],
            "words": figures["words"],
            "number_sum": figures["sum"],
            "steps": list(map(len, group.states)),
            "steps_done": [states.count("done") for states in group.states],
            "steps_dead": [states.count("dead") for states in group.states],
            "hash": group.digests,
            **self._copies,
        }
        return batch(schema.FACT_RESPONSE, columns)

    def _firsts(self, kind: str, wanted: Kind) -> Iterator[tuple[Leaf, int, Any]]:
        """Values of the fields of a kind, in the order of the form."""
        for leaf in self._version.leaves:
            if leaf.kind == kind:
                for single in (True, False):
                    found = self._group.places.get(_Place("answer", leaf.path, kind, wanted, single), _Values())
                    yield from ((leaf, row, value) for row, value in zip(found.rows, found.values, strict=True))

    def _respondents(self) -> list[str | None]:
        found = dict[int, str]()
        for _, row, email in self._firsts("email", Kind.TEXT):
            if row not in found:
                found[row] = identifier.derived("usr", self._group.tenant, email.lower())
        return list(map(found.get, range(self._count)))

    def _ratings(self) -> list[float | None]:
        found = dict[int, float]()
        for leaf, row, number in self._firsts("rating", Kind.NUMBER):
            if row not in found and leaf.scale:
                found[row] = (float(number) - 1) / (leaf.scale - 1)
        return list(map(found.get, range(self._count)))

    def _answer_rows(self, answers: _Answers) -> pa.RecordBatch:
        place, count = answers.place, len(answers.values)
        columns: dict[str, Any] = self._keys_of(answers.rows, count)
        for name, kind in _VALUES.items():
            columns[name] = self._constant(None, count, kind)
        columns[_VALUE_COLUMNS[place.type]] = answers.values
        if place.kind == "date" and place.type is Kind.TEXT:
            columns["value_date"] = _days(answers.values)
        is_text = _VALUE_COLUMNS[place.type] == "value_text"
        columns |= {
            "source": self._named(place.source, count),
            "path": self._named(place.path, count),
            "kind": self._named(place.kind, count),
            "item": self._named("", count) if place.single else pa.array(answers.items, _NAMES),
            "tenant": self._named(self._group.tenant, count),
            "form": self._named(self._version.form, count),
            "length": pc.utf8_length(answers.values) if is_text else self._constant(0, count),
        }
        return pa.RecordBatch.from_arrays([columns[name] for name in _ANSWERS.names], schema=_ANSWERS)

    def _named(self, value: str, count: int) -> pa.Array:
        """`count` times a text, in the memory of small numbers that are the same for every text."""
        return pa.DictionaryArray.from_arrays(self._constant(0, count), pa.array([value], pa.string()))


def _by_path(item: tuple[_Place, _Values]) -> tuple[str, str]:
    return item[0].source, item[0].path


def _scalar(value: Any) -> pa.Scalar:
    return pa.scalar(value, pa.string() if isinstance(value, str) else pa.int32())


def _array(place: _Place, values: list[Any]) -> pa.Array:
    match place.type:
        case Kind.NUMBER:
            return pa.array(np.fromiter(values, np.float64, len(values)))
        case Kind.OTHER:
            return pa.array([_text_of(value) for value in values], pa.string())
        case Kind.TEXT:
            return pa.array(values, pa.string())
        case Kind.BOOLEAN:
            return pa.array(values, pa.bool_())


def _text_of(value: Any) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)


def _days(texts: pa.Array) -> pa.Array:
    """Days of texts that are one, each different text looked at once."""
    known = texts.dictionary_encode()
    return pa.array([_day(text) for text in known.dictionary.to_pylist()], pa.date32()).take(known.indices)


_VALUES: Final = {
    name: schema.FACT_ANSWER.arrow.field(name).type for name in schema.FACT_ANSWER.names if "value_" in name
}
_VALUE_COLUMNS: Final = {
    Kind.TEXT: "value_text",
    Kind.NUMBER: "value_number",
    Kind.BOOLEAN: "value_bool",
    Kind.OTHER: "value_text",
}
_COPIES: Final = [f"{kind}_{number}" for kind in ("text", "number") for number in range(1, schema.PROMOTED + 1)]
_NAMES: Final = pa.dictionary(pa.int32(), pa.string())
#: `fact_answer` in memory: few different names, many rows.
_ANSWERS: Final = pa.schema(
    [
        one.with_type(_NAMES) if one.name in ("tenant", "form", "source", "path", "item", "kind") else one
        for one in schema.FACT_ANSWER.arrow
    ]
)
#: Columns of `fact_response` that not every version fills.
_EMPTY: Final = {name: schema.FACT_RESPONSE.arrow.field(name).type for name in (*_COPIES, "sentiment", "label")}
#: (kind of step, member of its result) to the kind of the row.
_RESULT_KINDS: Final = {
    ("summarize", "text"): "summary",
    ("translate", "text"): "translation",
    ("classify", "label"): "label",
    ("sentiment", "label"): "sentiment",
    ("extract", "data"): "extracted",
}
_MEMBER_KINDS: Final = {"score": "score", "empty": "flag", "cut": "flag", "sent": "flag"}


def _day(text: str) -> date | None:
    try:
        day = date.fromisoformat(text)
    except ValueError:
        return None
    return day if _FIRST_DAY <= day <= _LAST_DAY else None


def audit_rows(documents: Sequence[Document], digests: Sequence[int]) -> pa.RecordBatch:
    """The rows of `fact_audit` for some entries and the hashes of their BSON."""
    details = [document.get("detail") or {} for document in documents]
    at = pa.array([document["at"] for document in documents], pa.timestamp("ms"))
    columns = {
        "tenant": [document["tenant"] for document in documents],
        "entry": [document["_id"] for document in documents],
        "at": at,
        "day": at.cast(pa.date32(), safe=False),
        "actor": [document["actor"] for document in documents],
        "action": [document["action"] for document in documents],
        "subject": [document["subject"] for document in documents],
        "form": [_of_type(detail.get("form"), str) for detail in details],
        "version": [_of_type(detail.get("version"), int) for detail in details],
        "detail": [to_json(detail).decode() if detail else None for detail in details],
        "request_id": [document.get("request_id") for document in documents],
        "hash": list(digests),
    }
    return batch(schema.FACT_AUDIT, columns)


def _of_type(value: Any, kind: type) -> Any:
    return value if isinstance(value, kind) and not isinstance(value, bool) else None


#: What `job_rows` must know of a response.
RESPONSE_OF_JOB: Final = ("_id", "tenant", "form", "version", "created", "status")


def job_rows(documents: Iterable[Document], responses: dict[str, Document]) -> pa.RecordBatch:
    """The rows of `fact_job` for the jobs (one at least) of some responses, which are given by identifier."""
    rows = []
    for document in documents:
        response = responses[document["subject"]]
        keys = (response["tenant"], response["form"], response["version"], response["_id"])
        rows.append(_job_row(document, keys, response["created"].date()))
    return _of_jobs(rows)


def own_job_rows(documents: Iterable[Document]) -> pa.RecordBatch:
    """The rows of `fact_job` for jobs (one at least) that work on no response: of the day on which they were made."""
    return _of_jobs(
        [
            _job_row(document, (document["tenant"], None, None, None), document["created"].date())
            for document in documents
        ]
    )


def _of_jobs(rows: list[tuple[Any, ...]]) -> pa.RecordBatch:
    return batch(schema.FACT_JOB, dict(zip(schema.FACT_JOB.names, zip(*rows, strict=True), strict=True)))


def _job_row(document: Document, keys: tuple[str, str | None, int | None, str | None], day: date) -> tuple[Any, ...]:
    """The columns of `fact_job` in their order; `keys`: tenant, form, version and response."""
    first, run = _timing(document)
    created: datetime = document["created"]
    return (
        *keys,
        document["_id"],
        day,
        str((document.get("payload") or {}).get("step", "")),
        document["kind"],
        document["queue"],
        document["state"],
        created,
        document["due"],
        document.get("started"),
        document.get("ended"),
        (first - created).total_seconds() if first else None,
        run,
        document["attempt"],
        document["failures"],
    )


def _timing(job: Document) -> tuple[datetime | None, float | None]:
    """When a job first began, and the seconds of all its tries that ended, from its log."""
    first: datetime | None = None
    began: datetime | None = None
    total: float | None = None
    for entry in job.get("log") or ():
        if entry["type"] == "running":
            first, began = first or entry["at"], entry["at"]
        elif began is not None:
            total = (total or 0.0) + (entry["at"] - began).total_seconds()
            began = None
    return first, total


_JSON: Final = orjson.OPT_NAIVE_UTC | orjson.OPT_UTC_Z


def to_json(value: Any, option: int = 0) -> bytes:
    """A document's part as JSON: moments as RFC 3339, of what JSON does not know the text.

    Args:
        option: more of orjson's options.
    """
    return orjson.dumps(value, str, _JSON | option)
