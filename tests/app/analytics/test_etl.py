"""A run brings the warehouse to what MongoDB holds, and publishes nothing else."""

import time
from collections.abc import Iterator
from datetime import date
from math import inf, nan
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from quern.analytics import etl, partition, source
from quern.analytics.etl import BusyError, MismatchError, Range
from quern.analytics.extract import _DayWriter
from quern.analytics.flatten import Flattener
from quern.analytics.manifest import NAME, Manifest, NoWarehouseError
from quern.analytics.partition import PartitionWriter
from quern.analytics.schema import FACT_ANSWER, Table
from quern.analytics.shred import Column, Stripe, shred
from quern.analytics.source import Chunk, SpanReader
from tests.app.analytics.desk import RESULTS, Desk, moment, yesterday


def test_the_first_run_brings_all_of_it(desk: Desk) -> None:
    for day in ("2024-02-29", "2026-01-01", "2026-10-31"):
        desk.finish(desk.submit(moment(day), {"sector": "health", "comment": "fine"}), RESULTS)
    report = desk.run()
    assert report.outcome == "published"
    assert desk.holds()
    assert sorted(str(row["day"]) for row in desk.rows("fact_response")) == ["2024-02-29", "2026-01-01", "2026-10-31"]


def test_a_run_without_a_change_publishes_nothing_new(desk: Desk) -> None:
    desk.submit(moment("2026-10-31"), {"sector": "health"})
    first = desk.run()
    paths = desk.manifest.paths
    second = desk.run()
    assert (second.outcome, second.generation) == ("unchanged", first.generation)
    assert desk.manifest.paths == paths
    assert desk.manifest.freshness is not None and first.freshness is not None
    assert desk.manifest.freshness > first.freshness


def test_only_the_days_that_changed_are_rewritten(desk: Desk) -> None:
    days = [yesterday().replace(day=1), yesterday()]
    late = desk.submit(moment("2026-01-05"), {"sector": "retail"})
    for day in days:
        desk.submit(moment(day), {"sector": "health"})
    desk.run()
    before = desk.manifest.paths
    desk.finish(late, RESULTS)
    report = desk.run()
    # The day of the response, and the day of the audit entry that says that it ended.
    assert report.days == 2
    assert desk.holds()
    untouched = {path for path in before if f"/{yesterday()}." in path and "audit" not in path}
    assert untouched and untouched <= desk.manifest.paths


def test_a_late_response_comes_into_its_old_day(desk: Desk) -> None:
    desk.submit(moment("2026-01-05"), {"sector": "retail"})
    desk.run()
    desk.submit(moment("2026-01-05", 9), {"sector": "health"})
    desk.run()
    assert desk.holds()
    assert len(desk.rows("fact_response")) == 2


def test_days_of_a_closed_month_become_one_file(desk: Desk) -> None:
    for number in range(1, 20):
        desk.submit(moment(date(2026, 3, number)), {"sector": "health"})
    desk.run()
    assert [item.period for item in desk.manifest.partitions("fact_answer", desk.tenant)] == ["2026-03"]
    assert desk.holds()
    desk.submit(moment("2026-03-07", 13), {"sector": "retail"})
    desk.run()
    assert [item.period for item in desk.manifest.partitions("fact_answer", desk.tenant)] == ["2026-03"]
    assert len(desk.rows("fact_response", "day = DATE '2026-03-07'")) == 2
    assert desk.holds()


def test_days_are_built_together_only_as_long_as_they_are_small(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each day has a response and its audit entry: three days, then a day by itself that is too large.
    monkeypatch.setattr(etl, "_TOGETHER", 6)
    for number in (1, 2, 5, 9, 9, 9, 9, 20):
        desk.finish(desk.submit(moment(date(2026, 3, number)), {"sector": "health", "score": 3}), RESULTS)
    desk.run()
    assert [item.period for item in desk.manifest.partitions("fact_response", desk.tenant)] == ["2026-03"]
    assert len(desk.rows("fact_response")) == 8
    assert desk.holds()
    extracted = sorted(path.parent.name for path in desk.root.glob("extract/*/*/responses.parquet"))
    assert extracted == ["2026-03-01", "2026-03-02", "2026-03-05", "2026-03-09", "2026-03-20"]


def test_a_month_that_is_built_anew_is_not_merged_with_its_former_file(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2):
        desk.submit(moment(date(2026, 3, number)), {"sector": "health"})
    desk.run()
    monkeypatch.delattr("quern.analytics.warehouse.Assembly._merge")
    desk.run(everything=True)
    assert len(desk.rows("fact_response")) == 2
    assert desk.holds()


def test_rows_that_do_not_fit_in_memory_are_written_and_merged_in_parts(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partition, "BATCH_BYTES", 2000)
    for number in range(1, 20):
        desk.submit(moment(date(2026, 3, number)), {"sector": "health", "comment": "x" * 500})
    desk.run()
    (path,) = desk.manifest.files("fact_answer", desk.tenant)
    assert pq.read_metadata(path).num_row_groups > 1
    assert desk.holds()
    desk.submit(moment("2026-03-02"), {"sector": "retail"})
    desk.run()
    assert [item.period for item in desk.manifest.partitions("fact_answer", desk.tenant)] == ["2026-03"]
    (path,) = desk.manifest.files("fact_answer", desk.tenant)
    assert pq.read_metadata(path).num_row_groups > 1
    assert desk.holds()


def test_a_long_run_gives_back_what_it_freed_as_it_goes(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(etl, "_GIVE_BACK_AFTER", 4)
    pool, given_back = pa.default_memory_pool, []

    def asked_for() -> pa.MemoryPool:
        given_back.append(len(list(desk.root.rglob("fact_response/*.parquet"))))
        return pool()

    monkeypatch.setattr(pa, "default_memory_pool", asked_for)
    for month in (1, 2, 3, 4):
        for _ in range(2):
            desk.submit(moment(date(2026, month, 1)), {"sector": "health"})
    desk.run()
    # After each month of two responses and two entries, and once more before publishing.
    assert given_back == [1, 2, 3, 4, 4]


def test_large_answers_are_flattened_a_few_at_a_time(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "PIECE", 2)
    monkeypatch.setattr(source, "BATCH_BYTES", 20_000)
    at_once: list[int] = []
    batches = Flattener.batches

    def counted(flattener: Flattener) -> Iterator[tuple[Table, pa.RecordBatch]]:
        at_once.append(flattener.count)
        yield from batches(flattener)

    monkeypatch.setattr(Flattener, "batches", counted)
    for number in range(8):
        desk.submit(moment("2026-03-07"), {"comment": str(number) * 9000})
    desk.run()
    assert at_once == [4, 4]
    assert desk.holds()


def test_a_month_that_is_built_at_once_is_in_the_order_of_its_paths(desk: Desk) -> None:
    for number in range(1, 20):
        desk.submit(
            moment(date(2026, 3, number)), {"sector": "health", "comment": "fine", "topics": ["speed", "price"]}
        )
    desk.run()
    (path,) = desk.manifest.files("fact_answer", desk.tenant)
    rows = pq.read_table(path).to_pylist()
    keys = [tuple(row[name] for name in FACT_ANSWER.order[:4]) for row in rows]
    assert len({key[2] for key in keys}) == 3
    assert keys == sorted(keys)


def test_a_question_by_one_path_unpacks_no_other(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition, "_LEAST_OF_A_PLACE", 10)
    for number in range(1, 20):
        desk.submit(moment(date(2026, 3, number)), {"sector": "health", "comment": "fine", "topics": ["price"]})
    desk.run()
    assert _paths_of_groups(desk) == [{"comment"}, {"sector"}, {"topics"}]
    desk.submit(moment("2026-03-02", 13), {"sector": "retail"})
    desk.run()
    # This one was merged.
    assert _paths_of_groups(desk) == [{"comment"}, {"sector"}, {"topics"}]
    assert desk.holds()


def _paths_of_groups(desk: Desk) -> list[set[str]]:
    """Of each row group of the answers' only file, the least and the greatest path, which a reader looks at."""
    (path,) = desk.manifest.files("fact_answer", desk.tenant)
    known = pq.read_metadata(path)
    place = FACT_ANSWER.names.index("path")
    found = [known.row_group(number).column(place).statistics for number in range(known.num_row_groups)]
    return [{statistics.min, statistics.max} for statistics in found]


def test_a_late_response_rewrites_its_own_days_and_not_those_between(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etl, "_BETWEEN", 2)
    for number in range(1, 20):
        desk.submit(moment(date(2026, 3, number)), {"code": str(number)})
    of_each = desk.run().documents // 19
    for number in (3, 4, 17):
        desk.submit(moment(date(2026, 3, number)), {"code": "late"})
    assert desk.run().documents == of_each * (2 + 2 + 2)
    assert desk.holds()


def test_a_warehouse_of_another_version_is_made_anew(desk: Desk) -> None:
    desk.submit(moment("2026-03-07"), {"sector": "health"})
    desk.run()
    path = desk.root / "warehouse" / NAME
    path.write_bytes(orjson.dumps({**orjson.loads(path.read_bytes()), "format": 0}))
    with pytest.raises(NoWarehouseError, match="quern etl run"):
        Manifest.load(desk.root / "warehouse")
    desk.run()
    assert len(desk.rows("fact_response")) == 1
    assert desk.holds()


def test_short_answers_and_results_stand_beside_their_response(desk: Desk) -> None:
    desk.finish(desk.submit(moment("2026-03-07"), {"sector": "health", "score": 4, "age": 30}), RESULTS)
    desk.run()
    columns = {
        (row["source"], row["path"]): (row["text_column"], row["number_column"]) for row in desk.rows("dim_field")
    }
    (row,) = desk.rows("fact_response")
    assert row[f"text_{columns['answer', 'sector'][0]}"] == "health"
    assert row[f"number_{columns['answer', 'score'][1]}"] == 4
    assert row[f"number_{columns['answer', 'age'][1]}"] == 30
    assert row[f"text_{columns['result', 'topic'][0]}"] == "praise"
    assert row[f"number_{columns['result', 'mood'][1]}"] == 0.5
    assert columns["answer", "comment"] == columns["answer", "topics"] == (None, None)
    # Of this nothing is known, so nothing beside a response of this file is relied on.
    desk.keep({"answers": {"sector": ["health"]}, "version": 1, "created": moment("2026-03-08")})
    desk.run()
    assert [item.explained for item in desk.manifest.partitions("fact_response", desk.tenant)] == [False]


def test_a_response_that_is_deleted_leaves_its_day(desk: Desk) -> None:
    gone = desk.submit(moment("2026-03-07"), {"sector": "health"})
    desk.submit(moment("2026-03-07"), {"sector": "retail"})
    desk.run()
    desk.db.responses.delete_one({"_id": gone})
    desk.db.audit.delete_many({"subject": gone})
    desk.run()
    assert [row["response"] != gone for row in desk.rows("fact_response")] == [True]
    assert desk.holds()


def test_a_range_is_rewritten_on_demand(desk: Desk) -> None:
    for day in ("2026-03-07", "2026-03-08", "2026-03-09"):
        desk.submit(moment(day), {"sector": "health"})
    desk.run()
    report = desk.run(Range(date(2026, 3, 8), date(2026, 3, 9), desk.tenant))
    assert report.days == 1
    assert desk.holds()


def test_the_extract_holds_the_documents_of_each_day(desk: Desk) -> None:
    response = desk.submit(moment("2026-03-07"), {"sector": "health", "comment": "Grüße 🌾"})
    desk.finish(response, RESULTS)
    desk.run()
    folder = desk.root / "extract" / desk.tenant / "2026-03-07"
    assert sorted(path.name for path in folder.iterdir()) == [
        "audit.jsonl.zst",
        "audit.parquet",
        "responses.jsonl.zst",
        "responses.parquet",
    ]
    with pa.CompressedInputStream(str(folder / "responses.jsonl.zst"), "zstd") as stream:
        (line,) = stream.read().splitlines()
    found = orjson.loads(line)
    assert found["id"] == response
    assert found["answers"] == {"sector": "health", "comment": "Grüße 🌾"}
    assert found["created"] == "2026-03-07T12:00:00Z"
    assert found["results"] == RESULTS
    (row,) = pq.read_table(folder / "responses.parquet").to_pylist()
    assert (row["id"], orjson.loads(row["answers"])) == (response, found["answers"])
    assert "audit_key" not in found


def test_what_a_killed_run_was_writing_is_never_taken_for_the_extract(desk: Desk) -> None:
    response = desk.submit(moment("2026-03-07"), {"comment": "gone"})
    desk.run()
    folder = desk.root / "extract" / desk.tenant / "2026-03-07"
    for name in ("responses.jsonl.zst", "responses.parquet"):
        (folder / f".{name}.writing").write_bytes(b"half of a fi")
    # The day is built again, and has no response any more.
    desk.db.responses.delete_one({"_id": response})
    desk.run()
    assert sorted(path.name for path in folder.iterdir()) == ["audit.jsonl.zst", "audit.parquet"]
    assert desk.holds()


def test_what_is_erased_is_in_no_file_any_more(desk: Desk) -> None:
    secret = "xylophone-4711"
    kept = desk.submit(moment("2026-03-07"), {"comment": "another"})
    gone = desk.submit(moment("2026-03-07"), {"comment": secret, "email": "maud@example.org"})
    fresh = desk.submit(moment(yesterday()), {"comment": secret})
    for response in (kept, gone, fresh):
        desk.finish(response, {**RESULTS, "gist": {"text": secret}} if response != kept else RESULTS)
    desk.run()
    assert _files_with(desk, secret)
    for response in (gone, fresh):
        desk.erase(response)
    desk.run()
    # Replaced files stay for those who read them, as long as the setting says.
    time.sleep(1.1)
    desk.etl().prune()
    assert _files_with(desk, secret) == []
    assert _files_with(desk, "maud@example.org") == []
    assert {row["response"]: row["status"] for row in desk.rows("fact_response")}[gone] == "erased"
    assert desk.rows("fact_embedding", f"response = '{gone}'") == []
    assert desk.rows("fact_answer", f"response = '{gone}'") == []
    assert desk.holds()


def _files_with(desk: Desk, text: str) -> list[str]:
    """Files that hold a text, in any compression."""
    found = []
    for path in desk.files():
        if path.suffix == ".parquet":
            content = str(pq.read_table(path).to_pylist()).encode()
        elif path.suffix == ".zst":
            with pa.CompressedInputStream(str(path), "zstd") as stream:
                content = stream.read()
        else:
            content = path.read_bytes()
        if text.encode() in content:
            found.append(path.name)
    return found


def test_two_runs_at_once_are_refused(desk: Desk) -> None:
    found: list[int] = []

    def pause() -> None:
        if not found:
            found.append(1)
            with pytest.raises(BusyError):
                desk.run()

    desk.submit(moment("2026-03-07"), {"sector": "health"})
    desk.etl(pause=pause).run()
    assert found


def test_rows_that_differ_stop_the_publication_and_are_named(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    first = desk.submit(moment("2026-03-07"), {"code": "a"})
    desk.run()
    second = desk.submit(moment("2026-03-07"), {"code": "lost"})
    desk.submit(moment("2026-03-09"), {"code": "lost"})
    extracted = _extracted(desk)

    def lossy(column: Column) -> Iterator[Stripe]:
        yield from (stripe for stripe in shred(column) if "lost" not in stripe.values)

    monkeypatch.setattr("quern.analytics.flatten.shred", lossy)
    with pytest.raises(MismatchError) as caught:
        desk.run()
    problems = " ".join(caught.value.report.problems)
    assert second in problems and "code" in problems
    assert "lost" not in problems
    assert [row["response"] for row in desk.rows("fact_response")] == [first]
    assert _extracted(desk) == extracted
    monkeypatch.undo()
    desk.run()
    assert desk.holds()
    assert len(_extracted(desk)) == 2 * len(extracted)


def _extracted(desk: Desk) -> dict[str, bytes]:
    root = desk.root / "extract"
    return {str(path.relative_to(root)): path.read_bytes() for path in desk.files() if root in path.parents}


def test_documents_that_the_extract_would_lack_stop_the_publication(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.submit(moment("2026-03-07"), {"code": "a"})
    desk.run()
    paths, extracted = desk.manifest.paths, _extracted(desk)
    desk.submit(moment("2026-03-07"), {"code": "b"})
    write = _DayWriter.write

    def careless(writer: _DayWriter, chunk: Chunk) -> None:
        write(writer, Chunk(chunk.documents[:1], chunk.digests[:1]))

    monkeypatch.setattr(_DayWriter, "write", careless)
    with pytest.raises(MismatchError) as caught:
        desk.run()
    name = f"extract {desk.tenant}/2026-03-07/responses.parquet"
    assert any(f"{name}: 2 documents in MongoDB, 1 in the extract" in line for line in caught.value.report.problems)
    assert (desk.manifest.paths, _extracted(desk)) == (paths, extracted)
    monkeypatch.undo()
    desk.run()
    assert desk.holds()


@pytest.mark.parametrize(
    ("table", "column", "wrong"),
    [
        ("fact_response", "text_1", "wrong"),
        ("fact_response", "number_2", 7.5),
        ("fact_response", "status", "incomplete"),
        ("fact_response", "rating", 0.3),
        ("fact_response", "respondent", None),
        ("fact_response", "processing_seconds", 99.0),
        ("fact_response", "words", 7),
        ("fact_response", "label", None),
        ("fact_audit", "actor", "key_another"),
        ("fact_audit", "detail", None),
        ("fact_job", "state", "cancelled"),
        ("fact_job", "queue", "high"),
        ("fact_job", "run_seconds", 2.0),
    ],
)
def test_a_column_of_its_own_that_differs_stops_the_publication_and_is_named(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, table: str, column: str, wrong: Any
) -> None:
    answers = {"sector": "health", "score": 4, "email": "Maud@example.org", "comment": "fine it was"}
    response = desk.submit(moment("2026-03-07"), answers)
    desk.finish(response, RESULTS)
    write = PartitionWriter.write

    def wrongly(writer: PartitionWriter, rows: pa.RecordBatch) -> None:
        if writer._table.name == table:
            place = rows.schema.get_field_index(column)
            same = pa.array([wrong] * rows.num_rows, rows.schema.field(place).type)
            rows = pa.RecordBatch.from_arrays(
                [same if number == place else values for number, values in enumerate(rows.columns)], schema=rows.schema
            )
        write(writer, rows)

    with monkeypatch.context() as broken:
        broken.setattr(PartitionWriter, "write", wrongly)
        with pytest.raises(MismatchError) as caught:
            desk.run()
    collection, query = {
        "fact_response": ("responses", {"_id": response}),
        "fact_audit": ("audit", {"action": "response.submitted"}),
        "fact_job": ("jobs", {"subject": response}),
    }[table]
    names = [document["_id"] for document in desk.db[collection].find(query)]
    problems = " ".join(caught.value.report.problems)
    assert any(f"{name}: {table}.{column} differs" in problems for name in names)
    assert "Maud" not in problems and "key_another" not in problems
    desk.run()
    assert desk.holds()


def test_of_a_hundred_responses_those_that_differ_are_named(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def lossy(column: Column) -> Iterator[Stripe]:
        yield from (stripe for stripe in shred(column) if "lost" not in stripe.values)

    for number in range(100):
        # A stripe is lost whole, and a stripe is of 32 responses: the first of these is of one.
        answers = {"code": "lost"} if number == 50 else {"comment": f"text {number}", "score": 3}
        desk.keep({"answers": answers, "version": 1, "created": moment("2026-03-07")})
    broken = desk.db.responses.find_one({"answers.code": "lost"})
    assert broken is not None
    monkeypatch.setattr("quern.analytics.flatten.shred", lossy)
    with pytest.raises(MismatchError) as caught:
        desk.run()
    assert f"{desk.tenant} 2026-03-07: response {broken['_id']}: answer.code differs" in caught.value.report.problems
    desk.db.responses.update_many({}, {"$set": {"answers.code": "lost"}})
    with pytest.raises(MismatchError) as caught:
        desk.run()
    named = [line for line in caught.value.report.problems if "response rsp_" in line]
    assert len(named) == 20
    assert f"{desk.tenant} 2026-03-07: and 80 more" in caught.value.report.problems


def test_a_number_that_is_none_keeps_no_day_from_its_publication(desk: Desk) -> None:
    for value in (nan, inf, -inf, 2.5):
        desk.keep({"answers": {"age": value}, "version": 1, "created": moment("2026-03-07")})
    assert desk.run().outcome == "published"
    assert desk.holds()
    stored = [row["value_number"] for row in desk.rows("fact_answer")]
    assert sorted(map(str, stored)) == ["-inf", "2.5", "inf", "nan"]


def test_a_day_of_which_too_few_were_read_is_seen_though_another_has_too_many(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (3, 3, 9):
        desk.submit(moment(date(2026, 3, number)), {"code": "a"})
    read = SpanReader.responses

    def careless(reader: SpanReader) -> Iterator[Chunk]:
        """Leaves the first out, and gives the last twice: as many as there are."""
        for chunk in read(reader):
            yield Chunk(
                [*chunk.documents[1:], chunk.documents[-1]],
                [*chunk.digests[1:], chunk.digests[-1]],
            )

    monkeypatch.setattr(SpanReader, "responses", careless)
    with pytest.raises(MismatchError) as caught:
        desk.run()
    said = " ".join(caught.value.report.problems)
    assert "2026-03-03: responses: 1 were read, 2 are in MongoDB's index" in said
    assert "2026-03-09: responses: 2 were read, 1 are in MongoDB's index" in said


def test_a_reader_keeps_the_warehouse_that_it_opened(desk: Desk) -> None:
    desk.submit(moment(yesterday()), {"code": "a"})
    desk.run()
    opened = desk.manifest
    desk.submit(moment(yesterday()), {"code": "b"})
    desk.run()
    assert desk.manifest.generation == opened.generation + 1
    (path,) = opened.files("fact_response", desk.tenant)
    assert pq.read_table(path).num_rows == 1


def test_there_is_no_warehouse_before_the_first_run(desk: Desk) -> None:
    with pytest.raises(NoWarehouseError, match="quern etl run"):
        Manifest.load(desk.root / "warehouse")


def test_who_gave_no_address_is_told_from_the_one_who_did(desk: Desk) -> None:
    # DuckDB takes a plain column of one text and NULLs for NULL throughout, so such columns have a dictionary.
    for answers in ({"email": "maud@example.org"}, {"email": "maud@example.org"}, {"code": "a"}):
        desk.submit(moment("2026-03-07"), answers)
    desk.run()
    assert len(desk.rows("fact_response", "respondent IS NULL")) == 1
    assert len(desk.rows("fact_audit", "request_id IS NULL")) == 3
