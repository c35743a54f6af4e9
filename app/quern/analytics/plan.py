"""From a question to a statement: SQL that reads only the asker's files. Pure, but for the look at the manifest.

Nothing that a client sends becomes a part of the SQL: values and paths are bound, names choose among what stands here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from functools import cached_property
from typing import Any, Final

import pyarrow as pa

from quern.analytics.engine import Dialect, Parameter, Part, Statement
from quern.analytics.manifest import Manifest, Partition
from quern.analytics.question import (
    BUCKET,
    COUNTED,
    DEFAULT_STAGES,
    MEASURES,
    PATH,
    TENANT,
    WHOLE,
    Filter,
    Measure,
    Question,
    Stage,
)
from quern.analytics.schema import TABLES
from quern.analytics.wide import value_column

_FACT: Final = {"response": "fact_response", "job": "fact_job", "audit": "fact_audit"}
_MOMENT: Final = {"response": "created", "job": "created", "audit": "at"}
_QUANTILES: Final = {"p50": 0.5, "p75": 0.75, "p90": 0.9, "p95": 0.95, "p99": 0.99}
#: What `fact_answer` knows of a response by itself, so that no join is needed.
_OF_ANSWER: Final = frozenset({"form", "version", "weekday", "hour", TENANT})
_COMPARE: Final = {"lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_DEFAULT_TOP: Final = 100
#: A file with more than this part of the rows that the dialect takes at once is read by itself, and what is found kept.
_ALONE: Final = 20
_TERMS: Final = pa.schema([("c0", pa.string()), ("c1", pa.int64()), ("c2", pa.int64())])
#: Forms named in one expression; beyond that the answers' own rows are read.
_MOST_FORMS: Final = 50
#: Kinds of `dim_field` whose answers have one row a response at most, unless they are repeated.
_KNOWN_TEXT: Final = frozenset({"text", "long_text", "choice", "multiple_choice", "email", "date"})


class AskError(ValueError):
    """The question cannot be answered as it is; the text says what was expected and found."""


@dataclass(frozen=True)
class FieldInfo:
    """What the versions of a tenant's forms say of one path."""

    kinds: frozenset[str]
    repeated: bool


FormVersion = tuple[str, int]


@dataclass(frozen=True)
class Copies:
    """Which answers and results `fact_response` has copies of, for all versions of the forms in reach."""

    columns: dict[str, dict[FormVersion, str]] = field(default_factory=dict)
    """`answer.<path>` or `result.<step>.<member>` to its column in each version that has it. Only names that have a
    column in every such version."""
    users: dict[str, frozenset[FormVersion]] = field(default_factory=dict)
    """Column to the versions in which it holds something."""


@dataclass(frozen=True)
class Asker:
    """Whose rows are in reach, and which fields their forms have."""

    tenants: tuple[str, ...]
    operator: bool = False
    """Of all tenants: may ask by tenant."""
    fields: dict[str, FieldInfo] = field(default_factory=dict)
    """`answer.<path>` to what it is, of every version of every form."""
    steps: frozenset[str] = frozenset()
    copies: Copies = Copies()


def plan(question: Question, dialect: Dialect, manifest: Manifest, asker: Asker) -> Statement:
    """The statement that answers a question.

    Raises:
        AskError: a name is unknown, or a value has the wrong type for its dimension.
    """
    return _Plan(question, dialect, manifest, asker).statement()


@dataclass
class _Source:
    """Where rows come from: a FROM and WHERE, and what each dimension is there."""

    tables: list[str]
    where: list[str]
    dimensions: dict[str, str]
    moment: str
    value: str | None = None
    day: str | None = None
    """The column with the moment's day in UTC, if there is one."""


class _Plan:
    def __init__(self, question: Question, dialect: Dialect, manifest: Manifest, asker: Asker) -> None:
        self.question, self.dialect, self.manifest, self.asker = question, dialect, manifest, asker
        self.parameters: dict[str, Parameter] = {}
        self.parts: list[Part] = []

    # The answer's columns get names of ours in SQL (`c0`, `c1` …): a client's never stand there.
    def statement(self) -> Statement:
        question = self.question
        match question.measure:
            case Measure.FUNNEL:
                body = self._funnel()
            case Measure.COHORTS:
                body = self._cohorts()
            case Measure.TERMS:
                body = self._terms()
            case Measure.SIMILAR:
                body = self._similar()
            case _:
                body = self._aggregate(question.filters)
        columns = [f"c{place}" for place in range(len(question.columns))]
        top = question.top
        if top is None and question.measure in (Measure.TERMS, Measure.SIMILAR):
            top = _DEFAULT_TOP
        order = ", ".join(self._order(columns))
        limit = "" if top is None else f" LIMIT {int(top)}"
        sql = f"SELECT {', '.join(columns)} FROM ({body}) answer ORDER BY {order}{limit}"
        return self._bound(sql, shape(question), self.parts)

    def _bound(self, sql: str, shape: pa.Schema, parts: Sequence[Part] = ()) -> Statement:
        return Statement(sql, shape, self.dialect.bound_in(sql, self.parameters), parts)

    def _order(self, columns: list[str]) -> list[str]:
        question = self.question
        default = {
            Measure.TERMS: [("responses", True), ("occurrences", True)],
            Measure.SIMILAR: [("similarity", True)],
        }.get(question.measure, [])
        first = [(question.order.by, question.order.descending)] if question.order else default
        named = dict(first)
        rest = [(name, False) for name in question.columns if name not in named]
        return [
            f"{columns[question.columns.index(name)]} {'DESC' if descending else 'ASC'} NULLS LAST"
            for name, descending in [*first, *rest]
        ]

    # Values and files

    def bind(self, value: Parameter) -> str:
        for name, known in self.parameters.items():
            if type(known) is type(value) and known == value:
                return self.dialect.parameter(name, value)
        name = f"p{len(self.parameters)}"
        self.parameters[name] = value
        return self.dialect.parameter(name, value)

    def scan(self, table: str) -> str:
        """The asker's rows of a table: the files of exactly their tenants, of the days that the range touches."""
        return self._scan(table, self._reach(table))

    def _groups(self, partitions: Sequence[Partition]) -> list[list[Partition]]:
        """The same in groups, none with many more rows than the dialect takes at once; what is large stands alone."""
        large = self.dialect.most_rows // _ALONE
        groups = [[partition] for partition in partitions if partition.rows > large]
        gathered: list[Partition] = []
        for partition in partitions:
            if partition.rows > large:
                continue
            if gathered and sum(item.rows for item in gathered) + partition.rows > self.dialect.most_rows:
                groups.append(gathered)
                gathered = []
            gathered.append(partition)
        return [*groups, gathered] if gathered else groups

    def _scan(self, table: str, partitions: Sequence[Partition]) -> str:
        return self.dialect.scan(TABLES[table], [self.manifest.root / item.path for item in partitions])

    def _reach(self, table: str) -> list[Partition]:
        bounds = self.question.range
        since = bounds.start.date() if bounds.start else None
        until = bounds.before.date() + timedelta(days=1) if bounds.before and bounds.before.year < 9999 else None
        if table == "fact_job":
            # A job's partition is its response's day, and it may be made on a later one.
            since = None
        if table == "fact_embedding" or not TABLES[table].dated:
            since, until = None, None
        return [
            partition
            for tenant in self.asker.tenants
            for partition in self.manifest.partitions(table, tenant, since, until)
        ]

    def _within(self, moment: str) -> list[str]:
        bounds = self.question.range
        where = []
        if bounds.start:
            where.append(f"{moment} >= {self.bind(bounds.start)}")
        if bounds.before:
            where.append(f"{moment} < {self.bind(bounds.before)}")
        return where

    def _local(self, moment: str) -> str:
        if self.question.time_zone == "UTC":
            return moment
        return self.dialect.local(moment, self.bind(self.question.time_zone))

    def _bucket(self, source: _Source) -> str:
        """The period of the grain. In UTC from the day, where there is one: a file has few, each truncated once."""
        question = self.question
        if source.day is not None and question.grain != "hour" and question.time_zone == "UTC":
            return self.dialect.bucket(question.grain, source.day)
        return self.dialect.bucket(question.grain, self._local(source.moment))

    # What is asked of rows

    def _aggregate(self, filters: Sequence[Filter], statistics: Sequence[str] | None = None) -> str:
        question = self.question
        source = self._source(filters)
        keys = [] if question.grain == "all" else [self._bucket(source)]
        keys += [source.dimensions[name] for name in question.dimensions]
        asked = list(question.asked if statistics is None else statistics)
        value = source.value
        inner = f"SELECT {', '.join(self._keys_and_value(keys, source))} FROM {' '.join(source.tables)}"
        if source.where:
            inner += f" WHERE {' AND '.join(source.where)}"
        names = [f"c{place}" for place in range(len(keys))]
        # An empty answer to a question without groups is no row, in both engines.
        group = f" GROUP BY {', '.join(names)}" if names else ""
        counted = "count(*)" if value is None else "count(v)"
        having = " HAVING count(*) > 0" if not names else ""
        made = [self._statistic(statistic, counted) for statistic in asked]
        listed = [*names, *(f"{sql} AS c{len(names) + place}" for place, sql in enumerate(made))]
        sql = f"SELECT {', '.join(listed)} FROM ({inner}) rows_{group}{having}"
        if "share" not in asked:
            return sql
        return self._with_share(sql, len(names), asked)

    def _keys_and_value(self, keys: list[str], source: _Source) -> list[str]:
        listed = [f"{key} AS c{place}" for place, key in enumerate(keys)]
        return [*listed, f"{source.value or '1'} AS v"]

    def _statistic(self, statistic: str, counted: str) -> str:
        match statistic:
            case "count" | "share":
                return counted
            case "mean":
                return "avg(v)"
            case "sum" | "min" | "max":
                return f"{statistic}(v)"
        return self.dialect.quantile("v", _QUANTILES[statistic])

    def _with_share(self, sql: str, keys: int, asked: list[str]) -> str:
        bucketed = self.question.grain != "all"
        # A window costs DuckDB as much as reading the rows did.
        joined = bucketed and self.dialect.materializes
        columns = [f"c{place}" for place in range(keys)]
        for place, statistic in enumerate(asked, start=keys):
            name = f"c{place}"
            total = "whole" if joined else f"sum({name}) OVER ({'PARTITION BY c0' if bucketed else ''})"
            # A part of nothing is no number; 1.0 * keeps the engines from dividing whole numbers.
            share = f"CASE WHEN {total} > 0 THEN 1.0 * {name} / {total} END AS {name}"
            columns.append(share if statistic == "share" else name)
        if not joined:
            return f"SELECT {', '.join(columns)} FROM ({sql}) counted"
        counted = f"c{keys + asked.index('share')}"
        totals = f"SELECT c0 AS period, sum({counted}) AS whole FROM counted GROUP BY c0"
        return (
            f"WITH counted AS ({sql}), totals AS ({totals}) "
            f"SELECT {', '.join(columns)} FROM counted JOIN totals ON period = c0"
        )

    def _funnel(self) -> str:
        question = self.question
        keys = len(question.dimensions) + (question.grain != "all")
        names = [f"c{place}" for place in range(keys)]
        # One reading for all stages, not one for each: a stage is what passed the one before and its own filters.
        source = self._responses(question.filters, [name for name in question.dimensions if PATH.fullmatch(name)])
        keyed = [] if question.grain == "all" else [self._bucket(source)]
        keyed += [source.dimensions[name] for name in question.dimensions]
        listed = [f"{key} AS {name}" for key, name in zip(keyed, names, strict=True)]
        passed: list[str] = []
        stages = self._stages()
        for position, stage in enumerate(stages, start=1):
            passed += [self._response_condition(item, copied=True) for item in stage.filters]
            listed.append(f"CASE WHEN {' AND '.join(passed) or 'TRUE'} THEN 1 ELSE 0 END AS s{position}")
        rows = f"SELECT {', '.join(listed)} FROM {' '.join(source.tables)} WHERE {' AND '.join(source.where)}"
        sums = ", ".join(f"sum(s{position}) AS s{position}" for position in range(1, len(stages) + 1))
        group = f" GROUP BY {', '.join(names)}" if names else ""
        counted = f"SELECT {', '.join([*names, sums])} FROM ({rows}) rows_{group}"
        parts = [
            f"SELECT {''.join(f'{name}, ' for name in names)}{position} AS c{keys}, "
            f"{self.bind(stage.name)} AS c{keys + 1}, s{position} AS c{keys + 2} FROM counted WHERE s{position} > 0"
            for position, stage in enumerate(stages, start=1)
        ]
        union = " UNION ALL ".join(parts)
        partition = f"PARTITION BY {', '.join(names)} " if names else ""
        first = f"max(c{keys + 2}) OVER ({partition})"
        listed = [*names, f"c{keys}", f"c{keys + 1}", f"c{keys + 2}", f"1.0 * c{keys + 2} / {first} AS c{keys + 3}"]
        return f"WITH counted AS ({counted}) SELECT {', '.join(listed)} FROM ({union}) funnel"

    def _stages(self) -> list[Stage]:
        return self.question.stages or DEFAULT_STAGES

    def _cohorts(self) -> str:
        question = self.question
        source = self._responses(question.filters, [])
        member = f"r.{_quoted(question.member)}"
        bucket = self._bucket(source)
        where = " AND ".join([*source.where, f"{member} IS NOT NULL"])
        visits = (
            f"SELECT {member} AS member, {bucket} AS visited FROM {' '.join(source.tables)} WHERE {where} GROUP BY 1, 2"
        )
        periods = self.dialect.periods(question.grain, "first", "visited")
        firsts = "SELECT member, visited, min(visited) OVER (PARTITION BY member) AS first FROM visits"
        share = "1.0 * c2 / max(c2) OVER (PARTITION BY c0) AS c3 FROM counted"
        totals = ""
        if self.dialect.materializes:
            # As windows these cost DuckDB more than reading the rows does.
            entered = "SELECT member AS who, min(visited) AS first FROM visits GROUP BY member"
            firsts = f"SELECT visited, first FROM visits JOIN ({entered}) entered ON who = member"
            totals = ", totals AS (SELECT c0 AS cohort, max(c2) AS whole FROM counted GROUP BY c0)"
            share = "1.0 * c2 / whole AS c3 FROM counted JOIN totals ON cohort = c0"
        counted = f"SELECT first AS c0, {periods} AS c1, count(*) AS c2 FROM firsts GROUP BY 1, 2"
        tables = f"visits AS ({visits}), firsts AS ({firsts}), counted AS ({counted}){totals}"
        return f"WITH {tables} SELECT c0, c1, c2, {share}"

    def _terms(self) -> str:
        question = self.question
        where = ["a.source = 'answer'", "a.kind IN ('text', 'long_text')"]
        if question.of is not None:
            self._field(question.of)
            where.append(f"a.path = {self.bind(self._path(question.of)[1])}")
        where += self._answer_side(question.filters)
        files = self._reach("fact_answer")
        if sum(item.rows for item in files) <= self.dialect.most_rows or not self.dialect.most_rows:
            texts = self._texts(files, [*where, *self._within("a.created")])
            return self.dialect.terms(texts, self.bind(question.min_length))
        self.parts = [self._part_of_terms(group, where) for group in self._groups(files)]
        # Every row of a response is in one file, so nothing is counted twice.
        shortest = self.bind(question.min_length)
        return f"SELECT c0, sum(c1) AS c1, sum(c2) AS c2 FROM parts WHERE length(c0) >= {shortest} GROUP BY c0"

    def _part_of_terms(self, files: Sequence[Partition], where: Sequence[str]) -> Part:
        """All terms of some files, of every length and as if no range was asked for where they lie within it: so what
        is kept of a file serves other questions, too."""
        within = [] if all(map(self._is_in_range, files)) else self._within("a.created")
        sql = self.dialect.terms(self._texts(files, [*where, *within]), "1")
        return Part(self._bound(sql, _TERMS), files[0].path if len(files) == 1 else None)

    def _texts(self, files: Sequence[Partition], where: Sequence[str]) -> str:
        scanned = self._scan("fact_answer", files)
        return f"SELECT a.response AS response, a.value_text AS text FROM {scanned} a WHERE {' AND '.join(where)}"

    def _is_in_range(self, partition: Partition) -> bool:
        first, after = (datetime.combine(day, time(), UTC) for day in partition.days)
        bounds = self.question.range
        return (bounds.start is None or bounds.start <= first) and (bounds.before is None or bounds.before >= after)

    def _similar(self) -> str:
        question = self.question
        target = self.bind(question.of or "")
        vectors = self.scan("fact_embedding")
        where = ["e.response <> " + target, "e.step = t.step", *self._within("e.created")]
        where.append(f"{self.dialect.size('e.vector')} = {self.dialect.size('t.vector')}")
        where += self._answer_side(question.filters, "e")
        nearest = self.dialect.cosine("e.vector", "t.vector")
        # Of several embed steps the first by name is compared.
        one = (
            f"SELECT step, vector FROM {vectors} v WHERE v.response = {target} "
            f"AND {self.dialect.size('v.vector')} > 0 ORDER BY step LIMIT 1"
        )
        return (
            f"SELECT e.response AS c0, e.form AS c1, e.created AS c2, {nearest} AS c3 "
            f"FROM {vectors} e CROSS JOIN ({one}) t WHERE {' AND '.join(where)}"
        )

    # Where rows come from

    def _source(self, filters: Sequence[Filter]) -> _Source:
        subject = self.question.subject
        if subject != "response":
            return self._plain_fact(subject, filters)
        paths = [name for name in self.question.dimensions if PATH.fullmatch(name)]
        if not self._copies_suffice(paths, filters) and self._answers_suffice(paths, filters):
            return self._answers_alone(paths, filters)
        return self._responses(filters, paths)

    def _plain_fact(self, subject: str, filters: Sequence[Filter]) -> _Source:
        table, moment = _FACT[subject], f"r.{_MOMENT[subject]}"
        local = self._local(moment)
        special = {"weekday": self.dialect.weekday(local), "hour": self.dialect.hour(local)}
        names = [*self.question.dimensions, *(item.dimension for item in filters)]
        dimensions = {name: special.get(name, f"r.{_quoted(name)}") for name in names}
        self._check_tenant(names)
        where = [*self._within(moment), *(self._condition(dimensions[item.dimension], item) for item in filters)]
        column = MEASURES[self.question.measure].column
        value = f"r.{column}" if column else None
        # A job's day is its response's.
        day = "r.day" if subject == "audit" else None
        return _Source([f"{self.scan(table)} r"], where, dimensions, moment, value, day)

    def _responses(self, filters: Sequence[Filter], paths: list[str]) -> _Source:
        moment = "r.created"
        tables = [f"{self.scan('fact_response')} r"]
        where = ["r.status <> 'erased'", *self._within(moment)]
        where += [self._response_condition(item, copied=True) for item in filters]
        dimensions = self._own_dimensions("r", self.question.dimensions)
        for place, name in enumerate(paths):
            copy = self._copy(name)
            if copy is not None:
                where.append(f"{copy} IS NOT NULL")
                dimensions[name] = copy if _is_text(copy) else self.dialect.plain(copy)
                continue
            tables.append(f"JOIN ({self._values(name)}) a{place} ON a{place}.response = r.response")
            dimensions[name] = f"a{place}.value"
        value = self._measured("r")
        if self.question.measure is Measure.ANSWER:
            copy = self._copy(self.question.of or "")
            if copy is not None and not _is_text(copy):
                return _Source(tables, [*where, f"{copy} IS NOT NULL"], dimensions, moment, copy, "r.day")
            source, path = self._path(self.question.of or "")
            numbers = (
                f"SELECT response, value_number FROM {self.scan('fact_answer')} n WHERE source = '{source}' "
                f"AND path = {self.bind(path)} AND value_number IS NOT NULL"
            )
            tables.append(f"JOIN ({numbers}) m ON m.response = r.response")
            value = "m.value_number"
        return _Source(tables, where, dimensions, moment, value, "r.day")

    def _measured(self, alias: str) -> str | None:
        measure = self.question.measure
        if measure in COUNTED or measure in (Measure.FUNNEL, Measure.COHORTS):
            return None
        if measure is Measure.COMPLETION:
            return f"CASE WHEN {alias}.fields > 0 THEN 1.0 * {alias}.fields_answered / {alias}.fields END"
        return f"{alias}.{MEASURES[measure].column}"

    def _own_dimensions(self, alias: str, names: Sequence[str]) -> dict[str, str]:
        self._check_tenant(names)
        local = self._local(f"{alias}.created")
        special = {"weekday": self.dialect.weekday(local), "hour": self.dialect.hour(local)}
        return {name: special.get(name, f"{alias}.{_quoted(name)}") for name in names if not PATH.fullmatch(name)}

    def _copies_suffice(self, paths: list[str], filters: Sequence[Filter]) -> bool:
        """Whether `fact_response` answers alone, with the copies of answers and results that it has."""
        question = self.question
        names = [*paths, *(item.dimension for item in filters if PATH.fullmatch(item.dimension))]
        if question.measure is Measure.ANSWER:
            copy = self._copy(question.of or "")
            return copy is not None and not _is_text(copy) and all(map(self._copy, names))
        return all(map(self._copy, names))

    @cached_property
    def _copies(self) -> dict[str, dict[FormVersion, str]]:
        """The copies that can be relied on: none where a file in reach has values that no version explains."""
        bounds = self.question.range
        since = bounds.start.date() if bounds.start else None
        for tenant in self.asker.tenants:
            if not all(item.explained for item in self.manifest.partitions("fact_response", tenant, since)):
                return {}
        return self.asker.copies.columns

    def _copy(self, name: str) -> str | None:
        """The expression of `fact_response r` with a copy of an answer or a result, if there is one."""
        found = self._copies.get(name)
        if found is None:
            return None
        known = self.asker.copies
        columns = sorted(set(found.values()))
        if len(columns) == 1 and known.users[columns[0]] == found.keys():
            return f"r.{columns[0]}"
        cases, forms = [], 0
        for column in columns:
            of_form: dict[str, list[int]] = {}
            for (form, version), its in sorted(found.items()):
                if its == column:
                    of_form.setdefault(form, []).append(version)
            forms += len(of_form)
            if forms > _MOST_FORMS:
                return None
            those = [
                f"r.form = {self.bind(form)} AND r.version IN ({', '.join(map(str, versions))})"
                for form, versions in of_form.items()
            ]
            cases.append(f"WHEN {' OR '.join(those)} THEN r.{column}")
        return f"CASE {' '.join(cases)} END"

    def _answers_suffice(self, paths: list[str], filters: Sequence[Filter]) -> bool:
        """Whether `fact_answer` answers: by paths only, and nothing else is asked that only a response knows."""
        question = self.question
        names = {*question.dimensions, *(item.dimension for item in filters)}
        if not all(name in _OF_ANSWER or PATH.fullmatch(name) for name in names):
            return False
        if question.measure is Measure.ANSWER:
            return not paths
        answered = bool(paths) and not paths[0].startswith("step.")
        return answered and question.measure in (Measure.RESPONSES, Measure.RESPONSE_TIME, Measure.FUNNEL)

    def _answers_alone(self, paths: list[str], filters: Sequence[Filter]) -> _Source:
        question = self.question
        asked = question.of or "" if question.measure is Measure.ANSWER else paths[0]
        source, path = self._path(asked)
        where = [f"a.source = '{source}'", f"a.path = {self.bind(path)}", *self._within("a.created")]
        where += self._answer_side(filters)
        dimensions = self._own_dimensions("a", question.dimensions)
        if question.measure is Measure.ANSWER:
            where.append("a.value_number IS NOT NULL")
            return _Source([f"{self.scan('fact_answer')} a"], where, dimensions, "a.created", "a.value_number", "a.day")
        key = self._key("a", self._field(asked))
        where.append(f"{key} IS NOT NULL")
        scanned = f"{self.scan('fact_answer')} a"
        if self._field(asked).repeated:
            # The same option in two items of a group is one response with that option.
            kept = ("response", "form", "version", "tenant", "created", "day", "processing_seconds")
            rows = (
                f"SELECT DISTINCT {', '.join(f'a.{name} AS {name}' for name in kept)}, {key} AS value_ "
                f"FROM {scanned} WHERE {' AND '.join(where)}"
            )
            scanned, where, key = f"({rows}) a", [], "a.value_"
        dimensions[asked] = key
        tables = [scanned]
        for place, name in enumerate(paths[1:], start=1):
            tables.append(f"JOIN ({self._values(name)}) a{place} ON a{place}.response = a.response")
            dimensions[name] = f"a{place}.value"
        value = "a.processing_seconds" if question.measure is Measure.RESPONSE_TIME else None
        return _Source(tables, where, dimensions, "a.created", value, "a.day")

    def _values(self, name: str) -> str:
        """Response and value, once each, of an answer, a result or a step."""
        kind, path = self._path(name)
        if kind == "step":
            jobs = self.scan("fact_job")
            return f"SELECT DISTINCT response, state AS value FROM {jobs} j WHERE step = {self.bind(path)}"
        known = self._field(name)
        key = self._key("x", known)
        return (
            f"SELECT {'DISTINCT ' if known.repeated else ''}x.response AS response, {key} AS value "
            f"FROM {self.scan('fact_answer')} x WHERE x.source = '{kind}' AND x.path = {self.bind(path)} "
            f"AND {key} IS NOT NULL"
        )

    def _key(self, alias: str, known: FieldInfo) -> str:
        """The value of an answer as text."""
        if known.kinds and known.kinds <= _KNOWN_TEXT:
            return f"{alias}.value_text"
        number = self.dialect.plain(f"{alias}.value_number")
        truth = f"CASE WHEN {alias}.value_bool THEN 'true' WHEN NOT {alias}.value_bool THEN 'false' END"
        if known.kinds and {value_column(kind) for kind in known.kinds} == {"value_number"}:
            return number
        return f"coalesce({alias}.value_text, {number}, {truth})"

    # Filters

    def _response_condition(self, item: Filter, alias: str = "r", *, copied: bool = False) -> str:
        """`copied`: `alias` is `fact_response` itself, with its copies."""
        name = item.dimension
        if not PATH.fullmatch(name):
            return self._condition(self._own_dimensions(alias, [name])[name], item)
        copy = self._copy(name) if copied else None
        if copy is not None:
            return self._copy_condition(copy, item)
        kind, path = self._path(name)
        wanted = item.values != [False] if item.op == "exists" else item.op != "not_in"
        if kind == "step":
            matching = "" if item.op == "exists" else f" AND {self._matching('j.state', _positive(item))}"
            inner = f"SELECT j.response FROM {self.scan('fact_job')} j WHERE j.step = {self.bind(path)}{matching}"
        else:
            self._field(name)
            some = "(f.value_text IS NOT NULL OR f.value_number IS NOT NULL OR f.value_bool IS NOT NULL)"
            matching = some if item.op == "exists" else self._answer_matches(_positive(item))
            inner = (
                f"SELECT f.response FROM {self.scan('fact_answer')} f "
                f"WHERE f.source = '{kind}' AND f.path = {self.bind(path)} AND {matching}"
            )
        return f"{alias}.response {'IN' if wanted else 'NOT IN'} ({inner})"

    def _copy_condition(self, copy: str, item: Filter) -> str:
        if item.op == "exists":
            return f"{copy} IS {'NULL' if item.values == [False] else 'NOT NULL'}"
        values: list[str | float | bool] = [
            value if isinstance(value, str) else float(value)
            for value in item.values
            if isinstance(value, str) == _is_text(copy) and not isinstance(value, bool)
        ]
        negative = item.op == "not_in"
        if not values:
            return "1 = 1" if negative else "1 = 0"
        matching = self._matching(copy, _positive(item).model_copy(update={"values": values}))
        return f"({copy} IS NULL OR NOT {matching})" if negative else matching

    def _answer_side(self, filters: Sequence[Filter], alias: str = "a") -> list[str]:
        """Filters on rows of answers: those that such a row can answer itself, the others by its response."""
        where, others = [], []
        for item in filters:
            if item.dimension in _OF_ANSWER or PATH.fullmatch(item.dimension):
                where.append(self._response_condition(item, alias))
            else:
                others.append(self._response_condition(item))
        if others:
            scanned = f"SELECT r.response FROM {self.scan('fact_response')} r WHERE {' AND '.join(others)}"
            where.append(f"{alias}.response IN ({scanned})")
        return where

    def _answer_matches(self, item: Filter) -> str:
        texts = [value for value in item.values if isinstance(value, str)]
        truths = [value for value in item.values if isinstance(value, bool)]
        numbers = [float(value) for value in item.values if not isinstance(value, str | bool)]
        parts = []
        for column, values in (("value_text", texts), ("value_number", numbers), ("value_bool", truths)):
            if values:
                parts.append(self._matching(f"f.{column}", item.model_copy(update={"values": values})))
        return f"({' OR '.join(parts)})"

    def _condition(self, x: str, item: Filter) -> str:
        if item.op == "exists":
            return f"{x} IS {'NULL' if item.values == [False] else 'NOT NULL'}"
        whole = item.dimension in WHOLE
        for value in item.values:
            if isinstance(value, bool) or isinstance(value, str) is whole:
                kind = "a whole number" if whole else "a text"
                raise AskError(f"expected {kind} for the dimension {item.dimension}, found {value!r}")
        if item.op == "not_in":
            return f"({x} IS NULL OR NOT {self._matching(x, _positive(item))})"
        return self._matching(x, item)

    def _matching(self, x: str, item: Filter) -> str:
        if item.op == "in":
            return f"{x} IN ({', '.join(self.bind(value) for value in item.values)})"
        return f"{x} {_COMPARE[item.op]} {self.bind(item.values[0])}"

    # Names

    def _path(self, name: str) -> tuple[str, str]:
        found = PATH.fullmatch(name)
        if found is None:
            raise AskError(f"expected answer.<field>, result.<step>.<member> or step.<step>, found {name[:100]!r}")
        if found[1] == "step" and found[2] not in self.asker.steps:
            raise AskError(f"no form of yours has a step {found[2][:100]!r}")
        return found[1], found[2]

    def _field(self, name: str) -> FieldInfo:
        kind, path = self._path(name)
        if kind == "answer":
            if name not in self.asker.fields:
                raise AskError(f"no form of yours has a field {path[:100]!r}")
            return self.asker.fields[name]
        if path.split(".")[0] not in self.asker.steps:
            raise AskError(f"no form of yours has a step {path.split('.')[0][:100]!r}")
        # A result may be a list, and nothing says so beforehand.
        return FieldInfo(frozenset(), True)

    def _check_tenant(self, names: Sequence[str]) -> None:
        if TENANT in names and not self.asker.operator:
            raise AskError("the dimension tenant is the operator's; you see one tenant")


def files(manifest: Manifest, table: str, asker: Asker, since: date | None, until: date | None) -> list[Any]:
    """The files of a table in which an asker's rows of some days are, and no other's."""
    return [path for tenant in asker.tenants for path in manifest.files(table, tenant, since, until)]


def shape(question: Question) -> pa.Schema:
    """Names and types of an answer's columns."""
    return pa.schema([pa.field(name, _arrow(question, name)) for name in question.columns])


def _arrow(question: Question, name: str) -> pa.DataType:
    if name in (BUCKET, "cohort"):
        return pa.timestamp("ms") if question.grain == "hour" else pa.date32()
    if name in ("count", "position", "members", "period", "responses", "occurrences") or name in WHOLE:
        return pa.int64()
    if name in ("share", "sum", "mean", "min", "max", "similarity", *_QUANTILES):
        return pa.float64()
    return pa.timestamp("ms") if name == "created" else pa.string()


def _positive(item: Filter) -> Filter:
    return item.model_copy(update={"op": "in"}) if item.op == "not_in" else item


def _is_text(copy: str) -> bool:
    return "r.text_" in copy


def _quoted(name: str) -> str:
    # `user` is a keyword; every name here is one of ours.
    return f'"{name}"'
