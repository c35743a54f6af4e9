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
from typing import Any

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
    def names(self) -> list[str]:
        """Of all keys, in their order."""
        return [name for name, _ in self._keys]

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


class Walk:
    """A verification under way: judges sealed entries in their order, with the contents that they vouch for."""

    def __init__(self, keys: KeyRing, expect: tuple[int, str] | None = None) -> None:
        self.keys, self._expect = keys, expect
        self.seq, self.seal = 0, GENESIS
        self.checked = self.erased = 0
        self._problems: list[str] = []
        self._unknown: Counter[str] = Counter()
        self._oldest_allowed = len(keys)

    def go_on(self, db: Db, limit: int = 200) -> bool:
        """Judge the next entries, at most `limit`; False: the chain ended among them."""
        documents = list(db.audit.find({"seq": {"$gt": self.seq}}).sort("seq", 1).limit(limit))
        contents = _contents(db, [document.get("subject") for document in documents if "mac" in document])
        for document in documents:
            self._judge(document)
            if "mac" in document:
                self._compare(db, document, contents)
        return len(documents) == limit

    @property
    def problems(self) -> list[str]:
        """What was found so far, in the chain's order, and at last the keys that are lacking."""
        return self._problems + [
            f"{count} entries were sealed with key {name}, which is not among QUERN_AUDIT_KEY: put it back, last"
            for name, count in self._unknown.items()
        ]

    def _judge(self, document: Document) -> None:
        seq = self.seq + 1
        if document["seq"] != seq:
            self._problems.append(f"entry {seq} is missing: the chain goes on with {document['seq']}")
            seq = document["seq"]
        # Whoever tampers with an entry may leave anything in it, or nothing.
        name, seal = str(document.get("sealed_by", "")), str(document.get("seal", ""))
        key, age = self.keys.get(name)
        if age > self._oldest_allowed:
            self._problems.append(f"entry {seq} was sealed with key {name}, which a newer key had replaced before")
        self._oldest_allowed = min(age, self._oldest_allowed)
        if key is None:
            self._unknown[name] += 1
        elif not hmac.compare_digest(seal_of(key, self.seal, document, int(seq)).encode(), seal.encode()):
            which = f"{document['_id']}, {document.get('action')}"
            self._problems.append(f"entry {seq} ({which}) was changed, or the one before it")
        if self._expect and self._expect[0] == seq and self._expect[1] != seal:
            self._problems.append(f"entry {seq} carries another seal than the one noted earlier")
        self.seq, self.seal = seq, seal

    def _compare(self, db: Db, document: Document, contents: dict[str, str | None]) -> None:
        subject = document.get("subject")
        mac = contents.get(str(subject), "")
        if mac is None and db.audit.find_one({"subject": subject, "action": "response.erased"}, {"_id": 1}):
            self.erased += 1
        elif mac is not None and hmac.compare_digest(mac.encode(), str(document["mac"]).encode()):
            self.checked += 1
        else:
            self._problems.append(f"the content of {subject} is not what entry {self.seq} recorded")


def _contents(db: Db, subjects: list[Any]) -> dict[str, str | None]:
    """What vouches for each subject's content as it is now: None where that was erased; nothing where it is gone."""
    shown = {"answers": 1, "audit_key": 1, "erased": 1}
    return {
        one["_id"]: None if "erased" in one else content_mac(one.get("audit_key", b""), one.get("answers"))
        for one in db.responses.find({"_id": {"$in": subjects}}, shown)
    }


def verify(db: Db, keys: KeyRing, expect: tuple[int, str] | None = None) -> Verification:
    """Walk the whole chain, and check each response's answers against the HMAC taken when they arrived.

    Args:
        expect: number and seal noted at an earlier time; finds a chain that was cut off and sealed anew.
    """
    walk = Walk(keys, expect)
    while walk.go_on(db):
        pass
    problems = walk.problems
    if expect and expect[0] > walk.seq:
        problems.append(f"the chain ends at {walk.seq}, but {expect[0]} was noted earlier: its tail was cut off")
    unsealed = db.audit.count_documents({"pending": True})
    return Verification(walk.seq, unsealed, walk.seal, walk.checked, walk.erased, problems)
