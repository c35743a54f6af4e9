"""From documents to rows: nested answers and AI results, flattened by the version of the form that was answered.

Pure: documents in, Arrow batches out. A value goes to the column of its own type, never guessed: a text of digits stays
a text. What a version does not explain (it cannot come in by the API) still becomes rows, of kind `unknown`, so that
nothing that is in MongoDB is missing in the warehouse.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime
from typing import Any, Final

import orjson
import pyarrow as pa
import pyarrow.compute as pc

from quern.analytics import schema
from quern.analytics.partition import batch
from quern.forms.fields import ChoiceField, FormDefinition, GroupField, MultipleChoiceField, RatingField
from quern.store import identifier
from quern.store.connection import Document
from quern.workflows.definition import Workflow

_FIRST_DAY: Final = date(1900, 1, 1)
_LAST_DAY: Final = date(2299, 12, 31)
_TEXTS: Final = frozenset({"text", "long_text"})
#: Kinds of fields and steps with a short text (an option, a label), and with a number (an answer, a score).
_PROMOTED_TEXTS: Final = frozenset({"choice", "classify", "sentiment"})
_PROMOTED_NUMBERS: Final = frozenset({"number", "rating", "classify", "sentiment"})


@dataclass(frozen=True)
class Leaf:
    """One field that holds a value, or one step."""

    source: str
    path: str
    kind: str
    position: int
    label: str = ""
    required: bool = False
    repeated: bool = False
    options: str | None = None
    scale: int | None = None
    text_column: int | None = None
    number_column: int | None = None
    """Where a copy of an answer stands in `fact_response`; of a step: of its label, and of its score."""


@dataclass(frozen=True)
class Version:
    """What one version of a form means for flattening."""

    form: str
    number: int
    leaves: tuple[Leaf, ...]
    steps: tuple[Leaf, ...]
    by_path: dict[str, Leaf]
    step_kinds: dict[str, str]
    first_sentiment: str | None
    first_label: str | None
    answer_columns: dict[str, str]
    """Path to the column of `fact_response` that has a copy of its value."""
    result_columns: dict[str, str]
    """`<step>.<member>`, likewise."""

    @classmethod
    def of(cls, form: str, number: int, definition: str, workflow: str) -> "Version":
        """From a version's two JSON texts, see `forms.form.Version`."""
        leaves = tuple(_leaves(FormDefinition.model_validate_json(definition).fields))
        steps = tuple(
            Leaf("result", step.name, step.type, position)
            for position, step in enumerate(Workflow.model_validate_json(workflow).steps)
        )
        return cls._made(form, number, leaves, steps)

    @classmethod
    def unknown(cls, form: str, number: int) -> "Version":
        """Of a version that is not there (any more)."""
        return cls._made(form, number, (), ())

    @classmethod
    def _made(cls, form: str, number: int, leaves: tuple[Leaf, ...], steps: tuple[Leaf, ...]) -> "Version":
        first = {step.kind: step.path for step in reversed(steps)}
        leaves, steps = _with_columns(leaves, steps)
        answers = {leaf.path: f"text_{leaf.text_column}" for leaf in leaves if leaf.text_column}
        answers |= {leaf.path: f"number_{leaf.number_column}" for leaf in leaves if leaf.number_column}
        results = {f"{step.path}.label": f"text_{step.text_column}" for step in steps if step.text_column}
        results |= {f"{step.path}.score": f"number_{step.number_column}" for step in steps if step.number_column}
        return cls(
            form,
            number,
            leaves,
            steps,
            {leaf.path: leaf for leaf in leaves},
            {step.path: step.kind for step in steps},
            first.get("sentiment"),
            first.get("classify"),
            answers,
            results,
        )


def _with_columns(leaves: tuple[Leaf, ...], steps: tuple[Leaf, ...]) -> tuple[tuple[Leaf, ...], tuple[Leaf, ...]]:
    """The same with the columns that hold copies of their values: of the first that are short and come once."""
    texts, numbers = (iter(range(1, schema.PROMOTED + 1)) for _ in range(2))
    made = [
        replace(
            leaf,
            text_column=next(texts, None) if leaf.kind in _PROMOTED_TEXTS else None,
            number_column=next(numbers, None) if leaf.kind in _PROMOTED_NUMBERS else None,
        )
        if not leaf.repeated
        else leaf
        for leaf in (*steps, *leaves)
    ]
    return tuple(made[len(steps) :]), tuple(made[: len(steps)])


def _leaves(fields: Sequence[Any], prefix: str = "", repeated: bool = False) -> Iterator[Leaf]:
    position = 0
    for item in fields:
        path = prefix + item.name
        if isinstance(item, GroupField):
            for inner in _leaves(item.fields, path + ".", repeated or item.repeated):
                yield _at(inner, position)
                position += 1
            continue
        options = None
        if isinstance(item, ChoiceField | MultipleChoiceField):
            options = orjson.dumps({option.value: option.label or option.value for option in item.options}).decode()
        yield Leaf(
            "answer",
            path,
            item.type,
            position,
            item.label,
            item.required,
            repeated or isinstance(item, MultipleChoiceField),
            options,
            item.scale if isinstance(item, RatingField) else None,
        )
        position += 1


def _at(leaf: Leaf, position: int) -> Leaf:
    return Leaf(**{**vars(leaf), "position": position})


@dataclass
class _Stream:
    """Rows of `fact_answer` whose values have one type."""

    row: list[int] = field(default_factory=list)
    """Which response of the batch."""
    name: list[int] = field(default_factory=list)
    """Which (source, path, kind) of the batch."""
    item: list[str] = field(default_factory=list)
    value: list[Any] = field(default_factory=list)


@dataclass
class _Vectors:
    row: list[int] = field(default_factory=list)
    step: list[str] = field(default_factory=list)
    vector: list[list[float]] = field(default_factory=list)


class Flattener:
    """Turns a chunk of response documents into batches; made anew for each chunk."""

    def __init__(self) -> None:
        self.explained = True
        """Whether every value so far was what its version says: else columns of `fact_response` lack some."""
        self._copies: dict[str, list[Any]] = {}
        self._responses_added: list[tuple[Any, ...]] = []
        self._streams = {column: _Stream() for column in ("value_text", "value_number", "value_bool", "value_date")}
        self._text, self._number = self._streams["value_text"], self._streams["value_number"]
        self._vectors = _Vectors()
        self._names: dict[tuple[str, str, str], int] = {}
        self._row = 0
        # Of the response at hand.
        self._length = self._words = 0
        self._sum = 0.0
        self._respondent: str | None = None
        self._rating: float | None = None
        self._answered: set[str] = set()
        self._rows = 0

    def add(self, document: Document, version: Version, digest: int) -> None:
        """Add one response; `digest` is the hash of its BSON."""
        self._length = self._words = self._rows = 0
        self._sum, self._respondent, self._rating = 0.0, None, None
        self._answered = set()
        answers, results = document.get("answers") or {}, document.get("results") or {}
        for name, value in answers.items():
            self._answer(version, name, value, "")
        answer_rows = self._rows
        for step, result in results.items():
            self._result(version.step_kinds.get(step, ""), step, result)
            if version.result_columns and type(result) is dict:
                for member in ("label", "score"):
                    column = version.result_columns.get(f"{step}.{member}")
                    if column is not None and result.get(member) is not None:
                        self._copy(column, result[member], "")
        created, processed = document["created"], document.get("processed")
        states = list((document.get("steps") or {}).values())
        respondent = self._respondent
        if respondent is not None:
            respondent = identifier.derived("usr", document["tenant"], respondent.lower())
        # In the order of _RESPONSE_COLUMNS.
        self._responses_added.append(
            (
                document["tenant"],
                document["form"],
                document["version"],
                document["_id"],
                created,
                document["status"],
                processed,
                document.get("erased"),
                (processed - created).total_seconds() if processed else None,
                document.get("actor"),
                respondent,
                len(version.leaves),
                len(self._answered),
                answer_rows,
                self._rows - answer_rows,
                self._length,
                self._words,
                self._sum,
                _label(results, version.first_sentiment),
                _label(results, version.first_label),
                self._rating,
                len(states),
                states.count("done"),
                states.count("dead"),
                digest,
            )
        )
        self._row += 1

    def _answer(self, version: Version, path: str, value: Any, item: str) -> None:
        if value is None:
            return
        if type(value) is dict:
            for name, inner in value.items():
                self._answer(version, f"{path}.{name}", inner, item)
            return
        if type(value) is list:
            for index, inner in enumerate(value):
                self._answer(version, path, inner, f"{item}.{index}" if item else str(index))
            return
        leaf = version.by_path.get(path)
        kind = leaf.kind if leaf is not None else "unknown"
        self._answered.add(path)
        column = version.answer_columns.get(path)
        if column is not None:
            self._copy(column, value, item)
        elif leaf is None:
            self.explained = False
        if type(value) is str:
            if kind in _TEXTS:
                self._length += len(value)
                self._words += len(value.split())
            elif kind == "email" and self._respondent is None:
                self._respondent = value
            elif kind == "date":
                self._put(self._streams["value_date"], "answer", path, kind, item, value)
                return
            self._put(self._text, "answer", path, kind, item, value)
        elif type(value) is bool:
            self._put(self._streams["value_bool"], "answer", path, kind, item, value)
        elif isinstance(value, int | float):
            number = float(value)
            if kind == "rating" and self._rating is None and leaf is not None and leaf.scale:
                self._rating = (number - 1) / (leaf.scale - 1)
            self._sum += number
            self._put(self._number, "answer", path, kind, item, number)
        else:
            self._put(self._text, "answer", path, "unknown", item, str(value))

    def _copy(self, column: str, value: Any, item: str) -> None:
        """Put a single value into a column of `fact_response`, where it is of the column's type."""
        fits = type(value) is str if column.startswith("text") else type(value) in (int, float)
        if item or not fits:
            self.explained = False
            return
        copies = self._copies.setdefault(column, [])
        copies += [None] * (self._row - len(copies))
        copies.append(value)

    def _result(self, step_kind: str, step: str, result: Any) -> None:
        if not step_kind:
            self.explained = False
        if not isinstance(result, dict):
            self._plain(step, "other", result, "")
            return
        for member, value in result.items():
            path = f"{step}.{member}"
            if member == "vector" and type(value) is list:
                self._vectors.row.append(self._row)
                self._vectors.step.append(step)
                self._vectors.vector.append(value)
            elif member == "scores" and type(value) is dict:
                for label, score in value.items():
                    self._plain(path, "scores", score, label)
            else:
                self._plain(path, _RESULT_KINDS.get((step_kind, member), _MEMBER_KINDS.get(member, "other")), value, "")

    def _plain(self, path: str, kind: str, value: Any, item: str) -> None:
        """Rows of a JSON value by its own types."""
        if value is None:
            return
        if type(value) is dict:
            for name, inner in value.items():
                self._plain(f"{path}.{name}", kind, inner, item)
        elif type(value) is list:
            for index, inner in enumerate(value):
                self._plain(path, kind, inner, f"{item}.{index}" if item else str(index))
        elif type(value) is str:
            self._put(self._text, "result", path, kind, item, value)
        elif type(value) is bool:
            self._put(self._streams["value_bool"], "result", path, kind, item, value)
        elif isinstance(value, int | float):
            self._put(self._number, "result", path, kind, item, float(value))
        else:
            text = value.isoformat() if isinstance(value, datetime) else str(value)
            self._put(self._text, "result", path, kind, item, text)

    def _put(self, stream: _Stream, source: str, path: str, kind: str, item: str, value: Any) -> None:
        key = (source, path, kind)
        name = self._names.get(key)
        if name is None:
            name = self._names[key] = len(self._names)
        stream.row.append(self._row)
        stream.name.append(name)
        stream.item.append(item)
        stream.value.append(value)
        self._rows += 1

    def batches(self) -> Iterator[tuple[schema.Table, pa.RecordBatch]]:
        """What was added, table by table."""
        responses = self._responses()
        yield schema.FACT_RESPONSE, responses
        for column, stream in self._streams.items():
            if stream.row:
                yield schema.FACT_ANSWER, self._answers(responses, column, stream)
        if self._vectors.row:
            taken = responses.select(_KEY).take(pa.array(self._vectors.row, pa.int32()))
            yield (
                schema.FACT_EMBEDDING,
                batch(
                    schema.FACT_EMBEDDING,
                    {**_columns(taken), "step": self._vectors.step, "vector": self._vectors.vector},
                ),
            )

    def _responses(self) -> pa.RecordBatch:
        columns: dict[str, Any] = dict(zip(_RESPONSE_COLUMNS, zip(*self._responses_added, strict=True), strict=True))
        created = pa.array(columns["created"], pa.timestamp("ms"))
        columns |= {"created": created, "day": created.cast(pa.date32(), safe=False)}
        for name in _COPIES:
            copies = self._copies.get(name, [])
            columns[name] = copies + [None] * (self._row - len(copies))
        return batch(schema.FACT_RESPONSE, columns)

    def _answers(self, responses: pa.RecordBatch, column: str, stream: _Stream) -> pa.RecordBatch:
        count = len(stream.row)
        taken = _columns(responses.select([*_KEY, "processing_seconds"]).take(pa.array(stream.row, pa.int32())))
        names = pa.array(stream.name, pa.int32())
        sources, paths, kinds = (
            pa.array([key[part] for key in self._names], pa.string()).take(names) for part in range(3)
        )
        values: dict[str, Any] = {
            "value_text": pa.nulls(count, pa.string()),
            "value_number": pa.nulls(count, pa.float64()),
            "value_bool": pa.nulls(count, pa.bool_()),
            "value_date": pa.nulls(count, pa.date32()),
        }
        if column == "value_date":
            values["value_text"] = pa.array(stream.value, pa.string())
            values["value_date"] = pa.array([_day(text) for text in stream.value], pa.date32())
        else:
            values[column] = pa.array(stream.value, schema.FACT_ANSWER.arrow.field(column).type)
        length = pc.fill_null(pc.utf8_length(values["value_text"]), 0)
        facts = {"source": sources, "path": paths, "kind": kinds, "item": stream.item, "length": length}
        return batch(schema.FACT_ANSWER, {**taken, **values, **facts})


_COPIES: Final = [f"{kind}_{number}" for kind in ("text", "number") for number in range(1, schema.PROMOTED + 1)]
_RESPONSE_COLUMNS: Final = [name for name in schema.FACT_RESPONSE.names if name != "day" and name not in _COPIES]
_KEY: Final = ["tenant", "form", "version", "response", "created", "day"]
#: (kind of step, member of its result) to the kind of the row.
_RESULT_KINDS: Final = {
    ("summarize", "text"): "summary",
    ("translate", "text"): "translation",
    ("classify", "label"): "label",
    ("sentiment", "label"): "sentiment",
    ("extract", "data"): "extracted",
}
_MEMBER_KINDS: Final = {"score": "score", "empty": "flag", "cut": "flag", "sent": "flag"}


def _columns(rows: pa.RecordBatch) -> dict[str, pa.Array]:
    return dict(zip(rows.schema.names, rows.columns, strict=True))


def _label(results: dict[str, Any], step: str | None) -> str | None:
    found = results.get(step) if step is not None else None
    label = found.get("label") if isinstance(found, dict) else None
    return label if isinstance(label, str) else None


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


def job_rows(documents: Iterable[Document], responses: dict[str, Document]) -> pa.RecordBatch:
    """The rows of `fact_job` for the jobs (one at least) of some responses, which are given by identifier."""
    rows = []
    for document in documents:
        response = responses[document["subject"]]
        first, run = _timing(document)
        created: datetime = document["created"]
        row = (
            response["tenant"],
            response["form"],
            response["version"],
            response["_id"],
            document["_id"],
            response["created"].date(),
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
        rows.append(row)
    return batch(schema.FACT_JOB, dict(zip(schema.FACT_JOB.names, zip(*rows, strict=True), strict=True)))


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


def to_json(value: Any) -> bytes:
    """A document's part as JSON: moments as RFC 3339, of what JSON does not know the text."""
    return orjson.dumps(value, default=str, option=_JSON)
