"""`quern etl`: fill the warehouse, see how far it is, compare it with MongoDB, make it anew."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import date, datetime, timedelta
from functools import cache
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

import click
import orjson
from pymongo.errors import PyMongoError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from quern.analytics.handler import BUSY, MISMATCH
from quern.cli.output import emit, emit_json, fail, json_option
from quern.cli.runtime import open_runtime
from quern.config import LiveSettings
from quern.store.connection import Db, Store, is_away

# The warehouse's libraries are large: only a command that needs them loads them, not every process.
if TYPE_CHECKING:
    from quern.analytics.etl import Etl, Progress, Range, Report


class _Day(click.ParamType[date]):
    name = "day"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> date:
        try:
            return date.fromisoformat(value)
        except ValueError:
            self.fail(f"expected a day as YYYY-MM-DD, found {value!r}", param, ctx)


def _in_order(since: date | None, until: date | None) -> None:
    """Raises click.UsageError: there is no day from `since` to before `until`."""
    if since is not None and until is not None and since >= until:
        raise click.UsageError(f"expected --since to be before --until, found {since} and {until}")


class _StoppedError(Exception):
    """SIGINT or SIGTERM: what is built stays for the next run."""


@click.group("etl")
def etl_group() -> None:
    """Analytics: from MongoDB to the warehouse."""


@contextmanager
def _stoppable() -> Iterator[Callable[[], None]]:
    """Gives the function to call now and then: it raises once somebody has asked to stop."""
    asked: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        asked.append(number)

    def check() -> None:
        if asked:
            raise _StoppedError

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _bar(as_json: bool) -> Iterator[Callable[[int, int, str], None]]:
    """Progress on standard error, where a person looks at it."""
    if as_json or not sys.stderr.isatty():
        yield lambda done, total, text: None
        return
    columns = (
        SpinnerColumn(),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading the change stream", total=None)
        yield lambda done, total, text: bar.update(task, completed=done, total=total, description=text)


@cache
def _db() -> Db:
    """MongoDB as the ETL's own account, where it has one."""
    runtime = open_runtime()
    if (uri := runtime.settings.etl_mongodb_uri) is None:
        return runtime.store.db
    return Store(LiveSettings(runtime.settings.model_copy(update={"mongodb_uri": uri}))).db


def _make(pause: Callable[[], None], show: Callable[[int, int, str], None]) -> "Etl":
    # Read as Arrow is loaded: its writers, too, take their memory from the C library, which alone gives it back.
    os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"
    from quern.analytics.etl import Etl, NotConfiguredError, keep_freed_memory

    keep_freed_memory()
    runtime = open_runtime()

    def progress(at: "Progress") -> None:
        show(at.done, at.total, f"{at.documents} documents, {at.at}")

    try:
        return Etl(
            _db(),
            runtime.settings.analytics,
            jobs_kept=timedelta(days=runtime.settings.job.keep_ended_days),
            pause=pause,
            progress=progress,
        )
    except NotConfiguredError as error:
        fail(str(error))


def _root() -> Path:
    root = open_runtime().settings.analytics.warehouse
    if root is None:
        fail("expected a folder for the warehouse, found none; set QUERN_ANALYTICS__WAREHOUSE")
    return root


def _say(report: "Report", as_json: bool) -> None:
    if as_json:
        emit_json(asdict(report))
        return
    rate = round(report.documents / report.seconds) if report.seconds else 0
    click.echo(
        f"{report.outcome}: {report.days} days, {report.documents} documents in {report.seconds:.1f} s"
        f" ({rate}/s); generation {report.generation}"
    )
    for line in [*report.said, *report.problems]:
        click.echo(f"  {line}")


@contextmanager
def _explained() -> Iterator[None]:
    """What can go wrong with a run, as the exit status that the nightly job knows."""
    from quern.analytics.etl import BusyError
    from quern.analytics.follow import TokenLostError
    from quern.analytics.manifest import NoWarehouseError
    from quern.analytics.source import UnknownTenantError
    from quern.analytics.warehouse import MergeError

    try:
        yield
    except BusyError as error:
        click.echo(str(error), err=True)
        raise SystemExit(BUSY) from None
    except _StoppedError:
        click.echo("stopped; the next run goes on from there", err=True)
        raise SystemExit(130) from None
    except (NoWarehouseError, TokenLostError, MergeError, UnknownTenantError) as error:
        fail(str(error))


def _once(asked: "Range | None", everything: bool, as_json: bool) -> None:
    from quern.analytics.etl import MismatchError

    with _explained(), _stoppable() as pause, _bar(as_json) as show:
        try:
            report = _make(pause, show).run(asked, everything=everything)
        except MismatchError as error:
            _say(error.report, as_json)
            click.echo("nothing was published; the warehouse is as it was", err=True)
            raise SystemExit(MISMATCH) from None
    _say(report, as_json)


@etl_group.command("run")
@click.option("--since", type=_Day(), help="Rewrite the days from this one on (UTC), changed or not.")
@click.option("--until", type=_Day(), help="… before this one.")
@click.option("--tenant", "tenant_id", help="… of this tenant only.")
@click.option("--follow", is_flag=True, help="Go on: a run every QUERN_ANALYTICS__FOLLOW_SECONDS, until interrupted.")
@json_option
def run(since: date | None, until: date | None, tenant_id: str | None, follow: bool, as_json: bool) -> None:
    """Bring the warehouse up to now: what has changed since the last run, and the days asked for.

    Exit status 3: what was built differs from MongoDB, nothing was published. 75: another run is at it.
    """
    from quern.analytics.etl import Range

    _in_order(since, until)
    asked = Range(since, until, tenant_id) if since or until or tenant_id else None
    if not follow:
        _once(asked, False, as_json)
        return
    with _explained(), _stoppable() as pause:
        etl = _make(pause, lambda done, total, text: None)
        try:
            _follow(etl, asked, pause, as_json)
        except _StoppedError:
            # That is how it ends.
            return


def _follow(etl: "Etl", asked: "Range | None", pause: Callable[[], None], as_json: bool) -> None:
    """Run after run, until `pause` raises. What a run could not do the next one does."""
    from quern.analytics.etl import BusyError, MismatchError

    seconds = open_runtime().settings.analytics.follow_seconds
    while True:
        try:
            report = etl.run(asked)
        except BusyError:
            pass
        except MismatchError as error:
            _say(error.report, as_json)
        except PyMongoError as error:
            if not is_away(error):
                raise
            click.echo(f"MongoDB is away ({type(error).__name__}); trying again", err=True)
        else:
            asked = None
            if report.outcome != "unchanged":
                _say(report, as_json)
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            pause()
            time.sleep(min(0.2, seconds))


@etl_group.command("rebuild")
@json_option
def rebuild(as_json: bool) -> None:
    """Make every day of every tenant anew from MongoDB. Readers keep the old warehouse until the new one is whole."""
    _once(None, True, as_json)


@etl_group.command("prune")
@json_option
def prune(as_json: bool) -> None:
    """Delete replaced files that no reader can need any more."""
    with _explained(), _stoppable() as pause:
        deleted = _make(pause, lambda done, total, text: None).prune()
    if as_json:
        emit_json({"deleted_files": deleted})
    else:
        click.echo(f"{deleted} files deleted.")


@etl_group.command("status")
@json_option
def status(as_json: bool) -> None:
    """How fresh the warehouse is, what is in it, and how the last run ended."""
    from quern.analytics.manifest import Manifest, NoWarehouseError, last_report

    root = _root()
    report = last_report(root)
    try:
        manifest = Manifest.load(root)
    except NoWarehouseError as error:
        if report is None or as_json:
            fail(str(error))
        manifest = Manifest(root)
    rows = [
        {
            "table": table,
            "tenants": len(tenants),
            "files": sum(len(items) for items in tenants.values()),
            "rows": sum(item.rows for items in tenants.values() for item in items),
            "bytes": sum(item.bytes for items in tenants.values() for item in items),
        }
        for table, tenants in sorted(manifest.tables.items())
    ]
    facts = {
        "generation": manifest.generation,
        "published_at": manifest.published_at,
        "freshness": manifest.freshness,
        "replaced_files": len(manifest.retired),
    }
    if as_json:
        emit_json({**facts, "tables": rows, "last_run": report})
        return
    emit([facts], list(facts), False, "")
    emit(rows, ["table", "tenants", "files", "rows", "bytes"], False, "No tables.")
    if report:
        shown = {name: report[name] for name in ("outcome", "started", "seconds", "days", "documents", "events")}
        shown["started"] = datetime.fromisoformat(shown["started"])
        emit([shown], list(shown), False, "")
        for line in [*report["said"], *report["problems"]]:
            click.echo(f"  {line}")


@etl_group.command("verify")
@click.option("--since", type=_Day(), help="Only the days from this one on (UTC).")
@click.option("--until", type=_Day(), help="Only the days before this one.")
@click.option("--tenant", "tenant_id", help="Only this tenant's.")
@click.option("--figures", type=click.File("w"), help="Write what was compared, as JSON, into this file.")
@json_option
def verify(
    since: date | None, until: date | None, tenant_id: str | None, figures: TextIO | None, as_json: bool
) -> None:
    """Compare the published warehouse and extract with MongoDB: counts, hashes, sums, some documents field by field.

    Exit status 3: they differ; the rows, and files of the extract, are named.
    """
    from quern.analytics import integrity
    from quern.analytics.manifest import Manifest

    _in_order(since, until)
    manifest_root = _root()
    with _explained(), _bar(as_json) as show:
        found = integrity.verify(
            _db(),
            Manifest.load(manifest_root),
            since=since,
            until=until,
            tenant=tenant_id,
            extracts=open_runtime().settings.analytics.extract,
            progress=lambda done, total: show(done, total, "days"),
        )
    if figures is not None:
        figures.write(orjson.dumps({"days": found.figures, "missing_files": found.missing_files}).decode())
    facts = {name: value for name, value in asdict(found).items() if name != "figures"}
    if as_json:
        emit_json({"holds": found.holds, **facts})
    else:
        click.echo(
            f"{found.days} days with {found.responses} responses and {found.audit} audit entries compared, "
            f"{found.changed_since} changed since the publication: "
            + ("equal." if found.holds else f"{len(found.findings)} days differ.")
        )
        for line in found.missing_files:
            click.echo(f"  {line}")
        for finding in found.findings:
            for problem in finding.problems:
                click.echo(f"  {finding.tenant} {finding.day}: {problem}")
    if not found.holds:
        raise SystemExit(MISMATCH)
