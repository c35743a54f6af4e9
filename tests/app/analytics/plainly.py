"""Every question, answered in plain Python over documents as MongoDB holds them: slow, and easy to believe."""

import itertools
import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import date, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import orjson

from quern.analytics.question import DEFAULT_STAGES, Filter, Measure, Question
from quern.store import identifier
from tests.app.analytics.world import Document, World

QUANTILES = {"p50": 0.5, "p75": 0.75, "p90": 0.9, "p95": 0.95, "p99": 0.99}
Row = list[Any]


def answer(question: Question, world: World, tenant: str | None) -> list[Row]:
    """The rows of an answer; `tenant` None: of all tenants."""
    asked = _Asked(question, world, tenant)
    match question.measure:
        case Measure.FUNNEL:
            rows = asked.funnel()
        case Measure.COHORTS:
            rows = asked.cohorts()
        case Measure.TERMS:
            rows = asked.terms()
        case Measure.SIMILAR:
            rows = asked.similar()
        case _:
            rows = asked.aggregate()
    return _ordered(rows, question)


def leaves(value: Any, path: str) -> Iterable[tuple[str, Any]]:
    """Path and value of everything in a document that is neither a list nor an object nor nothing."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from leaves(inner, f"{path}.{name}")
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner, path)
    elif value is not None:
        yield path, value


def _of_results(document: Document) -> Iterable[tuple[str, Any]]:
    for step, result in document.get("results", {}).items():
        for member, value in result.items():
            if member == "scores":
                yield from ((f"result.{step}.scores", score) for score in value.values())
            elif member != "vector":
                yield from leaves(value, f"result.{step}.{member}")


def _as_text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return str(int(value)) if value == int(value) else repr(float(value))
    return str(value)


class _Asked:
    def __init__(self, question: Question, world: World, tenant: str | None) -> None:
        self.question, self.world = question, world
        own = [item for item in world.responses if tenant in (None, item["tenant"])]
        self.responses = [item for item in own if item["status"] != "erased"]
        known = {item["_id"]: item for item in own}
        self.jobs = [
            {**item, "response": known.get(item["subject"], {})}
            for item in world.jobs
            if tenant in (None, item["tenant"])
        ]
        self.audit = [item for item in world.audit if tenant in (None, item["tenant"])]
        self.zone = ZoneInfo(question.time_zone)

    # Facts of one item

    def fields(self, document: Document) -> list[Document]:
        fields: list[Document] = orjson.loads(self.world.versions[document["form"], document["version"]][0])["fields"]
        return fields

    def flat_fields(self, document: Document) -> dict[str, Document]:
        """Path to leaf field."""

        def walk(fields: list[Document], prefix: str) -> Iterable[tuple[str, Document]]:
            for field in fields:
                if field["type"] == "group":
                    yield from walk(field["fields"], f"{prefix}{field['name']}.")
                else:
                    yield prefix + field["name"], field

        return dict(walk(self.fields(document), ""))

    def values(self, document: Document, name: str) -> list[Any]:
        kind, _, path = name.partition(".")
        if kind == "step":
            return [
                job["state"]
                for job in self.jobs
                if job["subject"] == document["_id"] and job["payload"].get("step") == path
            ]
        if kind == "answer":
            found = [pair for top, value in document["answers"].items() for pair in leaves(value, f"answer.{top}")]
        else:
            found = list(_of_results(document))
        return [value for at, value in found if at == name]

    def texts(self, document: Document) -> list[tuple[str, str]]:
        kinds = {path: field["type"] for path, field in self.flat_fields(document).items()}
        found = [pair for top, value in document["answers"].items() for pair in leaves(value, top)]
        return [(path, text) for path, text in found if kinds[path] in ("text", "long_text")]

    def own(self, item: Document, name: str) -> Any:
        local = self.local(item)
        if name == "weekday":
            return local.isoweekday()
        if name == "hour":
            return local.hour
        if name == "user":
            return item.get("actor")
        if name == "respondent":
            found = [pair for top, value in item["answers"].items() for pair in leaves(value, top)]
            emails = [value for path, value in found if path == "email"]
            return identifier.derived("usr", item["tenant"], emails[0].lower()) if emails else None
        if name in ("sentiment", "label"):
            return item["results"].get({"sentiment": "mood", "label": "topic"}[name], {}).get("label")
        if "subject" in item and "payload" in item:
            if name == "step":
                return item["payload"].get("step", "")
            if name in ("form", "version"):
                return item["response"].get(name)
        return item.get(name)

    def local(self, item: Document) -> datetime:
        at: datetime = item["at" if "action" in item else "created"]
        return at.astimezone(self.zone).replace(tzinfo=None)

    def bucket(self, item: Document) -> Any:
        return _bucket(self.local(item), self.question.grain)

    def measured(self, item: Document) -> list[float | None]:
        measure = self.question.measure
        match measure:
            case Measure.RESPONSE_TIME:
                ended = item.get("processed")
                return [(ended - item["created"]).total_seconds() if ended else None]
            case Measure.RESPONSE_LENGTH:
                return [sum(len(text) for _, text in self.texts(item))]
            case Measure.RESPONSE_WORDS:
                return [sum(len(text.split()) for _, text in self.texts(item))]
            case Measure.COMPLETION:
                answered = {path for top, value in item["answers"].items() for path, _ in leaves(value, top)}
                return [len(answered) / len(self.flat_fields(item))]
            case Measure.RATING:
                return [self._rating(item)]
            case Measure.ANSWER:
                values = self.values(item, self.question.of or "")
                return [
                    float(value) for value in values if isinstance(value, int | float) and not isinstance(value, bool)
                ]
            case Measure.JOB_ATTEMPTS:
                return [float(item["attempt"])]
            case Measure.JOB_WAIT:
                begun = [entry["at"] for entry in item["log"] if entry["type"] == "running"]
                return [(begun[0] - item["created"]).total_seconds() if begun else None]
            case Measure.JOB_RUN:
                tries = [
                    (after["at"] - entry["at"]).total_seconds()
                    for entry, after in itertools.pairwise(item["log"])
                    if entry["type"] == "running"
                ]
                return [sum(tries) if tries else None]
        return [1.0]

    def _rating(self, item: Document) -> float | None:
        flat = self.flat_fields(item)
        for top, value in item["answers"].items():
            for path, number in leaves(value, top):
                if flat[path]["type"] == "rating":
                    return float((number - 1) / (flat[path].get("scale", 5) - 1))
        return None

    # Which items

    def items(self) -> list[Document]:
        subject = self.question.subject
        if subject == "response":
            return self.responses
        return self.jobs if subject == "job" else self.audit

    def chosen(self, filters: list[Filter]) -> list[Document]:
        bounds = self.question.range
        kept = []
        for item in self.items():
            at = item["at" if "action" in item else "created"]
            if (bounds.start and at < bounds.start) or (bounds.before and at >= bounds.before):
                continue
            if all(self.passes(item, each) for each in filters):
                kept.append(item)
        return kept

    def passes(self, item: Document, each: Filter) -> bool:
        if each.dimension.partition(".")[0] in ("answer", "result", "step") and "." in each.dimension:
            values = self.values(item, each.dimension)
        else:
            value = self.own(item, each.dimension)
            values = [] if value is None else [value]
        if each.op == "exists":
            return bool(values) is (each.values != [False])
        if each.op == "not_in":
            return not any(_same(value, wanted) for value in values for wanted in each.values)
        if each.op == "in":
            return any(_same(value, wanted) for value in values for wanted in each.values)
        compare: Callable[[Any, Any], bool] = {
            "lt": lambda a, b: a < b,
            "le": lambda a, b: a <= b,
            "gt": lambda a, b: a > b,
            "ge": lambda a, b: a >= b,
        }[each.op]
        return any(_kind(value) is _kind(each.values[0]) and compare(value, each.values[0]) for value in values)

    # Answers

    def groups(self, filters: list[Filter]) -> dict[tuple[Any, ...], list[float | None]]:
        question = self.question
        groups: dict[tuple[Any, ...], list[float | None]] = {}
        for item in self.chosen(filters):
            keys: list[list[Any]] = [] if question.grain == "all" else [[self.bucket(item)]]
            for name in question.dimensions:
                if "." in name:
                    keys.append(sorted({_as_text(value) for value in self.values(item, name)}))
                else:
                    keys.append([self.own(item, name)])
            for key in itertools.product(*keys):
                groups.setdefault(key, []).extend(self.measured(item))
        return {key: values for key, values in groups.items() if values}

    def aggregate(self) -> list[Row]:
        question = self.question
        groups = self.groups(question.filters)
        counted: Counter[Any] = Counter()
        for key, values in groups.items():
            counted[key[0] if question.grain != "all" else None] += sum(value is not None for value in values)
        rows = []
        for key, values in groups.items():
            real = [value for value in values if value is not None]
            whole = counted[key[0] if question.grain != "all" else None]
            rows.append([*key, *(_statistic(name, real, whole) for name in question.asked)])
        return rows

    def funnel(self) -> list[Row]:
        passed = list(self.question.filters)
        counts: dict[tuple[Any, ...], dict[int, int]] = {}
        stages = self.question.stages or DEFAULT_STAGES
        for position, stage in enumerate(stages, start=1):
            passed += stage.filters
            for key, values in self.groups(passed).items():
                counts.setdefault(key, {})[position] = len(values)
        return [
            [*key, position, stages[position - 1].name, count, count / max(found.values())]
            for key, found in counts.items()
            for position, count in found.items()
        ]

    def cohorts(self) -> list[Row]:
        visits: dict[str, set[date]] = {}
        for item in self.chosen(self.question.filters):
            member = self.own(item, self.question.member)
            if member is not None:
                visits.setdefault(member, set()).add(self.bucket(item))
        counts: Counter[tuple[date, int]] = Counter()
        for seen in visits.values():
            for at in seen:
                counts[min(seen), _periods(min(seen), at, self.question.grain)] += 1
        return [[first, period, count, count / counts[first, 0]] for (first, period), count in counts.items()]

    def terms(self) -> list[Row]:
        responses: Counter[str] = Counter()
        occurrences: Counter[str] = Counter()
        for item in self.chosen(self.question.filters):
            found: list[str] = []
            for path, text in self.texts(item):
                if self.question.of in (None, f"answer.{path}"):
                    found += terms(text)
            found = [term for term in found if len(term) >= self.question.min_length]
            occurrences.update(found)
            responses.update(set(found))
        return [[term, responses[term], occurrences[term]] for term in occurrences]

    def similar(self) -> list[Row]:
        vectors = {
            item["_id"]: item["results"]["vector"]["vector"] for item in self.responses if "vector" in item["results"]
        }
        target = vectors.get(self.question.of or "")
        if target is None:
            return []
        return [
            [item["_id"], item["form"], item["created"].replace(tzinfo=None), _cosine(vectors[item["_id"]], target)]
            for item in self.chosen(self.question.filters)
            if item["_id"] in vectors and item["_id"] != self.question.of
        ]


def _kind(value: Any) -> type:
    if isinstance(value, bool):
        return bool
    return str if isinstance(value, str) else float


def _same(value: Any, wanted: Any) -> bool:
    return _kind(value) is _kind(wanted) and bool(value == wanted)


def _bucket(local: datetime, grain: str) -> Any:
    if grain == "hour":
        return local.replace(minute=0, second=0, microsecond=0)
    day = local.date()
    match grain:
        case "week":
            return day - timedelta(days=day.weekday())
        case "month":
            return day.replace(day=1)
        case "quarter":
            return day.replace(month=(day.month - 1) // 3 * 3 + 1, day=1)
        case "year":
            return day.replace(month=1, day=1)
    return day


def _periods(first: date, last: date, grain: str) -> int:
    months = (last.year - first.year) * 12 + last.month - first.month
    days = (last - first).days
    return {"day": days, "week": days // 7, "month": months, "quarter": months // 3, "year": months // 12}[grain]


def _statistic(name: str, values: list[float], whole: int) -> Any:
    if name == "count":
        return len(values)
    if name == "share":
        return len(values) / whole if whole else None
    if not values:
        return None
    if name == "sum":
        return math.fsum(values)
    if name == "mean":
        return math.fsum(values) / len(values)
    if name in ("min", "max"):
        return min(values) if name == "min" else max(values)
    place = (len(values) - 1) * QUANTILES[name]
    low, high = math.floor(place), math.ceil(place)
    ordered = sorted(values)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def terms(text: str) -> list[str]:
    plain = "".join(part.lower()[0] if unicodedata.category(part)[0] in "LN" else " " for part in text)
    return plain.replace("ς", "σ").split()


def _cosine(one: list[float], other: list[float]) -> float:
    product = math.fsum(a * b for a, b in zip(one, other, strict=True))
    return product / math.sqrt(math.fsum(a * a for a in one) * math.fsum(b * b for b in other))


def _ordered(rows: list[Row], question: Question) -> list[Row]:
    default = {
        Measure.TERMS: [("responses", True), ("occurrences", True)],
        Measure.SIMILAR: [("similarity", True)],
    }.get(question.measure, [])
    first = [(question.order.by, question.order.descending)] if question.order else default
    rest = [(name, False) for name in question.columns if name not in dict(first)]
    # A stable sort from the last key to the first; what has no value comes last either way.
    for name, descending in reversed([*first, *rest]):
        place = question.columns.index(name)
        real = sorted((row for row in rows if row[place] is not None), key=lambda row: row[place], reverse=descending)
        rows = real + [row for row in rows if row[place] is None]
    top = question.top
    if top is None and question.measure in (Measure.TERMS, Measure.SIMILAR):
        top = 100
    return rows if top is None else rows[:top]
