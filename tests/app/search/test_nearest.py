"""Search by meaning is exact: what a plain comparison of everything would find, within the filter and the tenant."""

from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from quern.jobs import queue
from quern.search import vectors
from quern.search.nearest import Among, Found, nearest
from quern.search.vectors import Embedded
from quern.store import clock
from quern.store.connection import Document, Store

COUNT = 9_000
NOW = clock.now()


def unit(rows: Any) -> NDArray[np.float32]:
    made: NDArray[np.float32] = (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)
    return made


@pytest.fixture
def stored(store: Store) -> list[Document]:
    """More than two chunks of vectors of two tenants, forms, steps and models; half are the searching tenant's."""
    rng = np.random.default_rng(7)
    made = unit(rng.normal(size=(COUNT, 16)))
    documents: list[Document] = [
        {
            "_id": f"rsp_{number // 2}:{'ab'[number % 2]}",
            "response": f"rsp_{number // 2}",
            "step": "ab"[number % 2],
            "tenant": f"ten_{number // 2 % 2}",
            "form": f"frm_{number // 4 % 2}",
            "created": NOW - timedelta(seconds=number),
            "model": "one" if number % 40 else "another",
            "vector": made[number].tobytes(),
        }
        for number in range(COUNT)
    ]
    store.db.vectors.insert_many(documents)
    return documents


def plainly(stored: list[Document], wanted: Embedded, most: int, **same: Any) -> list[tuple[str, str]]:
    """By comparing everything in numpy, in one go."""
    rows = [row for row in stored if all(row[name] == value for name, value in same.items())]
    scores = np.stack([np.frombuffer(row["vector"], np.float32) for row in rows]) @ wanted.vector
    order = sorted(range(len(rows)), key=lambda place: (-scores[place], rows[place]["_id"]))[:most]
    return [(rows[place]["response"], rows[place]["step"]) for place in order]


def places(found: Found) -> list[tuple[str, str]]:
    return [(near.response, near.step) for near in found.nearest]


WANTED = Embedded(unit(np.random.default_rng(8).normal(size=16)), "one")


@pytest.mark.parametrize("most", [1, 20, 100])
def test_the_nearest_are_those_of_a_plain_comparison(store: Store, stored: list[Document], most: int) -> None:
    found = nearest(store.db, "ten_1", WANTED, Among(), most)
    assert places(found) == plainly(stored, WANTED, most, tenant="ten_1", model="one")
    assert found.compared == sum(row["tenant"] == "ten_1" and row["model"] == "one" for row in stored)
    assert [near.score for near in found.nearest] == sorted((near.score for near in found.nearest), reverse=True)


def test_filters_narrow_what_is_compared(store: Store, stored: list[Document]) -> None:
    found = nearest(store.db, "ten_1", WANTED, Among(form="frm_0", step="b"), 10)
    assert places(found) == plainly(stored, WANTED, 10, tenant="ten_1", model="one", form="frm_0", step="b")
    since, before = NOW - timedelta(seconds=500), NOW - timedelta(seconds=100)
    found = nearest(store.db, "ten_1", WANTED, Among(created_from=since, created_before=before), 10)
    within = [row for row in stored if since <= row["created"] < before]
    assert places(found) == plainly(within, WANTED, 10, tenant="ten_1", model="one")
    few = frozenset({"rsp_1", "rsp_2", "rsp_3"})
    found = nearest(store.db, "ten_1", WANTED, Among(responses=few, but="rsp_3"), 10)
    assert {near.response for near in found.nearest} == {"rsp_1"}, "rsp_2 is another tenant's"
    assert nearest(store.db, "ten_1", WANTED, Among(responses=frozenset()), 10).nearest == []


def test_no_tenant_finds_anothers(store: Store, stored: list[Document]) -> None:
    mine = {row["response"] for row in stored if row["tenant"] == "ten_0"}
    found = nearest(store.db, "ten_0", WANTED, Among(), 100)
    assert {near.response for near in found.nearest} <= mine
    assert vectors.of(store.db, "ten_0", "rsp_1", None) is None
    assert nearest(store.db, "ten_none", WANTED, Among(), 5) == Found([], 0)


def test_a_step_that_runs_again_replaces_its_vector_and_an_erasure_takes_it_away(store: Store) -> None:
    response = {"_id": "rsp_x", "tenant": "ten_0", "form": "frm_0", "created": NOW}
    first, second = (Embedded(unit(np.random.default_rng(seed).normal(size=16)), "one") for seed in (1, 2))
    queue.transact(store, lambda session: vectors.keep(store.db, response, "a", first.vector, first.model, session))
    queue.transact(store, lambda session: vectors.keep(store.db, response, "a", second.vector, second.model, session))
    kept = vectors.of(store.db, "ten_0", "rsp_x", "a")
    assert kept is not None
    assert np.array_equal(kept.vector, second.vector)
    assert store.db.vectors.count_documents({}) == 1
    queue.transact(store, lambda session: vectors.forget(store.db, "rsp_x", session))
    assert store.db.vectors.count_documents({}) == 0
