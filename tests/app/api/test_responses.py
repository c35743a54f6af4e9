"""Submitting, reading, listing, exporting and erasing responses."""

import csv
import io
import threading
from typing import Any

import orjson
import pytest

from quern.store import clock
from tests.app.api.client import Client, House, Json, until

FIELDS: list[Json] = [
    {"name": "email", "type": "email"},
    {"name": "sector", "type": "choice", "options": [{"value": "health"}, {"value": "energy"}]},
    {"name": "score", "type": "number"},
    {"name": "agree", "type": "consent"},
    {"name": "comment", "type": "long_text"},
    {"name": "address", "type": "group", "fields": [{"name": "city", "type": "text"}]},
    {"name": "rows", "type": "group", "repeated": True, "fields": [{"name": "mail", "type": "email"}]},
]


@pytest.fixture
def form(owner: Client) -> str:
    return owner.form(FIELDS)


def _csv(client: Client, form: str, query: str = "") -> list[dict[str, str]]:
    answer = client.send("GET", f"/forms/{form}/export?format=csv{query}")
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/csv")
    assert "attachment" in answer.headers["content-disposition"]
    return list(csv.DictReader(io.StringIO(answer.content.decode(), newline="")))


def _jsonl(client: Client, form: str, query: str = "") -> list[Json]:
    answer = client.send("GET", f"/forms/{form}/export?format=jsonl{query}")
    assert answer.status == 200
    return [orjson.loads(line) for line in answer.content.splitlines()]


def test_a_submission_is_acknowledged_with_links_to_its_jobs(owner: Client) -> None:
    form = owner.form(FIELDS, [{"name": "mood", "type": "sentiment"}])
    accepted = owner.call("POST", f"/forms/{form}/responses", {"answers": {"comment": "fine"}}, status=202)
    assert accepted["status"] == "processing"
    assert owner.call("GET", "/" + accepted["href"].removeprefix("/api/v1/"))["id"] == accepted["id"]
    (job,) = accepted["jobs"]
    found = until(lambda: _found(owner, f"/jobs/{job['id']}"))
    assert (found["response"], found["step"]) == (accepted["id"], "mood")
    assert job["events"] == job["href"] + "/events"


def _found(client: Client, path: str) -> Any:
    answer = client.send("GET", path)
    return answer.json() if answer.status == 200 else None


def test_a_form_without_steps_is_done_at_once(owner: Client, form: str) -> None:
    accepted = owner.call("POST", f"/forms/{form}/responses", {"answers": {}}, status=202)
    assert (accepted["status"], accepted["jobs"]) == ("processed", [])


def test_lists_are_walked_once_over_everything_while_more_comes_in(owner: Client, form: str) -> None:
    before = [owner.submit(form, {"score": number}) for number in range(25)]
    stop = threading.Event()

    def more() -> None:
        while not stop.is_set():
            owner.submit(form, {"score": -1})

    writer = threading.Thread(target=more)
    writer.start()
    try:
        seen, cursor = [], ""
        while cursor is not None:
            page = owner.call("GET", f"/forms/{form}/responses?limit=4" + (f"&cursor={cursor}" if cursor else ""))
            seen += [item["id"] for item in page["items"]]
            cursor = page["next_cursor"]
        exported = [row["id"] for row in _jsonl(owner, form)]
    finally:
        stop.set()
        writer.join()
    assert len(set(seen)) == len(seen)
    assert [identity for identity in seen if identity in set(before)] == before[::-1]
    assert len(set(exported)) == len(exported)
    assert exported[:25] == before


def test_responses_of_one_millisecond_are_all_listed_and_exported(owner: Client, form: str, house: House) -> None:
    made = sorted(owner.submit(form, {"score": number}) for number in range(9))
    moment = clock.now()
    house.stack.runtime.store.db.responses.update_many({"form": form}, {"$set": {"created": moment}})
    seen, cursor = [], ""
    while cursor is not None:
        page = owner.call("GET", f"/forms/{form}/responses?limit=2" + (f"&cursor={cursor}" if cursor else ""))
        seen += [item["id"] for item in page["items"]]
        cursor = page["next_cursor"]
    assert seen == made[::-1]
    assert [row["id"] for row in _jsonl(owner, form)] == made


def test_an_export_of_more_than_a_page_is_whole(owner: Client, form: str, house: House) -> None:
    owner.submit(form, {"comment": "copied"})
    db = house.stack.runtime.store.db
    one = db.responses.find_one({"form": form})
    assert one is not None
    db.responses.insert_many([{**one, "_id": f"rsp_{number:026d}"} for number in range(1001)])
    assert len(_jsonl(owner, form)) == 1002
    assert len(_csv(owner, form)) == 1002


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("where=sector:health", [0, 2]),
        ("where=score:2", [2]),
        ("where=score:2.0", [2]),
        ("where=agree:true", [1]),
        ("where=email:Maud@EXAMPLE.org", [0]),
        ("where=comment:a:b", [3]),
        ("status=processed", [0, 1, 2, 3]),
        ("status=processing", []),
        ("created_from=2000-01-01T00:00:00Z", [0, 1, 2, 3]),
        ("created_before=2000-01-01T00:00:00Z", []),
        ("created_from=2000-01-01T00:00:00%2B02:00&where=sector:energy", [1]),
    ],
)
def test_filters_choose_the_same_for_lists_and_exports(
    owner: Client, form: str, query: str, expected: list[int]
) -> None:
    made = [
        owner.submit(form, {"sector": "health", "email": "Maud@example.org"}),
        owner.submit(form, {"sector": "energy", "agree": True}),
        owner.submit(form, {"sector": "health", "score": 2}),
        owner.submit(form, {"comment": "a:b", "agree": False}),
    ]
    wanted = [made[position] for position in expected]
    listed = owner.call("GET", f"/forms/{form}/responses?{query}")["items"]
    assert [item["id"] for item in listed] == wanted[::-1]
    assert [row["id"] for row in _jsonl(owner, form, f"&{query}")] == wanted
    assert [row["id"] for row in _csv(owner, form, f"&{query}")] == wanted


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t=", "\r=", "\n=", " =", "＝", "＋1", "－1", "＠"])
def test_no_answer_becomes_a_formula(owner: Client, form: str, start: str) -> None:
    owner.submit(form, {"comment": f"{start}HYPERLINK(1)", "address": {"city": f"{start.strip()}cmd|x"}, "score": -5})
    (row,) = _csv(owner, form)
    assert row["answers.comment"] == f"'{start}HYPERLINK(1)"
    assert row["answers.address.city"].startswith("'")
    assert row["answers.score"] == "-5.0"


def test_a_csv_holds_any_text_and_every_version(owner: Client, form: str) -> None:
    text = 'quotes " and, commas;\r\nlines\nand ünïcode 🙂'
    owner.submit(form, {"comment": text, "address": {"city": "Ghent"}, "rows": [{"mail": "a@example.org"}]})
    owner.call("PUT", f"/forms/{form}", {"name": "v2", "fields": [{"name": "extra", "type": "text"}]})
    owner.call("POST", f"/forms/{form}/publish")
    until(lambda: owner.send("POST", f"/forms/{form}/responses", {"answers": {"extra": "new"}}).status == 202)
    first, *_, last = _csv(owner, form)
    assert first["answers.comment"] == text
    assert first["answers.address.city"] == "Ghent"
    assert orjson.loads(first["answers.rows"]) == [{"mail": "a@example.org"}]
    assert (first["answers.extra"], last["answers.extra"], last["answers.comment"]) == ("", "new", "")


def test_an_empty_export_is_a_header_or_nothing(owner: Client, form: str) -> None:
    assert _jsonl(owner, form) == []
    answer = owner.send("GET", f"/forms/{form}/export?format=csv")
    assert answer.content.decode().strip().split(",")[:2] == ["id", "version"]


def test_an_erased_response_is_gone_from_everywhere_and_the_audit_log_says_so(owner: Client, house: House) -> None:
    hook = owner.call("POST", "/webhooks", {"url": f"{house.stack.receiver.url}/erase"}, status=201)["id"]
    form = owner.form(FIELDS, [{"name": "tell", "type": "webhook", "endpoint": hook}])
    words = "nobody may ever read this again"
    response = owner.submit(form, {"comment": words})
    until(lambda: owner.call("GET", f"/responses/{response}")["status"] == "processed")
    assert owner.send("DELETE", f"/responses/{response}").status == 204
    shown = owner.call("GET", f"/responses/{response}")
    assert (shown["status"], shown["answers"], shown["results"]) == ("erased", None, {})
    assert owner.call("GET", f"/forms/{form}/responses")["items"] == []
    assert _jsonl(owner, form) == []
    db = house.stack.runtime.store.db
    for name in db.list_collection_names():
        assert not [1 for document in db[name].find() if words in repr(document)], name
    actions = [entry["action"] for entry in owner.call("GET", f"/audit?subject={response}")["items"]]
    assert actions[0] == "response.erased"
    assert owner.send("DELETE", f"/responses/{response}").status == 204
    assert [entry["action"] for entry in owner.call("GET", f"/audit?subject={response}")["items"]] == actions


def test_a_persons_responses_are_erased_by_their_address_however_it_is_written(owner: Client, form: str) -> None:
    theirs = [owner.submit(form, {"email": "Maud@Example.ORG"}) for _ in range(3)]
    other = owner.submit(form, {"email": "other@example.org"})
    erased = owner.call("POST", f"/forms/{form}/erasures", {"field": "email", "value": "Maud@EXAMPLE.org"})
    assert sorted(erased["erased"]) == sorted(theirs)
    assert owner.call("GET", f"/responses/{other}")["status"] == "processed"
    nested = owner.submit(form, {"rows": [{"mail": "x@example.org"}, {"mail": "guest@example.org"}]})
    erased = owner.call("POST", f"/forms/{form}/erasures", {"field": "rows.mail", "value": "guest@example.org"})
    assert erased["erased"] == [nested]


def test_many_responses_are_erased_in_several_requests(owner: Client, form: str, house: House) -> None:
    owner.submit(form, {"email": "many@example.org"})
    db = house.stack.runtime.store.db
    one = db.responses.find_one({"form": form})
    assert one is not None
    db.responses.insert_many([{**one, "_id": f"rsp_z{number:025d}"} for number in range(150)])
    total, more = 0, True
    while more:
        found = owner.call("POST", f"/forms/{form}/erasures", {"field": "email", "value": "many@example.org"})
        total, more = total + len(found["erased"]), found["more"]
    assert total == 151
    assert owner.call("GET", f"/forms/{form}/responses")["items"] == []


@pytest.mark.parametrize("field", ["$where", "a.b.c.d.e", "a..b", ".a", "a.", "_id", "a.$b", ""])
def test_erasing_by_what_is_no_field_is_refused(owner: Client, form: str, field: str) -> None:
    answer = owner.send("POST", f"/forms/{form}/erasures", {"field": field, "value": "x"})
    assert (answer.status, answer.pointers) == (422, ["/field"])
