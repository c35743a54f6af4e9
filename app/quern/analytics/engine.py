"""The interface that an analytic engine has: a dialect of SQL, and a way to run one statement over files.

An engine only ever opens the files that a statement names. Which files these are is decided by `plan`, from the
manifest and the tenant who asks: another tenant's rows are not filtered out, they are never in reach.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from quern.analytics.schema import Table

Parameter = str | int | float | bool | datetime


class EngineError(Exception):
    """The engine could not answer; the text says why."""


class TimedOutError(EngineError):
    """The statement took longer than it may."""


class Dialect(ABC):
    """How one engine says what the other says differently. Every argument named `x` is an SQL expression."""

    name: str
    materializes: bool
    """Whether a common table expression is computed once, however often it is read."""
    most_rows: int
    """Of `fact_answer`, in one statement that looks into each text; 0: any number."""

    @abstractmethod
    def scan(self, table: Table, files: Sequence[Path]) -> str:
        """The rows of some Parquet files, as something to select from; no file makes an empty table."""

    @abstractmethod
    def parameter(self, name: str, value: Parameter) -> str:
        """The place of a bound parameter."""

    def bound_in(self, sql: str, parameters: Mapping[str, Parameter]) -> dict[str, Parameter]:
        """Those that have a place in a statement: engines refuse others."""
        return {name: value for name, value in parameters.items() if self.parameter(name, value) in sql}

    @abstractmethod
    def local(self, x: str, zone: str) -> str:
        """A UTC moment as wall-clock time in `zone` (a placeholder)."""

    @abstractmethod
    def bucket(self, grain: str, local: str) -> str:
        """The first day (or for `hour`: moment) of the period that a wall-clock time lies in; weeks begin on Monday."""

    @abstractmethod
    def weekday(self, local: str) -> str:
        """1 Monday to 7 Sunday."""

    @abstractmethod
    def hour(self, local: str) -> str:
        """0 to 23."""

    @abstractmethod
    def periods(self, grain: str, first: str, last: str) -> str:
        """How many periods lie between two buckets."""

    @abstractmethod
    def quantile(self, x: str, share: float) -> str:
        """Of the values that are not NULL, with linear interpolation (type 7 of Hyndman and Fan, 1996)."""

    @abstractmethod
    def plain(self, x: str) -> str:
        """A number as text, whole ones without a point."""

    @abstractmethod
    def terms(self, texts: str, shortest: str) -> str:
        """Each term `c0` of at least `shortest` code points, in how many responses `c1`, how often `c2`.

        `texts` selects `response` and `text`, several rows a response. A term is a run of letters and digits in
        lower case: each character for itself, ς as σ.
        """

    @abstractmethod
    def cosine(self, x: str, y: str) -> str:
        """The cosine of the angle between two vectors of the same length."""

    @abstractmethod
    def size(self, x: str) -> str:
        """The length of a vector."""


@dataclass(frozen=True)
class Statement:
    """SQL of one dialect with bound parameters, and the shape of what comes back."""

    sql: str
    shape: pa.Schema
    """Names and types of the answer's columns; the SQL's have the same order and names of their own."""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    parts: Sequence["Part"] = ()
    """What has to be run before: all their rows together are `rows`."""
    rows: pa.Table | None = None
    """The table `parts` of `sql`, once its parts were run."""


@dataclass(frozen=True)
class Part:
    """A part of a statement: a statement of its own."""

    statement: Statement
    file: str | None = None
    """Where it reads one file only: its path in the warehouse. A file never changes, and so its rows do not either."""


class Engine(Protocol):
    """Runs statements."""

    @property
    def dialect(self) -> Dialect: ...

    def run(self, statement: Statement, seconds: float) -> pa.Table:
        """The rows, with the statement's names and types.

        Raises:
            TimedOutError: it took longer than `seconds`.
            EngineError: it failed.
        """
        ...

    def close(self) -> None:
        """Give back what is held."""
        ...


def shaped(table: pa.Table, shape: pa.Schema) -> pa.Table:
    """The same rows with the names and types that were promised. Raises EngineError when they cannot be."""
    columns = []
    for column, promised in zip(table.columns, shape, strict=True):
        if pa.types.is_timestamp(column.type) and column.type.tz is not None:
            column = column.cast(pa.timestamp(column.type.unit))
        try:
            columns.append(column.cast(promised.type))
        except pa.ArrowInvalid as error:
            raise EngineError(f"expected {promised.name} as {promised.type}, found {column.type}") from error
    return pa.table(columns, schema=shape)
