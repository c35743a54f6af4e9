"""`quern logs`: what went wrong, what is slow, what was refused, and everything about one request.

Reads the journal (Quern's own JSON lines) and nginx's logs, the rotated and compressed ones too.
"""

import gzip
import json
import re
import statistics
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click
import orjson

from quern.cli.output import emit, emit_json, fail, json_option
from quern.observe.nginxlog import Finding, Request, finding_of, request_of
from quern.store import clock

NGINX_LOGS = Path("/var/log/nginx")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_FAILURES = frozenset({"error", "critical"})
#: What differs between two messages about the same thing.
_VARIABLE = re.compile(r"\b[a-z]{3}_[0-9A-Za-z]{20,}\b|\b[0-9a-f]{8,}\b|\d+(?:\.\d+)?")

Entry = dict[str, Any]


class Span(click.ParamType[timedelta]):
    """A time in the past: `90s`, `15m`, `6h`, `2d`."""

    name = "span"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        if isinstance(value, timedelta):
            return value
        found = re.fullmatch(r"(\d{1,6})([smhd])", str(value))
        if found is None:
            self.fail(f"expected a number and s, m, h or d, such as 6h; found {value!r}", param, ctx)
        return timedelta(seconds=int(found[1]) * _UNITS[found[2]])


since_option = click.option("--since", type=Span(), default="1h", show_default=True, help="How far back: 90s, 6h, 2d.")
nginx_option = click.option(
    "--nginx-logs",
    type=click.Path(path_type=Path),
    default=NGINX_LOGS,
    show_default=True,
    help="Folder of nginx's logs.",
)
journal_option = click.option(
    "--journal",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    help="Files of JSON lines (also .gz) instead of the journal, such as those of QUERN_LOG_FILE.",
)


@click.group("logs")
def logs_group() -> None:
    """What the logs say."""


@logs_group.command("errors")
@since_option
@journal_option
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True)
@json_option
def errors(since: timedelta, journal: tuple[Path, ...], limit: int, as_json: bool) -> None:
    """The most frequent errors."""
    rows = top_errors(_entries(journal, clock.now() - since))[:limit]
    emit(rows, ["count", "last", "process", "error", "where", "request_id"], as_json, "No errors.")


@logs_group.command("slow")
@since_option
@nginx_option
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True)
@json_option
def slow(since: timedelta, nginx_logs: Path, limit: int, as_json: bool) -> None:
    """The routes whose slowest hundredth is slowest."""
    rows = slow_routes(_requests(nginx_logs, clock.now() - since))[:limit]
    columns = ["route", "requests", "p50_seconds", "p99_seconds", "slowest_seconds", "errors", "request_id"]
    emit(rows, columns, as_json, "No requests.")


@logs_group.command("refused")
@since_option
@nginx_option
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True)
@json_option
def refused(since: timedelta, nginx_logs: Path, limit: int, as_json: bool) -> None:
    """What the firewall found, by rule and place; `docs/waf.md` says what to do about it."""
    begin = clock.now() - since
    answered = {request.request_id: request.status for request in _requests(nginx_logs, begin)}
    rows = top_findings(_findings(nginx_logs, begin), answered)[:limit]
    columns = ["rule", "count", "refused", "place", "path", "message", "request_id"]
    emit(rows, columns, as_json, "The firewall found nothing.")


@logs_group.command("request")
@click.argument("identity")
@click.option("--since", type=Span(), default="7d", show_default=True, help="How far back: 90s, 6h, 2d.")
@nginx_option
@journal_option
@json_option
def request(identity: str, since: timedelta, nginx_logs: Path, journal: tuple[Path, ...], as_json: bool) -> None:
    """Everything about one request (its X-Request-ID), in order: front door, API, jobs, webhooks."""
    begin = clock.now() - since
    rows = [_row(entry) for entry in _entries(journal, begin) if entry.get("request_id") == identity]
    rows += [
        {
            "time": found.time,
            "process": "nginx",
            "level": "info",
            "message": f"{found.method} {found.route} {found.status} in {found.seconds} s",
        }
        for found in _requests(nginx_logs, begin)
        if found.request_id == identity
    ]
    rows += [
        {
            "time": found.time,
            "process": "firewall",
            "level": "warning",
            "message": f"rule {found.rule} at {found.place or 'the whole request'}: {found.message}",
        }
        for found in _findings(nginx_logs, begin)
        if found.request_id == identity
    ]
    rows.sort(key=lambda row: row["time"])
    if as_json:
        emit_json(rows)
    elif rows:
        emit(rows, ["time", "process", "level", "message"], False, "")
    else:
        fail(f"expected a request {identity} in the logs, found none; look further back: --since 14d")


def top_errors(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """Errors by process and what they say (identifiers and numbers left out), most frequent first."""
    groups: dict[tuple[str, ...], list[Entry]] = defaultdict(list)
    for entry in entries:
        if entry.get("level") in _FAILURES:
            message = _VARIABLE.sub("…", str(entry.get("message", "")))
            where = str((entry.get("where") or [""])[-1])
            groups[str(entry.get("process", "")), message, str(entry.get("exception", "")), where].append(entry)
    rows = [
        {
            "count": len(found),
            "last": max(entry["time"] for entry in found),
            "process": process,
            "error": f"{exception}: {message}" if exception else message,
            "where": where,
            "request_id": next((entry["request_id"] for entry in reversed(found) if entry.get("request_id")), None),
        }
        for (process, message, exception, where), found in groups.items()
    ]
    return sorted(rows, key=lambda row: (-row["count"], row["process"], row["error"]))


def slow_routes(requests: Iterable[Request]) -> list[dict[str, Any]]:
    """Routes by the time that their slowest hundredth takes, longest first. Event streams, which wait, are left out."""
    groups: dict[str, list[Request]] = defaultdict(list)
    for one in requests:
        if not one.route.endswith("/events"):
            groups[f"{one.method} {one.route}"].append(one)
    rows = []
    for route, found in groups.items():
        times = sorted(item.seconds for item in found)
        slowest = max(found, key=lambda item: item.seconds)
        rows.append(
            {
                "route": route,
                "requests": len(found),
                "p50_seconds": round(statistics.median(times), 3),
                "p99_seconds": times[min(len(times) - 1, int(len(times) * 0.99))],
                "slowest_seconds": slowest.seconds,
                "errors": sum(item.status >= 500 for item in found),
                "request_id": slowest.request_id,
            }
        )
    return sorted(rows, key=lambda row: (-row["p99_seconds"], row["route"]))


def top_findings(findings: Iterable[Finding], answered: dict[str, int]) -> list[dict[str, Any]]:
    """The firewall's findings by rule and place, most frequent first; `answered` gives each request's status."""
    groups: dict[tuple[str, str, str], list[Finding]] = defaultdict(list)
    for one in findings:
        # It only adds up what other rules found.
        if one.rule != "949110":
            groups[one.rule, one.place, one.path].append(one)
    rows = [
        {
            "rule": rule,
            "count": len(found),
            "refused": sum(answered.get(item.request_id) in {400, 403, 415} for item in found),
            "place": place,
            "path": path,
            "message": found[0].message,
            "request_id": found[-1].request_id,
        }
        for (rule, place, path), found in groups.items()
    ]
    return sorted(rows, key=lambda row: (-row["refused"], -row["count"], row["rule"], row["path"]))


def _row(entry: Entry) -> dict[str, Any]:
    known = {"time", "process", "level", "message", "logger", "request_id", "where"}
    extra = " ".join(f"{name}={value}" for name, value in entry.items() if name not in known)
    message = f"{entry.get('message', '')} {extra}".strip()
    return {"time": entry["time"], "process": entry.get("process"), "level": entry.get("level"), "message": message}


def _entries(files: tuple[Path, ...], begin: datetime) -> Iterator[Entry]:
    """Quern's own log entries since `begin`, from files or the journal; what is no entry is passed over."""
    lines = (line for path in files for line in _lines(path)) if files else _journal(begin)
    for line in lines:
        try:
            entry = orjson.loads(line)
            entry["time"] = datetime.fromisoformat(entry["time"]).astimezone(UTC)
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
            continue
        if entry["time"] >= begin:
            yield entry


def _journal(begin: datetime) -> Iterator[str]:
    command = ["journalctl", "--quiet", "--output=json", "--output-fields=MESSAGE", "--unit=quern-*"]
    try:
        with subprocess.Popen(
            [*command, f"--since=@{begin.timestamp():.0f}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None and process.stderr is not None  # noqa: S101 - both are pipes
            for line in process.stdout:
                # What is not text comes as a list of bytes; ours is text.
                message = json.loads(line).get("MESSAGE")
                if isinstance(message, str):
                    yield message
            said = process.stderr.read().strip()
    except FileNotFoundError:
        fail("expected journalctl, found none; name files by --journal")
    if process.returncode:
        fail(f"expected to read the journal, found: {said or process.returncode}; run it as root")


def _requests(folder: Path, begin: datetime) -> Iterator[Request]:
    for line in _rotated(folder, "access.log", begin):
        found = request_of(line)
        if found is not None and found.time >= begin:
            yield found


def _findings(folder: Path, begin: datetime) -> Iterator[Finding]:
    for line in _rotated(folder, "waf.log", begin):
        found = finding_of(line)
        # Its times have whole seconds.
        if found is not None and found.time >= begin - timedelta(seconds=1):
            yield found


def _rotated(folder: Path, name: str, begin: datetime) -> Iterator[str]:
    """The lines of a log and of what was rotated out of it since `begin`, oldest file first."""
    try:
        found = [(path.stat().st_mtime, path) for path in folder.glob(f"{name}*")]
    except OSError as error:
        fail(f"{folder}: expected nginx's logs, found {type(error).__name__}; run it as root, or give --nginx-logs")
    if not found:
        fail(f"{folder}: expected {name}, found none; give --nginx-logs")
    for changed, path in sorted(found):
        if changed >= begin.timestamp():
            yield from _lines(path)


def _lines(path: Path) -> Iterator[str]:
    if path.suffix == ".gz":
        with gzip.open(path, "rt", errors="replace") as packed:
            yield from packed
        return
    with path.open(errors="replace") as plain:
        yield from plain
