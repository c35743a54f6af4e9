"""The unpublished work of a run, kept on disk so that a run that is killed goes on where it was.

`work.json` names the days still to do, the files built so far, and the token up to which the changes are known. The
token is written in one rename with the days that it led to: no change is ever lost or needs to be seen twice.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import date, datetime
from pathlib import Path
from typing import Any, Final

import orjson

from quern.analytics.manifest import Manifest, Partition, Source, write_atomically

NAME: Final = "work.json"
_FORMAT: Final = 1

TenantDay = tuple[str, date]
Place = tuple[str, str, str]
"""Table, tenant and month."""


@dataclass
class Work:
    """What a run has done and has still to do."""

    root: Path
    base: int
    """Generation of the manifest that it starts from; work on another one is void."""
    source: Source
    pending: set[TenantDay] = field(default_factory=set)
    built: dict[TenantDay, dict[str, Partition]] = field(default_factory=dict)
    """Days built, by table; a day without rows is there and empty."""
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
            built={
                _key(item[:2]): {table: Partition(**made) for table, made in item[2].items()} for item in raw["built"]
            },
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
                (*key, {table: vars(made) for table, made in tables.items()})
                for key, tables in sorted(self.built.items())
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
            self.built.pop(key, None)
            for place in [item for item in self.merged if item[1] == key[0] and key[1].isoformat()[:7] == item[2]]:
                del self.merged[place]

    def done(self, key: TenantDay, partitions: dict[str, Partition]) -> None:
        """A day was built and is equal to MongoDB."""
        self.pending.discard(key)
        self.built[key] = partitions

    @property
    def paths(self) -> set[str]:
        """Files that it needs, beside those of the manifest."""
        days = {made.path for tables in self.built.values() for made in tables.values()}
        return days | {made.path for made in self.merged.values() if made}

    def forget(self) -> None:
        """It is published."""
        (self.root / NAME).unlink(missing_ok=True)


def _key(item: list[Any]) -> TenantDay:
    return item[0], date.fromisoformat(item[1])
