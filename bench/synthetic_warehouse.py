"""A warehouse of generated responses, written directly: for benches and tests of the questions, without MongoDB.

    python bench/synthetic_warehouse.py /tmp/warehouse --responses 1000000 --tenants 20 --days 365

Tenants are skewed (Zipf, exponent 1): the first of 20 has 28 % of all. Each form has sector, e-mail, rating, age,
comment and two chosen topics; a summary, a label, a sentiment, and with `--vectors` an embedding. The same seed gives
the same rows. The last ten days are partitions of days, the rest of months.
"""

import argparse
import time
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from quern.analytics import calendar, schema
from quern.analytics.manifest import ALL, SHARED, Manifest, Partition, Source
from quern.analytics.partition import PartitionWriter, batch
from quern.store import identifier

SECTORS = ["health", "retail", "education", "energy", "transport", "public", "finance", "farming"]
LABELS = ["praise", "complaint", "question", "idea"]
SENTIMENTS = ["positive", "neutral", "negative"]
TOPICS = ["price", "speed", "staff", "place", "website"]
_TEXT = (
    "the service was quick and friendly but parking is hard to find near station prices went up since last year "
    "please answer mail sooner staff helped me with form online opening hours queue long waiting great thanks"
)
WORDS = _TEXT.split()
#: path, kind, required, repeated, options, scale
FIELDS: list[tuple[str, str, bool, bool, list[str] | None, int | None]] = [
    ("sector", "choice", True, False, SECTORS, None),
    ("email", "email", False, False, None, None),
    ("score", "rating", True, False, None, 5),
    ("age", "number", False, False, None, None),
    ("comment", "long_text", False, False, None, None),
    ("topics", "multiple_choice", False, True, TOPICS, None),
]
STEPS = [("summary", "summarize"), ("topic", "classify"), ("mood", "sentiment"), ("vector", "embed")]
#: As `flatten` numbers them: steps first.
_TEXT_COLUMNS = {"topic": 1, "mood": 2, "sector": 3}
_NUMBER_COLUMNS = {"topic": 1, "mood": 2, "score": 3, "age": 4}
DIMENSIONS = 384
_CHUNK = 50_000
_MILLISECOND = np.timedelta64(1, "ms")


def _text(random: np.random.Generator, pool: list[str], count: int) -> np.ndarray[Any, Any]:
    return np.array(pool, dtype=object)[random.integers(0, len(pool), count)]


def _sentences(random: np.random.Generator) -> list[str]:
    lengths = np.minimum(random.lognormal(3.2, 0.8, 4000).astype(int) + 3, 600)
    return [" ".join(random.choice(WORDS, length)) for length in lengths]


class Generator:
    """Rows of one tenant, in chunks of consecutive moments."""

    def __init__(self, tenant: str, forms: list[str], seed: int, vectors: bool) -> None:
        self.tenant, self.forms, self.vectors = tenant, forms, vectors
        self.random = np.random.default_rng(seed)
        self.sentences = _sentences(self.random)
        self.users = [identifier.derived("key", tenant, str(number)) for number in range(3)]
        self.made = 0

    def batches(self, day: date, count: int) -> dict[str, pa.RecordBatch]:
        """One batch a fact table, of `count` responses accepted on `day`."""
        random = self.random
        start = np.datetime64(day, "ms")
        created = np.sort(start + random.integers(0, 86_400_000, count) * _MILLISECOND)
        seconds = np.round(random.lognormal(2.5, 1.0, count), 3)
        processed = created + (seconds * 1000).astype(int) * _MILLISECOND
        seconds = (processed - created) / np.timedelta64(1, "s")
        ids = np.array(
            [identifier.derived("rsp", self.tenant, str(self.made + number)) for number in range(count)], dtype=object
        )
        self.made += count
        form = _text(random, self.forms, count)
        version = random.integers(1, 3, count).astype(np.int32)
        sector, label, mood = (_text(random, pool, count) for pool in (SECTORS, LABELS, SENTIMENTS))
        respondent = np.array(
            [f"user{number}@example.org" for number in random.zipf(1.3, count) % 100_000], dtype=object
        )
        rating = random.integers(1, 6, count).astype(float)
        age = random.integers(16, 90, count).astype(float)
        comment = _text(random, self.sentences, count)
        length = np.array([len(text) for text in comment], dtype=np.int32)
        summary = np.array([text[:60] for text in comment], dtype=object)
        topics = np.stack([random.integers(0, 3, count), random.integers(3, 5, count)])
        base = {
            "tenant": np.full(count, self.tenant, dtype=object),
            "form": form,
            "version": version,
            "response": ids,
            "created": created,
            "day": np.full(count, np.datetime64(day, "D")),
        }
        scores = [np.round(random.uniform(0.3, 1, count), 4) for _ in range(2)]
        copies = {"text_1": label, "text_2": mood, "text_3": sector}
        copies |= {"number_1": scores[0], "number_2": scores[1], "number_3": rating, "number_4": age}
        leaves: list[tuple[str, str, str, str, Any, Any]] = [
            ("answer", "sector", "", "choice", sector, None),
            ("answer", "email", "", "email", respondent, None),
            ("answer", "score", "", "rating", None, rating),
            ("answer", "age", "", "number", None, age),
            ("answer", "comment", "", "long_text", comment, None),
            ("answer", "topics", "0", "multiple_choice", np.array(TOPICS, dtype=object)[topics[0]], None),
            ("answer", "topics", "1", "multiple_choice", np.array(TOPICS, dtype=object)[topics[1]], None),
            ("result", "summary.text", "", "summary", summary, None),
            ("result", "topic.label", "", "label", label, None),
            ("result", "topic.score", "", "score", None, scores[0]),
            ("result", "mood.label", "", "sentiment", mood, None),
            ("result", "mood.score", "", "score", None, scores[1]),
        ]
        answers = [self._leaf(base, seconds, leaf) for leaf in leaves]
        made = {
            "fact_response": self._responses(
                base, processed, seconds, respondent, length, rating, age, mood, label, copies
            ),
            "fact_answer": pa.concat_batches(answers),
            "fact_job": self._jobs(base, created, seconds),
            "fact_audit": self._audit(base),
        }
        if self.vectors:
            made["fact_embedding"] = self._vectors(base, count)
        return made

    def _leaf(self, base: dict[str, Any], seconds: Any, leaf: tuple[str, str, str, str, Any, Any]) -> pa.RecordBatch:
        source, path, item, kind, text, number = leaf
        count = len(seconds)
        lengths = [len(value) for value in text] if text is not None else np.zeros(count, dtype=np.int32)
        columns = {
            **base,
            **{
                key: np.full(count, value, dtype=object)
                for key, value in (("source", source), ("path", path), ("item", item), ("kind", kind))
            },
            "value_text": text if text is not None else pa.nulls(count, pa.string()),
            "value_number": number if number is not None else pa.nulls(count, pa.float64()),
            "value_bool": pa.nulls(count, pa.bool_()),
            "value_date": pa.nulls(count, pa.date32()),
            "length": lengths,
            "processing_seconds": seconds,
        }
        return batch(schema.FACT_ANSWER, columns)

    def _responses(
        self,
        base: dict[str, Any],
        processed: Any,
        seconds: Any,
        respondent: Any,
        length: Any,
        rating: Any,
        age: Any,
        mood: Any,
        label: Any,
        copies: dict[str, Any],
    ) -> pa.RecordBatch:
        count = len(seconds)
        columns = {
            **base,
            "status": np.full(count, "processed", dtype=object),
            "processed": processed,
            "erased": pa.nulls(count, pa.timestamp("ms")),
            "processing_seconds": seconds,
            "user": _text(self.random, self.users, count),
            "respondent": np.array([identifier.derived("usr", text) for text in respondent], dtype=object),
            "fields": np.full(count, 6, dtype=np.int32),
            "fields_answered": np.full(count, 6, dtype=np.int32),
            "answer_rows": np.full(count, 7, dtype=np.int32),
            "result_rows": np.full(count, 5, dtype=np.int32),
            "text_length": length.astype(np.int64),
            "words": (length // 5 + 1).astype(np.int64),
            "number_sum": rating + age,
            "sentiment": mood,
            "label": label,
            "rating": (rating - 1) / 4,
            "steps": np.full(count, 4, dtype=np.int32),
            "steps_done": np.full(count, 4, dtype=np.int32),
            "steps_dead": np.zeros(count, dtype=np.int32),
            "hash": self.random.integers(-(2**63), 2**63 - 1, count),
        }
        for number in range(1, schema.PROMOTED + 1):
            columns[f"text_{number}"] = copies.get(f"text_{number}", pa.nulls(count, pa.string()))
            columns[f"number_{number}"] = copies.get(f"number_{number}", pa.nulls(count, pa.float64()))
        return batch(schema.FACT_RESPONSE, columns)

    def _jobs(self, base: dict[str, Any], created: Any, seconds: Any) -> pa.RecordBatch:
        count, parts = len(seconds), []
        for number, (step, kind) in enumerate(STEPS):
            run = np.round(seconds / 8, 3)
            wait = np.round(seconds * (number + 1) / 8, 3)
            started = created + (wait * 1000).astype(int) * _MILLISECOND
            columns = {
                **{key: base[key] for key in ("tenant", "form", "version", "response", "day")},
                "job": np.array([f"job_{text[4:]}{number}" for text in base["response"]], dtype=object),
                **{
                    key: np.full(count, value, dtype=object)
                    for key, value in (("step", step), ("kind", kind), ("queue", "batched"), ("state", "done"))
                },
                "created": created,
                "due": created,
                "started": started,
                "ended": started + (run * 1000).astype(int) * _MILLISECOND,
                "wait_seconds": wait,
                "run_seconds": run,
                "attempts": np.ones(count, dtype=np.int32),
                "failures": np.zeros(count, dtype=np.int32),
            }
            parts.append(batch(schema.FACT_JOB, columns))
        return pa.concat_batches(parts)

    def _audit(self, base: dict[str, Any]) -> pa.RecordBatch:
        count = len(base["response"])
        columns = {
            "tenant": base["tenant"],
            "entry": np.array([f"aud_{text[4:]}" for text in base["response"]], dtype=object),
            "at": base["created"],
            "day": base["day"],
            "actor": _text(self.random, self.users, count),
            "action": np.full(count, "response.submitted", dtype=object),
            "subject": base["response"],
            "form": base["form"],
            "version": base["version"],
            "detail": pa.nulls(count, pa.string()),
            "request_id": pa.nulls(count, pa.string()),
            "hash": self.random.integers(-(2**63), 2**63 - 1, count),
        }
        return batch(schema.FACT_AUDIT, columns)

    def _vectors(self, base: dict[str, Any], count: int) -> pa.RecordBatch:
        vectors = self.random.standard_normal((count, DIMENSIONS)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        offsets = np.arange(0, (count + 1) * DIMENSIONS, DIMENSIONS, dtype=np.int32)
        kind = schema.FACT_EMBEDDING.arrow.field("vector").type
        columns = {
            **base,
            "step": np.full(count, "vector", dtype=object),
            "vector": pa.ListArray.from_arrays(offsets, pa.array(vectors.ravel()), type=kind),
        }
        return batch(schema.FACT_EMBEDDING, columns)


def _dimensions(root: Path, generator: Generator, first: datetime, generation: int) -> dict[str, Partition]:
    tenant, forms = generator.tenant, generator.forms
    versions = [(form, version) for form in forms for version in (1, 2)]
    made: dict[str, dict[str, list[Any]]] = {
        "dim_user": {
            "tenant": [tenant] * 3,
            "user": generator.users,
            "kind": ["publishable"] * 3,
            "name": ["website", "kiosk", "app"],
            "created": [first] * 3,
            "revoked": [None] * 3,
        },
        "dim_form": {
            "tenant": [tenant] * len(versions),
            "form": [form for form, _ in versions],
            "version": [version for _, version in versions],
            "name": [f"Survey {number // 2 + 1}" for number in range(len(versions))],
            "status": ["open"] * len(versions),
            "valid_from": [first + timedelta(days=version - 1) for _, version in versions],
            "valid_to": [first + timedelta(days=1) if version == 1 else None for _, version in versions],
            "current": [version == 2 for _, version in versions],
            "fields": [6] * len(versions),
            "steps": [4] * len(versions),
        },
    }
    rows: list[dict[str, Any]] = []
    for form, version in versions:
        key = {"tenant": tenant, "form": form, "version": version}
        for place, (path, kind, required, repeated, options, scale) in enumerate(FIELDS):
            listed = "{" + ",".join(f'"{option}":"{option.title()}"' for option in options) + "}" if options else None
            rows.append(
                {
                    **key,
                    "source": "answer",
                    "path": path,
                    "kind": kind,
                    "position": place,
                    "label": path.title(),
                    "required": required,
                    "repeated": repeated,
                    "options": listed,
                    "scale": scale,
                    "text_column": _TEXT_COLUMNS.get(path),
                    "number_column": _NUMBER_COLUMNS.get(path),
                }
            )
        for place, (path, kind) in enumerate(STEPS):
            rows.append(
                {
                    **key,
                    "source": "result",
                    "path": path,
                    "kind": kind,
                    "position": place,
                    "label": "",
                    "required": False,
                    "repeated": False,
                    "options": None,
                    "scale": None,
                    "text_column": _TEXT_COLUMNS.get(path),
                    "number_column": _NUMBER_COLUMNS.get(path),
                }
            )
    made["dim_field"] = {name: [row[name] for row in rows] for name in schema.DIM_FIELD.names}
    return {
        name: _write(root, name, tenant, ALL, generation, [batch(schema.TABLES[name], columns)])
        for name, columns in made.items()
    }


def _write(
    root: Path, table: str, tenant: str, period: str, generation: int, batches: list[pa.RecordBatch]
) -> Partition:
    with PartitionWriter(root, schema.TABLES[table], tenant, period, generation) as writer:
        for item in batches:
            writer.write_sorted(item)
        made = writer.close()
    if made is None:
        raise ValueError(f"expected rows for {table} of {tenant}, found none")
    return made


def write(
    root: Path,
    *,
    responses: int,
    tenants: int = 20,
    days: int = 365,
    last: date = date(2026, 11, 21),
    seed: int = 7,
    vectors: bool = False,
) -> Manifest:
    """Write and publish a warehouse of about `responses` responses; returns its manifest.

    Tenants are `identifier.derived("ten", "synthetic", "0")` and so on, the largest first, with two forms each.
    """
    manifest, generation = Manifest(root), 1
    weights = 1 / np.arange(1, tenants + 1)
    per_day = np.maximum(1, np.round(responses / days * weights / weights.sum())).astype(int)
    first = last - timedelta(days=days - 1)
    recent = last - timedelta(days=9)
    every = [first + timedelta(days=number) for number in range(days)]
    periods: dict[str, list[date]] = {}
    for day in every:
        periods.setdefault(day.isoformat() if day >= recent else day.isoformat()[:7], []).append(day)
    for number in range(tenants):
        tenant = identifier.derived("ten", "synthetic", str(number))
        forms = [identifier.derived("frm", tenant, str(place)) for place in range(2)]
        generator = Generator(tenant, forms, seed + number, vectors)
        found: dict[str, list[Partition]] = {}
        for period, period_days in periods.items():
            made_of: dict[str, list[pa.RecordBatch]] = {}
            for day in period_days:
                left = int(per_day[number])
                while left:
                    count = min(left, _CHUNK)
                    left -= count
                    for table, made in generator.batches(day, count).items():
                        made_of.setdefault(table, []).append(made)
            for table, batches in made_of.items():
                # Sorted, as a month is that the ETL has merged.
                order = [(name, "ascending") for name in schema.TABLES[table].order]
                listed = pa.Table.from_batches(batches).sort_by(order).combine_chunks().to_batches()
                found.setdefault(table, []).append(_write(root, table, tenant, period, generation, listed))
        start = datetime(first.year, first.month, first.day, tzinfo=UTC)
        for table, partition in _dimensions(root, generator, start, generation).items():
            found[table] = [partition]
        for table, partitions in found.items():
            manifest = manifest.with_partitions(table, tenant, partitions)
    times = batch(schema.DIM_TIME, calendar.columns())
    manifest = manifest.with_partitions(
        "dim_time", SHARED, [_write(root, "dim_time", SHARED, ALL, generation, [times])]
    )
    fresh = datetime(last.year, last.month, last.day, tzinfo=UTC) + timedelta(days=1)
    return manifest.publish(keep=timedelta(minutes=15), freshness=fresh, source=Source(), at=fresh)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--responses", type=int, default=100_000)
    parser.add_argument("--tenants", type=int, default=20)
    parser.add_argument("--days", type=int, default=365)
    parser.add_argument("--vectors", action="store_true")
    chosen = parser.parse_args()
    began = time.monotonic()
    made = write(
        chosen.root, responses=chosen.responses, tenants=chosen.tenants, days=chosen.days, vectors=chosen.vectors
    )
    rows = sum(item.rows for item in (part for parts in made.tables["fact_response"].values() for part in parts))
    size = sum((made.root / path).stat().st_size for path in made.paths)
    print(f"{rows} responses, {len(made.paths)} files, {size / 1e6:.0f} MB, {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    main()
