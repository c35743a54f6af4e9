"""What a tenant's search reads: one small document for each embedded text, beside the response that it came from."""

import sys
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymongo import ASCENDING, DESCENDING, IndexModel
from pymongo.client_session import ClientSession

from quern.store.connection import Db, Document

# Every process that ends a step or erases a response comes by here; only a search computes, and needs numpy's memory.
if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vector = NDArray[np.float32]

INDEXES = {
    "vectors": [
        IndexModel([("tenant", ASCENDING), ("form", ASCENDING), ("created", DESCENDING)], name="by_form"),
        IndexModel([("response", ASCENDING), ("step", ASCENDING)], name="by_response"),
    ],
}
_PACKED = "<f4"


@dataclass(frozen=True)
class Embedded:
    """A text's vector, of length 1, and the model that made it: only vectors of one model can be compared."""

    vector: "Vector"
    model: str


def keep(db: Db, response: Document, step: str, vector: Iterable[float], model: str, session: ClientSession) -> None:
    """Keep a step's vector, in the transaction that ends the step; a step that runs again replaces it."""
    packed = array("f", vector)
    if sys.byteorder == "big":
        packed.byteswap()
    document: Document = {name: response[name] for name in ("tenant", "form", "created")}
    document |= {"response": response["_id"], "step": step, "model": model}
    document["vector"] = packed.tobytes()
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


def unpacked(vectors: Iterable[bytes]) -> "Vector":
    """Stored vectors as the rows of a matrix."""
    import numpy as np

    rows = list(vectors)
    return np.frombuffer(b"".join(rows), _PACKED).reshape(len(rows), -1)
