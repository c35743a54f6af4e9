"""`wide_<form>_<version>`: one version's responses with a column for each field, in DuckDB's SQL.

No Arrow here: the process that runs a statement makes these views, and may have one thread only.
"""

import re
from collections.abc import Iterable
from typing import Final

_VALUE: Final = {
    "number": "value_number",
    "rating": "value_number",
    "score": "value_number",
    "scores": "value_number",
    "consent": "value_bool",
    "flag": "value_bool",
    "date": "value_text",
}
#: Type of step to the members of its result that have columns, and their kinds. What `extract` found has no fixed
#: members, the scores of all labels are many, and vectors have a table: these stay where they are.
_MEMBERS: Final = {
    "classify": (("label", "label"), ("score", "score")),
    "sentiment": (("label", "sentiment"), ("score", "score")),
    "summarize": (("text", "summary"),),
    "translate": (("text", "translation"),),
}
#: `item` in order of its numbers: "2" before "10".
_BY_ITEM: Final = "TRY_CAST(string_split(item, '.') AS INTEGER[])"
_NAMED: Final = re.compile(r"\bwide_(frm_[0-9a-z]{26})_([1-9][0-9]{0,8})\b", re.IGNORECASE | re.ASCII)
#: What `wide` takes, of one version.
FIELDS: Final = (
    "SELECT source, path, kind, repeated FROM dim_field WHERE form = ? AND version = ? ORDER BY source, position"
)


def value_column(kind: str) -> str:
    """The column of `fact_answer` that holds the value of a field of this kind."""
    return _VALUE.get(kind, "value_text")


def named(sql: str) -> set[tuple[str, int]]:
    """Form and version of each `wide_<form>_<version>` that a statement may mean."""
    return {(form.lower(), int(version)) for form, version in _NAMED.findall(sql)}


def wide(form: str, version: int, fields: Iterable[tuple[str, str, str, bool]]) -> str:
    """SQL for one version's responses with a column for each path: the nested answers, flattened.

    Args:
        fields: (source, path, kind, repeated) as in `dim_field`. A repeated one becomes a list in the order of `item`.
    """
    columns: dict[str, str] = {}
    for source, path, kind, repeated in _leaves(fields):
        value, where = value_column(kind), f"source = {quote(source)} AND path = {quote(path)}"
        made = f"list({value} ORDER BY {_BY_ITEM}, item)" if repeated else f"any_value({value})"
        title = f"{source}.{path}"
        # To DuckDB names that differ in case only are the same.
        while title.lower() in columns:
            title += "_"
        columns[title.lower()] = f"{made} FILTER (WHERE {where}) AS {name(title)}"
    listed = "".join(f", {column}" for column in columns.values())
    # Every part is quoted.
    rows = f"form = {quote(form)} AND version = {int(version)}"
    flat = f"SELECT response{listed} FROM fact_answer WHERE {rows} GROUP BY response"
    own = f"SELECT response, created, status FROM fact_response WHERE {rows} AND status <> 'erased'"
    # A response without any answer is one, too.
    return f"SELECT * FROM ({own}) own LEFT JOIN ({flat}) flat USING (response)"


def _leaves(fields: Iterable[tuple[str, str, str, bool]]) -> Iterable[tuple[str, str, str, bool]]:
    for source, path, kind, repeated in fields:
        if source == "result":
            yield from ((source, f"{path}.{member}", own, False) for member, own in _MEMBERS.get(kind, ()))
        else:
            yield source, path, kind, repeated


def quote(text: str) -> str:
    """A SQL string literal. Doubling the quote is enough in DuckDB, where a backslash means itself."""
    return "'" + text.replace("'", "''") + "'"


def name(text: str) -> str:
    """A quoted SQL identifier."""
    return '"' + text.replace('"', '""') + '"'
