"""`quern logs`, on files as the processes and nginx write them."""

import gzip
import json
import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from quern.cli.main import main
from quern.observe.logs import JsonFormatter, request_id

Logs = Callable[..., Any]
FORM = "frm_0123456789ABCDEFGHJKMNPQRS"
NOW = datetime.now(UTC)


def ask(*words: str | Path) -> Any:
    result = CliRunner().invoke(main, ["logs", *map(str, words), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def access(path: str, status: int, seconds: float, identity: str, ago: timedelta = timedelta(0)) -> str:
    time = (NOW - ago).isoformat(timespec="seconds")
    entry = {"time": time, "process": "nginx", "method": "GET", "path": path, "status": status, "seconds": seconds}
    return json.dumps({**entry, "request_id": identity}) + "\n"


def finding(rule: str, identity: str) -> str:
    time = NOW.astimezone().strftime("%Y/%m/%d %H:%M:%S")
    return (
        f"{time} [info] 7#7: *9 ModSecurity: Warning. Matched \"Operator `Rx' with parameter `x' against variable "
        f'`ARGS:json.answers.comment\' (Value: `a person\'s words\' ) [file "/x"] [line "1"] [id "{rule}"] '
        f'[msg "A rule"] [data "Matched Data: a person\'s words found within ARGS:json.answers.comment: a person\'s '
        f'words"] [uri "/api/v1/forms/{FORM}/responses"] [unique_id "{identity}"] [ref ""], client: 192.0.2.1\n'
    )


@pytest.fixture
def nginx(tmp_path: Path) -> Path:
    """Today's log, and yesterday's as logrotate leaves it."""
    (tmp_path / "access.log").write_text(
        access(f"/api/v1/forms/{FORM}", 200, 0.02, "r1")
        + access(f"/api/v1/forms/{FORM[:-1]}T", 502, 3.5, "r2")
        + access("/healthz", 200, 0.001, "r3")
        + access("/api/v1/jobs/job_1/events", 200, 900.0, "r4")
        + '{"cut off'
    )
    with gzip.open(tmp_path / "access.log-20260101-1.gz", "wt") as rotated:
        rotated.write(access("/healthz", 500, 9.0, "r5", timedelta(hours=20)))
    (tmp_path / "waf.log").write_text(finding("942100", "r6") + finding("949110", "r6") + "nothing of ours\n")
    return tmp_path


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """What a process writes to its standard error."""
    formatter = JsonFormatter("worker-low")
    lines = []
    for number in range(3):
        token = request_id.set(f"r{number}")
        record = logging.LogRecord(
            "quern", logging.ERROR, "", 0, f"job job_{number:026d} failed in {number} s", (), None
        )
        lines.append(formatter.format(record))
        request_id.reset(token)
    lines.append(formatter.format(logging.LogRecord("quern", logging.WARNING, "", 0, "no error", (), None)))
    path = tmp_path / "quern.log"
    path.write_text("\n".join([*lines, "no JSON"]) + "\n")
    return path


def test_errors_that_differ_in_identifiers_only_are_one(journal: Path) -> None:
    (row,) = ask("errors", "--journal", journal)
    assert (row["count"], row["process"], row["error"]) == (3, "worker-low", "job … failed in … s")
    assert row["request_id"] == "r2"


def test_routes_are_told_without_identifiers_slowest_first(nginx: Path) -> None:
    first, second = ask("slow", "--nginx-logs", nginx)
    assert (first["route"], first["requests"], first["errors"]) == ("GET /api/v1/forms/{id}", 2, 1)
    assert (first["p99_seconds"], first["request_id"]) == (3.5, "r2")
    assert second["route"] == "GET /healthz"


def test_rotated_logs_count_as_far_back_as_asked(nginx: Path) -> None:
    routes = {row["route"]: row for row in ask("slow", "--nginx-logs", nginx, "--since", "2d")}
    assert routes["GET /healthz"]["requests"] == 2
    assert routes["GET /healthz"]["slowest_seconds"] == 9.0


def test_what_the_firewall_found_is_told_without_what_was_written(nginx: Path) -> None:
    (row,) = found = ask("refused", "--nginx-logs", nginx)
    assert (row["rule"], row["place"], row["request_id"]) == ("942100", "json.answers.comment", "r6")
    assert "words" not in json.dumps(found)


def test_one_request_is_told_from_the_door_to_the_worker(nginx: Path, journal: Path) -> None:
    rows = ask("request", "r2", "--nginx-logs", nginx, "--journal", journal)
    assert sorted(row["process"] for row in rows) == ["nginx", "worker-low"]
    (refused, *_) = ask("request", "r6", "--nginx-logs", nginx, "--journal", journal)
    assert refused["message"].startswith("rule 942100 at json.answers.comment")


@pytest.mark.parametrize("span", ["", "1", "h", "1w", "-1h"])
def test_a_span_that_is_none_is_refused_with_an_example(span: str) -> None:
    result = CliRunner().invoke(main, ["logs", "slow", "--since", span])
    assert result.exit_code == 2
    assert "6h" in result.output


def test_a_missing_log_is_said_with_what_to_give(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["logs", "slow", "--nginx-logs", str(tmp_path)])
    assert result.exit_code == 1
    assert "expected access.log, found none; give --nginx-logs" in result.output
