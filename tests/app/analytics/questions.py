"""Random questions about the random house of `world`."""

from datetime import timedelta
from typing import Any

from hypothesis import strategies as st

from quern.analytics.question import COUNTED, MEASURES, SPECIAL, Filter, Measure, Question, Stage
from tests.app.analytics.world import FORMS, LABELS, SECTORS, SENTIMENTS, TOPICS, USERS, World

ZONES = ["UTC", "Europe/Berlin", "Asia/Kathmandu", "America/St_Johns"]
OWN: dict[str, list[Any]] = {
    "form": FORMS,
    "version": [1.0, 2.0, 3.0],
    "status": ["processed", "incomplete", "processing"],
    "user": USERS,
    "sentiment": SENTIMENTS,
    "label": LABELS,
    "weekday": [1.0, 3.0, 7.0],
    "hour": [0.0, 2.0, 3.0, 23.0],
}
#: These stand in every version of every form.
PATHS: dict[str, list[Any]] = {
    "answer.sector": SECTORS,
    "answer.stars": [1.0, 3.0],
    "answer.email": ["ann@example.org"],
    "answer.comment": ["parking", "z"],
    "result.topic.label": LABELS,
    "result.mood.score": [0.2, 0.7],
    "step.mood": ["done", "dead"],
}
#: These only in some.
SOMETIMES: dict[str, list[Any]] = {
    "answer.mixed": [3.0, "price", "7"],
    "answer.age": [0.0, 7.0],
    "answer.terms": [True, False],
    "answer.topics": TOPICS,
    "answer.visit": ["2024-06-01"],
    "answer.place.sector": SECTORS[:2],
    "answer.items.kind": TOPICS,
    "answer.items.stars": [2.0],
    "result.topic.scores": [0.5],
}
JOB: dict[str, list[Any]] = {
    "form": FORMS,
    "version": [1.0, 2.0],
    "queue": ["batched", "high"],
    "kind": ["mood", "openai_chat"],
    "step": ["topic"],
    "state": ["done"],
    "hour": [1.0],
}
AUDIT: dict[str, list[Any]] = {"actor": [*USERS, "operator"], "action": ["form.published"], "weekday": [5.0]}


def _dimensions(measure: Measure, asked: World, tenant: str | None) -> dict[str, list[Any]]:
    subject = MEASURES[measure].subject
    if subject != "response":
        return JOB if subject == "job" else AUDIT
    found = set()
    for (form, _), (definition, _) in asked.versions.items():
        if tenant in (None, asked.owner(form)):
            found |= {name for name in SOMETIMES if all(f'"{part}"' in definition for part in name.split(".")[1:])}
    values: list[list[Any]] = [["parking"], [7.0]]
    named = {f"answer.{name}": values[place % 2] for place, name in enumerate(asked.names)}
    return OWN | PATHS | named | {name: SOMETIMES[name] for name in found} | {"result.topic.scores": [0.5]}


@st.composite
def _filter(draw: st.DrawFn, known: dict[str, list[Any]]) -> Filter:
    name = draw(st.sampled_from(sorted(known)))
    values = known[name]
    op = draw(st.sampled_from(["in", "not_in", "lt", "le", "gt", "ge", "exists"]))
    if op == "exists":
        return Filter(dimension=name, op="exists", values=draw(st.sampled_from([[], [True], [False]])))
    if op in ("lt", "le", "gt", "ge"):
        comparable = [value for value in values if not isinstance(value, bool)]
        if not comparable:
            op = "in"
        else:
            return Filter(dimension=name, op=op, values=[draw(st.sampled_from(comparable))])
    chosen = draw(
        st.lists(st.sampled_from(values), min_size=1, max_size=3, unique_by=lambda value: (type(value), value))
    )
    return Filter(dimension=name, op=op, values=chosen)


@st.composite
def questions(draw: st.DrawFn, asked: World, tenant: str | None) -> Question:
    """A question that has an answer."""
    measure = draw(st.sampled_from(sorted(Measure)))
    known = _dimensions(measure, asked, tenant)
    subject = MEASURES[measure].subject
    made: dict[str, Any] = {"measure": measure, "time_zone": draw(st.sampled_from(ZONES))}
    made["filters"] = draw(st.lists(_filter(known), max_size=2))
    if draw(st.booleans()):
        bounds = sorted(
            draw(st.sampled_from(asked.times)) + timedelta(hours=draw(st.integers(0, 80))) for _ in range(2)
        )
        made["range"] = {"from": bounds[0], "before": bounds[1]} if draw(st.booleans()) else {"from": bounds[0]}
    if measure not in (Measure.TERMS, Measure.SIMILAR, Measure.COHORTS):
        names = sorted(known) + (["respondent"] if subject == "response" else [])
        names += ["tenant"] if tenant is None else []
        made["dimensions"] = draw(st.lists(st.sampled_from(names), max_size=3, unique=True))
        made["grain"] = draw(st.sampled_from(["all", "hour", "day", "week", "month", "quarter", "year"]))
    if measure is Measure.COHORTS:
        made["grain"] = draw(st.sampled_from(["day", "week", "month", "quarter", "year"]))
        made["member"] = draw(st.sampled_from(["respondent", "user"]))
    if measure is Measure.ANSWER:
        numbers = ["answer.stars", "answer.mixed", "answer.age", "answer.items.stars"]
        numbers += [f"answer.{name}" for name in asked.names[1::2]]
        numeric = [name for name in known if name in numbers]
        made["of"] = draw(st.sampled_from([*sorted(numeric), "result.mood.score", "result.topic.scores"]))
    if measure is Measure.TERMS:
        made["of"] = draw(st.sampled_from([None, "answer.comment"]))
        made["min_length"] = draw(st.sampled_from([1, 3]))
    if measure is Measure.SIMILAR:
        made["of"] = draw(
            st.sampled_from([item["_id"] for item in asked.responses if tenant in (None, item["tenant"])])
        )
    if measure is Measure.FUNNEL and draw(st.booleans()):
        made["stages"] = [
            Stage(name=f"stage {place}", filters=draw(st.lists(_filter(known), max_size=2))) for place in range(3)
        ]
    if measure not in SPECIAL:
        statistics = ["count", "share"] + (
            [] if measure in COUNTED else ["sum", "mean", "min", "max", "p50", "p75", "p90", "p95", "p99"]
        )
        made["statistics"] = draw(st.lists(st.sampled_from(statistics), max_size=4, unique=True))
        if "count" in made["statistics"] and draw(st.booleans()):
            made["order"] = {"by": "count", "descending": draw(st.booleans())}
            made["top"] = draw(st.sampled_from([None, 1, 5]))
    return Question.model_validate(made)
