"""Ad-hoc SQL: each statement in a process of its own, which the kernel lets read one tenant's files and nothing else.

The process lives for one statement. It is confined before it sees a letter of it (`confine`): Landlock lets it read
exactly the files that the manifest gives that tenant, seccomp leaves no socket, no program and no other process, and
resource limits bound memory and time. DuckDB's own settings are a second wall, not the first.
"""

import math
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson

from quern.analytics.confine import CONFINED
from quern.analytics.duckdb_engine import DuckDbDialect
from quern.analytics.manifest import Manifest
from quern.analytics.schema import TABLES

_MOST_ANSWER_BYTES: Final = 64 << 20
_FILES_BESIDES: Final = 64
_PACKAGES: Final = Path(__file__).resolve().parents[2]


class SqlError(Exception):
    """The statement failed, or may not be run; the text is for whoever wrote it."""


class SandboxError(Exception):
    """There is no sandbox to be had on this machine; nothing was run."""


@dataclass(frozen=True)
class Limits:
    """What one statement may use. Memory is the engine's; as much again is left for what it does not count.

    `seconds`, by the clock, begin when the process is confined; until then it has `start_seconds`.
    """

    seconds: float = 30.0
    memory_megabytes: int = 512
    rows: int = 10_000
    start_seconds: float = 20.0


@dataclass(frozen=True)
class Rows:
    """What a statement gave. `types` are DuckDB's names; `more`: there were more rows than the limit."""

    columns: list[str]
    types: list[str]
    rows: list[list[Any]]
    more: bool


def files_of(manifest: Manifest, tenants: Sequence[str]) -> dict[str, list[Path]]:
    """Table to the files of these tenants: all that a statement can read."""
    return {
        name: [file for tenant in (tenants[:1] if table.shared else tenants) for file in manifest.files(name, tenant)]
        for name, table in TABLES.items()
    }


def run(sql: str, manifest: Manifest, tenants: Sequence[str], limits: Limits = Limits(), *, check: bool = True) -> Rows:
    """Run one SELECT over the rows of some tenants: the tables of the warehouse, by their names.

    Args:
        check: False leaves DuckDB's own walls out (any statement, no locked settings), so that tests meet the kernel's.

    Raises:
        SqlError: it is no SELECT, it failed, or it took more time or memory than it may.
        SandboxError: this machine cannot confine a process.
    """
    tables, dialect = files_of(manifest, tenants), DuckDbDialect()
    views = [
        f"CREATE VIEW {name} AS SELECT * FROM {dialect.scan(TABLES[name], files)}" for name, files in tables.items()
    ]
    readable = [str(file) for listed in tables.values() for file in listed]
    order = {
        "files": readable,
        "views": views,
        "tables": [*sorted(tables), "wide_<form>_<version>"],
        "memory_megabytes": limits.memory_megabytes,
        "rows": limits.rows,
        # The parent's clock comes first; this one ends the process where the parent is gone.
        "cpu_seconds": math.ceil(limits.seconds) + 1,
        "open_files": len(readable) + _FILES_BESIDES,
        "check": check,
    }
    answer = _converse(orjson.dumps(order) + b"\n" + sql.encode(), limits)
    try:
        outcome: dict[str, Any] = orjson.loads(answer)
    except orjson.JSONDecodeError:
        memory = limits.memory_megabytes
        raise SqlError(f"the statement's process ended early: it may use {memory} MB of memory") from None
    if not outcome["ok"]:
        raise (SandboxError if outcome["kind"] == "confinement" else SqlError)(outcome["text"])
    return Rows(outcome["columns"], outcome["types"], outcome["rows"], outcome["more"])


def _converse(request: bytes, limits: Limits) -> bytes:
    """Start a process, give it `request`, return what it wrote; kill it when it takes too long or writes too much."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-s", "-m", "quern.analytics.sandbox_child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=Path("/"),
        env={
            "LC_ALL": "C.UTF-8",
            "TZ": "UTC",
            # Every thread's own arena would take 64 MB of the address space.
            "MALLOC_ARENA_MAX": "2",
            # A release lies beside its environment, not in it.
            "PYTHONPATH": str(_PACKAGES),
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        start_new_session=True,
    )
    if process.stdin is None or process.stdout is None:
        raise SandboxError("the process has no pipes")
    stdin = process.stdin
    with process.stdout as stdout:
        try:
            with _killed_after(limits.start_seconds, process) as slow:
                # Where it ended already, what it said about that is read below.
                with suppress(BrokenPipeError), stdin:
                    stdin.write(request)
                confined = stdout.read(len(CONFINED))
            with _killed_after(limits.seconds, process) as late:
                answer = stdout.read(_MOST_ANSWER_BYTES + 1)
        finally:
            process.kill()
            process.wait()
    if slow.is_set():
        raise SandboxError(f"expected a confined process within {limits.start_seconds:g} s, found none")
    if len(answer) > _MOST_ANSWER_BYTES:
        raise SqlError(f"expected an answer of at most {_MOST_ANSWER_BYTES >> 20} MB, found more; ask for fewer rows")
    if late.is_set():
        raise SqlError(f"expected an answer within {limits.seconds:g} s, found none")
    return answer if confined == CONFINED else confined + answer


@contextmanager
def _killed_after(seconds: float, process: "subprocess.Popen[bytes]") -> Iterator[threading.Event]:
    """Kill the process unless the block ends in time; the event says whether it came to that."""
    due = threading.Event()

    def kill() -> None:
        due.set()
        process.kill()

    timer = threading.Timer(seconds, kill)
    timer.daemon = True
    timer.start()
    try:
        yield due
    finally:
        timer.cancel()
