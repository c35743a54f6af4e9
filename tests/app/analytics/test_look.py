"""`quern ask`, `quern sql` and `quern report`: an operator looks at the warehouse without the service."""

import io
import os
import pty
import stat
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from click.testing import CliRunner, Result

from quern.analytics.question import Question
from quern.cli.main import main
from tests.app.analytics import plainly
from tests.app.analytics.desk import RESULTS, Desk, moment
from tests.app.analytics.world import TENANTS, World, publish, world

COST: dict[str, Any] = {"measure": "job_run", "dimensions": ["tenant", "queue"], "statistics": ["count", "sum"]}
AI = {"dimension": "queue", "values": ["batched", "high"]}
UNTIL = "2025-01-02T00:00:00.000Z"


@pytest.fixture
def filled(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> Desk:
    for number in range(3):
        desk.finish(desk.submit(moment("2026-11-05", number), {"sector": "health", "score": 3}), RESULTS)
    desk.run()
    monkeypatch.setenv("QUERN_ANALYTICS__WAREHOUSE", str(desk.settings.warehouse))
    return desk


def _quern(*arguments: str, given: str | None = None) -> Result:
    return CliRunner().invoke(main, list(arguments), input=given, catch_exceptions=False)


def test_sql_names_columns_as_they_are_asked_for(filled: Desk) -> None:
    found = _quern("sql", "SELECT text_length, count(*) FROM fact_response GROUP BY ALL")
    assert found.exit_code == 0
    head, row = found.stdout.splitlines()
    assert head.split() == ["text_length", "count_star()"]
    assert row.split() == ["0", "3"]


def test_sql_takes_its_statement_from_standard_input_and_says_that_there_are_more_rows(filled: Desk) -> None:
    found = _quern("sql", "--rows", "2", given="SELECT response FROM fact_response")
    assert len(found.stdout.splitlines()) == 3
    assert "2 rows; there are more, see --rows" in found.stderr
    as_json = orjson.loads(_quern("sql", "--json", "--rows", "2", "SELECT 1 AS a").stdout)
    assert (as_json["columns"], as_json["rows"], as_json["more"]) == (["a"], [[1]], False)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["DROP VIEW fact_response"], "nothing can be written"),
        (["SELECT * FROM read_text('/etc/passwd')"], "/etc/passwd"),
        (["--seconds", "0.5", "SELECT sum(a.range * b.range) FROM range(10000000) a, range(10000000) b"], "0.5 s"),
        (["--tenant", "ten_none", "SELECT 1"], "`quern tenant list`"),
    ],
)
def test_sql_that_is_refused_says_why(filled: Desk, arguments: list[str], said: str) -> None:
    found = _quern("sql", *arguments)
    assert found.exit_code == 1
    assert said in found.stderr


def test_a_report_is_a_file_that_others_cannot_read(filled: Desk, tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    found = _quern("report", str(target), "--tenant", filled.tenant, "--days", "60")
    assert found.exit_code == 0, found.output
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    made = target.read_text()
    assert made.count("<svg") > 3 and "health" in made


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """Two tenants' house, published."""
    made = world(3)
    publish(made, tmp_path / "warehouse")
    monkeypatch.setenv("QUERN_ANALYTICS__WAREHOUSE", str(tmp_path / "warehouse"))
    # Several threads add up in another order each time.
    monkeypatch.setenv("QUERN_ANALYTICS__SERVICE__THREADS", "1")
    return made


def _asked(asked: dict[str, Any], *arguments: str) -> Result:
    return _quern("ask", orjson.dumps(asked).decode(), *arguments)


def _rows(asked: dict[str, Any], *arguments: str) -> list[list[Any]]:
    found = _asked(asked, "--format", "json", *arguments)
    assert found.exit_code == 0, found.output
    page = orjson.loads(found.stdout)
    assert [column["name"] for column in page["columns"]] == Question.model_validate(asked).columns
    assert page["total_rows"] == len(page["rows"])
    assert page["freshness"]["complete_until"] == "2025-01-02T00:00:00Z"
    rows: list[list[Any]] = page["rows"]
    return rows


@pytest.mark.parametrize("filters", [[], [AI]])
def test_the_operator_asks_what_ai_and_queues_cost_each_tenant(house: World, filters: list[dict[str, Any]]) -> None:
    asked = {**COST, "filters": filters}
    wanted = plainly.answer(Question.model_validate(asked), house, None)
    assert {(row[0], row[1]) for row in wanted} >= {(tenant, queue) for tenant in TENANTS for queue in AI["values"]}
    assert _rows(asked) == [[*row[:3], pytest.approx(row[3])] for row in wanted]


def test_a_tenants_question_sees_its_rows_and_may_not_ask_by_tenant(house: World) -> None:
    asked = {**COST, "dimensions": ["queue"]}
    for tenant in TENANTS:
        wanted = plainly.answer(Question.model_validate(asked), house, tenant)
        assert _rows(asked, "--tenant", tenant) == [[*row[:2], pytest.approx(row[2])] for row in wanted]
    assert "the dimension tenant is the operator's" in _asked(COST, "--tenant", TENANTS[0]).stderr


def test_a_table_ends_after_so_many_rows_and_says_so_and_how_new_it_is(house: World) -> None:
    found = _quern("ask", "-", "--rows", "2", given=orjson.dumps(COST).decode())
    head, *rows = found.stdout.splitlines()
    assert head.split() == ["tenant", "queue", "count", "sum"]
    assert [row.split()[:2] for row in rows] == [row[:2] for row in _rows(COST)[:2]]
    assert f"2 rows; there are more, see --rows; complete until {UNTIL}" in " ".join(found.stderr.split())


@pytest.mark.parametrize("form", ["json", "csv", "parquet", "arrow", "svg", "png"])
def test_every_format_is_printed_or_written_whole(house: World, tmp_path: Path, form: str) -> None:
    target = tmp_path / f"answer.{form}"
    assert _asked(COST, "--format", form, "--output", str(target)).exit_code == 0
    made = target.read_bytes()
    found = _asked(COST, "--format", form)
    assert found.stdout_bytes == made
    assert f"complete until {UNTIL}" in " ".join(found.stderr.split())
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    if form == "svg":
        assert "job run by tenant, queue" in "".join(ElementTree.fromstring(made).itertext())  # noqa: S314
    elif form == "png":
        assert made.startswith(b"\x89PNG\r\n\x1a\n")
    elif form != "json":
        read = {
            "csv": pyarrow.csv.read_csv,
            "parquet": pyarrow.parquet.read_table,
            "arrow": lambda source: pa.ipc.open_stream(source).read_all(),
        }[form]
        assert [list(row.values()) for row in read(io.BytesIO(made)).to_pylist()] == _rows(COST)


def test_no_picture_is_printed_on_a_terminal(house: World) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "quern.cli.main", "ask", '{"measure": "responses"}', "--format", "png"]
    done = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE, timeout=300, check=False)
    os.close(theirs)
    os.close(ours)
    assert done.returncode == 1
    assert b"expected --output FILE or a pipe for png, found a terminal" in done.stderr


@pytest.mark.parametrize(
    ("question", "arguments", "said"),
    [
        ("responses", (), "Invalid JSON"),
        ('{"measure": "reponses"}', (), "measure: Input should be 'responses', 'response_time'"),
        ('{"measure": "reponses"}', (), "found 'reponses'"),
        ('{"measure": "jobs", "dimensions": ["tenants"]}', (), "no such dimension of jobs; there are form, version"),
        ('{"measure": "responses", "dimensions": ["answer.none"]}', (), "no form of yours has a field 'none'"),
        ('{"measure": "responses"}', ("--tenant", "ten_none"), "`quern tenant list`"),
        ('{"measure": "responses"}', ("--output", "answer.txt"), "found a table"),
    ],
)
def test_a_question_that_is_refused_says_why(
    house: World, question: str, arguments: tuple[str, ...], said: str
) -> None:
    found = _quern("ask", question, *arguments)
    assert (found.exit_code, found.stdout) == (1, "")
    assert said in found.stderr


def test_a_report_of_all_tenants_says_what_each_cost(house: World, tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    found = _quern("report", str(target), "--days", "400")
    assert found.exit_code == 0, found.output
    made = target.read_text()
    part = made[made.index("<h2>AI and queues by tenant</h2>") :].split("<h2>")[1]
    assert all(f"<td>{tenant}</td><td>batched</td>" in part for tenant in TENANTS)
