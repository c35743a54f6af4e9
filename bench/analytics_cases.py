"""Every measure that can be asked, as a question and as MongoDB's best aggregation, with the indexes made for them.

The peer is favoured where it can be: no pipeline leaves erased responses out or looks for several tries of a job, as
the warehouse's figures do. MongoDB 6.0 has no `$percentile`: values are gathered, sorted and interpolated, which is
exact, as DuckDB's `quantile_cont` is.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from etl_documents import TOPICS

Document = dict[str, Any]
Keys = list[tuple[str, int]]

_TEXTS: Keys = [("answers.comment", 1), ("answers.contact.city", 1), ("answers.contact.phone", 1)]
_OF: Keys = [("tenant", 1)]

#: Collection, to name, to keys. Every pipeline reads its index alone, but for completion, which asks of a field with
#: several values, too: an index that holds such a field cannot stand for the document.
INDEXES: dict[str, dict[str, Keys]] = {
    "responses": {
        "time": [*_OF, ("created", 1)],
        "user_texts": [*_OF, ("actor", 1), *_TEXTS],
        "month_texts": [*_OF, ("created", 1), *_TEXTS],
        "sector": [*_OF, ("created", 1), ("answers.sector", 1), ("processed", 1)],
        "sector_score": [*_OF, ("answers.sector", 1), ("answers.score", 1), ("created", 1), ("processed", 1)],
        "sector_score_label": [*_OF, ("answers.sector", 1), ("answers.score", 1), ("results.topic.label", 1)],
        "label": [*_OF, ("created", 1), ("results.topic.label", 1)],
        "label_sector": [*_OF, ("answers.sector", 1), ("results.topic.label", 1)],
        "mood": [*_OF, ("created", 1), ("results.mood.label", 1)],
        "score": [*_OF, ("created", 1), ("answers.score", 1)],
        "age": [*_OF, ("answers.sector", 1), ("answers.age", 1)],
        "rating": [*_OF, ("answers.score", 1)],
        "person": [*_OF, ("answers.email", 1), ("created", 1)],
        "status": [*_OF, ("status", 1)],
        "status_month": [*_OF, ("created", 1), ("status", 1)],
        "topics": [*_OF, ("answers.topics", 1)],
    },
    "audit": {"action": [*_OF, ("at", 1), ("action", 1)], "actor": [*_OF, ("actor", 1)]},
    "jobs": {"work": [*_OF, ("queue", 1), ("kind", 1), ("created", 1), ("started", 1), ("ended", 1)]},
}


@dataclass(frozen=True)
class Case:
    """A question and its peer. The pipeline's `_id` holds the answer's keys in their order, the rest its statistics."""

    name: str
    asked: Document
    hint: str
    pipeline: list[Document]
    heavy: bool = True
    collection: str = "responses"


def _seconds(first: str, last: str) -> Document:
    return {"$divide": [{"$subtract": [last, first]}, 1000]}


_TIME = _seconds("$created", "$processed")
_OWN_TEXTS = ("$answers.comment", "$answers.contact.city", "$answers.contact.phone")
_LENGTH: Document = {"$add": [{"$strLenCP": {"$ifNull": [text, ""]}} for text in _OWN_TEXTS]}
_WORDS: Document = {
    "$add": [
        {"$cond": [{"$gt": [text, ""]}, {"$size": {"$split": [text, " "]}}, 0]}  # Single spaces stand between.
        for text in _OWN_TEXTS
    ]
}
_LEAVES = ("sector", "email", "score", "age", "visited", "comment", "topics", "contact.city", "contact.phone", "agreed")
_COMPLETION: Document = {
    "$divide": [{"$add": [{"$cond": [{"$gt": [f"$answers.{leaf}", None]}, 1, 0]} for leaf in _LEAVES]}, len(_LEAVES)]
}
_RATING: Document = {"$divide": [{"$subtract": ["$answers.score", 1]}, 4]}
_RUN, _WAIT = _seconds("$started", "$ended"), _seconds("$created", "$started")


def _grouped(match: Document, key: Any, value: Any = None, statistics: tuple[str, ...] = ("mean",)) -> list[Document]:
    how: Document = {"_id": key, "count": {"$sum": 1}}
    operators = {"mean": "$avg", "sum": "$sum", "min": "$min", "max": "$max"}
    if value is not None:
        how |= {name: {operators[name]: value} for name in statistics}
    return [{"$match": match}, {"$group": how}]


def _month(field: str = "$created", unit: str = "month") -> Document:
    return {"$dateTrunc": {"date": field, "unit": unit}}


def _at(share: float) -> Document:
    """The value at a share of the sorted ones, interpolated between its neighbours."""
    low, high = ({"$arrayElemAt": ["$all", {rounded: "$$at"}]} for rounded in ("$floor", "$ceil"))
    between: Document = {"$multiply": [{"$subtract": ["$$at", {"$floor": "$$at"}]}, {"$subtract": ["$$high", "$$low"]}]}
    inner: Document = {"$let": {"vars": {"low": low, "high": high}, "in": {"$add": ["$$low", between]}}}
    return {"$let": {"vars": {"at": {"$multiply": [{"$subtract": ["$count", 1]}, share]}}, "in": inner}}


def _quantiles(match: Document, key: Any, value: Any, shares: tuple[float, ...]) -> list[Document]:
    return [
        {"$match": match},
        {"$group": {"_id": key, "all": {"$push": value}, "mean": {"$avg": value}}},
        {"$set": {"count": {"$size": "$all"}, "all": {"$sortArray": {"input": "$all", "sortBy": 1}}}},
        {"$project": {"count": 1, "mean": 1, **{f"p{share * 100:.0f}": _at(share) for share in shares}}},
    ]


def _funnel(match: Document, key: Document, stages: list[Any]) -> list[Document]:
    """Counts of each stage, given what must hold of it, as rows of key and position."""
    counted = {f"s{place}": {"$sum": {"$cond": [stage, 1, 0]}} for place, stage in enumerate(stages, start=1)}
    rows = [{"position": place, "count": f"$s{place}"} for place in range(1, len(stages) + 1)]
    return [
        {"$match": match},
        {"$group": {"_id": key, **counted}},
        {"$project": {"stage": rows}},
        {"$unwind": "$stage"},
        {"$project": {"_id": {"key": "$_id.key", "position": "$stage.position"}, "count": "$stage.count"}},
    ]


def _cohorts(tenant: str) -> list[Document]:
    return [
        {"$match": {"tenant": tenant, "answers.email": {"$type": "string"}}},
        {"$group": {"_id": {"who": "$answers.email", "at": _month()}}},
        {"$group": {"_id": "$_id.who", "first": {"$min": "$_id.at"}, "seen": {"$push": "$_id.at"}}},
        {"$unwind": "$seen"},
        {"$group": {"_id": {"first": "$first", "at": "$seen"}, "members": {"$sum": 1}}},
        {
            "$project": {
                "_id": {
                    "first": "$_id.first",
                    "period": {"$dateDiff": {"startDate": "$_id.first", "endDate": "$_id.at", "unit": "month"}},
                },
                "members": 1,
            }
        },
    ]


def _terms(own: Document) -> list[Document]:
    """Words counted text by text: to group pairs of word and response needs the disk, and thrice the time."""
    # As the question finds words: of letters and digits of any script, whatever stands between.
    matches = {"$regexFindAll": {"input": {"$toLower": "$answers.comment"}, "regex": r"[\p{L}\p{N}]+"}}
    words = {"$map": {"input": matches, "in": "$$this.match"}}
    # Each word once for what it counts as a response, and every time for what it counts as an occurrence.
    marked = [
        {"$map": {"input": found, "as": "w", "in": {"w": "$$w", "r": once, "o": 1 - once}}}
        for found, once in (("$words", 0), ({"$setUnion": ["$words", []]}, 1))
    ]
    return [
        {"$match": own},
        {"$project": {"_id": 0, "words": words}},
        {"$project": {"each": {"$concatArrays": marked}}},
        {"$unwind": "$each"},
        {"$group": {"_id": "$each.w", "responses": {"$sum": "$each.r"}, "occurrences": {"$sum": "$each.o"}}},
        {"$match": {"$expr": {"$gte": [{"$strLenCP": "$_id"}, 3]}}},
    ]


def _topics(own: Document) -> list[Document]:
    """The form knows its options: each is counted by its keys, so that no document is read, as `$unwind` must."""
    first, *others = (
        [{"$match": {**own, "answers.topics": topic}}, {"$group": {"_id": topic, "count": {"$sum": 1}}}]
        for topic in TOPICS
    )
    return [*first, *({"$unionWith": {"coll": "responses", "pipeline": other}} for other in others)]


def cases(tenant: str) -> list[Case]:
    """All questions of the bench, for one tenant."""
    own = {"tenant": tenant}
    since = {"tenant": tenant, "created": {"$gte": datetime(2026, 1, 1, tzinfo=UTC)}}
    year = {"from": "2026-01-01T00:00:00Z"}
    sector, score, label = "$answers.sector", "$answers.score", "$results.topic.label"
    good = {"$gte": [score, 4]}
    month, mean = {"grain": "month"}, {"statistics": ["count", "mean"]}
    by_sector = {"dimensions": ["answer.sector"]}
    high: Document = {"statistics": ["count", "mean", "p50", "p95", "p99"]}
    shares = (0.5, 0.95, 0.99)
    stages = [
        {"name": "received"},
        {"name": "content", "filters": [{"dimension": "answer.score", "op": "ge", "values": [4]}]},
        {"name": "praised", "filters": [{"dimension": "result.topic.label", "values": ["praise"]}]},
    ]
    berlin = {"date": "$created", "timezone": "Europe/Berlin"}
    ended = {"$in": ["$status", ["processed", "incomplete"]]}
    return [
        Case("responses a month", {"measure": "responses", **month}, "time", _grouped(own, _month()), heavy=False),
        Case(
            "responses by weekday and hour, Berlin",
            {"measure": "responses", "dimensions": ["weekday", "hour"], "time_zone": "Europe/Berlin"},
            "time",
            _grouped(own, {"d": {"$isoDayOfWeek": berlin}, "h": {"$hour": berlin}}),
        ),
        Case(
            "by status", {"measure": "responses", "dimensions": ["status"]}, "status", _grouped(own, "$status"), False
        ),
        Case(
            "length by user",
            {"measure": "response_length", "dimensions": ["user"], **mean},
            "user_texts",
            _grouped(own, "$actor", _LENGTH),
        ),
        Case(
            "length, p50 p95 p99 a month",
            {"measure": "response_length", **high, **month},
            "month_texts",
            _quantiles(own, _month(), _LENGTH, shares),
        ),
        Case(
            "words, p50 p95 p99 by user",
            {"measure": "response_words", "dimensions": ["user"], **high},
            "user_texts",
            _quantiles(own, "$actor", _WORDS, shares),
        ),
        Case(
            "time to respond by sector",
            {"measure": "response_time", **by_sector, **mean, "range": year},
            "sector",
            _grouped(since, sector, _TIME),
        ),
        Case(
            "the same a month",
            {"measure": "response_time", **by_sector, **mean, **month},
            "sector",
            _grouped(own, {"m": _month(), "s": sector}, _TIME),
        ),
        Case(
            "time by sector and score",
            {"measure": "response_time", "dimensions": ["answer.sector", "answer.score"], **mean},
            "sector_score",
            _grouped(own, {"s": sector, "c": score}, _TIME),
        ),
        Case(
            "median time to respond",
            {"measure": "response_time", "statistics": ["count", "p50"]},
            "sector",
            _quantiles(own, None, _TIME, (0.5,)),
        ),
        Case(
            "time, p50 p95 p99 by sector",
            {"measure": "response_time", **by_sector, **high},
            "sector_score",
            _quantiles(own, sector, _TIME, shares),
        ),
        Case(
            "completion by form",
            {"measure": "completion", "dimensions": ["form"], **mean},
            "time",
            _grouped(own, "$form", _COMPLETION),
        ),
        Case(
            "funnel of stages a month",
            {"measure": "funnel", **month},
            "status_month",
            _funnel(own, {"key": _month()}, [True, ended, {"$eq": ["$status", "processed"]}]),
        ),
        Case(
            "funnel of answers by sector",
            {"measure": "funnel", **by_sector, "stages": stages},
            "sector_score_label",
            _funnel(own, {"key": sector}, [True, good, {"$and": [good, {"$eq": [label, "praise"]}]}]),
        ),
        Case(
            "labels a month",
            {"measure": "responses", "dimensions": ["label"], **month},
            "label",
            _grouped(own, {"m": _month(), "l": label}),
        ),
        Case(
            "sentiment a month",
            {"measure": "responses", "dimensions": ["sentiment"], **month},
            "mood",
            _grouped(own, {"m": _month(), "l": "$results.mood.label"}),
        ),
        Case(
            "labels where sector is health",
            {
                "measure": "responses",
                "dimensions": ["result.topic.label"],
                "filters": [{"dimension": "answer.sector", "values": ["health"]}],
            },
            "label_sector",
            _grouped({**own, "answers.sector": "health"}, label),
            heavy=False,
        ),
        Case(
            "rating distribution",
            {"measure": "responses", "dimensions": ["answer.score"]},
            "rating",
            _grouped(own, score),
            heavy=False,
        ),
        Case(
            "rating distribution a month",
            {"measure": "responses", "dimensions": ["answer.score"], **month},
            "score",
            _grouped(own, {"m": _month(), "c": score}),
        ),
        Case("rating, mean a month", {"measure": "rating", **mean, **month}, "score", _grouped(own, _month(), _RATING)),
        Case(
            "age, sum mean min max by sector",
            {
                "measure": "answer",
                "of": "answer.age",
                **by_sector,
                "statistics": ["count", "sum", "mean", "min", "max"],
            },
            "age",
            _grouped(own, sector, "$answers.age", ("sum", "mean", "min", "max")),
        ),
        Case(
            "topics (several a response)",
            {"measure": "responses", "dimensions": ["answer.topics"]},
            "topics",
            _topics(own),
        ),
        Case("cohorts a month", {"measure": "cohorts", **month}, "person", _cohorts(tenant)),
        Case("terms", {"measure": "terms", "of": "answer.comment", "top": 10_000}, "month_texts", _terms(own)),
        Case(
            "AI and queue cost a day",
            {"measure": "job_run", "dimensions": ["queue"], "statistics": ["count", "sum", "mean"], "grain": "day"},
            "work",
            _grouped(own, {"d": _month(unit="day"), "q": "$queue"}, _RUN, ("sum", "mean")),
            collection="jobs",
        ),
        Case(
            "wait for a queue, p50 p95 p99 by kind",
            {"measure": "job_wait", "dimensions": ["kind"], **high},
            "work",
            _quantiles(own, "$kind", _WAIT, shares),
            collection="jobs",
        ),
        Case(
            "jobs by queue and kind",
            {"measure": "jobs", "dimensions": ["queue", "kind"]},
            "work",
            _grouped(own, {"q": "$queue", "k": "$kind"}),
            heavy=False,
            collection="jobs",
        ),
        Case(
            "audit by action a month",
            {"measure": "audit_entries", "dimensions": ["action"], **month},
            "action",
            _grouped(own, {"m": _month("$at"), "a": "$action"}),
            collection="audit",
        ),
        Case(
            "audit by actor",
            {"measure": "audit_entries", "dimensions": ["actor"]},
            "actor",
            _grouped(own, "$actor"),
            heavy=False,
            collection="audit",
        ),
    ]
