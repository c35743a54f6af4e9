"""The audit chain: every change to what was sealed is found, and so is what is missing."""

import random
import threading
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quern.audit import chain
from quern.audit.entry import content_key, content_mac, entry, listing, record
from quern.store.connection import Db, Document, Store
from tests.app.workflows.course import TENANT, Course, email

KEY = chain.KeyRing(["k" * 32])
SECRET = KEY.current[1]


def write(store: Store, count: int, cause: str = "c") -> None:
    for number in range(count):
        record(store.db, entry("ten_a", "key_1", "form.created", f"frm_{number}", cause=(cause, str(number))))


def seal_all(store: Store) -> None:
    while chain.seal_pending(store.db, KEY, limit=7):
        pass


@pytest.fixture
def sealed(store: Store) -> Store:
    """Twenty entries in a chain."""
    write(store, 20)
    seal_all(store)
    return store


def test_a_chain_that_nobody_touched_holds(sealed: Store) -> None:
    found = chain.verify(sealed.db, KEY)
    assert (found.sealed, found.unsealed, found.problems) == (20, 0, [])
    assert chain.head(sealed.db) == (20, found.head)


def test_what_is_not_sealed_yet_is_counted(sealed: Store) -> None:
    write(sealed, 3, cause="later")
    found = chain.verify(sealed.db, KEY)
    assert (found.sealed, found.unsealed, found.problems) == (20, 3, [])
    seal_all(sealed)
    assert chain.verify(sealed.db, KEY).sealed == 23


Tampering = Callable[[Db], Any]


def swap(db: Db) -> None:
    one, two = (db.audit.find_one({"seq": seq}) for seq in (7, 8))
    assert one is not None
    assert two is not None
    db.audit.delete_many({"seq": {"$in": [7, 8]}})
    db.audit.insert_many([{**one, "seq": 8}, {**two, "seq": 7}])


@pytest.mark.parametrize(
    ("tamper", "says"),
    [
        (lambda db: db.audit.update_one({"seq": 5}, {"$set": {"actor": "key_2"}}), "entry 5 "),
        (lambda db: db.audit.update_one({"seq": 5}, {"$set": {"at": datetime(2020, 1, 1)}}), "entry 5 "),  # noqa: DTZ001
        (lambda db: db.audit.update_one({"seq": 5}, {"$set": {"extra": 1}}), "entry 5 "),
        (lambda db: db.audit.update_one({"seq": 5}, {"$unset": {"subject": ""}}), "entry 5 "),
        (lambda db: db.audit.update_one({"seq": 5}, {"$set": {"seal": "0" * 64}}), "entry 5 "),
        (lambda db: db.audit.delete_one({"seq": 5}), "entry 5 is missing"),
        (lambda db: db.audit.delete_one({"seq": 1}), "entry 1 is missing"),
        (swap, "entry 7 "),
    ],
    ids=["actor", "time", "added", "removed", "seal", "deleted", "first deleted", "swapped"],
)
def test_tampering_is_found(sealed: Store, tamper: Tampering, says: str) -> None:
    tamper(sealed.db)
    problems = chain.verify(sealed.db, KEY).problems
    assert problems
    assert says in problems[0]


def test_a_cut_tail_is_found_against_what_was_noted_earlier(sealed: Store) -> None:
    noted = chain.head(sealed.db)
    sealed.db.audit.delete_many({"seq": {"$gt": 15}})
    assert chain.verify(sealed.db, KEY).problems == [], "without a note nobody can know"
    [problem] = chain.verify(sealed.db, KEY, expect=noted).problems
    assert "ends at 15, but 20 was noted" in problem


def test_a_tail_that_was_cut_and_sealed_anew_is_found(sealed: Store) -> None:
    noted = chain.head(sealed.db)
    sealed.db.audit.delete_many({"seq": {"$gt": 15}})
    write(sealed, 8, cause="forged")
    seal_all(sealed)
    [problem] = chain.verify(sealed.db, KEY, expect=noted).problems
    assert "entry 20 carries another seal" in problem


def test_who_does_not_have_the_key_cannot_forge_a_chain(sealed: Store) -> None:
    previous = chain.GENESIS
    for document in list(sealed.db.audit.find().sort("seq", 1)):
        previous = chain.seal_of(b"another key, guessed" * 2, previous, document, document["seq"])
        sealed.db.audit.update_one({"_id": document["_id"]}, {"$set": {"seal": previous}})
    assert len(chain.verify(sealed.db, KEY).problems) == 20


def test_one_entry_cannot_be_replaced_even_with_the_key(sealed: Store) -> None:
    """Each seal covers the one before it: whoever changes one entry must seal all that follow anew, and that shows
    against any head noted since."""
    noted = chain.head(sealed.db)
    document = sealed.db.audit.find_one({"seq": 12})
    before = sealed.db.audit.find_one({"seq": 11})
    assert document is not None
    assert before is not None
    document["actor"] = "key_2"
    document["seal"] = chain.seal_of(SECRET, before["seal"], document, 12)
    sealed.db.audit.replace_one({"seq": 12}, document)
    [problem] = chain.verify(sealed.db, KEY).problems
    assert "entry 13 " in problem
    previous = document["seal"]
    for later in list(sealed.db.audit.find({"seq": {"$gt": 12}}).sort("seq", 1)):
        previous = chain.seal_of(SECRET, previous, later, later["seq"])
        sealed.db.audit.update_one({"_id": later["_id"]}, {"$set": {"seal": previous}})
    assert chain.verify(sealed.db, KEY).problems == []
    assert len(chain.verify(sealed.db, KEY, expect=noted).problems) == 1


def test_a_new_key_seals_from_now_on_and_the_old_one_still_verifies(sealed: Store) -> None:
    rotated = chain.KeyRing(["n" * 32, "k" * 32])
    write(sealed, 5, cause="later")
    assert chain.seal_pending(sealed.db, rotated) == 5
    assert chain.verify(sealed.db, rotated).problems == []
    [problem] = chain.verify(sealed.db, chain.KeyRing(["n" * 32])).problems
    assert problem.startswith("20 entries were sealed with key ")


def test_a_replaced_key_seals_nothing_any_more(sealed: Store) -> None:
    """Who stole it cannot go on with the chain, and a scheduler that has not heard of the new one does not."""
    rotated = chain.KeyRing(["n" * 32, "k" * 32])
    write(sealed, 1, cause="with the new key")
    chain.seal_pending(sealed.db, rotated)
    write(sealed, 1, cause="with the old key")
    with pytest.raises(chain.UnknownKeyError, match="QUERN_AUDIT_KEY"):
        chain.seal_pending(sealed.db, KEY)
    seq, previous = chain.head(sealed.db)
    forged = sealed.db.audit.find_one({"pending": True})
    assert forged is not None
    seal = chain.seal_of(SECRET, previous, forged, seq + 1)
    sealing = {"seq": seq + 1, "seal": seal, "sealed_by": KEY.current[0]}
    sealed.db.audit.update_one({"_id": forged["_id"]}, {"$set": sealing, "$unset": {"pending": ""}})
    [problem] = chain.verify(sealed.db, rotated).problems
    assert "which a newer key had replaced" in problem


def test_many_sealers_at_once_make_one_chain(store: Store) -> None:
    """Entries keep coming meanwhile, and their identifiers come in no order."""
    stop = threading.Event()

    def seal() -> None:
        rng = random.Random()
        while not stop.is_set():
            chain.seal_pending(store.db, KEY, limit=rng.randint(1, 9))

    sealers = [threading.Thread(target=seal) for _ in range(4)]
    writers = [threading.Thread(target=write, args=(store, 60, f"writer {number}")) for number in range(3)]
    for thread in (*sealers, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    for thread in sealers:
        thread.join()
    seal_all(store)
    found = chain.verify(store.db, KEY)
    assert (found.sealed, found.unsealed, found.problems) == (180, 0, [])


def test_a_changed_answer_is_found(course: Course) -> None:
    response = course.submit(course.publish(email("mail")), comment="what I said")
    course.work()
    key = chain.KeyRing(course.runtime.settings.required("audit_key"))
    while chain.seal_pending(course.db, key):
        pass
    assert chain.verify(course.db, key).problems == []
    course.db.responses.update_one({"_id": response}, {"$set": {"answers.comment": "what I never said"}})
    [problem] = chain.verify(course.db, key).problems
    assert f"the content of {response}" in problem


def test_an_answer_that_was_made_to_vanish_is_found(course: Course) -> None:
    """Only an erasure that the log knows of is one."""
    response = course.submit(course.publish(email("mail")), comment="what I said")
    course.work()
    key = chain.KeyRing(course.runtime.settings.required("audit_key"))
    while chain.seal_pending(course.db, key):
        pass
    course.db.responses.update_one({"_id": response}, {"$set": {"erased": True}, "$unset": {"answers": ""}})
    assert len(chain.verify(course.db, key).problems) == 1
    course.db.responses.delete_one({"_id": response})
    assert len(chain.verify(course.db, key).problems) == 1


ANSWER = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.from_regex(r"[a-z]{1,5}", fullmatch=True), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(answers=st.dictionaries(st.from_regex(r"[a-z]{1,5}", fullmatch=True), ANSWER, max_size=4))
def test_what_was_vouched_for_is_what_is_read_again(store: Store, answers: Document) -> None:
    """MongoDB gives back other types than it was given; the canonical form must not see that."""
    key = content_key()
    store.db.scratch.replace_one({"_id": 1}, {"answers": answers}, upsert=True)
    found = store.db.scratch.find_one({"_id": 1})
    assert found is not None
    assert content_mac(key, found["answers"]) == content_mac(key, answers)


def test_an_entry_with_a_cause_is_written_once(store: Store) -> None:
    one = entry("ten_a", "key_1", "response.submitted", "rsp_1", cause=("submitted",))
    two = entry("ten_a", "key_1", "response.submitted", "rsp_1", cause=("submitted",))
    other = entry("ten_b", "key_1", "response.submitted", "rsp_1", cause=("submitted",))
    assert one["_id"] == two["_id"] != other["_id"]


def test_a_tenants_log_is_read_in_pages_newest_first(store: Store) -> None:
    write(store, 10)
    record(store.db, entry("ten_b", "key_1", "form.created", "frm_of_another"))
    first = listing(store.db, "ten_a", after=None, limit=6)
    position = [first[-1]["at"].isoformat(), first[-1]["_id"]]
    second = listing(store.db, "ten_a", after=position, limit=6)
    found = [row["_id"] for row in (*first, *second)]
    assert len(found) == len(set(found)) == 10
    assert found == [row["_id"] for row in store.db.audit.find({"tenant": "ten_a"}).sort([("at", -1), ("_id", -1)])]
    assert [row["subject"] for row in listing(store.db, "ten_a", after=None, limit=9, subject="frm_3")] == ["frm_3"]


def test_entries_name_no_tenant_but_their_own(course: Course) -> None:
    course.submit(course.publish(email("mail")), comment="hello")
    course.work()
    assert {row["tenant"] for row in course.db.audit.find()} == {TENANT}
