"""The extract's files hold the documents given to them, in the order of time, whole or not at all."""

from datetime import date, datetime, time, timedelta
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from quern.analytics import extract
from quern.analytics.extract import AUDIT, RESPONSES, Compression, Extract
from quern.analytics.source import DayChunk

_DAY = date(2026, 3, 7)
_NOON = datetime.combine(_DAY, time(12))


def _chunk(first: int, count: int) -> DayChunk:
    documents: list[dict[str, Any]] = [
        {
            "_id": f"rsp_{number}",
            "tenant": "ten_a",
            "form": "frm_a",
            "version": 1,
            "status": "processed",
            "created": _NOON + timedelta(seconds=number),
            "answers": {"comment": f"Grüße {number}", "seen": _NOON},
        }
        for number in range(first, first + count)
    ]
    return DayChunk(documents, [number - 5 for number in range(first, first + count)], day=_DAY)


def _lines(path: Path) -> list[dict[str, Any]]:
    kind = {".zst": "zstd", ".gz": "gzip"}.get(path.suffix)
    raw = pa.CompressedInputStream(str(path), kind).read() if kind else path.read_bytes()
    return [orjson.loads(line) for line in raw.splitlines()]


def _folder(root: Path) -> Path:
    return root / "ten_a" / _DAY.isoformat()


@pytest.mark.parametrize("compression", ["zstd", "gzip", "none"])
def test_both_files_hold_every_document_in_the_order_in_which_it_came(
    tmp_path: Path, compression: Compression, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extract, "_BATCH", 4)
    with Extract(tmp_path, "ten_a", "responses", RESPONSES, compression) as files:
        for first in (0, 3, 6):
            files.write(_chunk(first, 3))
        files.replace([_DAY])
    (lines,) = _folder(tmp_path).glob("responses.jsonl*")
    found, rows = _lines(lines), pq.read_table(_folder(tmp_path) / "responses.parquet").to_pylist()
    assert [line["id"] for line in found] == [row["id"] for row in rows] == [f"rsp_{number}" for number in range(9)]
    assert [orjson.loads(row["answers"]) for row in rows] == [line["answers"] for line in found]
    assert found[8]["answers"] == {"comment": "Grüße 8", "seen": "2026-03-07T12:00:00Z"}
    assert [row["hash"] for row in rows] == [number - 5 for number in range(9)]
    assert {row["processed"] for row in rows} == {None}


def test_rows_with_large_answers_are_written_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extract, "_BATCH_BYTES", 500)
    with Extract(tmp_path, "ten_a", "responses", RESPONSES, "zstd") as files:
        for first in range(0, 12, 3):
            files.write(_chunk(first, 3))
        files.replace([_DAY])
    known = pq.read_metadata(_folder(tmp_path) / "responses.parquet")
    assert [known.row_group(number).num_rows for number in range(known.num_row_groups)] == [3, 3, 3, 3]


def test_another_compression_leaves_no_file_of_the_former(tmp_path: Path) -> None:
    kinds: tuple[Compression, ...] = ("gzip", "none", "zstd")
    for compression in kinds:
        with Extract(tmp_path, "ten_a", "responses", RESPONSES, compression) as files:
            files.write(_chunk(0, 2))
            files.replace([_DAY])
        suffix = {"gzip": ".gz", "none": "", "zstd": ".zst"}[compression]
        assert sorted(path.name for path in _folder(tmp_path).iterdir()) == [
            f"responses.jsonl{suffix}",
            "responses.parquet",
        ]


def test_what_ends_in_an_error_changes_nothing(tmp_path: Path) -> None:
    with Extract(tmp_path, "ten_a", "responses", RESPONSES, "zstd") as files:
        files.write(_chunk(0, 2))
        files.replace([_DAY])
    before = {path: path.read_bytes() for path in _folder(tmp_path).iterdir()}
    broken = _chunk(5, 1)
    broken.documents[0]["version"] = "one"
    with pytest.raises(pa.ArrowInvalid), Extract(tmp_path, "ten_a", "responses", RESPONSES, "zstd") as files:
        files.write(_chunk(0, 3))
        files.write(broken)
        files.replace([_DAY])
    assert {path: path.read_bytes() for path in _folder(tmp_path).iterdir()} == before


def test_the_audit_log_is_extracted_as_well(tmp_path: Path) -> None:
    entry = {
        "_id": "aud_1",
        "tenant": "ten_a",
        "at": _NOON,
        "actor": "key_a",
        "action": "form.published",
        "subject": "frm_a",
        "detail": {"version": 2},
        "mac": "ab",
        "request_id": "req_1",
    }
    with Extract(tmp_path, "ten_a", "audit", AUDIT, "zstd") as files:
        files.write(DayChunk([entry], [7], day=_DAY))
        files.replace([_DAY])
    (line,) = _lines(_folder(tmp_path) / "audit.jsonl.zst")
    assert line == {**{name: value for name, value in entry.items() if name != "_id"}, "id": "aud_1"} | {
        "at": "2026-03-07T12:00:00Z"
    }
    (row,) = pq.read_table(_folder(tmp_path) / "audit.parquet").to_pylist()
    assert {**row, "detail": orjson.loads(row["detail"])} == {**line, "at": entry["at"], "hash": 7}
