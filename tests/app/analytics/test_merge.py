"""A late response comes into its closed month without the month in memory."""

import random
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from quern.analytics import partition
from quern.analytics.manifest import Manifest, Partition, Source
from quern.analytics.partition import PartitionWriter, batch
from quern.analytics.schema import FACT_AUDIT
from quern.analytics.warehouse import Assembly
from quern.analytics.work import Span, Work

_TENANT = "ten_a"
_LATE = date(2026, 3, 5)


def _written(root: Path, period: str, days: list[date], each: int, name: str) -> Partition:
    """A file of so many entries a day, of some 1 KB each that does not compress."""
    chance = random.Random(7)
    with PartitionWriter(root, FACT_AUDIT, _TENANT, period, 1) as writer:
        for day in days:
            at = [datetime.combine(day, time()) + timedelta(seconds=second) for second in range(each)]
            same = {"tenant": _TENANT, "actor": "key_a", "action": "response.submitted", "subject": "rsp_a"}
            columns = {
                **{column: [value] * each for column, value in same.items()},
                **dict.fromkeys(("form", "version", "request_id"), [None] * each),
                "entry": [f"{name}-{day}-{second}" for second in range(each)],
                "at": at,
                "day": [day] * each,
                "detail": [chance.randbytes(500).hex() for _ in range(each)],
                "hash": list(range(each)),
            }
            writer.write(batch(FACT_AUDIT, columns))
        made = writer.close()
    assert made is not None
    return made


def _merge(root: Path, each: int) -> tuple[list[str], int]:
    """Entries of a month after a day of it was rewritten, and the most memory that Arrow needed for it."""
    month = [date(2026, 3, number) for number in range(1, 31)]
    manifest = Manifest(root).with_partitions("fact_audit", _TENANT, [_written(root, "2026-03", month, each, "old")])
    work = Work(root, manifest.generation, Source(None, datetime(2026, 11, 22, tzinfo=UTC)))
    late = _written(root, "2026-03-05", [_LATE], 3, "late")
    work.done(Span(_TENANT, _LATE, _LATE, {"fact_audit": late}))
    assembly = Assembly(manifest, work, today=date(2026, 11, 22), compact_after_days=3, memory="64MB", threads=1)
    usual, watched = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(watched)
    try:
        made = assembly.assemble()
    finally:
        pa.set_memory_pool(usual)
    (merged,) = made.partitions("fact_audit", _TENANT)
    assert merged.period == "2026-03"
    return pq.read_table(root / merged.path, columns=["entry"]).column("entry").to_pylist(), watched.max_memory()


def test_a_merge_replaces_the_rewritten_day_and_keeps_the_others(tmp_path: Path) -> None:
    found, _ = _merge(tmp_path, 5)
    assert sorted(name for name in found if str(_LATE) in name) == [f"late-{_LATE}-{number}" for number in range(3)]
    assert len([name for name in found if name.startswith("old")]) == 29 * 5


def test_a_merge_takes_the_same_memory_however_large_the_month_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partition, "BATCH_BYTES", 100_000)
    monkeypatch.setattr(partition, "_ROWS", 50)
    _, few = _merge(tmp_path / "few", 20)
    found, many = _merge(tmp_path / "many", 200)
    assert len(found) == 29 * 200 + 3
    # 600 KB of rows, and 6 MB.
    assert many < 2 * few
