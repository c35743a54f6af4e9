"""What stands in for parts of the Core Rule Set keeps what the rest of it needs."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.waf import attacks
from tests.waf.arrangement import role_values
from tests.waf.conftest import Send
from tests.waf.debian import unpacked
from tests.waf.front_door import PACKAGES, FrontDoor

PATH = "/api/v1/forms/frm_0123456789ABCDEFGHJKMNPQRS/responses"
#: Twelve signs in a row are only reported, by a rule of level 2.
REPORTED = "a ~ b ! c @ d # e % f ^ g * h = i : j ~ k ! l ~ m"


def _included(front_door: FrontDoor) -> list[Path]:
    text = (front_door.directory / "modsecurity" / "main.conf").read_text()
    return [Path(name) for name in re.findall(r"(?m)^Include (\S+)$", text)]


def _originals() -> list[Path]:
    """The rule set's files that are in use, as Debian ships them."""
    folder = unpacked("front-door", PACKAGES) / "usr/share/modsecurity-crs/rules"
    return [folder / name for name in role_values()["nginx_waf_files"]]


def _rules(path: Path) -> Iterator[tuple[int, str]]:
    """The identifier and the text of each rule, its chain with it."""
    text = "\n".join(line for line in path.read_text().splitlines() if not line.lstrip().startswith("#"))
    for rule in re.split(r"(?m)^(?=Sec(?:Rule|Action)\b)", text):
        if found := re.search(r"\bid:(\d+)", rule):
            yield int(found[1]), rule


def _level(identifier: int) -> int | None:
    """Which level a check asks for, of an identifier of the Core Rule Set."""
    rest = identifier % 1000
    return (rest - 9) // 2 if identifier > 900_000 and 11 <= rest <= 18 else None


def test_no_rule_reads_a_variable_that_nobody_sets(front_door: FrontDoor) -> None:
    rules = [rule for path in _included(front_door) for _, rule in _rules(path)]
    # What is remembered of an address is never read.
    text = re.sub(r"(?:set|expire)var:'?ip\.[^,]*", "", "\n".join(rules))
    read = set(re.findall(r"(?i)(?:%\{tx\.|(?<![\w.&])TX:)([a-z_]\w*)", text))
    assert len(read) > 10
    folder = unpacked("front-door", PACKAGES) / "usr/share/modsecurity-crs/rules"
    # What only the operator of a Core Rule Set sets ("at most so many parameters") limits nothing where it is missing.
    initial = _set((folder / "REQUEST-901-INITIALIZATION.conf").read_text())
    assert {name.lower() for name in read} & initial - _set(text) == set()


def _set(text: str) -> set[str]:
    return {name.lower() for name in re.findall(r"(?i)setvar:'?tx\.([a-z_]\w*)", text)}


def test_a_rule_that_is_only_reported_bears_its_level() -> None:
    """Of long bodies rules are left out by this mark."""
    reported = 0
    for path in _originals():
        section = None
        for identifier, rule in _rules(path):
            section = _level(identifier) or section
            if section is not None and _level(identifier) is None and "REQUEST-949" not in path.name:
                assert ("paranoia-level/2" in rule) is (section == 2), identifier
                reported += section == 2
    assert reported > 40


def _reported(send: Send, front_door: FrontDoor, comment: str, name: str) -> set[int]:
    """The rules that found something in an answer that passes."""
    body = json.dumps({"answers": {"comment": comment}}).encode()
    assert send(attacks.request("POST", PATH, headers={"X-Request-ID": name}, body=body)) == (200, True)
    return {int(finding.rule) for finding in front_door.findings(name)}


def test_what_is_only_reported_is_not_searched_for_in_a_long_body(send: Send, front_door: FrontDoor) -> None:
    short = _reported(send, front_door, REPORTED, "test-setup-short")
    assert 942430 in short
    assert _reported(send, front_door, REPORTED + " x" * 33_000, "test-setup-long") == set()


@pytest.mark.parametrize("header", ["Proxy", "Accept-Charset", "Content-Range", "If", "Lock-Token", "LOCK-TOKEN"])
def test_a_header_that_no_client_needs_is_refused(send: Send, header: str) -> None:
    assert send(attacks.request("GET", PATH, headers={header: "x"})) == (403, False)


@pytest.mark.parametrize("header", ["If-None-Match", "If-Match", "Content-Language", "Proxied-By"])
def test_a_header_of_a_similar_name_passes(send: Send, header: str) -> None:
    assert send(attacks.request("GET", PATH, headers={header: "x"})) == (200, True)


@pytest.mark.parametrize(
    "comment", ["x; cat /etc/hosts", "ls -la", "$(id)", "ping 10.0.0.1", "curl https://example.org", "kill 1234 "]
)
def test_a_command_in_an_answer_is_refused(send: Send, comment: str) -> None:
    body = json.dumps({"answers": {"comment": comment}}).encode()
    assert send(attacks.request("POST", PATH, body=body)) == (403, False)


@pytest.mark.parametrize(
    "comment",
    [
        "Our shop:\nLocation: Berlin\nOpen from 9 to 5",
        'My letter began with\n\nContent-Type: text/html; charset="utf-8"',
        'Мотылёк: "На мой век огоньков хватит!"',
        'A los 9 años descubrí que no me llamaba "¡CÁLLATE!"',
    ],
)
def test_quoted_words_and_headed_lines_are_prose(send: Send, comment: str) -> None:
    assert send(attacks.answer(comment)) == (200, True)


@pytest.mark.parametrize(
    "comment",
    [
        "x\r\nSet-Cookie: session=1",
        "x\r\nContent-Length: 0\r\n\r\n",
        "é' or 1=1 -- ",
        "\uff07 or 1=1 -- ",
        "%27 or 1=1 -- ",
        "x' or 'ö'='ö",
    ],
)
def test_sql_and_headers_in_an_answer_are_refused_whatever_their_letters(send: Send, comment: str) -> None:
    assert send(attacks.answer(comment)) == (403, False)


def test_a_long_body_is_searched_for_what_is_refused(send: Send) -> None:
    body = json.dumps({"answers": {"comment": "A sentence. " * 7000, "other": "<script>alert(1)</script>"}}).encode()
    assert send(attacks.request("POST", PATH, body=body)) == (403, False)
