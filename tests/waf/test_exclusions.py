"""docs/waf.md names every rule of the Core Rule Set that is not tried somewhere, and no other one."""

import re
from collections.abc import Iterable
from pathlib import Path

from tests.waf.arrangement import ROLE, role_values
from tests.waf.debian import unpacked
from tests.waf.front_door import PACKAGES

RULES = unpacked("front-door", PACKAGES) / "usr/share/modsecurity-crs/rules"
TEMPLATES = ROLE / "templates/etc/nginx/modsecurity"


def _table() -> list[list[str]]:
    """The table's rows: where, which rules, why."""
    section = (ROLE.parents[1] / "docs/waf.md").read_text().partition("## Exclusions, and why")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    return rows[2:]


def _in(ranges: Iterable[tuple[str, str]], known: Iterable[int]) -> set[int]:
    """Which of the known numbers are in the ranges; the end of a range of one is empty."""
    ends = [(int(first), int(last or first)) for first, last in ranges]
    return {one for one in known if any(first <= one <= last for first, last in ends)}


def _documented(digits: int, known: Iterable[int]) -> set[int]:
    number = rf"\b(9\d{{{digits - 1}}})\b"
    return _in((found for row in _table() for found in re.findall(f"{number}(?: to {number})?", row[1])), known)


def _text(path: Path) -> str:
    return re.sub(r"(?m)^\s*#.*$", "", path.read_text())


def test_every_rule_that_is_left_out_or_excepted_is_in_the_table_and_no_other() -> None:
    values = role_values()
    known = {int(found) for path in RULES.glob("*.conf") for found in re.findall(r"\bid:(9\d{5})", _text(path))}
    named = [*values["nginx_waf_left_out"], *values["nginx_waf_prose"]]
    for name in ("exclusions", "screens"):
        named += re.findall(r"ctl:ruleRemove(?:Target)?ById=(9\d{5})", (TEMPLATES / f"{name}.conf.j2").read_text())
    excepted = _in(((first, last) for first, _, last in (one.partition("-") for one in named)), known)
    assert len(excepted) > 20
    assert _documented(6, known) == excepted


def test_every_file_that_is_left_out_is_in_the_table_and_no_other() -> None:
    shipped = {int(re.split("[-.]", path.name)[1]): path.name for path in RULES.glob("RE*.conf")}
    left_out = {number for number, name in shipped.items() if name not in role_values()["nginx_waf_files"]}
    assert {901, 903} <= left_out
    assert _documented(3, shipped) == left_out


def test_every_place_with_an_exception_is_in_the_table() -> None:
    places = " ".join(row[0] for row in _table())
    text = _text(TEMPLATES / "exclusions.conf.j2")
    routes = set(re.findall(r"REQUEST_URI \"@(?:rx \^|streq )(/(?:api/v1|v1)(?:/[a-z]+)*)", text))
    assert len(routes) >= 5
    # Webhooks and prompts are told by their names.
    names = {"/api/v1/webhooks": "webhooks", "/v1": "/v1/chat/completions"}
    assert [route for route in routes if names.get(route, route) not in places] == []
    assert "nginx_waf_code_forms" in places
