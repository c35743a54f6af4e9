"""Every rule of the Core Rule Set is in force, in a group that is passed over only where that changes nothing."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.waf.arrangement import core_rule_set, role_values
from tests.waf.debian import unpacked
from tests.waf.front_door import PACKAGES, FrontDoor
from tests.waf.needless import actions, number, parsed

OWN = """
SecRule ARGS "@rx x" "id:10001,phase:2,pass"
SecRule REQUEST_URI|ARGS "@rx y" "id:10002,phase:2,pass"
"""
RULES = r"""
# A comment, "chain" in it.
SecRule TX:EXECUTING_PARANOIA_LEVEL "@lt 1" "id:911011,phase:1,pass,nolog,skipAfter:END-REQUEST-911-X"
SecRule ARGS|ARGS_NAMES|!ARGS:/a/ "@rx chain" \
    "id:911100,\
    phase:2,\
    msg:'of a chain, too',tag:'OWASP_CRS',\
    chain"
    SecRule MATCHED_VARS "@pm x" "t:none"
SecRule REQUEST_COOKIES "@pmFromFile a.data b.data" "id:911101,phase:2,pass"
SecRule TX:EXECUTING_PARANOIA_LEVEL "@lt 2" "id:911013,phase:1,pass,nolog,skipAfter:END-REQUEST-911-X"
SecRule ARGS "@rx z" "id:911200,phase:2,pass"
SecRule TX:EXECUTING_PARANOIA_LEVEL "@lt 3" "id:911015,phase:1,pass,nolog,skipAfter:END-REQUEST-911-X"
SecRule ARGS "@rx z" "id:911300,phase:2,pass"
SecMarker END-REQUEST-911-X
"""


def selected(**changes: Any) -> Any:
    values: dict[str, Any] = {
        "level": 2,
        "blocking": 1,
        "left_out": [],
        "calm": [],
        "plain": [],
        "prose": [],
        "seldom": [],
    }
    return core_rule_set().Selection(**{**values, "proven": core_rule_set().digest([RULES]), **changes})


def arranged(text: str, **changes: Any) -> dict[str, list[int]]:
    groups = core_rule_set().arranged(OWN, {"a.conf": text}, "/rules", selected(**changes))
    return {name: list(map(int, re.findall(r"id:(\d+)", one))) for name, one in groups.items() if one}


def test_a_rule_lies_where_what_it_looks_at_says() -> None:
    assert arranged(RULES) == {"always": [10002], "values": [10001, 911100, 911101, 911200]}
    assert arranged(RULES, prose=["911200"])["prose"] == [911200]
    assert arranged(RULES, level=3)["values"][-1] == 911300
    assert arranged(RULES, left_out=["911100-911101"])["values"] == [10001, 911200]


def test_what_looks_at_a_seldom_header_only_lies_apart() -> None:
    text = """
SecRule REQUEST_HEADERS:Range|REQUEST_HEADERS:Referer "@rx x" "id:911100,phase:2,pass"
SecRule REQUEST_HEADERS:Range|REQUEST_HEADERS:Host "@rx x" "id:911101,phase:2,pass"
SecRule &REQUEST_HEADERS:Range "@eq 0" "id:911102,phase:2,pass"
SecRule REQUEST_HEADERS:Range "@rx x" "id:911103,phase:1,pass"
"""
    groups = arranged(text, seldom=["Range", "Referer"])
    assert groups == {"always": [10002, 911101, 911102], "values": [10001], "opening": [911103], "seldom": [911100]}


def test_what_was_proved_needless_is_passed_over_for_the_rules_it_was_proved_of_only() -> None:
    proved = {"calm": ["10002", "911100-911199"], "plain": ["911101"]}
    assert arranged(RULES, **proved) == {"calm": [10002, 911100], "plain": [911101], "values": [10001, 911200]}
    assert arranged(RULES + "\n", **proved) == arranged(RULES)


def test_a_chain_stays_together_and_lists_are_named_in_full() -> None:
    groups = core_rule_set().arranged(OWN, {"a.conf": RULES}, "/rules", selected())
    assert "@pmFromFile /rules/a.data /rules/b.data" in groups["values"]
    assert re.search(
        r'SecRule ARGS\|!ARGS:/a/ "@rx chain".*?chain"\s+SecRule MATCHED_VARS', groups["values"], re.DOTALL
    )


@pytest.mark.parametrize(
    "text",
    [
        'SecRule ARGS "@rx x" "phase:2,pass"',
        'SecRule ARGS "@rx x" "id:911100,phase:2,chain"',
        "SecRuleRemoveById 1",
        'SecRule ARGS "@rx x" "id:911100,phase:2,pass,skipAfter:END-HOST-CHECK"',
    ],
)
def test_what_the_arrangement_does_not_know_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        arranged(text)


def test_a_marker_for_another_use_stays_between_its_rules() -> None:
    text = """
SecRule REQUEST_URI "@rx x" "id:911100,phase:2,pass,skipAfter:END-HOST-CHECK"
SecRule REQUEST_URI "@rx y" "id:911101,phase:2,pass"
SecMarker END-HOST-CHECK
"""
    found = core_rule_set().arranged("", {"a.conf": text}, "/rules", selected())
    assert re.findall(r"id:\d+|SecMarker", found["always"]) == ["id:911100", "id:911101", "SecMarker"]


def described(chain: list[Any]) -> list[Any]:
    """What a rule does, but for the names that it no longer looks at and the places of lists."""
    return [
        (
            {
                (one["variable"], one["variable_part"], one["negated"], one["counter"])
                for one in link["variables"]
                if one["variable"] != "ARGS_NAMES"
            },
            link["operator"],
            link["operator_negated"],
            re.sub(r"/\S*/", "", link["operator_argument"])
            if link["operator"].startswith("@pmf") or "File" in link["operator"]
            else link["operator_argument"],
            [(action["act_name"], action["act_arg"]) for action in link["actions"]],
        )
        for link in chain
    ]


def chains(path: Path) -> Iterator[tuple[list[Any], int]]:
    """Every rule, as another parser than the role's reads it, and the level that was asked for before."""
    chain: list[Any] = []
    level = 1
    for line in parsed(path):
        if line["type"] not in {"SecRule", "SecAction"}:
            continue
        chain.append({"variables": [], "operator": "", "operator_negated": False, "operator_argument": "", **line})
        if actions(line, "chain"):
            continue
        if {one["variable_part"] for one in chain[0]["variables"]} == {"EXECUTING_PARANOIA_LEVEL"}:
            level = int(chain[0]["operator_argument"])
        else:
            yield chain, level
        chain = []


def test_every_rule_of_the_rule_set_is_in_force_once_and_as_it_was(front_door: FrontDoor) -> None:
    values = role_values()
    names = (
        core_rule_set()
        .Selection(
            level=2,
            blocking=1,
            **{
                name: values[f"nginx_waf_{name}"] for name in ("left_out", "calm", "plain", "prose", "seldom", "proven")
            },
        )
        .names
    )
    folder = unpacked("front-door", PACKAGES) / "usr/share/modsecurity-crs/rules"
    shipped = {
        number(chain): described(chain)
        for name in values["nginx_waf_files"]
        for chain, level in chains(folder / name)
        if level <= 2 and not names("left_out", number(chain))
    }
    for unused in (949061, 949062, 949063):
        # Sums of levels that do not block.
        del shipped[unused]
    groups = {path.stem: list(chains(path)) for path in (front_door.directory / "modsecurity/rules").glob("*.conf")}
    found = {number(chain): described(chain) for group in groups.values() for chain, _ in group}
    assert Counter(number(chain) for group in groups.values() for chain, _ in group).most_common(1)[0][1] == 1
    assert len(shipped) > 150
    assert {one: rule for one, rule in found.items() if one > 900_000} == shipped
    assert all(groups[name] for name in core_rule_set().GROUPS)


def test_only_what_looks_at_values_is_passed_over_without_any(front_door: FrontDoor) -> None:
    sent = {"ARGS", "ARGS_GET", "ARGS_NAMES", "REQUEST_COOKIES", "REQUEST_COOKIES_NAMES", "REQUEST_BODY", "XML"}
    for name in ("values", "prose"):
        for chain, _ in chains(front_door.directory / f"modsecurity/rules/{name}.conf"):
            assert {one["variable"] for one in chain[0]["variables"]} <= sent, number(chain)


def test_what_takes_prose_for_an_attack_looks_at_answers_and_cookies_only(front_door: FrontDoor) -> None:
    for chain, _ in chains(front_door.directory / "modsecurity/rules/prose.conf"):
        seen = {one["variable"] for one in chain[0]["variables"]}
        assert seen <= {"ARGS", "REQUEST_COOKIES", "REQUEST_COOKIES_NAMES", "XML"}, number(chain)
