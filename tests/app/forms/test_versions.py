"""Drafts, versions, opening and closing: a response is checked against the version that it was filled in for."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.app.api.client import Client, Json, until

OLD: list[Json] = [{"name": "old", "type": "text", "required": True}]
NEW: list[Json] = [{"name": "new", "type": "number", "required": True}]


def _draft(fields: list[Json]) -> Json:
    return {"name": "versioned", "fields": fields}


@pytest.fixture
def form(owner: Client) -> str:
    """Version 1 asks `old`, version 2 asks `new`."""
    form = owner.form(OLD)
    owner.call("PUT", f"/forms/{form}", _draft(NEW))
    assert owner.call("POST", f"/forms/{form}/publish")["version"] == 2
    until(
        lambda: (
            {owner.send("POST", f"/forms/{form}/responses", {"answers": {"old": 1}}).pointers[0] for _ in range(8)}
            == {"/answers/new"}
        )
    )
    return form


def test_a_response_is_checked_against_the_version_that_it_names(owner: Client, form: str) -> None:
    path = f"/forms/{form}/responses"
    first = owner.call("POST", path, {"answers": {"old": "x"}, "version": 1}, status=202)["id"]
    second = owner.call("POST", path, {"answers": {"new": 5}}, status=202)["id"]
    assert owner.call("GET", f"/responses/{first}")["version"] == 1
    assert owner.call("GET", f"/responses/{second}")["version"] == 2
    assert owner.send("POST", path, {"answers": {"new": 5}, "version": 1}).status == 422
    assert owner.send("POST", path, {"answers": {"old": "x"}, "version": 2}).status == 422


@pytest.mark.parametrize("version", [0, -1, 3, 1.5, "1", True, 10**9])
def test_a_version_that_is_not_there_is_refused(owner: Client, form: str, version: object) -> None:
    answer = owner.send("POST", f"/forms/{form}/responses", {"answers": {"new": 1}, "version": version})
    assert (answer.status, answer.pointers) == (422, ["/version"])


def test_a_published_version_never_changes(owner: Client, form: str) -> None:
    before = owner.call("GET", f"/forms/{form}/versions")["items"]
    assert [item["version"] for item in before] == [2, 1]
    owner.call("PUT", f"/forms/{form}", _draft(OLD))
    assert owner.call("GET", f"/forms/{form}/versions")["items"] == before
    assert owner.call("GET", f"/forms/{form}/schema")["version"] == 2


def test_versions_come_a_page_at_a_time(owner: Client, form: str) -> None:
    first = owner.call("GET", f"/forms/{form}/versions?limit=1")
    second = owner.call("GET", f"/forms/{form}/versions?limit=1&cursor={first['next_cursor']}")
    assert [first["items"][0]["version"], second["items"][0]["version"]] == [2, 1]
    assert second["next_cursor"] is None


def test_a_draft_takes_no_responses(owner: Client) -> None:
    form = owner.form(OLD, publish=False)
    answer = owner.send("POST", f"/forms/{form}/responses", {"answers": {"old": "x"}})
    assert (answer.status, answer.json()["type"]) == (409, "urn:quern:problem:form-not-open")
    assert owner.send("GET", f"/forms/{form}/schema").status == 404
    for verb in ("open", "close"):
        assert owner.send("POST", f"/forms/{form}/{verb}").status == 409


def test_publishing_needs_a_draft(owner: Client, form: str) -> None:
    assert owner.call("GET", f"/forms/{form}")["draft"] is None
    answer = owner.send("POST", f"/forms/{form}/publish")
    assert answer.status == 409
    assert "save one first" in answer.json()["detail"]


def test_a_closed_form_takes_nothing_until_it_is_opened(owner: Client, form: str) -> None:
    def answered() -> set[int]:
        body = {"answers": {"new": 1}}
        return {owner.send("POST", f"/forms/{form}/responses", body).status for _ in range(8)}

    assert owner.call("POST", f"/forms/{form}/close")["status"] == "closed"
    until(lambda: answered() == {409})
    assert owner.call("POST", f"/forms/{form}/open")["status"] == "open"
    until(lambda: answered() == {202})


def test_publishing_at_once_from_many_sides_makes_one_version(owner: Client) -> None:
    form = owner.form(OLD, publish=False)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: owner.send("POST", f"/forms/{form}/publish").status, range(8)))
    assert sorted(found) == [200] + [409] * 7
    assert len(owner.call("GET", f"/forms/{form}/versions")["items"]) == 1


def test_every_change_of_a_form_is_in_the_audit_log(owner: Client, form: str) -> None:
    owner.call("POST", f"/forms/{form}/close")
    owner.call("POST", f"/forms/{form}/open")
    found = [entry["action"] for entry in owner.call("GET", f"/audit?subject={form}")["items"]]
    assert found == [
        "form.opened",
        "form.closed",
        "form.published",
        "form.draft_saved",
        "form.published",
        "form.created",
    ]


def test_the_schema_describes_what_is_accepted(owner: Client) -> None:
    from jsonschema import Draft202012Validator

    form = owner.form(
        [
            {"name": "score", "type": "rating", "scale": 5, "required": True},
            {"name": "day", "type": "date"},
            {"name": "rows", "type": "group", "repeated": True, "fields": [{"name": "n", "type": "number"}]},
        ]
    )
    schema = owner.call("GET", f"/forms/{form}/schema")["json_schema"]
    Draft202012Validator.check_schema(schema)
    judge = Draft202012Validator(schema)
    for answers in ({"score": 5}, {"score": 1, "day": "2026-01-01", "rows": [{"n": 1}]}, {"score": 6}, {}, {"x": 1}):
        accepted = owner.send("POST", f"/forms/{form}/responses", {"answers": answers}).status == 202
        assert accepted == judge.is_valid(answers), answers
