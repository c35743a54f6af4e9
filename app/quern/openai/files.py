"""Files of a tenant: uploaded for batches, or made by them. The content lies in chunks, forgotten with the file."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from pymongo import ASCENDING, DESCENDING, IndexModel
from pymongo.client_session import ClientSession

from quern.store import clock, identifier
from quern.store.connection import Db, Document

#: Bytes of one chunk.
CHUNK: Final = 1_048_576
PURPOSES: Final = ("batch", "user_data")

INDEXES = {
    "ai_files": [
        IndexModel([("forget", ASCENDING)], expireAfterSeconds=0, name="forget"),
        IndexModel([("tenant", ASCENDING), ("_id", DESCENDING)], name="by_tenant"),
    ],
    "ai_file_chunks": [
        IndexModel([("forget", ASCENDING)], expireAfterSeconds=0, name="forget"),
        IndexModel([("file", ASCENDING), ("number", ASCENDING)], name="by_file"),
    ],
}


@dataclass(frozen=True)
class StoredFile:
    """A file without its content. `id` begins with `fil_`; clients see `public_id`."""

    id: str
    tenant: str
    purpose: str
    filename: str
    size: int
    created: datetime
    forget: datetime

    @property
    def public_id(self) -> str:
        return "file-" + self.id.removeprefix("fil_")

    @property
    def shown(self) -> dict[str, Any]:
        """As OpenAI's clients know it."""
        return {
            "id": self.public_id,
            "object": "file",
            "bytes": self.size,
            "created_at": int(self.created.timestamp()),
            "expires_at": int(self.forget.timestamp()),
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


def _file(document: Document) -> StoredFile:
    return StoredFile(
        document["_id"],
        document["tenant"],
        document["purpose"],
        document["filename"],
        document["size"],
        document["created"],
        document["forget"],
    )


def internal_id(public_id: str) -> str | None:
    """The identifier behind one that a client gave; None for what is none."""
    core = public_id.removeprefix("file-")
    own = f"fil_{core}"
    return own if public_id.startswith("file-") and identifier.is_valid(own, "fil") else None


def write_content(db: Db, tenant: str, identity: str, pieces: Iterable[bytes], forget: datetime) -> int:
    """Store content under an identifier that no document has yet; returns its size. Written again, it is replaced.

    A process that dies in between leaves chunks that nobody can read; they are forgotten when the file would be.
    """
    size = 0
    for number, piece in enumerate(_in_chunks(pieces)):
        chunk = {"_id": f"{identity}|{number:06}", "file": identity, "number": number, "tenant": tenant, "data": piece}
        db.ai_file_chunks.replace_one({"_id": chunk["_id"]}, {**chunk, "forget": forget}, upsert=True)
        size += len(piece)
    return size


def _in_chunks(pieces: Iterable[bytes]) -> Iterator[bytes]:
    buffer = bytearray()
    for piece in pieces:
        buffer += piece
        while len(buffer) >= CHUNK:
            yield bytes(buffer[:CHUNK])
            del buffer[:CHUNK]
    if buffer:
        yield bytes(buffer)


def insert(
    db: Db,
    session: ClientSession,
    *,
    identity: str,
    tenant: str,
    purpose: str,
    filename: str,
    size: int,
    forget: datetime,
) -> StoredFile:
    """Make a file whose content is stored visible; again, it stays as it is."""
    document: Document = {
        "_id": identity,
        "tenant": tenant,
        "purpose": purpose,
        "filename": filename,
        "size": size,
        "created": clock.now(),
        "forget": forget,
    }
    found = db.ai_files.find_one({"_id": identity}, session=session)
    if found is None:
        db.ai_files.insert_one(document, session=session)
    return _file(found or document)


def get(db: Db, tenant: str, identity: str | None, session: ClientSession | None = None) -> StoredFile | None:
    document = db.ai_files.find_one({"_id": identity, "tenant": tenant}, session=session)
    return _file(document) if document else None


def listing(
    db: Db, tenant: str, *, purpose: str | None, after: str | None, limit: int, newest_first: bool
) -> list[StoredFile]:
    query: Document = {"tenant": tenant}
    if purpose:
        query["purpose"] = purpose
    if after:
        query["_id"] = {"$lt" if newest_first else "$gt": after}
    rows = db.ai_files.find(query).sort("_id", -1 if newest_first else 1).limit(limit)
    return [_file(document) for document in rows]


def content(db: Db, file: StoredFile) -> Iterator[bytes]:
    """The content, a chunk at a time."""
    for row in db.ai_file_chunks.find({"file": file.id, "tenant": file.tenant}, batch_size=4).sort("number", 1):
        yield row["data"]


def lines(db: Db, file: StoredFile) -> Iterator[bytes]:
    """The lines, without their ends; the last one need not have one."""
    rest = b""
    for piece in content(db, file):
        *whole, rest = (rest + piece).split(b"\n")
        yield from whole
    if rest:
        yield rest


def delete(db: Db, session: ClientSession, file: StoredFile) -> None:
    db.ai_files.delete_one({"_id": file.id, "tenant": file.tenant}, session=session)
    db.ai_file_chunks.delete_many({"file": file.id, "tenant": file.tenant}, session=session)


def kept_until(days: int) -> datetime:
    """When a file that is made now is forgotten."""
    return clock.now() + timedelta(days=days)


def chunk(db: Db, file: StoredFile, number: int) -> bytes | None:
    """One chunk of the content; None behind the last."""
    found = db.ai_file_chunks.find_one({"file": file.id, "number": number, "tenant": file.tenant})
    return found["data"] if found else None
