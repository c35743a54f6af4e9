"""Rules that are not tried on plain values could not have matched them."""

import json
import re

import pytest

from tests.waf import attacks
from tests.waf.conftest import Send
from tests.waf.debian import unpacked
from tests.waf.front_door import PACKAGES, FrontDoor
from tests.waf.needless import may_match, needless

RULES = "usr/share/modsecurity-crs/rules"
PATH = "/api/v1/forms/frm_0123456789ABCDEFGHJKMNPQRS/responses"


def configured(front_door: FrontDoor) -> tuple[frozenset[str], set[int]]:
    """The characters of a plain value, and the rules that are not tried on it."""
    text = (front_door.directory / "modsecurity" / "exclusions.conf").read_text()
    plain = re.search(r'"@rx \[\^(\S+(?: \S+)*)\]" \\\n    "id:10700,', text)
    skipping = re.search(r'"id:10701,[^"]*"', text)
    assert plain and skipping
    allowed = re.compile(f"[{plain[1]}]")
    characters = frozenset(chr(code) for code in range(0x110000) if allowed.match(chr(code)))
    return characters, {int(number) for number in re.findall(r"ctl:ruleRemoveById=(\d+)", skipping[0])}


def test_a_rule_that_plain_values_skip_can_match_none_of_them(front_door: FrontDoor) -> None:
    characters, skipped = configured(front_door)
    assert len(characters) > 60
    assert len(skipped) > 20
    assert skipped - needless(unpacked("front-door", PACKAGES) / RULES, characters) == set()


@pytest.mark.parametrize("more", ["<", "=", ":", "$"])
def test_the_proof_fails_for_characters_that_rules_look_for(front_door: FrontDoor, more: str) -> None:
    characters, skipped = configured(front_door)
    assert skipped - needless(unpacked("front-door", PACKAGES) / RULES, characters | {more}) != set()


@pytest.mark.parametrize("escape", ["%", "&", "\\", "+", "ü"])
def test_a_character_that_may_stand_for_another_is_refused_by_the_proof(front_door: FrontDoor, escape: str) -> None:
    characters, _ = configured(front_door)
    with pytest.raises(ValueError, match="stand for themselves"):
        needless(unpacked("front-door", PACKAGES) / RULES, characters | {escape})


@pytest.mark.parametrize(
    ("expression", "may"),
    [
        ("<script", False),
        ("(?:<|x)script", True),
        ("a<*b", True),
        ("a<+b", False),
        ("[<>=]", False),
        ("[^a-z]", True),
        (r"[^\w\s]x", False),
        (r"\W", True),
        (r"\Wx\d", False),
        (r"(?=<)a", True),
        ("(?i)ÄA", False),
    ],
)
def test_what_may_match_is_decided_on_the_expression(expression: str, may: bool) -> None:
    assert may_match(expression, frozenset("abcipqrstxABCIPQRSTX ")) is may


def test_an_attack_in_one_value_is_found_among_plain_ones(send: Send) -> None:
    plain = {f"member_{number}": "A plain value, as most are." for number in range(20)}
    attack = {**plain, "comment": "<script>alert(1)</script>"}
    assert send(attacks.request("POST", PATH, body=json.dumps(plain).encode())) == (200, True)
    assert send(attacks.request("POST", PATH, body=json.dumps(attack).encode())) == (403, False)


def test_an_attack_in_a_header_is_found_beside_plain_values(send: Send) -> None:
    headers = {"User-Agent": "<script>alert(1)</script>"}
    assert send(attacks.request("GET", PATH, headers=headers)) == (403, False)


@pytest.mark.parametrize("name", ["x'; drop table responses--", "<script>", "a/*b", "x;id|nc", "../../etc/passwd"])
def test_a_name_with_what_only_an_attack_needs_is_refused(send: Send, name: str) -> None:
    assert send(attacks.request("POST", PATH, body=json.dumps({"answers": {name: "1"}}).encode())) == (403, False)


@pytest.mark.parametrize("name", ["größe", "первый ответ", "$defs", "first-name", "a.b", "名前", "q1: why?"])
def test_a_name_in_any_language_passes(send: Send, name: str) -> None:
    assert send(attacks.request("POST", "/api/v1/forms", body=json.dumps({"schema": {name: "text"}}).encode())) == (
        200,
        True,
    )
