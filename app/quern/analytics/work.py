"""The unpublished work of a run, kept on disk so that a run that is killed goes on where it was.

`work.json` names the days still to do, the files built so far, and the token up to which the changes are known. The
token is written in one rename with the days that it led to: no change is ever lost or needs to be seen twice.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import orjson

from quern.analytics.manifest import Manifest, Partition, Source, write_atomically

NAME: Final = "work.json"
_FORMAT: Final = 2

TenantDay = tuple[str, date]
Place = tuple[str, str, str]
"""Table, tenant and month."""


@dataclass(frozen=True)
class Span:
    """A tenant's days from `first` to `last`, built together."""

    tenant: str
    first: date
    last: date
    tables: dict[str, Partition]
    """Without those that have no row."""

    @property
    def days(self) -> list[date]:
        return [self.first + timedelta(days=number) for number in range((self.last - self.first).days + 1)]


@dataclass
class Work:
    """What a run has done and has still to do."""

    root: Path
    base: int
    """Generation of the manifest that it starts from; work on another one is void."""
    source: Source
    pending: set[TenantDay] = field(default_factory=set)
    built: dict[TenantDay, Span] = field(default_factory=dict)
    """Days built, each with the span that it is in."""
    merged: dict[Place, Partition | None] = field(default_factory=dict)
    """Months made of days."""
    dimensions: set[str] = field(default_factory=set)
    """Tenants whose dimensions are to be made."""
    said: list[str] = field(default_factory=list)
    """What the operator should know of this run."""

    @classmethod
    def resume(cls, manifest: Manifest) -> "Work":
        """The work that an earlier run left, where it continues this manifest; else new work."""
        try:
            raw = orjson.loads((manifest.root / NAME).read_bytes())
        except (OSError, orjson.JSONDecodeError):
            raw = {}
        if raw.get("format") != _FORMAT or raw.get("base") != manifest.generation:
            return cls(manifest.root, manifest.generation, manifest.source)
        seen = raw["seen"]
        return cls(
            root=manifest.root,
            base=raw["base"],
            source=Source(raw["token"], datetime.fromisoformat(seen) if seen else None),
            pending={_key(item) for item in raw["pending"]},
            built={(span.tenant, day): span for item in raw["built"] for span in [_span(*item)] for day in span.days},
            merged={
                (table, tenant, month): Partition(**made) if made else None
                for table, tenant, month, made in raw["merged"]
            },
            dimensions=set(raw["dimensions"]),
            said=raw["said"],
        )

    def save(self) -> None:
        """Write it down, in one rename."""
        raw: dict[str, Any] = {
            "format": _FORMAT,
            "base": self.base,
            "token": self.source.token,
            "seen": self.source.seen,
            "pending": sorted(self.pending),
            "built": [
                (span.tenant, span.first, span.last, {table: vars(made) for table, made in span.tables.items()})
                for span in self.spans
            ],
            "merged": [(*key, vars(made) if made else None) for key, made in sorted(self.merged.items())],
            "dimensions": sorted(self.dimensions),
            "said": self.said,
        }
        self.root.mkdir(parents=True, exist_ok=True, mode=0o750)
        write_atomically(self.root / NAME, orjson.dumps(raw, option=orjson.OPT_UTC_Z))

    def want(self, days: Iterable[TenantDay]) -> None:
        """Have these days built, again if they were before: they have changed since."""
        for key in days:
            self.pending.add(key)
            span = self.built.get(key)
            if span is not None:
                again = [(span.tenant, day) for day in span.days]
                self.pending.update(again)
                for item in again:
                    self.built.pop(item, None)
            for place in [item for item in self.merged if item[1] == key[0] and key[1].isoformat()[:7] == item[2]]:
                del self.merged[place]

    def done(self, span: Span) -> None:
        """Its days were built and are equal to MongoDB."""
        for day in span.days:
            self.pending.discard((span.tenant, day))
            self.built[span.tenant, day] = span

    @property
    def spans(self) -> list[Span]:
        """What was built, by tenant and day."""
        return [span for (_, day), span in sorted(self.built.items(), key=lambda item: item[0]) if day == span.first]

    @property
    def paths(self) -> set[str]:
        """Files that it needs, beside those of the manifest."""
        days = {made.path for span in self.built.values() for made in span.tables.values()}
        return days | {made.path for made in self.merged.values() if made}

    def forget(self) -> None:
        """It is published."""
        (self.root / NAME).unlink(missing_ok=True)


def _span(tenant: str, first: str, last: str, tables: dict[str, Any]) -> Span:
    made = {table: Partition(**item) for table, item in tables.items()}
    return Span(tenant, date.fromisoformat(first), date.fromisoformat(last), made)


def _key(item: list[Any]) -> TenantDay:
    return item[0], date.fromisoformat(item[1])
