"""Which rules cannot match a request that passes given screens, proved from the text of both.

A screen is a rule that looks for characters outside a set, and for patterns. What it lets pass is a regular language,
and so is what a rule matches: the rule is needless where no string is in both. Both automata run side by side over the
rule's syntax tree, as sets of states. What cannot be followed errs towards "may match": look-arounds hold, back
references stand for anything, case never matters. A transformation is followed backwards, each character that it leaves
to what it may have been (`_removing`, `_unicode`, …): a pattern is looked for where the screen looks, before it.
"""

import importlib
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import msc_pyparser  # type: ignore[import-untyped]

#: A set of characters and whether any number of them may follow each other.
Step = tuple[frozenset[str], bool]
#: What a character may have been before a transformation: alternatives, each a row of steps.
Origins = dict[str, list[list[Step]]]
#: Of the screens' automaton: its state, and whether the character before was one of a word.
Raw = tuple[int, bool]
#: Raw, whether the transformed character before was one of a word, and what a boundary in the rule wants of the next.
State = tuple[int, bool, bool, bool | None]

#: What no request has that comes so far: bodies are JSON, and names are taken from the rules as these are arranged.
ABSENT = frozenset({"ARGS_NAMES", "ARGS_GET_NAMES", "XML:/*", "XML://@*", "FILES", "FILES_NAMES"})
_PART_OF = {"ARGS_GET": "ARGS", "MATCHED_VAR": "MATCHED", "MATCHED_VARS": "MATCHED"}
_ALL = frozenset(map(chr, range(256)))
_WORD = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")
_BLANK = frozenset(" \t\n\r\x0b\x0c")
_BOUNDARY = "boundary"
_NOTHING: tuple[()] = ()
#: Syntax that Python reads otherwise than PCRE, or not at all.
_FOREIGN = re.compile(r"\[:\^?[a-z]+:\]|\{,\d|\(\?[x&R|0-9+-]|\(\*|\\[VhHRKQEGpPXCNogek0]|\\x\{|%\{")


class Undecided(Exception):
    """The text is beyond this proof."""


@dataclass(frozen=True)
class Screen:
    """What is known of the values of `targets`: made of `characters` (bytes), and none of `patterns` is in them."""

    targets: frozenset[str]
    characters: frozenset[str]
    patterns: tuple[Any, ...] = ()


def rules_of(path: Path) -> list[list[Any]]:
    """The file's rules of levels 1 and 2, each with those that are chained to it."""
    return list(_chains(parsed(path)))


def parsed(path: Path) -> list[Any]:
    """The file's directives."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parser = msc_pyparser.MSCParser()
        parser.parser.parse(path.read_text())
    return list(parser.configlines)


def number(chain: Sequence[Any]) -> int:
    return int(actions(chain[0], "id")[0])


def actions(line: Any, name: str) -> list[str]:
    return [action["act_arg"] for action in line.get("actions", []) if action["act_name"] == name]


def screen_of(line: Any) -> Screen:
    """A screen from its rule: `@rx [^characters]|pattern|…` or `@pm phrase …`."""
    targets, argument = frozenset(_targets(line)), line["operator_argument"]
    if line["operator"] == "@pm":
        phrases = argument.split()
        excluded = frozenset(phrase for phrase in phrases if len(phrase) == 1)
        return Screen(targets, _ALL - excluded, tuple(_parsed(re.escape(phrase)) for phrase in phrases))
    tree = list(_parsed(argument))
    branches = tree[0][1][1] if str(tree[0][0]) == "BRANCH" and len(tree) == 1 else [tree]
    characters, patterns = _ALL, []
    for branch in map(list, branches):
        kind, value = branch[0]
        if len(branch) == 1 and str(kind) == "IN" and str(value[0][0]) == "NEGATE":
            characters &= frozenset(one for one in _ALL if not _is_in(value, one))
        else:
            patterns.append(branch)
    return Screen(targets, characters, tuple(patterns))


def needless(paths: Iterable[Path], screens: Sequence[Screen], only: Set[int] | None = None) -> set[int]:
    """The rules of levels 1 and 2 in the files that match no value of a request that passes all these screens.

    `only` names the rules to try.
    """
    proofs: dict[Any, _Proof] = {}
    found = set()
    for path in paths:
        for chain in rules_of(path):
            if only is not None and number(chain) not in only:
                continue
            absent = ABSENT if "OWASP_CRS" in actions(chain[0], "tag") else ABSENT - {"ARGS_NAMES"}
            if any(
                _cannot_match(link, chain[0] if place == 1 else None, absent, screens, proofs, path.parent)
                for place, link in enumerate(chain)
            ):
                found.add(number(chain))
    return found


def may_match(expression: str, screen: Screen, transformations: Sequence[str] = ()) -> bool:
    """Whether a value that passes the screen may match; True also where that cannot be decided."""
    try:
        return _Proof(screen, transformations).matches(_parsed(expression))
    except Undecided:
        return True


def _chains(lines: Iterable[Any]) -> Iterator[list[Any]]:
    """Stops where level 3 begins."""
    chain: list[Any] = []
    for line in lines:
        if line["type"] != "SecRule":
            continue
        chain.append(line)
        if not actions(line, "chain"):
            if actions(line, "skipAfter") and line["operator_argument"] == "3":
                return
            if not actions(line, "skipAfter") or actions(line, "skipAfter")[0] in {"NOT-CALM", "NOT-PLAIN"}:
                yield chain
            chain = []


def _targets(line: Any) -> Iterator[str]:
    for one in line["variables"]:
        if not one["negated"]:
            counted = "&" if one["counter"] else ""
            yield counted + one["variable"] + (f":{one['variable_part']}" if one["variable_part"] else "")


def _screen_for(target: str, screens: Sequence[Screen]) -> Screen | None:
    target = _PART_OF.get(target, target)
    names = {target, target.partition(":")[0]} if target.startswith("REQUEST_") else {target}
    covering = [screen for screen in screens if screen.targets & names]
    if not covering:
        return None
    characters = frozenset.intersection(*(screen.characters for screen in covering))
    return Screen(frozenset(), characters, tuple(pattern for screen in covering for pattern in screen.patterns))


def _cannot_match(
    link: Any,
    earlier: Any,
    absent: Set[str],
    screens: Sequence[Screen],
    proofs: dict[Any, "_Proof"],
    folder: Path,
) -> bool:
    if link["operator_negated"]:
        return False
    for target in set(_targets(link)) - absent:
        transformations = actions(link, "t")
        places = {target}
        if _PART_OF.get(target) == "MATCHED":
            # The values that matched before, as the rule before transformed them.
            places = set(_targets(earlier)) - absent if earlier else {target}
            transformations = (
                [*actions(earlier, "t"), *(name for name in transformations if name != "none")] if earlier else []
            )
        for place in places:
            screen = _screen_for(place, screens)
            if screen is None:
                return False
            key = (screen.characters, tuple(map(id, screen.patterns)), tuple(transformations))
            try:
                if key not in proofs:
                    proofs[key] = _Proof(screen, transformations)
                if _may(proofs[key], link, folder):
                    return False
            except Undecided:
                return False
    return True


def _may(proof: "_Proof", link: Any, folder: Path) -> bool:
    argument = link["operator_argument"]
    match link["operator"]:
        case "@rx":
            return proof.matches(_parsed(argument))
        case "@pm" if "|" not in argument:
            phrases = argument.split()
        case "@pmf" | "@pmFromFile":
            phrases = [phrase for name in argument.split() for phrase in _phrases(folder / name)]
        case "@validateByteRange":
            ends = [part.split("-") for part in argument.split(",")]
            valid = {code for end in ends for code in range(int(end[0]), int(end[-1]) + 1)}
            return not {ord(one) for one in proof.characters} <= valid
        case _:
            raise Undecided(link["operator"])
    return any(proof.matches(_parsed(re.escape(phrase))) for phrase in phrases)


def _phrases(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]


def _parsed(expression: str) -> Any:
    if _FOREIGN.search(expression):
        raise Undecided(expression)
    # Case never matters here, ends of lines hold anywhere; PCRE's \v is all vertical space.
    expression = re.sub(r"(?<!\\)\(\?[ims]+\)", "", expression).replace(r"\z", r"\Z").replace(r"\v", r"\n\v\f\r\x85")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("re._parser").parse(expression, re.ASCII | re.DOTALL)
    except (re.error, OverflowError) as wrong:
        raise Undecided(expression) from wrong


def _lower(character: str) -> str:
    return character.lower() if character.isascii() else character


def _swapped(character: str) -> str:
    return character.swapcase() if character.isascii() else character


_CATEGORIES = {
    "CATEGORY_DIGIT": re.compile(r"\d", re.ASCII),
    "CATEGORY_NOT_DIGIT": re.compile(r"\D", re.ASCII),
    "CATEGORY_SPACE": re.compile(r"\s", re.ASCII),
    "CATEGORY_NOT_SPACE": re.compile(r"\S", re.ASCII),
    "CATEGORY_WORD": re.compile(r"\w", re.ASCII),
    "CATEGORY_NOT_WORD": re.compile(r"\W", re.ASCII),
}


def _is_in(items: Iterable[Any], character: str) -> bool:
    inside, negated = False, False
    for kind, value in items:
        match str(kind):
            case "NEGATE":
                negated = True
            case "LITERAL":
                inside |= value == ord(character)
            case "RANGE":
                inside |= value[0] <= ord(character) <= value[1]
            case _:  # a category, such as \w
                inside |= bool(_CATEGORIES[str(value)].match(character))
    return inside != negated


def _one_of(kind: str, value: Any, characters: Iterable[str]) -> frozenset[str]:
    """Those that a node for a single character takes, in either case."""
    match kind:
        case "LITERAL":
            return frozenset(one for one in characters if chr(value) in {one, _swapped(one)})
        case "NOT_LITERAL":
            return frozenset(one for one in characters if {one, _swapped(one)} - {chr(value)})
        case "IN":
            return frozenset(one for one in characters if _is_in(value, one) or _is_in(value, _swapped(one)))
    return frozenset(characters)


class _Patterns:
    """Where a screen's patterns stand in a text: an automaton, made deterministic as it is needed.

    Between a character of a word and another one the text has a mark, which only `\\b` takes.
    """

    def __init__(self, patterns: Iterable[Any]) -> None:
        self._empty: list[list[int]] = [[]]
        self._edges: list[list[tuple[frozenset[str], int]]] = [[]]
        self._final = {self._add(pattern, 0) for pattern in patterns}
        self._numbers: dict[frozenset[int], int] = {}
        self._sets: list[frozenset[int]] = []
        self._steps: dict[tuple[int, str], int | None] = {}
        self._number(frozenset({0}))

    def _new(self) -> int:
        self._empty.append([])
        self._edges.append([])
        return len(self._empty) - 1

    def _add(self, nodes: Iterable[Any], here: int) -> int:
        for name, value in nodes:
            match kind := str(name):
                case "LITERAL" | "NOT_LITERAL" | "IN" | "ANY":
                    there = self._new()
                    self._edges[here].append((_one_of(kind, value, _ALL), there))
                case "AT" if str(value) == "AT_BOUNDARY":
                    there = self._new()
                    self._edges[here].append((frozenset({_BOUNDARY}), there))
                case "BRANCH":
                    there = self._new()
                    for branch in value[1]:
                        self._empty[self._add(branch, here)].append(there)
                case "SUBPATTERN":
                    there = self._add(value[3], here)
                case "MAX_REPEAT" | "MIN_REPEAT":
                    least, most, body = value
                    for _ in range(least):
                        here = self._add(body, here)
                    there = self._new()
                    self._empty[here].append(there)
                    if str(most) == "MAXREPEAT":
                        self._empty[self._add(body, there)].append(there)
                    else:
                        for _ in range(most - least):
                            here = self._add(body, here)
                            self._empty[here].append(there)
                case _:
                    raise Undecided(f"a screen with {kind}")
            here = there
        return here

    def _number(self, positions: frozenset[int]) -> int | None:
        found, todo = set(positions), list(positions)
        while todo:
            for there in self._empty[todo.pop()]:
                if there not in found:
                    found.add(there)
                    todo.append(there)
        if found & self._final:
            return None
        key = frozenset(found)
        if key not in self._numbers:
            self._numbers[key] = len(self._sets)
            self._sets.append(key)
        return self._numbers[key]

    def step(self, state: int, character: str) -> int | None:
        """The next state, or None where a pattern was found."""
        key = (state, character)
        if key not in self._steps:
            # A mark may be passed over.
            after = {0, *(self._sets[state] if character == _BOUNDARY else ())}
            after |= {there for one in self._sets[state] for takes, there in self._edges[one] if character in takes}
            self._steps[key] = self._number(frozenset(after))
        return self._steps[key]

    def alike(self, characters: Iterable[str]) -> list[str]:
        """One of each kind of characters between which no pattern tells."""
        kinds: dict[tuple[bool, ...], str] = {}
        for one in sorted(characters):
            kinds.setdefault((one in _WORD, *(one in takes for edge in self._edges for takes, _ in edge)), one)
        return list(kinds.values())


def _removing(characters: frozenset[str], removed: Iterable[str]) -> Origins:
    gone = characters & frozenset(removed)
    return {one: [[*([(gone, True)] if gone else []), (frozenset({one}), False)]] for one in characters - gone}


def _blank(characters: frozenset[str], blanks: Iterable[str]) -> Origins:
    """Blanks in a row become one space."""
    found = characters & frozenset(blanks)
    origins = _removing(characters - found, ())
    return origins | ({" ": [[(found, False), (found, True)]]} if found else {})


def _command_line(characters: frozenset[str]) -> Origins:
    gone, blanks = characters & frozenset("\"'\\^"), characters & frozenset(" ,;\t\r\n")
    origins: Origins = {}
    for one in characters - gone - blanks:
        before = gone | blanks if one in "/(" else gone
        deleted = [(before, True)] if before else []
        origins.setdefault(_lower(one), []).append([*deleted, (frozenset({one}), False)])
    if blanks:
        origins[" "] = [[(gone, True), (blanks, False), (gone | blanks, True)]]
    return origins


def _path(characters: frozenset[str]) -> Origins:
    """Segments may go, with the slash after them."""
    origins = _removing(characters, ())
    if "/" in characters:
        slash = (frozenset("/"), False)
        origins["/"] = [[slash], [slash, (characters, True), slash]]
    return origins


_FOLLOWING = frozenset(map(chr, range(0x80, 0xC0)))
_TWO, _THREE = frozenset(map(chr, range(0xC4, 0xE0))), frozenset(map(chr, range(0xE1, 0xEF)))
_BEYOND_ASCII = _ALL - frozenset(map(chr, range(0x80)))


def _unicode(characters: frozenset[str]) -> Origins:
    """Letters beyond ASCII (UTF-8) as letters.map has them: to U+00FF as that byte, others as an x."""
    if not characters & _BEYOND_ASCII <= _FOLLOWING | _TWO | _THREE | {"\xc2", "\xc3"}:
        raise Undecided("characters that are no letters")
    origins = _removing(characters - _BEYOND_ASCII, ())
    if not characters & _BEYOND_ASCII:
        return origins
    for one in _FOLLOWING:
        origins[one] = [[(frozenset("\xc2"), False), (frozenset({one}), False)]]
        origins[chr(ord(one) + 0x40)] = [[(frozenset("\xc3"), False), (frozenset({one}), False)]]
    following = (_FOLLOWING, False)
    origins.setdefault("x", []).extend([[(_TWO, False), following], [(_THREE, False), following, following]])
    return origins


def _without(absent: str) -> Callable[[frozenset[str]], Origins]:
    """Nothing is changed where these characters are absent."""

    def same(characters: frozenset[str]) -> Origins:
        if characters & frozenset(absent):
            raise Undecided(f"escapes that begin with {absent}")
        return _removing(characters, ())

    return same


def _url(characters: frozenset[str]) -> Origins:
    origins = _without("%")(characters - {"+"})
    if "+" in characters:
        origins.setdefault(" ", []).append([(frozenset("+"), False)])
    return origins


_TRANSFORMATIONS: Mapping[str, Callable[[frozenset[str]], Origins]] = {
    "lowercase": _without(""),
    "urldecode": _url,
    "urldecodeuni": _url,
    "htmlentitydecode": _without("&"),
    "jsdecode": _without("\\"),
    "cssdecode": _without("\\"),
    "replacecomments": _without("*"),
    "removenulls": lambda characters: _removing(characters, "\0"),
    "removewhitespace": lambda characters: _removing(characters, {*_BLANK, "\xa0"}),
    "compresswhitespace": lambda characters: _blank(characters, _BLANK),
    "cmdline": _command_line,
    "normalizepath": _path,
    "normalisepath": _path,
    "normalizepathwin": _path,
}


def _itself(character: str) -> list[list[Step]]:
    return [[(frozenset({character}), False)]]


class _Proof:
    """Runs rules over all values that pass a screen, as transformations leave them."""

    def __init__(self, screen: Screen, transformations: Sequence[str]) -> None:
        self._patterns = _Patterns(screen.patterns)
        self._origins: list[Origins] = []
        self.characters = screen.characters
        names = [name.lower() for name in transformations]
        for place, name in enumerate(names):
            if name == "none":
                self._origins, self.characters = [], screen.characters
                continue
            if name == "utf8tounicode" and names[place + 1 : place + 2] == ["urldecodeuni"]:
                origins = _unicode(self.characters)
            elif name in _TRANSFORMATIONS:
                origins = _TRANSFORMATIONS[name](self.characters)
            else:
                raise Undecided(name)
            self.characters = frozenset(origins)
            if any(ways != _itself(one) for one, ways in origins.items()):
                self._origins.append(origins)
        self._alike = cache(lambda characters: tuple(self._patterns.alike(characters)))
        self._before = cache(self._before_transformations)
        self._after: dict[tuple[int, State], frozenset[State]] = {}
        self._classes: dict[frozenset[str], int] = {}
        self._nodes: dict[tuple[str, int], tuple[Any, int, tuple[str, ...]]] = {}

    def matches(self, tree: Any) -> bool:
        """Whether a value that passes may match anywhere."""
        # What is before is not known; only a letter that becomes an x is of no word before and of one after.
        start = {(0, raw, seen, None) for raw, seen in ((True, True), (False, False), (False, True))}
        after = self._sequence(tree, frozenset(start))
        # A boundary that the rule wants at its end is one for the patterns too.
        ended = {state for state in after if state[3] and state[1] and state[2]}
        return any(state not in ended or self._patterns.step(state[0], _BOUNDARY) is not None for state in after)

    def _before_transformations(self, level: int, state: Raw, character: str) -> frozenset[Raw]:
        """Where the patterns may stand after what the first `level` transformations made this character of."""
        if level == 0:
            where, word = state
            marked = self._patterns.step(where, _BOUNDARY) if word != (character in _WORD) else where
            after = None if marked is None else self._patterns.step(marked, character)
            return frozenset() if after is None else frozenset({(after, character in _WORD)})
        found: set[Raw] = set()
        for steps in self._origins[level - 1].get(character, ()):
            states = {state}
            for characters, repeated in steps:
                ones = self._alike(characters) if level == 1 else tuple(characters)
                fresh = states
                states = set(states) if repeated else set()
                while fresh:
                    fresh = {new for old in fresh for one in ones for new in self._before(level - 1, old, one)} - states
                    states |= fresh
                    if not repeated:
                        break
            found |= states
        return frozenset(found)

    def _take(self, kind: str, value: Any, states: frozenset[State]) -> frozenset[State]:
        # By identity, and kept: a node is met again and again.
        node = kind, value if isinstance(value, int) else id(value)
        if node not in self._nodes:
            characters = _one_of(kind, value, self.characters)
            # Those that nothing tells from another need one of them only.
            same = [one for one in characters if all(origins.get(one) == _itself(one) for origins in self._origins)]
            ones = (*self._alike(frozenset(same)), *(characters - frozenset(same)))
            self._nodes[node] = value, self._classes.setdefault(characters, len(self._classes)), ones
        _, key, ones = self._nodes[node]
        found: set[State] = set()
        for state in states:
            if (after := self._after.get((key, state))) is None:
                where, raw, word, wanted = state
                after = self._after[key, state] = frozenset(
                    (*new, one in _WORD, None)
                    for one in ones
                    if wanted is None or wanted == (word != (one in _WORD))
                    for new in self._before(len(self._origins), (where, raw), one)
                )
            found |= after
        return frozenset(found)

    def _sequence(self, nodes: Iterable[Any], states: frozenset[State]) -> frozenset[State]:
        for kind, value in nodes:
            if not states:
                break
            states = self._node(str(kind), value, states)
        return states

    def _node(self, kind: str, value: Any, states: frozenset[State]) -> frozenset[State]:
        match kind:
            case "LITERAL" | "NOT_LITERAL" | "IN" | "ANY":
                return self._take(kind, value, states)
            case "BRANCH":
                return frozenset().union(*(self._sequence(branch, states) for branch in value[1]))
            case "SUBPATTERN":
                return self._sequence(value[3], states)
            case "ATOMIC_GROUP":
                return self._sequence(value, states)
            case "MAX_REPEAT" | "MIN_REPEAT" | "POSSESSIVE_REPEAT":
                return self._repeat(value[0], value[1], value[2], states)
            case "AT" if str(value) in {"AT_BOUNDARY", "AT_NON_BOUNDARY"}:
                flips = str(value) == "AT_BOUNDARY"
                return frozenset((*state[:3], flips) for state in states if state[3] in {None, flips})
            case "AT" if str(value) == "AT_BEGINNING":
                # Of the value or of a line: no character of a word is before it.
                return frozenset(state for state in states if not state[1] and not state[2])
            case "AT" | "ASSERT" | "ASSERT_NOT":
                return states
            case _:
                return self._any_number(lambda some: self._take("ANY", _NOTHING, some), states)

    def _repeat(self, least: int, most: Any, body: Any, states: frozenset[State]) -> frozenset[State]:
        for _ in range(min(least, 40)):
            states = self._sequence(body, states)
        if least <= 40 and str(most) != "MAXREPEAT" and most - least <= 3:
            found = states
            for _ in range(most - least):
                states = self._sequence(body, states)
                found |= states
            return found
        return self._any_number(lambda some: self._sequence(body, some), states)

    def _any_number(
        self, once: Callable[[frozenset[State]], frozenset[State]], states: frozenset[State]
    ) -> frozenset[State]:
        found = fresh = states
        while fresh:
            fresh = once(fresh) - found
            found |= fresh
        return found
