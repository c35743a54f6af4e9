"""The Core Rule Set in groups, each of which a request passes over at once where none of its rules can match.

libmodsecurity asks of each rule of a phase whether an exception names it, copies every value that it is for, and then
compares: a rule that is removed while a request runs, or that has no value to look at, still costs. A marker behind a
group costs one comparison. Only whole rules are moved, each with those that are chained to it, and they only add to a
score, which is judged after them: their order does not matter, but for markers of their own, which stay in place.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

#: In the order of what reads them (templates/etc/nginx/modsecurity/main.conf.j2).
GROUPS = ("first", "opening", "always", "seldom", "plain", "calm", "prose", "values", "verdict")
#: What a request without a query, cookies and a body has none of.
_SENT = re.compile(
    r"[!&]?(?:ARGS|ARGS_GET|ARGS_NAMES|REQUEST_COOKIES|REQUEST_COOKIES_NAMES|REQUEST_BODY|XML)(?:[:].*)?"
)
_VERDICT = "REQUEST-949-BLOCKING-EVALUATION.conf"
#: The verdict's sums: of level 1 this and one, of level 2 this and two.
_SUMS = 949_059
_LEVEL = re.compile(r'SecRule TX:EXECUTING_PARANOIA_LEVEL "@lt (\d)"')


@dataclass(frozen=True)
class Selection:
    """What to do with which rules; each is named by its identifier or as a range (`941110-941300`).

    `level` is the highest whose rules are tried, `blocking` the highest that refuses; `proven` the digest of the rules
    that `calm` and `plain` were proved of. Of other ones nothing is passed over. `seldom` are names of headers.
    """

    level: int
    blocking: int
    left_out: list[str]
    calm: list[str]
    plain: list[str]
    prose: list[str]
    seldom: list[str]
    proven: str
    _expanded: dict[str, list[tuple[int, int]]] = field(default_factory=dict, init=False, repr=False)

    def names(self, group: str, identifier: int) -> bool:
        if group not in self._expanded:
            ends = [str(one).partition("-") for one in getattr(self, group)]
            self._expanded[group] = [(int(first), int(last or first)) for first, _, last in ends]
        return any(first <= identifier <= last for first, last in self._expanded[group])


def digest(texts: Iterable[str]) -> str:
    """What tells these rules from other ones."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def directives(text: str) -> Iterator[str]:
    """Each directive with its continued lines, and a rule with those that are chained to it."""
    chain = directive = ""
    for line in text.splitlines():
        if not directive and (not line.strip() or line.lstrip().startswith("#")):
            continue
        directive += line + "\n"
        if line.rstrip().endswith("\\"):
            continue
        chain, actions, directive = chain + directive, directive.rpartition(' "')[2], ""
        if not re.search(r"(?:^|[\s,])chain\s*[,\"]", actions):
            yield chain
            chain = ""
    if chain + directive:
        raise ValueError(f"expected the end of a rule, found {(chain + directive)[:80]!r} alone")


def identifier_of(directive: str) -> int:
    found = re.search(r"\bid:(\d+)", directive)
    if found is None:
        raise ValueError(f"expected a rule with an identifier, found {directive[:80]!r}")
    return int(found[1])


def targets(rule: str) -> list[str]:
    """What the first of a chain looks at."""
    return rule.split(maxsplit=2)[1].split("|") if rule.startswith("SecRule") else []


def arranged(own: str, rules: Mapping[str, str], folder: str, selection: Selection) -> dict[str, str]:
    """The groups: the text of each, from that of our own rules and of the Core Rule Set's files by name.

    `folder` is where the lists lie that those files name. Raises ValueError where a directive is not what the rules of
    version 3 are made of.
    """
    proven = digest(rules.values()) == selection.proven
    groups: dict[str, list[str]] = {name: [] for name in GROUPS}
    for directive in directives(own):
        groups[_group(directive, selection, proven)].append(directive)
    for name, text in rules.items():
        for directive in _tried(text, selection):
            if directive.startswith("SecMarker"):
                groups["always"].append(directive)
                continue
            group = "verdict" if name == _VERDICT else _group(directive, selection, proven)
            if "skipAfter:" in directive and group not in {"first", "always"}:
                raise ValueError(f"expected no marker behind rule {identifier_of(directive)}, found one")
            groups[group].append(_adapted(directive, folder))
    return {name: "".join(one) for name, one in groups.items()}


def _tried(text: str, selection: Selection) -> Iterator[str]:
    """The rules of the levels that are wanted, without the questions for the level, and markers of other use."""
    level = 1
    for directive in directives(text):
        if asked := _LEVEL.match(directive):
            level = int(asked[1])
        elif level > selection.level:
            continue
        elif directive.startswith("SecMarker"):
            if not re.search(r"END-RE(?:QUEST|SPONSE)-\d", directive):
                yield directive
        elif not directive.startswith(("SecRule", "SecAction")):
            raise ValueError(f"expected rules and markers, found {directive[:80]!r}")
        elif not selection.names("left_out", number := identifier_of(directive)) and not (
            _SUMS + selection.blocking < number <= _SUMS + 4
        ):
            yield directive


def _group(rule: str, selection: Selection, proven: bool) -> str:
    number = identifier_of(rule)
    seen = targets(rule)
    seldom = bool(seen) and set(seen) <= {f"REQUEST_HEADERS:{name}" for name in selection.seldom}
    if "phase:1" in rule:
        return "opening" if seldom else "first"
    if proven and selection.names("calm", number):
        return "plain" if selection.names("plain", number) else "calm"
    if seldom:
        return "seldom"
    if seen and all(_SENT.fullmatch(target) for target in seen):
        return "prose" if selection.names("prose", number) else "values"
    return "always"


def _adapted(rule: str, folder: str) -> str:
    """Lists by their full names; and values only, as 10012 looks at names."""
    first, *others = targets(rule)
    kept = [target for target in (first, *others) if target != "ARGS_NAMES"] or [first]
    rule = rule.replace("|".join((first, *others)), "|".join(kept), 1)
    return re.sub(
        r"(@pm(?:f|FromFile) )([^\"]+)",
        lambda found: found[1] + " ".join(f"{folder}/{name}" for name in found[2].split()),
        rule,
    )
