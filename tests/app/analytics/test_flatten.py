"""Any answer that a form can take, and any result, comes back from the warehouse as it was."""

import gc
import math
import time
from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quern.analytics import sandbox, schema
from quern.analytics.flatten import Flattener, to_json
from quern.analytics.tally import Tally, add_rows, leaves_of, rows_as_leaves
from quern.analytics.version import Version
from quern.analytics.wide import value_column
from quern.forms.fields import MAX_FIELDS
from tests.app.analytics.desk import FIELDS, RESULTS, STEPS, Desk, moment

_DEFINITION = to_json({"fields": FIELDS}).decode()
_WORKFLOW = to_json({"steps": STEPS}).decode()
_VERSION = Version.of("frm_a", 1, _DEFINITION, _WORKFLOW)


def _document(answers: dict[str, Any], results: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "_id": "rsp_a",
        "tenant": "ten_a",
        "form": "frm_a",
        "version": 1,
        "status": "processed",
        "created": datetime(2024, 2, 29, 23, 59, 59, 999000, UTC).replace(tzinfo=None),
        "answers": answers,
        "results": results or {},
        "steps": {},
    }


def _flat(document: dict[str, Any], version: Version = _VERSION) -> dict[str, list[dict[str, Any]]]:
    flattener = Flattener()
    flattener.add(document, version, 1)
    found: dict[str, list[dict[str, Any]]] = {table.name: [] for table in schema.FACTS}
    for table, rows in flattener.batches():
        found[table.name] += rows.to_pylist()
    return found


def _values(rows: list[dict[str, Any]]) -> dict[tuple[str, str], Any]:
    return {(row["path"], row["item"]): row[value_column(row["kind"])] for row in rows}


def test_each_kind_of_answer_has_its_column() -> None:
    answers = {
        "sector": "retail",
        "email": "Maud@example.org",
        "score": 4,
        "age": 41.5,
        "code": "007",
        "comment": "two words",
        "visited": "2024-02-29",
        "agreed": True,
        "topics": ["speed", "price"],
        "people": [{"name": "Ann", "age": 3}, {"name": "Bo"}],
    }
    rows = _flat(_document(answers))
    assert _values(rows["fact_answer"]) == {
        ("sector", ""): "retail",
        ("email", ""): "Maud@example.org",
        ("score", ""): 4.0,
        ("age", ""): 41.5,
        ("code", ""): "007",
        ("comment", ""): "two words",
        ("visited", ""): "2024-02-29",
        ("agreed", ""): True,
        ("topics", "0"): "speed",
        ("topics", "1"): "price",
        ("people.name", "0"): "Ann",
        ("people.age", "0"): 3.0,
        ("people.name", "1"): "Bo",
    }
    (response,) = rows["fact_response"]
    assert (response["fields"], response["fields_answered"], response["answer_rows"]) == (11, 11, 13)
    assert (response["text_length"], response["words"], response["number_sum"]) == (len("007two wordsAnnBo"), 5, 48.5)
    assert response["rating"] == 0.75
    assert response["respondent"] and "maud" not in response["respondent"]
    assert response["day"] == date(2024, 2, 29)


def test_results_become_rows_by_their_kind() -> None:
    rows = _flat(_document({}, RESULTS))
    kinds = {(row["path"], row["item"]): row["kind"] for row in rows["fact_answer"]}
    assert kinds == {
        ("topic.label", ""): "label",
        ("topic.score", ""): "score",
        ("topic.scores", "praise"): "scores",
        ("topic.scores", "complaint"): "scores",
        ("mood.label", ""): "sentiment",
        ("mood.score", ""): "score",
        ("mood.scores", "positive"): "scores",
        ("mood.scores", "neutral"): "scores",
        ("mood.scores", "negative"): "scores",
        ("gist.text", ""): "summary",
    }
    assert [row["vector"] for row in rows["fact_embedding"]] == [pytest.approx([0.6, 0.8])]
    (response,) = rows["fact_response"]
    assert (response["label"], response["sentiment"]) == ("praise", "positive")


def test_a_text_of_digits_stays_a_text() -> None:
    (row,) = _flat(_document({"code": "42"}))["fact_answer"]
    assert (row["value_text"], row["value_number"]) == ("42", None)


def test_a_day_that_not_both_engines_can_hold_is_kept_as_text() -> None:
    (row,) = _flat(_document({"visited": "0044-03-15"}))["fact_answer"]
    assert (row["value_text"], row["value_date"]) == ("0044-03-15", None)
    (row,) = _flat(_document({"visited": "2299-12-31"}))["fact_answer"]
    assert row["value_date"] == date(2299, 12, 31)


def test_what_no_version_explains_is_there_all_the_same() -> None:
    answers = {"'; DROP TABLE x; --": "a", "a.b": {"$where": 1}, "": False}
    rows = _flat(_document(answers), Version.unknown("frm_a", 9))["fact_answer"]
    assert {row["kind"] for row in rows} == {"unknown"}
    found = rows_as_leaves(rows)
    assert found == {
        ("answer", "'; DROP TABLE x; --", ""): "a",
        ("answer", "a.b.$where", ""): 1.0,
        ("answer", "", ""): False,
    }


_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=40)
_SCALAR = _TEXT | st.booleans() | st.integers(-(10**12), 10**12) | st.floats(-1e9, 1e9)
_ANY = st.recursive(
    st.none() | _SCALAR,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.from_regex(r"[a-z]{1,5}", fullmatch=True), inner, max_size=3)
    ),
    max_leaves=12,
)
_TREES = st.dictionaries(st.from_regex(r"[a-z]{1,5}", fullmatch=True), _ANY, max_size=5)


@settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow])
@given(answers=_TREES, results=_TREES)
def test_nothing_is_lost_whatever_the_shape(answers: dict[str, Any], results: dict[str, Any]) -> None:
    document = _document(answers, results)
    flattener, stored, there = Flattener(), Tally(responses=1, response_hash=1), Tally()
    flattener.add(document, _VERSION, 1)
    rows: list[dict[str, Any]] = []
    for table, batch in flattener.batches():
        add_rows({document["created"].date(): there}, table.name, batch)
        rows += batch.to_pylist() if table is schema.FACT_ANSWER else []
    stored.add_documents([document])
    if not any("vector" in result for result in results.values() if isinstance(result, dict)):
        assert stored.differences(there) == []
    wanted = {key: float(value) if type(value) is int else value for key, value in leaves_of(document).items()}
    assert rows_as_leaves(rows) == wanted


def test_what_is_walked_is_let_go_of_at_once() -> None:
    document = _document({"comment": "fine", "people": [{"name": "Ada"}]}, RESULTS)
    gc.collect()
    gc.disable()
    try:
        leaves_of(document)
        assert gc.collect() == 0
    finally:
        gc.enable()


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(made=st.lists(st.tuples(_TREES, _TREES), min_size=2, max_size=6))
def test_documents_together_give_the_rows_that_each_gives_alone(
    made: list[tuple[dict[str, Any], dict[str, Any]]],
) -> None:
    documents = [{**_document(*trees), "_id": f"rsp_{number}"} for number, trees in enumerate(made)]
    together = Flattener()
    found: dict[str, list[str]] = {"fact_response": [], "fact_answer": []}
    alone: dict[str, list[str]] = {"fact_response": [], "fact_answer": []}
    for document in documents:
        together.add(document, _VERSION, 1)
        single = Flattener()
        single.add(document, _VERSION, 1)
        for table, rows in single.batches():
            alone.setdefault(table.name, []).extend(map(repr, rows.to_pylist()))
    for table, rows in together.batches():
        found.setdefault(table.name, []).extend(map(repr, rows.to_pylist()))
    assert {name: sorted(rows) for name, rows in found.items()} == {name: sorted(rows) for name, rows in alone.items()}


def test_names_that_hardly_repeat_are_flattened_as_well() -> None:
    flattener = Flattener()
    for number in range(300):
        flattener.add(
            {**_document({f"only_{number}": [number, {"a": str(number)}]}), "_id": f"rsp_{number}"}, _VERSION, 1
        )
    rows = [row for table, rows in flattener.batches() if table is schema.FACT_ANSWER for row in rows.to_pylist()]
    assert {(row["response"], row["path"], row["item"], row["value_text"], row["value_number"]) for row in rows} == {
        found
        for number in range(300)
        for found in (
            (f"rsp_{number}", f"only_{number}", "0", None, float(number)),
            (f"rsp_{number}", f"only_{number}.a", "1", str(number), None),
        )
    }


def test_a_tally_sees_one_changed_letter() -> None:
    one, other = Tally(), Tally()
    one.add_documents([_document({"code": "abc"})])
    other.add_documents([_document({"code": "abd"})])
    assert one.differences(other)


def test_a_tally_forgives_only_the_order_of_a_sum() -> None:
    one, other = Tally(), Tally()
    numbers = [0.1 * number for number in range(1, 2000)]
    one.answers.add(numbers)
    other.answers.add(numbers[::-1])
    other.answers.numbers = math.fsum(numbers)
    assert one.differences(other) == []
    other.answers.numbers += 0.01
    assert one.differences(other)


def test_every_answer_comes_back_from_the_warehouse(desk: Desk) -> None:
    fields: list[dict[str, Any]] = [{"name": f"f{number}", "type": "text"} for number in range(MAX_FIELDS - 5)]
    fields += [
        {"name": "select", "type": "text"},
        {"name": "__proto__x".strip("_"), "type": "text"},
        {"name": "response", "type": "number"},
        {"name": "day", "type": "choice", "options": [{"value": "'\"; DROP"}, {"value": "ü.ß"}]},
        {"name": "long", "type": "long_text", "max_length": 500_000},
    ]
    desk.publish(fields)
    wide = {f"f{number}": f"väl {number} 🌾" for number in range(MAX_FIELDS - 5)}
    hostile = {"select": "Robert'); DROP TABLE--", "proto__x": "=1+1", "response": 1e15, "day": "'\"; DROP"}
    big = {"long": "\u200b🌾é" * 166_666, "day": "ü.ß"}
    # A megabyte and a half in UTF-8, more than the API takes.
    assert len(big["long"].encode()) > 1_400_000
    ids = [desk.submit(moment("2024-02-29", hour), answers) for hour, answers in ((0, wide), (1, hostile), (23, big))]
    desk.run()
    assert desk.holds()
    for identity, answers in zip(ids, (wide, hostile, big), strict=True):
        rows = desk.rows("fact_answer", f"response = '{identity}'")
        assert {path: value for (_, path, _), value in rows_as_leaves(rows).items()} == answers
    assert {row["fields"] for row in desk.rows("fact_response")} == {MAX_FIELDS}


def test_sql_sees_the_responses_of_each_version_of_a_form_with_a_column_for_each_field(desk: Desk) -> None:
    person = {"name": 'Ann "o\'Hara"', "age": 40}
    answers = {"code": "1", "topics": ["speed", "price"], "agreed": True, "people": [{"age": -3.25}, person]}
    first = desk.submit(moment("2026-03-07"), answers)
    desk.finish(first, RESULTS)
    desk.erase(desk.submit(moment("2026-03-07"), {"code": "gone"}))
    desk.publish([{"name": "code", "type": "number"}, {"name": "Code", "type": "text"}], STEPS[3:])
    second = desk.submit(moment("2026-03-08"), {"code": 2, "Code": "b"})
    silent = desk.submit(moment("2026-03-08", 13), {})
    desk.run()
    old, new = (f"wide_{desk.form}_{version}" for version in (1, 2))

    def rows(*sql: str) -> list[list[Any]]:
        return sandbox.run(" ".join(sql), desk.manifest, [desk.tenant]).rows

    asked = ["code", "topics", "agreed", "people.name", "people.age", "comment"]
    columns = ", ".join(f'"answer.{path}"' for path in asked)
    steps = '"result.topic.label", "result.mood.score", "result.gist.text"'
    found = rows("SELECT response,", columns, ",", steps, "FROM", old)
    names, results = "['Ann \"o\\'Hara\"']", ["praise", 0.5, "All was well."]
    assert found == [[first, "1", "[speed, price]", True, names, "[-3.25, 40.0]", None, *results]]
    # What a field became later is not what it was; a response without answers is one, an erased one is none.
    assert rows("SELECT * EXCLUDE created FROM", new.upper(), "ORDER BY created") == [
        [second, "processing", 2.0, "b"],
        [silent, "processing", None, None],
    ]
    both = f"{old} a, {new} b WHERE b.\"answer.Code_\" = 'b'"
    assert rows('SELECT a."answer.code", b."answer.code" FROM', both) == [["1", 2.0]]
    assert [row[0] for row in rows(f"DESCRIBE {new}")] == [
        "response",
        "created",
        "status",
        "answer.code",
        "answer.Code_",
    ]
    with pytest.raises(sandbox.SqlError, match=r"wide_<form>_<version>"):
        rows(f"FROM wide_{desk.form}_3")


@pytest.mark.parametrize(
    ("at", "day"),
    [
        (datetime(2024, 2, 29, 23, 59, 59, 999000, UTC), date(2024, 2, 29)),
        (datetime(2024, 3, 1, 0, 0, tzinfo=UTC), date(2024, 3, 1)),
        (datetime(2026, 3, 29, 1, 30, tzinfo=timezone(timedelta(hours=2))), date(2026, 3, 28)),
        (datetime(2025, 12, 31, 20, 0, tzinfo=timezone(timedelta(hours=-5))), date(2026, 1, 1)),
    ],
)
def test_a_day_is_utcs_whatever_the_zone(desk: Desk, monkeypatch: pytest.MonkeyPatch, at: datetime, day: date) -> None:
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    time.tzset()
    try:
        desk.submit(at, {"code": "a"})
        desk.run()
        assert desk.holds()
        (row,) = desk.rows("fact_response")
    finally:
        monkeypatch.undo()
        time.tzset()
    assert row["day"] == day
    assert row["created"] == at.astimezone(UTC).replace(tzinfo=None)


def test_empty_days_have_no_files(desk: Desk) -> None:
    for day in ("2026-10-28", "2026-10-31"):
        desk.submit(moment(day), {"code": "a"})
    desk.run()
    assert desk.holds()
    assert sorted(path.name for path in (desk.root / "extract" / desk.tenant).iterdir()) == ["2026-10-28", "2026-10-31"]
    assert desk.rows("fact_answer", "day = DATE '2026-10-29'") == []


def test_dim_time_knows_leap_days_and_iso_weeks(desk: Desk) -> None:
    desk.run()
    (leap,) = desk.rows("dim_time", "day = DATE '2024-02-29'")
    assert (leap["day_of_year"], leap["iso_week"], leap["weekday"]) == (60, 9, 4)
    (turn,) = desk.rows("dim_time", "day = DATE '2027-01-01'")
    assert (turn["iso_year"], turn["iso_week"], turn["quarter"]) == (2026, 53, 1)
    assert len(desk.rows("dim_time", "month = 2 AND day_of_month = 29")) == 25


def test_jobs_and_users_are_there(desk: Desk) -> None:
    response = desk.submit(moment("2026-10-31"), {"code": "a"})
    desk.db.jobs.update_many(
        {"subject": response},
        {
            "$set": {
                "state": "done",
                "started": moment("2026-10-31", 13),
                "ended": moment("2026-10-31", 14),
                "attempt": 2,
            },
            "$push": {
                "log": {
                    "$each": [
                        {"seq": 2, "type": "running", "at": moment("2026-10-31", 12, 5), "data": {}},
                        {"seq": 3, "type": "retry", "at": moment("2026-10-31", 12, 6), "data": {}},
                        {"seq": 4, "type": "running", "at": moment("2026-10-31", 13), "data": {}},
                        {"seq": 5, "type": "done", "at": moment("2026-10-31", 14), "data": {}},
                    ]
                }
            },
        },
    )
    desk.run()
    jobs = desk.rows("fact_job")
    assert {row["step"] for row in jobs} == {"topic", "mood", "gist", "meaning"}
    assert {(row["wait_seconds"], row["run_seconds"], row["attempts"]) for row in jobs} == {(300.0, 3660.0, 2)}
    assert {row["user"] for row in desk.rows("dim_user")} == {"operator", "quern"}


def test_jobs_stay_after_mongodb_has_forgotten_them(desk: Desk) -> None:
    response = desk.submit(moment("2026-03-07"), {"code": "a"})
    other = desk.submit(moment("2026-03-07"), {"code": "b"})
    desk.run()
    desk.db.jobs.delete_many({"subject": {"$in": [response, other]}})
    desk.finish(response, RESULTS)
    desk.erase(other)
    desk.run()
    # The erased one's are gone for good; the other's are known from the warehouse alone.
    assert {row["response"] for row in desk.rows("fact_job")} == {response}
    assert desk.holds()
    (mark,) = desk.rows("fact_response", f"response = '{other}'")
    assert (mark["status"], mark["answer_rows"], mark["user"], mark["respondent"]) == ("erased", 0, None, None)
