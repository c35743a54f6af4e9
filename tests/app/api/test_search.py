"""Searching over HTTP: by text or by example, filtered; slow or broken, it fails fast and harms nothing else."""

import hashlib
from contextlib import ExitStack

import numpy as np
import pytest
from flask.testing import FlaskClient

from quern.api import search
from quern.api.app import create_app
from quern.breaker import Breaker
from quern.jobs import queue
from quern.search import vectors
from tests.app.api.client import Client, House, Json

FIELDS = [{"name": "comment", "type": "long_text"}, {"name": "stars", "type": "rating"}]


def embedded(text: str) -> vectors.Embedded:
    """A stand-in for the encoder, which this house has not: equal words, equal directions."""
    made = np.zeros(64, np.float32)
    for word in text.split():
        made[int(hashlib.sha256(word.encode()).hexdigest(), 16) % 64] += 1
    return vectors.Embedded(made / np.linalg.norm(made), "test")


def submit(house: House, client: Client, form: str, comment: str, stars: int) -> str:
    response = client.submit(form, {"comment": comment, "stars": stars})
    store = house.stack.runtime.store
    document = store.db.responses.find_one({"_id": response})
    assert document is not None
    made = embedded(comment)
    queue.transact(store, lambda session: vectors.keep(store.db, document, "vector", made.vector, made.model, session))
    return response


@pytest.fixture
def asked(house: House, owner: Client) -> Json:
    """A form with four responses that were embedded."""
    form = owner.form(FIELDS)
    texts = {"late": "the parcel came late", "later": "the parcel came too late", "kind": "kind staff", "odd": "odd"}
    made = {name: submit(house, owner, form, text, 1 + place) for place, (name, text) in enumerate(texts.items())}
    return {"form": form, **made}


def test_what_means_the_same_is_found_first_and_the_example_itself_is_not(owner: Client, asked: Json) -> None:
    found = owner.call("POST", "/search", {"like": asked["late"], "include_answers": True})
    assert [hit["response"] for hit in found["items"]][:1] == [asked["later"]]
    assert found["compared"] == 3
    assert found["items"][0]["answers"]["comment"] == "the parcel came too late"
    assert found["items"][0]["score"] > 0.8
    assert asked["late"] not in [hit["response"] for hit in found["items"]]
    plain = owner.call("POST", "/search", {"like": asked["late"], "limit": 1})
    assert len(plain["items"]) == 1
    assert plain["items"][0]["answers"] is None


def test_a_search_keeps_to_its_filter(owner: Client, asked: Json) -> None:
    def responses(**question: object) -> set[str]:
        hits = owner.call("POST", "/search", {"like": asked["late"], **question})["items"]
        return {hit["response"] for hit in hits}

    assert responses(form=asked["form"], answers={"stars": 3}) == {asked["kind"]}
    assert responses(form=owner.form(FIELDS)) == set()
    assert responses(step="vector") == {asked["later"], asked["kind"], asked["odd"]}
    assert responses(created_before="2020-01-01T00:00:00Z") == set()
    assert responses(status="processing") | responses(status="processed") == {
        asked["later"],
        asked["kind"],
        asked["odd"],
    }


@pytest.mark.parametrize(
    ("question", "status"),
    [
        ({}, 422),
        ({"text": "a", "like": "rsp_x"}, 422),
        ({"text": "  "}, 422),
        ({"text": "a", "answers": {"stars": 1}}, 422),
        ({"text": "a", "form": "frm_x", "answers": {"$where": "1"}}, 422),
        ({"text": "a", "limit": 101}, 422),
        ({"text": "a", "unknown": 1}, 422),
        ({"text": "a", "form": "frm_x"}, 404),
        ({"like": "rsp_x"}, 404),
    ],
)
def test_a_question_that_cannot_be_answered_is_refused(owner: Client, question: Json, status: int) -> None:
    assert owner.send("POST", "/search", question).status == status


def test_an_example_that_no_step_has_read_is_said_so(owner: Client) -> None:
    response = owner.submit(owner.form(FIELDS), {"comment": "x", "stars": 1})
    assert owner.send("POST", "/search", {"like": response}).status == 409


def test_an_erased_response_is_found_no_more(owner: Client, asked: Json) -> None:
    owner.call("DELETE", f"/responses/{asked['later']}", status=204)
    found = owner.call("POST", "/search", {"like": asked["late"]})
    assert asked["later"] not in [hit["response"] for hit in found["items"]]
    assert found["compared"] == 2


@pytest.fixture
def in_process(house: House, monkeypatch: pytest.MonkeyPatch) -> FlaskClient:
    """The API in this process with circuits of its own, so that a test can make it hurry."""
    monkeypatch.setattr(search, "_scan", Breaker(3, 60.0, search.SLOW))
    monkeypatch.setattr(search, "_embedding", Breaker(3, 60.0, search.BROKEN))
    return create_app(house.stack.runtime).test_client()


def test_without_an_engine_texts_fail_fast_and_examples_go_on(
    in_process: FlaskClient, owner: Client, asked: Json
) -> None:
    headers = {"Authorization": f"Bearer {owner.key}"}
    answers = [in_process.post("/api/v1/search", json={"text": "late"}, headers=headers) for _ in range(5)]
    assert {answer.status_code for answer in answers} == {503}
    assert all("Retry-After" in answer.headers for answer in answers)
    assert "let alone" in answers[-1].get_json()["detail"]
    assert in_process.post("/api/v1/search", json={"like": asked["late"]}, headers=headers).status_code == 200


def test_slow_searches_open_the_circuit_and_everything_else_goes_on(
    in_process: FlaskClient, owner: Client, asked: Json, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = {"Authorization": f"Bearer {owner.key}"}
    monkeypatch.setattr(search, "SCAN_SECONDS", 1e-6)
    slow = [in_process.post("/api/v1/search", json={"like": asked["late"]}, headers=headers) for _ in range(4)]
    assert {answer.status_code for answer in slow} == {503}
    assert "let alone" in slow[-1].get_json()["detail"]
    monkeypatch.undo()
    path = f"/api/v1/forms/{asked['form']}/responses"
    accepted = in_process.post(path, json={"answers": {"comment": "x", "stars": 1}}, headers=headers)
    assert accepted.status_code == 202


def test_one_process_does_few_searches_at_once(in_process: FlaskClient, owner: Client, asked: Json) -> None:
    headers = {"Authorization": f"Bearer {owner.key}"}
    with ExitStack() as busy:
        for _ in range(2):
            busy.enter_context(search.place())
        refused = in_process.post("/api/v1/search", json={"like": asked["late"]}, headers=headers)
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
    assert in_process.post("/api/v1/search", json={"like": asked["late"]}, headers=headers).status_code == 200
