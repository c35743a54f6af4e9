"""`quern sql` and `quern report`: an operator looks at the warehouse without the service."""

import stat
from pathlib import Path

import orjson
import pytest
from click.testing import CliRunner, Result

from quern.cli.main import main
from tests.app.analytics.desk import RESULTS, Desk, moment


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
