"""Which rules cannot match a value made of given characters, proved from the rules' own text.

A rule needs a character that the value lacks, where no string of the given characters is in its language. For a regular
expression that is decided on its syntax tree, erring towards "may match": a look-around, an anchor or a back reference
may always hold. The transformations that a rule applies first must turn such strings into such strings.
"""

import importlib
import re
import warnings
from collections.abc import Iterable, Iterator, Set
from pathlib import Path
from typing import Any

import msc_pyparser  # type: ignore[import-untyped]

#: What of a request a rule may look at: what rule 10700 looks at too, or what is taken from it (names, by
#: retractions.conf), or what no request has that comes so far (bodies are JSON).
TARGETS = {
    *("ARGS", "ARGS_GET", "ARGS_NAMES", "ARGS_GET_NAMES", "REQUEST_COOKIES", "REQUEST_COOKIES_NAMES"),
    *("REQUEST_FILENAME", "REQUEST_HEADERS:User-Agent", "REQUEST_HEADERS:Referer", "XML:/*"),
}
#: They remove, replace by a blank or lower what they find; or begin at a percent sign, ampersand, backslash or plus.
CLOSED = {
    *("none", "lowercase", "compressWhitespace", "removeNulls", "removeWhitespace", "cmdLine", "normalizePath"),
    *("urlDecodeUni", "htmlEntityDecode", "jsDecode", "cssDecode", "replaceComments", "utf8toUnicode"),
}
ESCAPES = frozenset("%&\\+*")


def needless(rules: Path, characters: Set[str]) -> set[int]:
    """The rules of levels 1 and 2 in the folder that no value of these characters can match.

    Raises ValueError where a character begins an escape, which a transformation would turn into another one.
    """
    if wrong := characters & ESCAPES or {one for one in characters if not one.isascii()}:
        raise ValueError(f"expected characters that stand for themselves, found {sorted(wrong)}")
    found = set()
    for path in sorted(rules.glob("REQUEST-9[2-4]*.conf")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parser = msc_pyparser.MSCParser()
            parser.parser.parse(path.read_text())
        for chain in _chains(parser.configlines):
            sees = {target for link in chain for target in _targets(link)}
            if sees <= TARGETS and any(_cannot_match(link, characters, path.parent) for link in chain):
                found.add(int(_actions(chain[0], "id")[0]))
    return found


def _chains(lines: Iterable[Any]) -> Iterator[list[Any]]:
    """Each rule with those that are chained to it: all of them must match. Stops where level 3 begins."""
    chain: list[Any] = []
    for line in lines:
        if line["type"] != "SecRule":
            continue
        chain.append(line)
        if not _actions(line, "chain"):
            if _actions(line, "skipAfter") and line["operator_argument"] == "3":
                return
            yield chain
            chain = []


def _actions(line: Any, name: str) -> list[str]:
    return [action["act_arg"] for action in line.get("actions", []) if action["act_name"] == name]


def _targets(line: Any) -> Iterator[str]:
    for one in line["variables"]:
        if not one["negated"]:
            yield one["variable"] + (f":{one['variable_part']}" if one["variable_part"] else "")


def _cannot_match(line: Any, characters: Set[str], folder: Path) -> bool:
    if line["operator_negated"] or not set(_actions(line, "t")) <= CLOSED:
        return False
    argument = line["operator_argument"]
    match line["operator"]:
        case "@rx":
            return not may_match(argument, characters)
        case "@pm":
            phrases = argument.split()
        case "@pmf" | "@pmFromFile":
            phrases = [phrase for name in argument.split() for phrase in _phrases(folder / name)]
        case _:
            return False
    return not any(set(phrase) <= characters for phrase in phrases)


def _phrases(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]


def may_match(expression: str, characters: Set[str]) -> bool:
    """Whether a string of these characters may match; True also where that cannot be decided."""
    try:
        tree = importlib.import_module("re._parser").parse(expression, re.IGNORECASE | re.DOTALL)
    except re.error:
        return True  # PCRE's own syntax
    return _sequence(tree, characters)


def _sequence(nodes: Iterable[Any], characters: Set[str]) -> bool:
    return all(_node(str(kind), value, characters) for kind, value in nodes)


def _node(kind: str, value: Any, characters: Set[str]) -> bool:
    match kind:
        case "LITERAL":
            return bool({chr(value), chr(value).swapcase()} & characters)
        case "IN":
            return any(_is_in(value, one) for one in characters)
        case "BRANCH":
            return any(_sequence(branch, characters) for branch in value[1])
        case "SUBPATTERN":
            return _sequence(value[3], characters)
        case "MAX_REPEAT" | "MIN_REPEAT" | "POSSESSIVE_REPEAT":
            return value[0] == 0 or _sequence(value[2], characters)
        case "ATOMIC_GROUP":
            return _sequence(value, characters)
        case _:
            return True


def _is_in(items: Iterable[Any], character: str) -> bool:
    either = {ord(character), ord(character.swapcase())}
    inside, negated = False, False
    for kind, value in items:
        match str(kind):
            case "NEGATE":
                negated = True
            case "LITERAL":
                inside |= value in either
            case "RANGE":
                inside |= any(value[0] <= one <= value[1] for one in either)
            case _:  # a category, such as \w
                inside |= bool(re.match(_CATEGORIES[str(value)], character))
    return inside != negated


_CATEGORIES = {
    "CATEGORY_DIGIT": r"\d",
    "CATEGORY_NOT_DIGIT": r"\D",
    "CATEGORY_SPACE": r"\s",
    "CATEGORY_NOT_SPACE": r"\S",
    "CATEGORY_WORD": r"\w",
    "CATEGORY_NOT_WORD": r"\W",
}
