"""The warehouse's directory, and the manifest that says which files are the warehouse.

    manifest.json                                                 swapped by rename at publication
    report.json                                                   what the last run did, swapped likewise
    tenants/<tenant>/<table>/<period>.<generation>-<random>.parquet   a tenant's rows of a table; the period is
                                                                  a day (2026-11-22), a month (2026-10) or `all`
    tenants/shared/<table>/all.<generation>-<random>.parquet      what is the same for every tenant (dim_time)

A file is never changed and its path never used again: DuckDB keeps serving the old file of a path to a process that has
it open. What a publication replaces stays on disk for a while (`retired`), so a reader that loaded the manifest before
reads on undisturbed. The tenant is the first level: a tenant's warehouse is a set of paths, whatever the question.
"""

import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import orjson

from quern.analytics.schema import TABLES

NAME: Final = "manifest.json"
#: What the last run did.
REPORT: Final = "report.json"
SHARED: Final = "shared"
ALL: Final = "all"
_FORMAT: Final = 3


class NoWarehouseError(Exception):
    """There is no warehouse to read, or not one that this version knows; the text says what to run."""


class OtherFormatError(NoWarehouseError):
    """The warehouse is of another version; the next run makes it anew."""


@dataclass(frozen=True)
class Partition:
    """One Parquet file: a table's rows of one tenant in one period."""

    path: str
    """Relative to the warehouse's directory."""
    period: str
    rows: int
    bytes: int
    hash: str
    """BLAKE2b-128 of the file, hex."""
    explained: bool = True
    """Of `fact_response`: every value was what its form's version says, so the promoted columns hold all of theirs."""
    unsettled: bool = False
    """Of `fact_job`: there may be jobs that had not ended and whose end changes no response. The next run looks."""

    @property
    def days(self) -> tuple[date, date]:
        """First day, and the day after the last. Of `all`: every day."""
        if self.period == ALL:
            return date.min, date.max
        if is_month(self.period):
            first = date.fromisoformat(f"{self.period}-01")
            return first, (first + timedelta(days=31)).replace(day=1)
        # A span of days is never published: only the work in progress knows it.
        start, _, end = self.period.partition("_")
        return date.fromisoformat(start), date.fromisoformat(end or start) + timedelta(days=1)


@dataclass(frozen=True)
class Retired:
    """A file that no manifest names any more since `at`."""

    path: str
    at: datetime


@dataclass(frozen=True)
class Source:
    """How far MongoDB has been followed: what the next run goes on from."""

    token: dict[str, Any] | None = None
    """Resume token of the change stream; None before the first run."""
    seen: datetime | None = None
    """Every change that was durable by then is in the warehouse."""


@dataclass(frozen=True)
class Manifest:
    """A published warehouse, whole and unchanging: load it again to see a newer one."""

    root: Path
    generation: int = 0
    published_at: datetime | None = None
    """When it was published."""
    freshness: datetime | None = None
    """Every response accepted before this moment is in it."""
    tables: dict[str, dict[str, tuple[Partition, ...]]] = field(default_factory=dict)
    """Table to tenant to partitions, in order of time, without overlap."""
    retired: tuple[Retired, ...] = ()
    source: Source = Source()

    @classmethod
    def load(cls, root: Path) -> "Manifest":
        """The warehouse as of its last publication.

        Raises:
            NoWarehouseError: nothing was published here yet, or by another version.
        """
        try:
            raw = orjson.loads((root / NAME).read_bytes())
        except FileNotFoundError:
            raise NoWarehouseError(f"expected a warehouse in {root}, found none; run `quern etl run`") from None
        except (OSError, orjson.JSONDecodeError) as error:
            raise NoWarehouseError(
                f"expected a readable {root / NAME}, found {type(error).__name__}; run `quern etl rebuild`"
            ) from None
        if raw.get("format") != _FORMAT:
            raise OtherFormatError(
                f"expected a warehouse of format {_FORMAT}, found {raw.get('format')}; run `quern etl run`"
            )
        return cls.of(root, raw)

    @classmethod
    def of(cls, root: Path, raw: dict[str, Any]) -> "Manifest":
        """From its JSON, see `raw`."""
        tables = {
            table: {tenant: tuple(Partition(**item) for item in items) for tenant, items in tenants.items()}
            for table, tenants in raw["tables"].items()
        }
        retired = tuple(Retired(item["path"], datetime.fromisoformat(item["at"])) for item in raw["retired"])
        seen = raw["source"]["seen"]
        source = Source(raw["source"]["token"], datetime.fromisoformat(seen) if seen else None)
        published, freshness = (
            datetime.fromisoformat(raw[name]) if raw[name] else None for name in ("published_at", "freshness")
        )
        return cls(root, raw["generation"], published, freshness, tables, retired, source)

    @property
    def tenants(self) -> list[str]:
        """Every tenant with at least one row, sorted."""
        return sorted({tenant for tenants in self.tables.values() for tenant in tenants} - {SHARED})

    def partitions(
        self, table: str, tenant: str, since: date | None = None, until: date | None = None
    ) -> list[Partition]:
        """Partitions of `tenant` with rows of days in [since, until), in order of time. A month's may hold more days.

        Raises:
            KeyError: there is no such table.
        """
        known = TABLES[table]
        found = self.tables.get(table, {}).get(SHARED if known.shared else tenant, ())
        low, high = since or date.min, until or date.max
        return [item for item in found if item.days[0] < high and item.days[1] > low]

    def files(self, table: str, tenant: str, since: date | None = None, until: date | None = None) -> list[Path]:
        """Absolute paths of `partitions`: filter by `day` as well, since a month's file holds the whole month."""
        return [self.root / item.path for item in self.partitions(table, tenant, since, until)]

    def with_partitions(self, table: str, tenant: str, partitions: Iterable[Partition]) -> "Manifest":
        """The same warehouse with these as the tenant's partitions of a table."""
        listed = tuple(sorted(partitions, key=lambda item: item.days))
        tenants = {**self.tables.get(table, {})}
        if listed:
            tenants[tenant] = listed
        else:
            tenants.pop(tenant, None)
        return replace(self, tables={**self.tables, table: tenants})

    @property
    def paths(self) -> set[str]:
        """Every file that it names."""
        return {item.path for tenants in self.tables.values() for items in tenants.values() for item in items}

    def publish(self, *, keep: timedelta, freshness: datetime, source: Source, at: datetime) -> "Manifest":
        """Make this the warehouse, in one rename; returns it as published.

        As the next generation, unless it names the same files: then only the moments are newer.
        Its new files are flushed to the disk first: after a power cut no manifest names what is not there.
        Files that the manifest on disk names and this one does not are retired; those retired longer than `keep` ago
        are struck from the list (`warehouse.prune` deletes what is on no list).
        """
        before = load_or_empty(self.root)
        gone = dict.fromkeys(before.paths - self.paths, at)
        held = {item.path: item.at for item in before.retired if item.at > at - keep}
        retired = tuple(Retired(path, when) for path, when in sorted({**gone, **held}.items()))
        made = replace(
            self,
            generation=before.generation + (self.paths != before.paths or not before.generation),
            published_at=at,
            freshness=freshness,
            retired=retired,
            source=source,
        )
        _flush(self.root, self.paths - before.paths)
        made._write()
        return made

    def raw(self) -> dict[str, Any]:
        """As the manifest's JSON; `of` reads it again."""
        return {
            "format": _FORMAT,
            "generation": self.generation,
            "published_at": self.published_at,
            "freshness": self.freshness,
            "source": {"token": self.source.token, "seen": self.source.seen},
            "retired": [{"path": item.path, "at": item.at} for item in self.retired],
            "tables": {
                table: {tenant: [vars(item) for item in items] for tenant, items in tenants.items()}
                for table, tenants in self.tables.items()
            },
        }

    def _write(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True, mode=0o750)
        write_atomically(self.root / NAME, orjson.dumps(self.raw(), option=orjson.OPT_UTC_Z))


def last_report(root: Path) -> dict[str, Any] | None:
    """What the last run said, or None before the first."""
    try:
        found: dict[str, Any] = orjson.loads((root / REPORT).read_bytes())
    except FileNotFoundError:
        return None
    return found


def load_or_empty(root: Path) -> Manifest:
    """The published warehouse, or one without a row where nothing was published yet."""
    if not (root / NAME).exists():
        return Manifest(root)
    return Manifest.load(root)


def _flush(root: Path, paths: Iterable[str]) -> None:
    directories = set()
    for path in paths:
        handle = os.open(root / path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        directories |= {root / parent for parent in Path(path).parents}
    for directory in directories:
        sync_directory(directory)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file: whoever reads sees the old or the new, also after a power cut."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), 0o640)
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make renames and new names in a directory survive a power cut."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def day_of(moment: datetime) -> date:
    """The UTC day of a moment."""
    return moment.astimezone(UTC).date()


def is_month(period: str) -> bool:
    """Whether a partition's period is a month."""
    return len(period) == len("2026-11")


def safe(tenant: str) -> str:
    """A tenant's identifier as a folder's name: what could be anything else than a name is spelled out."""
    return "".join(
        character if character.isascii() and (character.isalnum() or character in "_-") else f"%{ord(character):x}"
        for character in tenant
    )
