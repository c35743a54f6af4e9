"""Rules that are not tried on plain values, or on calm requests, could not have matched them."""

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, find, settings
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument, NoSuchExample, Unsatisfiable

from tests.waf import attacks
from tests.waf.conftest import Send
from tests.waf.front_door import FrontDoor
from tests.waf.needless import Screen, may_match, needless, number, rules_of, screen_of

PATH = "/api/v1/forms/frm_0123456789ABCDEFGHJKMNPQRS/responses"
PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,")


def group(front_door: FrontDoor, name: str) -> Path:
    return front_door.directory / f"modsecurity/rules/{name}.conf"


def passed_over(front_door: FrontDoor) -> list[Path]:
    return [group(front_door, name) for name in ("plain", "calm")]


def screens_of(front_door: FrontDoor, numbers: Iterable[int]) -> list[Screen]:
    path = front_door.directory / "modsecurity/screens.conf"
    return [screen_of(chain[0]) for chain in rules_of(path) if number(chain) in set(numbers)]


def plain(front_door: FrontDoor) -> tuple[list[Screen], set[int]]:
    """The screens, and the rules that are not tried on what passes them."""
    return screens_of(front_door, {10700}), {number(chain) for chain in rules_of(group(front_door, "plain"))}


def calm(front_door: FrontDoor) -> tuple[list[Screen], set[int]]:
    rules = {number(chain) for path in passed_over(front_door) for chain in rules_of(path)}
    return screens_of(front_door, range(10702, 10709)), rules


def test_a_rule_that_plain_values_skip_can_match_none_of_them(front_door: FrontDoor) -> None:
    screens, skipped = plain(front_door)
    assert len(screens[0].characters) > 60
    assert len(skipped) > 20
    assert skipped - needless(passed_over(front_door), screens, skipped) == set()


@pytest.mark.parametrize("family", ["10", "92", "930", "931", "932", "933", "941", "942", "943", "944"])
def test_a_rule_that_calm_requests_skip_can_match_none_of_them(front_door: FrontDoor, family: str) -> None:
    screens, skipped = calm(front_door)
    assert len(screens) == 7
    listed = {one for one in skipped if str(one).startswith(family)}
    assert listed
    assert listed - needless(passed_over(front_door), screens, listed) == set()


def test_a_command_needs_what_the_short_expression_finds(front_door: FrontDoor) -> None:
    path = front_door.directory / "modsecurity" / "own.conf"
    (chain,) = [chain for chain in rules_of(path) if number(chain) == 10030]
    short, long = screen_of(chain[1]), chain[2]["operator_argument"]
    assert not may_match(long, short)
    for place in range(len(short.patterns)):
        less = (*short.patterns[:place], *short.patterns[place + 1 :])
        assert may_match(long, replace(short, patterns=less))


@pytest.mark.parametrize("more", ["<", "=", ":", "$"])
def test_the_proof_fails_for_characters_that_rules_look_for(front_door: FrontDoor, more: str) -> None:
    (screen,), skipped = plain(front_door)
    wider = replace(screen, characters=screen.characters | {more})
    assert skipped - needless(passed_over(front_door), [wider], skipped) != set()


@pytest.mark.parametrize("rule", [942270, 942390, 933150, 944110, 942140, 941180])
def test_the_proof_fails_without_the_words(front_door: FrontDoor, rule: int) -> None:
    screens, skipped = calm(front_door)
    assert rule in skipped
    assert needless(passed_over(front_door), [replace(screen, patterns=()) for screen in screens], {rule}) == set()


@pytest.mark.parametrize("unseen", range(7))
def test_the_proof_fails_without_any_of_the_screens(front_door: FrontDoor, unseen: int) -> None:
    screens, _ = calm(front_door)
    rule = {0: 930100, 1: 932170, 2: 941120, 3: 931110, 4: 944200, 5: 933150, 6: 942150}[unseen]
    rest = [screen for place, screen in enumerate(screens) if place != unseen]
    assert needless(passed_over(front_door), screens, {rule}) == {rule}
    assert needless(passed_over(front_door), rest, {rule}) == set()


def test_what_is_made_to_match_a_rule_is_held_by_a_screen(front_door: FrontDoor) -> None:
    """The other way round: texts that match each rule, of nothing but the characters of calm values."""
    screens, skipped = calm(front_door)
    path = front_door.directory / "modsecurity/screens.conf"
    (values,) = [chain[0] for chain in rules_of(path) if number(chain) == 10707]
    (words,) = [chain[0]["operator_argument"].split() for chain in rules_of(path) if number(chain) == 10706]
    (java,) = [chain[0]["operator_argument"].split() for chain in rules_of(path) if number(chain) == 10705]
    phrases = "|".join(map(re.escape, [*words, *java]))
    held = re.compile(f"{values['operator_argument']}|{phrases}", re.ASCII | re.DOTALL)
    # Blanks that a transformation would join, and letters that it would change, are left to the proof.
    alphabet = st.sampled_from(sorted(one for one in screens[6].characters if one.isascii() and one.isprintable()))
    tried = set()
    for chain in (chain for file in passed_over(front_door) for chain in rules_of(file) if number(chain) in skipped):
        rule = chain[0]
        if rule["operator"] != "@rx" or len(chain) > 1 or "ARGS" not in {one["variable"] for one in rule["variables"]}:
            continue
        expression = re.sub(r"(?<!\\)\(\?[ims]+\)", "", rule["operator_argument"])
        try:
            matching = re.compile(expression, re.ASCII | re.DOTALL | re.IGNORECASE)
            strategy = st.from_regex(matching, alphabet=alphabet)
            free = find(
                strategy,
                lambda text: held.search(text) is None,
                settings=settings(
                    max_examples=60,
                    derandomize=True,
                    database=None,
                    phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck),
                    deadline=None,
                ),
            )
        except NoSuchExample:
            tried.add(number(chain))
            continue
        except (InvalidArgument, Unsatisfiable, re.error, NotImplementedError):
            continue  # no text of these characters, or syntax of PCRE
        pytest.fail(f"{number(chain)} matches {free!r}, which passes the screens")
    print(f"\n{len(tried)} rules met by texts made to match them")
    assert len(tried) >= 10


@pytest.mark.parametrize("escape", ["%", "&", "\\", "\xff"])
def test_a_character_that_may_stand_for_another_is_left_to_the_rules(escape: str) -> None:
    screen = Screen(frozenset({"ARGS"}), PLAIN | {escape})
    changing = ["utf8toUnicode", "urlDecodeUni", "htmlEntityDecode", "jsDecode"]
    assert may_match("<script", screen, changing)
    assert not may_match("<script", screen)


@pytest.mark.parametrize(
    ("expression", "may"),
    [
        ("<script", False),
        ("(?:<|x)script", True),
        ("a<*b", True),
        ("a<+b", False),
        ("[<>=]", False),
        ("[^a-z]", True),
        (r"[^\w\s]x", True),
        (r"[^\w\s.,]x", False),
        (r"(?=<)a", True),
        ("(?i)ÄA", False),
        ("drop table", False),
        ("dr.p", True),
        ("d(?:rop|ump)", True),
        ("d[r]{1}op+", False),
        (r"\bor\b +1", False),
        ("or +1", True),
        ("[[:alpha:]]", True),
    ],
)
def test_what_may_match_is_decided_on_the_expression(expression: str, may: bool) -> None:
    screen = screen_of(
        {
            "variables": [{"variable": "ARGS", "variable_part": "", "negated": False, "counter": False}],
            "operator": "@rx",
            "operator_argument": r"(?i)[^A-Za-z0-9 .,]|drop|\bor\s+\d",
        }
    )
    assert may_match(expression, screen) is may


@pytest.mark.parametrize(
    ("transformation", "more", "may"),
    [
        (["lowercase"], "", False),
        (["cmdLine"], "", False),
        (["cmdLine"], "'", True),
        (["removeWhitespace"], "", True),
        (["compressWhitespace"], "", False),
        (["normalizePath"], "/", False),
        (["removeNulls"], "\0", True),
        (["base64Decode"], "", True),
        (["none", "lowercase"], "", False),
        (["removeWhitespace", "none"], "", False),
    ],
)
def test_a_word_that_a_transformation_may_put_together_proves_nothing(
    transformation: list[str], more: str, may: bool
) -> None:
    words = screen_of(
        {
            "variables": [{"variable": "ARGS", "variable_part": "", "negated": False, "counter": False}],
            "operator": "@rx",
            "operator_argument": "(?i)xdrop",
        }
    )
    screen = replace(words, characters=PLAIN | frozenset(more))
    assert may_match("xdrop", screen, transformation) is may


def test_a_letter_that_is_read_as_an_x_makes_a_word(front_door: FrontDoor) -> None:
    cyrillic = PLAIN | frozenset(map(chr, (*range(0x80, 0xC0), 0xD0, 0xD1)))
    line = {
        "variables": [{"variable": "ARGS", "variable_part": "", "negated": False, "counter": False}],
        "operator": "@rx",
        "operator_argument": "(?i)xor|drop",
    }
    screen = replace(screen_of(line), characters=cyrillic)
    assert may_match("xor", screen, ["utf8toUnicode", "urlDecodeUni"])
    assert not may_match("drop", screen, ["utf8toUnicode", "urlDecodeUni"])
    assert not may_match("xor", screen)
    # As the proof supposes: every letter that calm values may have, and none below it, is an x.
    rows = (front_door.directory / "modsecurity" / "letters.map").read_text()
    letters = {int(code, 16): int(to, 16) for code, to in re.findall(r"\b([0-9a-f]{4}):([0-9a-f]{2})\b", rows)}
    assert {letters[code] for code in range(0x100, 0xF000)} == {ord("x")}
    assert min(letters) == 0x100


def test_a_body_that_is_no_utf_8_is_refused(send: Send) -> None:
    assert send(attacks.request("POST", PATH, body=b'{"answers": {"comment": "\xc3("}}')) == (400, False)


@pytest.mark.parametrize(
    "text",
    ["zlib_decode", "java.lang.Runtime", "1 union select 2", "Straße zlib_decode", "powershell.exe", "get-content"],
)
def test_an_attack_without_any_sign_is_found_among_calm_values(send: Send, text: str) -> None:
    calm = {f"member_{number}": "Ein ruhiger Satz, wie die meisten für größere Städte." for number in range(20)}
    assert send(attacks.request("POST", PATH, body=json.dumps(calm).encode())) == (200, True)
    attack = json.dumps({**calm, "comment": text}, ensure_ascii=False).encode()
    assert send(attacks.request("POST", PATH, body=attack)) == (403, False)


def test_an_attack_in_one_value_is_found_among_plain_ones(send: Send) -> None:
    plain = {f"member_{number}": "A plain value, as most are." for number in range(20)}
    attack = {**plain, "comment": "<script>alert(1)</script>"}
    assert send(attacks.request("POST", PATH, body=json.dumps(plain).encode())) == (200, True)
    assert send(attacks.request("POST", PATH, body=json.dumps(attack).encode())) == (403, False)


def test_an_attack_in_a_header_is_found_beside_plain_values(send: Send) -> None:
    headers = {"User-Agent": "<script>alert(1)</script>"}
    assert send(attacks.request("GET", PATH, headers=headers)) == (403, False)


@pytest.mark.parametrize(
    "request_of",
    [
        attacks.request("GET", f"{PATH}?q=1%20union%20select%202"),
        attacks.request("GET", PATH, headers={"Cookie": "a=1 union select 2"}),
        attacks.request("GET", PATH, headers={"Cookie": "a=<script>alert(1)</script>"}),
        attacks.request("GET", PATH, headers={"Cookie": "a=;cat /etc/passwd"}),
        attacks.request("POST", PATH, headers={"Cookie": "a=;cat /etc/passwd"}, body=b'{"answers": {"comment": "x"}}'),
        attacks.request("DELETE", PATH, body=b'{"a": "1 union select 2"}'),
    ],
)
def test_an_attack_is_found_wherever_a_request_has_values(send: Send, request_of: bytes) -> None:
    assert send(request_of) == (403, False)


@pytest.mark.parametrize("name", ["x'; drop table responses--", "<script>", "a/*b", "x;id|nc", "../../etc/passwd"])
def test_a_name_with_what_only_an_attack_needs_is_refused(send: Send, name: str) -> None:
    assert send(attacks.request("POST", PATH, body=json.dumps({"answers": {name: "1"}}).encode())) == (403, False)


@pytest.mark.parametrize("name", ["größe", "первый ответ", "$defs", "first-name", "a.b", "名前", "q1: why?"])
def test_a_name_in_any_language_passes(send: Send, name: str) -> None:
    assert send(attacks.request("POST", "/api/v1/forms", body=json.dumps({"schema": {name: "text"}}).encode())) == (
        200,
        True,
    )
