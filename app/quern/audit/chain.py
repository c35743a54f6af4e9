"""The audit chain: a single leased sealer numbers the entries and seals each over the one before it.

seal(n) = HMAC-SHA-256(audit key, seal(n-1) ‖ n ‖ canonical(entry n)), after the hash-chained logs of Schneier and
Kelsey, "Secure Audit Logs to Support Computer Forensics" (1999). The audit key is not in the database, so who can only
write there cannot forge a chain. An entry names the key that sealed it, so that keys can follow one another. Cutting
off the tail is seen against the head that `verify` printed before.
"""

import hashlib
import hmac
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pymongo import UpdateOne
from pymongo.errors import BulkWriteError, DuplicateKeyError

from quern.audit.entry import canonical, content_mac
from quern.observe import metrics
from quern.store.connection import Db, Document

GENESIS = "0" * 64
_UNSEALED_FIELDS = frozenset({"seq", "seal", "sealed_by", "pending"})


class KeyRing:
    """The audit keys: the first seals, all verify. A retired key must stay for as long as its entries do."""

    def __init__(self, keys: Sequence[str]) -> None:
        """`keys`: the current one first, each at least 32 characters."""
        self._keys = [(_name(key), key.encode()) for key in keys]

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def current(self) -> tuple[str, bytes]:
        """Name and value of the key that seals."""
        return self._keys[0]

    def get(self, name: str) -> tuple[bytes | None, int]:
        """The key of that name and how many keys came after it; (None, 0): it is not on the ring."""
        return next(((key, age) for age, (known, key) in enumerate(self._keys) if known == name), (None, 0))


class UnknownKeyError(Exception):
    """The chain was sealed last with a key that is not on the ring."""

    def __init__(self, name: str) -> None:
        super().__init__(f"expected key {name}, which sealed last, in QUERN_AUDIT_KEY; found others only: add it")


def _name(key: str) -> str:
    """What a key is called in the entries that it sealed; says nothing of the key."""
    return hmac.new(key.encode(), b"quern audit key", hashlib.sha256).hexdigest()[:16]


def seal_of(key: bytes, previous: str, document: Document, seq: int) -> str:
    """The seal (hex) of an entry as number `seq` after the entry whose seal is `previous`."""
    body = {name: value for name, value in document.items() if name not in _UNSEALED_FIELDS}
    return hmac.new(key, previous.encode() + seq.to_bytes(8, "big") + canonical(body), hashlib.sha256).hexdigest()


def head(db: Db) -> tuple[int, str]:
    """Number and seal of the last sealed entry; (0, GENESIS) for an empty chain."""
    last = _last(db)
    return (last["seq"], last["seal"]) if last else (0, GENESIS)


def _last(db: Db) -> Document | None:
    return db.audit.find_one({"seq": {"$exists": True}}, sort=[("seq", -1)])


def seal_pending(db: Db, keys: KeyRing, limit: int = 1000) -> int:
    """Chain up to `limit` waiting entries; returns how many.

    Two sealers at once do no harm: the number is unique, so the slower one's write fails and is made again later.
    An ordered bulk write leaves no gap, whenever it stops.

    Raises:
        UnknownKeyError: a newer key than those on this ring seals by now.
    """
    name, key = keys.current
    last = _last(db)
    if last and keys.get(last["sealed_by"])[0] is None:
        raise UnknownKeyError(last["sealed_by"])
    seq, previous = (last["seq"], last["seal"]) if last else (0, GENESIS)
    writes = []
    for document in db.audit.find({"pending": True}).sort([("pending", 1), ("_id", 1)]).limit(limit):
        seq += 1
        previous = seal_of(key, previous, document, seq)
        writes.append(
            UpdateOne(
                {"_id": document["_id"], "pending": True},
                {"$set": {"seq": seq, "seal": previous, "sealed_by": name}, "$unset": {"pending": ""}},
            )
        )
    if not writes:
        return 0
    try:
        sealed = db.audit.bulk_write(writes, ordered=True).modified_count
    except BulkWriteError as error:
        if any(item.get("code") != 11000 for item in error.details.get("writeErrors", [])):
            raise
        sealed = int(error.details.get("nModified", 0))
    except DuplicateKeyError:
        sealed = 0
    metrics.SEALED.inc(sealed)
    return sealed


@dataclass(frozen=True)
class Verification:
    """What `verify` found. `problems` is empty when the chain holds."""

    sealed: int
    unsealed: int
    head: str
    contents_checked: int
    contents_erased: int
    problems: list[str]


def verify(db: Db, keys: KeyRing, expect: tuple[int, str] | None = None) -> Verification:
    """Walk the whole chain, and check each response's answers against the HMAC taken when they arrived.

    Args:
        expect: number and seal noted at an earlier time; finds a chain that was cut off and sealed anew.
    """
    problems: list[str] = []
    seq, previous, checked, erased = 0, GENESIS, 0, 0
    unknown: Counter[str] = Counter()
    oldest_allowed = len(keys)
    for document in db.audit.find({"seq": {"$exists": True}}).sort("seq", 1):
        seq += 1
        if document["seq"] != seq:
            problems.append(f"entry {seq} is missing: the chain goes on with {document['seq']}")
            seq = document["seq"]
        name = document.get("sealed_by", "")
        key, age = keys.get(name)
        if age > oldest_allowed:
            problems.append(f"entry {seq} was sealed with key {name}, which a newer key had replaced before")
        oldest_allowed = min(age, oldest_allowed)
        if key is None:
            unknown[name] += 1
        elif not hmac.compare_digest(seal_of(key, previous, document, seq), document["seal"]):
            problems.append(f"entry {seq} ({document['_id']}, {document['action']}) was changed, or the one before it")
        previous = document["seal"]
        if expect and expect[0] == seq and expect[1] != previous:
            problems.append(f"entry {seq} carries another seal than the one noted earlier")
        if "mac" in document:
            verdict = _content_holds(db, document)
            checked += verdict is True
            erased += verdict is None
            if verdict is False:
                problems.append(f"the content of {document['subject']} is not what entry {seq} recorded")
    if expect and expect[0] > seq:
        problems.append(f"the chain ends at {seq}, but {expect[0]} was noted earlier: its tail was cut off")
    problems += [
        f"{count} entries were sealed with key {name}, which is not among QUERN_AUDIT_KEY: put it back, last"
        for name, count in unknown.items()
    ]
    unsealed = db.audit.count_documents({"pending": True})
    return Verification(seq, unsealed, previous, checked, erased, problems)


def _content_holds(db: Db, document: Document) -> bool | None:
    """True or False where the subject's key still exists, None where it was erased."""
    subject = db.responses.find_one({"_id": document["subject"]}, {"answers": 1, "audit_key": 1, "erased": 1})
    if subject is None:
        return False
    if "erased" in subject:
        return None if db.audit.find_one({"subject": document["subject"], "action": "response.erased"}) else False
    return hmac.compare_digest(content_mac(subject["audit_key"], subject["answers"]), document["mac"])
