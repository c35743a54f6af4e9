"""The nearest responses to a vector: exact, since every vector that the filter lets through is looked at."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, TypeVar

import numpy as np

from quern.search.vectors import Embedded, unpacked
from quern.store.connection import Db, Document

#: Vectors read and compared at a time: 6 MB of the usual 384 numbers.
_CHUNK: Final = 4096
Item = TypeVar("Item")


@dataclass(frozen=True)
class Among:
    """Which vectors. Times are half-open: from `created_from` on, before `created_before`."""

    form: str | None = None
    step: str | None = None
    created_from: datetime | None = None
    created_before: datetime | None = None
    responses: frozenset[str] | None = None
    """Only of these; None: of all."""
    but: str | None = None
    """Not of this response."""


@dataclass(frozen=True)
class Near:
    """One answer to a search; `score` is the cosine, from -1 to 1."""

    response: str
    form: str
    step: str
    created: datetime
    score: float


@dataclass(frozen=True)
class Found:
    """The nearest first, and how many were compared."""

    nearest: list[Near]
    compared: int


def nearest(db: Db, tenant: str, wanted: Embedded, among: Among, most: int) -> Found:
    """The `most` nearest of a tenant's vectors; one response may come once for each of its embedded steps."""
    best: list[tuple[float, str, Document]] = []
    compared = 0
    for rows in _chunked(_candidates(db, tenant, wanted.model, among), _CHUNK):
        scores = unpacked(row["vector"] for row in rows) @ wanted.vector
        compared += len(rows)
        kept = np.argpartition(-scores, most - 1)[:most] if len(rows) > most else range(len(rows))
        best += [(float(scores[place]), rows[place]["_id"], rows[place]) for place in kept]
        best = sorted(best, key=lambda item: (-item[0], item[1]))[:most]
    return Found(
        [Near(row["response"], row["form"], row["step"], row["created"], score) for score, _, row in best], compared
    )


def _candidates(db: Db, tenant: str, model: str, among: Among) -> Iterator[Document]:
    query: Document = {"tenant": tenant, "model": model}
    if among.form is not None:
        query["form"] = among.form
    created: dict[str, Any] = {}
    if among.created_from is not None:
        created["$gte"] = among.created_from
    if among.created_before is not None:
        created["$lt"] = among.created_before
    if created:
        query["created"] = created
    if among.step is not None:
        query["step"] = among.step
    shown = {"vector": 1, "response": 1, "form": 1, "step": 1, "created": 1}
    if among.responses is None:
        found: Iterable[Document] = db.vectors.find(query, shown, batch_size=_CHUNK)
    else:
        found = itertools.chain.from_iterable(
            db.vectors.find(query | {"response": {"$in": some}}, shown)
            for some in _chunked(sorted(among.responses), _CHUNK)
        )
    return (row for row in found if row["response"] != among.but)


def _chunked(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    following = iter(items)
    while chunk := list(itertools.islice(following, size)):
        yield chunk
