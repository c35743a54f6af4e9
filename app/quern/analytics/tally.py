"""What is compared between MongoDB and the warehouse: counts, sums and hashes of a tenant's day.

The MongoDB side of the sums is computed here by walking the documents, in the plainest way, by other code than the
flattening that it judges: it knows no form, no kind of field and no column.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from datetime import date, timedelta
from typing import Any
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from quern.analytics.source import signed
from quern.store.connection import Document

#: Sums of floating-point numbers depend on their order; this much of their size they may differ by.
_TOLERANCE = 1e-9
_EPOCH = date(1970, 1, 1)


@dataclass
class Leaves:
    """Values of answers, or of results."""

    rows: int = 0
    characters: int = 0
    """Code points of all texts."""
    numbers: float = 0.0
    """Sum of all finite numbers: with another in it, no sum equals itself."""
    size: float = 0.0
    """Sum of their absolute values: what a difference of `numbers` is measured against."""
    true: int = 0
    texts: int = 0
    """Sum of the CRC-32 of every text's UTF-8: the words themselves, wherever they stand."""

    def add(self, value: Any) -> None:
        """Count every value in a JSON value."""
        texts: list[str] = []
        numbers: list[float] = []
        rows = true = 0
        left = [value]
        while left:
            one = left.pop()
            kind = type(one)
            if kind is str:
                texts.append(one)
            elif kind is dict:
                left += one.values()
            elif kind is list:
                left += one
            elif kind is bool:
                rows += 1
                true += one
            elif isinstance(one, int | float):
                numbers.append(one)
            elif one is not None:
                rows += 1
        self.rows += rows + len(texts) + len(numbers)
        self.characters += sum(map(len, texts))
        self.texts += sum(map(crc32, map(str.encode, texts)))
        self.true += true
        total = sum(numbers)
        if not math.isfinite(total):
            numbers = list(filter(math.isfinite, numbers))
            total = sum(numbers)
        self.numbers += total
        self.size += sum(map(abs, numbers))

    def differences(self, other: "Leaves", name: str) -> list[str]:
        found = [
            f"{name} {what}: {mine} in MongoDB, {theirs} in the warehouse"
            for what, mine, theirs in (
                ("rows", self.rows, other.rows),
                ("characters", self.characters, other.characters),
                ("true values", self.true, other.true),
                ("checksum of texts", self.texts, other.texts),
            )
            if mine != theirs
        ]
        if not math.isclose(self.numbers, other.numbers, rel_tol=0, abs_tol=max(self.size, 1.0) * _TOLERANCE):
            found.append(f"{name} sum of numbers: {self.numbers} in MongoDB, {other.numbers} in the warehouse")
        return found


@dataclass
class Tally:
    """A tenant's day in figures."""

    responses: int = 0
    response_hash: int = 0
    """Sum of the hashes of all responses, the lowest 64 bits, signed: the order does not matter, each document does."""
    audit: int = 0
    audit_hash: int = 0
    jobs: int = 0
    attempts: int = 0
    vectors: int = 0
    answers: Leaves = field(default_factory=Leaves)
    results: Leaves = field(default_factory=Leaves)

    def add_documents(self, documents: Sequence[Document]) -> None:
        """Count the values of some response documents."""
        self.answers.add([document.get("answers") for document in documents])
        found: list[Any] = []
        for document in documents:
            for result in (document.get("results") or {}).values():
                if isinstance(result, dict) and isinstance(result.get("vector"), list):
                    self.vectors += 1
                    found.append({name: value for name, value in result.items() if name != "vector"})
                else:
                    found.append(result)
        self.results.add(found)

    def documents(self, name: str) -> tuple[int, int]:
        """Number of `responses`, or of entries of `audit`, and the sum of their hashes."""
        return (self.responses, self.response_hash) if name == "responses" else (self.audit, self.audit_hash)

    def flat(self) -> dict[str, int | float | str]:
        """Every figure by name. Hashes as text: a reader of JSON may have no 64-bit integers. Sums to nine digits."""
        found: dict[str, int | float | str] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Leaves):
                found |= {
                    f"{item.name}_{name}": getattr(value, name) for name in ("rows", "characters", "true", "texts")
                }
                found[f"{item.name}_numbers"] = float(f"{value.numbers:.9g}")
            else:
                found[item.name] = str(value) if item.name.endswith("hash") else value
        return found

    def differences(self, warehouse: "Tally") -> list[str]:
        """What differs, each in one line; empty when the two are equal."""
        found = []
        for item in fields(self):
            mine, theirs = getattr(self, item.name), getattr(warehouse, item.name)
            if isinstance(mine, Leaves):
                found += mine.differences(theirs, item.name)
            elif mine != theirs:
                found.append(f"{item.name.replace('_', ' ')}: {mine} in MongoDB, {theirs} in the warehouse")
        return found


def add_rows(tallies: dict[date, Tally], table: str, rows: pa.RecordBatch) -> None:
    """Count rows as they stand in a partition's file, each for its day, which must be one of `tallies`.

    Raises:
        ValueError: there is a row of another day.
    """
    if not rows.num_rows:
        return
    numbers = rows.column("day").cast(pa.int32()).to_numpy()
    present, place = np.unique(numbers, return_inverse=True)
    listed = [tallies.get(_EPOCH + timedelta(days=int(number))) for number in present]
    if None in listed:
        raise ValueError(f"{table}: expected rows of {len(tallies)} days, found one of another")
    days = [tally for tally in listed if tally is not None]
    counts = np.bincount(place, minlength=len(days))
    for tally, count in zip(days, counts.tolist(), strict=True):
        if table == "fact_response":
            tally.responses += count
        elif table == "fact_audit":
            tally.audit += count
        elif table == "fact_job":
            tally.jobs += count
        elif table == "fact_embedding":
            tally.vectors += count
    if table in ("fact_response", "fact_audit"):
        for tally, total in zip(days, _sums(rows.column("hash"), place, len(days)), strict=True):
            if table == "fact_response":
                tally.response_hash = signed(tally.response_hash + total)
            else:
                tally.audit_hash = signed(tally.audit_hash + total)
    elif table == "fact_job":
        for tally, total in zip(days, _sums(rows.column("attempts"), place, len(days)), strict=True):
            tally.attempts += total
    elif table == "fact_answer":
        answers = pc.equal(rows.column("source"), "answer").to_numpy(zero_copy_only=False)
        for mask, name in ((answers, "answers"), (~answers, "results")):
            _add_leaves([getattr(tally, name) for tally in days], rows.filter(pa.array(mask)), place[mask])


def _add_leaves(leaves: list[Leaves], rows: pa.RecordBatch, place: Any) -> None:
    size = len(leaves)
    texts = rows.column("value_text")
    there = texts.is_valid().to_numpy(zero_copy_only=False)
    known, of_text = texts.drop_null(), place[there]
    sums = np.zeros(size, dtype=np.int64)
    np.add.at(sums, of_text, np.fromiter(map(crc32, known.cast(pa.binary()).to_pylist()), np.int64, len(known)))
    numbers = rows.column("value_number").fill_null(0.0).to_numpy(zero_copy_only=False)
    figures = zip(
        leaves,
        np.bincount(place, minlength=size).tolist(),
        _sums(pc.utf8_length(known), of_text, size),
        sums.tolist(),
        np.bincount(place, weights=np.where(np.isfinite(numbers), numbers, 0.0), minlength=size).tolist(),
        _sums(rows.column("value_bool").fill_null(False).cast(pa.int32()), place, size),
        strict=True,
    )
    for one, count, characters, text, number, true in figures:
        one.rows += count
        one.characters += characters
        one.texts += text
        one.numbers += number
        one.true += true


def _sums(values: pa.Array, place: Any, size: int) -> list[int]:
    """Sums by place, of 64 bits: hashes wrap around."""
    found = np.zeros(size, dtype=np.int64)
    np.add.at(found, place, values.to_numpy(zero_copy_only=False).astype(np.int64))
    return [int(total) for total in found]


#: The columns that `add_rows` reads, beside `day`.
COUNTED = {
    "fact_response": ["hash"],
    "fact_audit": ["hash"],
    "fact_job": ["attempts"],
    "fact_embedding": ["step"],
    "fact_answer": ["source", "value_text", "value_number", "value_bool"],
}


def leaves_of(document: Document) -> dict[tuple[str, str, str], Any]:
    """Every value of a response by (source, path, item), walked in the plainest way: for the comparison field by field.

    Vectors are left out: they are compared on their own.
    """
    found: dict[tuple[str, str, str], Any] = {}
    for source, values in (("answer", document.get("answers")), ("result", document.get("results"))):
        for name, value in (values or {}).items():
            _walk(found, source, name, "", value)
    return found


# Not within the former: a function that knows itself keeps what it has found until somebody looks for cycles.
def _walk(found: dict[tuple[str, str, str], Any], source: str, path: str, item: str, value: Any) -> None:
    if isinstance(value, dict):
        scores = source == "result" and path.endswith(".scores") and path.count(".") == 1
        for name, inner in value.items():
            if scores and not isinstance(inner, dict | list):
                _walk(found, source, path, name, inner)
            elif not (source == "result" and name == "vector" and "." not in path and isinstance(inner, list)):
                _walk(found, source, f"{path}.{name}", item, inner)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _walk(found, source, path, f"{item}.{index}" if item else str(index), inner)
    elif value is not None:
        found[source, path, item] = value


def rows_as_leaves(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, str, str], Any]:
    """The rows of `fact_answer` of one response in the same shape."""
    return {
        (row["source"], row["path"], row["item"]): next(
            (row[column] for column in ("value_text", "value_number", "value_bool") if row[column] is not None),
            None,
        )
        for row in rows
    }
