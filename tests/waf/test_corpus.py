"""What the firewall refuses and what it lets pass. `pytest tests/waf -s` prints the figures of docs/waf.md."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import pytest

from tests.waf import attacks, prose
from tests.waf.conftest import Send, verdict_of
from tests.waf.debian import source, unpacked
from tests.waf.front_door import PACKAGES, FrontDoor

AskAll = Callable[[Sequence[bytes]], list[str]]
Judge = Callable[[Sequence[attacks.Case]], list[str]]
FIREWALL, NGINX, PASSED = "blocked by the firewall", "refused by nginx", "passed"
#: What nginx itself may refuse: requests that are wrong as HTTP, whatever is in them.
_OF_THE_PROTOCOL = frozenset({"malformed", "oversized", "crs-920", "crs-921"})
#: By which statuses: 501 and 505 say that a request asks for a transfer or a version of HTTP that nginx does not have.
_BY_NGINX = frozenset({400, 405, 408, 411, 413, 414, 421, 431, 501, 505})


@pytest.fixture
def judge(ask_all: AskAll, front_door: FrontDoor) -> Iterator[Judge]:
    """What became of each case. Any answer but a pass and a refusal is an error, and so is the loss of a worker."""

    def judged(cases: Sequence[attacks.Case]) -> list[str]:
        heads = ask_all([case.request for case in cases])
        denials = front_door.denials()
        return [_outcome(case, head, denials) for case, head in zip(cases, heads, strict=True)]

    yield judged
    assert front_door.lost_workers() == []


def _outcome(case: attacks.Case, head: str, denials: dict[str, int]) -> str:
    status, reached = verdict_of(head)
    if reached:
        return PASSED
    # The status alone may be nginx's own: what the firewall refuses, its log has too.
    if status in {403, denials.get(_identifier(head))}:
        assert denials.get(_identifier(head)) == status, (case.name, status)
        return FIREWALL
    assert status in _BY_NGINX, (case.name, status)
    return NGINX


def _identifier(head: str) -> str:
    return next((line[14:] for line in head.split("\r\n") if line.lower().startswith("x-request-id: ")), "")


def _tell(title: str, cases: Sequence[attacks.Case], outcomes: Sequence[str]) -> list[str]:
    """Print a line for each kind; return the names of those that are not refused by what ought to refuse them."""
    print(f"\n{title}: {_split(outcomes)}")
    for kind in sorted({case.kind for case in cases}):
        print(f"  {kind}: {_split([told for case, told in zip(cases, outcomes, strict=True) if case.kind == kind])}")
    return [
        case.name
        for case, outcome in zip(cases, outcomes, strict=True)
        if outcome == PASSED or (outcome == NGINX and case.kind not in _OF_THE_PROTOCOL)
    ]


def _split(outcomes: Sequence[str]) -> str:
    counted = Counter(outcomes)
    return f"{len(outcomes)}, " + ", ".join(f"{counted[each]} {each}" for each in (FIREWALL, NGINX, PASSED))


def test_ninety_eight_of_a_hundred_attacks_are_refused(judge: Judge) -> None:
    cases = list(attacks.own())
    assert len(cases) >= 300
    missed = _tell("own attacks", cases, judge(cases))
    assert len(missed) <= 0.02 * len(cases), missed


def test_ninety_eight_of_a_hundred_of_the_rule_sets_own_attacks_are_refused(judge: Judge) -> None:
    rules = unpacked("front-door", PACKAGES) / "usr" / "share" / "modsecurity-crs" / "rules"
    cases = list(attacks.rule_set(source("crs-source", "modsecurity-crs"), rules))
    assert len(cases) >= 300
    missed = _tell("the Core Rule Set's attacks", cases, judge(cases))
    assert len(missed) <= 0.02 * len(cases), missed


def _refused(ask_all: AskAll, texts: Sequence[str], form: bytes = b"frm_0123456789") -> list[str]:
    """Which answers to a form do not reach the API."""
    requests = [attacks.answer(text).replace(b"frm_0123456789", form) for text in texts]
    heads = ask_all(requests)
    return [text for text, head in zip(texts, heads, strict=True) if verdict_of(head) != (200, True)]


def test_nine_hundred_ninety_nine_of_a_thousand_answers_in_prose_pass(ask_all: AskAll) -> None:
    answers = prose.answers(1000)
    assert len(set(answers)) == 1000
    refused = _refused(ask_all, answers)
    print(f"\nprose: {len(answers) - len(refused)} of {len(answers)} passed")
    assert len(refused) <= 1, refused


def test_nineteen_of_twenty_answers_with_code_pass_and_all_where_the_operator_says_so(ask_all: AskAll) -> None:
    answers = prose.answers_with_code(200)
    assert len(answers) == 200
    refused = _refused(ask_all, answers)
    print(f"\nanswers with code: {len(answers) - len(refused)} of {len(answers)} passed")
    assert len(refused) <= 0.05 * len(answers), refused
    assert _refused(ask_all, answers, b"frm_C0DE456789") == []


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_the_apis_methods_pass(send: Send, method: str) -> None:
    body = b'{"name": "A form"}' if method in {"POST", "PUT", "PATCH"} else None
    assert send(attacks.request(method, "/api/v1/forms", body)) == (200, True)
