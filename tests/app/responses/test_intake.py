"""Intake: one durable insert, and one response for each idempotency key."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from quern.responses import intake
from tests.app.workflows.course import TENANT, Course, email


def test_what_is_acknowledged_waits_for_the_journal_of_a_majority(course: Course) -> None:
    assert course.runtime.store.db.responses.write_concern.document == {"w": "majority", "j": True}


def test_a_response_carries_its_audit_entry_and_its_jobs_cause_in_one_document(course: Course) -> None:
    response = course.submit(course.publish(email("one")), comment="hello")
    document = course.response(response)
    assert document["outbox"]["audit"]["action"] == "response.submitted"
    assert document["outbox"]["audit"]["mac"]
    assert document["steps"] == {"one": "queued"}
    assert "hello" not in repr(document["outbox"])
    assert course.db.audit.count_documents({}) == course.db.jobs.count_documents({}) == 0


def test_many_at_once_with_one_key_make_one_response(course: Course) -> None:
    form = course.publish(email("one"))

    def submit(_: int) -> str:
        try:
            return course.submit(form, key="again", comment="hello")
        except intake.SubmittedBeforeError as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        ids = set(pool.map(submit, range(16)))
    assert len(ids) == 1
    assert course.db.responses.count_documents({}) == 1


def test_a_key_belongs_to_one_form_of_one_tenant() -> None:
    ids = {
        intake.identity(TENANT, "frm_1", "key"),
        intake.identity(TENANT, "frm_2", "key"),
        intake.identity("ten_other", "frm_1", "key"),
    }
    assert len(ids) == 3


def test_a_response_can_be_found_again_by_its_key(course: Course) -> None:
    form = course.publish(email("one"))
    response = course.submit(form, key="mine", comment="hello")
    found = intake.submitted(course.db, TENANT, form, "mine")
    assert found is not None
    assert found["_id"] == response
    assert intake.submitted(course.db, "ten_other", form, "mine") is None


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [
        (({"a": 1, "b": 2}, 1), ({"b": 2, "a": 1}, 1), True),
        (({"a": 1}, 1), ({"a": 2}, 1), False),
        (({"a": 1}, 1), ({"a": 1}, 2), False),
        (({"a": "1"}, 1), ({"a": 1}, 1), False),
    ],
)
def test_a_fingerprint_is_of_answers_and_version(
    one: tuple[dict[str, object], int], two: tuple[dict[str, object], int], same: bool
) -> None:
    assert (intake.fingerprint(*one) == intake.fingerprint(*two)) is same
