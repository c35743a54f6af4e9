"""What a tenant's search reads: one small document for each embedded text, beside the response that it came from."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pymongo import ASCENDING, DESCENDING, IndexModel
from pymongo.client_session import ClientSession

from quern.store.connection import Db, Document

Vector = NDArray[np.float32]

INDEXES = {
    "vectors": [
        IndexModel([("tenant", ASCENDING), ("form", ASCENDING), ("created", DESCENDING)], name="by_form"),
        IndexModel([("response", ASCENDING), ("step", ASCENDING)], name="by_response"),
    ],
}
_PACKED = np.dtype("<f4")


@dataclass(frozen=True)
class Embedded:
    """A text's vector, of length 1, and the model that made it: only vectors of one model can be compared."""

    vector: Vector
    model: str


def keep(db: Db, response: Document, step: str, embedded: Embedded, session: ClientSession) -> None:
    """Keep a step's vector, in the transaction that ends the step; a step that runs again replaces it."""
    document: Document = {name: response[name] for name in ("tenant", "form", "created")}
    document |= {"response": response["_id"], "step": step, "model": embedded.model}
    document["vector"] = embedded.vector.astype(_PACKED).tobytes()
    db.vectors.replace_one({"_id": f"{response['_id']}:{step}"}, document, upsert=True, session=session)


def forget(db: Db, response: str, session: ClientSession) -> None:
    """Delete what was made of a response, in the transaction that erases it."""
    db.vectors.delete_many({"response": response}, session=session)


def of(db: Db, tenant: str, response: str, step: str | None) -> Embedded | None:
    """The vector of a tenant's response: of `step`, or of the first that has one. None: there is none."""
    wanted: Document = {"response": response, "tenant": tenant}
    if step is not None:
        wanted["step"] = step
    found = db.vectors.find_one(wanted, sort=[("step", 1)])
    return None if found is None else Embedded(unpacked([found["vector"]])[0], found["model"])


def unpacked(vectors: Iterable[bytes]) -> Vector:
    """Stored vectors as the rows of a matrix."""
    rows = list(vectors)
    return np.frombuffer(b"".join(rows), _PACKED).reshape(len(rows), -1)
