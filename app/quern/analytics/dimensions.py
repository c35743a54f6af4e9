"""The rows of a tenant's dimensions: who, which forms, which fields. Small, and made anew whenever they may differ."""

from collections.abc import Sequence
from typing import Any, Final

import pyarrow as pa

from quern.analytics import calendar, schema, source
from quern.analytics.partition import batch
from quern.analytics.version import Leaf, Version
from quern.store.connection import Db, Document

#: Actors of the audit log that are no API key.
_PROCESSES: Final = ("operator", "quern")


def of_tenant(db: Db, tenant: str) -> dict[str, pa.RecordBatch]:
    """The tenant's `dim_user`, `dim_form` and `dim_field`."""
    listed = source.versions(db, tenant)
    known = [Version.of(row["form"], row["version"], row["definition"], row["workflow"]) for row in listed]
    return {
        "dim_user": users(tenant, source.people(db, tenant)),
        "dim_form": forms(tenant, listed, known, source.form_states(db, tenant)),
        "dim_field": fields(tenant, known),
    }


def users(tenant: str, keys: Sequence[Document]) -> pa.RecordBatch:
    """`dim_user`: the API keys, and the processes that act on the tenant's behalf."""
    rows: list[tuple[Any, ...]] = [
        (tenant, key["_id"], key["kind"], key["name"], key.get("created"), key.get("revoked")) for key in keys
    ]
    rows += [(tenant, name, "process", name, None, None) for name in _PROCESSES]
    return _batch(schema.DIM_USER, rows)


def forms(tenant: str, listed: Sequence[Document], known: Sequence[Version], states: dict[str, str]) -> pa.RecordBatch:
    """`dim_form`: each version is valid until the next one of its form. `listed` and `known` by form and number."""
    rows = []
    for place, (document, version) in enumerate(zip(listed, known, strict=True)):
        following = listed[place + 1] if place + 1 < len(listed) else None
        until = following["published"] if following and following["form"] == document["form"] else None
        rows.append(
            (
                tenant,
                document["form"],
                document["version"],
                document["name"],
                states.get(document["form"], "closed"),
                document["published"],
                until,
                until is None,
                len(version.leaves),
                len(version.steps),
            )
        )
    return _batch(schema.DIM_FORM, rows)


def fields(tenant: str, known: Sequence[Version]) -> pa.RecordBatch:
    """`dim_field`: every leaf and step of every version."""
    rows = [
        (tenant, version.form, version.number, *_of_leaf(leaf))
        for version in known
        for leaf in (*version.leaves, *version.steps)
    ]
    return _batch(schema.DIM_FIELD, rows)


def _of_leaf(leaf: Leaf) -> tuple[Any, ...]:
    return (
        leaf.source,
        leaf.path,
        leaf.kind,
        leaf.position,
        leaf.label,
        leaf.required,
        leaf.repeated,
        leaf.options,
        leaf.scale,
        leaf.text_column,
        leaf.number_column,
    )


def time() -> pa.RecordBatch:
    """`dim_time`."""
    return batch(schema.DIM_TIME, calendar.columns())


def _batch(table: schema.Table, rows: Sequence[tuple[Any, ...]]) -> pa.RecordBatch:
    return batch(table, {name: [row[place] for row in rows] for place, name in enumerate(table.names)})
