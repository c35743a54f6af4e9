"""What the firewall refuses and what it lets pass. `pytest tests/waf -s` prints the figures of docs/waf.md."""

from collections import Counter
from collections.abc import Callable, Sequence

import pytest

from tests.waf import attacks, prose
from tests.waf.conftest import Send, Verdict
from tests.waf.debian import source, unpacked
from tests.waf.front_door import PACKAGES

SendAll = Callable[[Sequence[bytes]], list[Verdict]]
REFUSALS = frozenset({0, 400, 403, 404, 405, 408, 413, 414, 415, 421, 501, 505})


def _tell(title: str, cases: Sequence[attacks.Case], verdicts: Sequence[Verdict]) -> list[str]:
    """Print a line for each kind; return the names of those that passed."""
    passed = [case for case, (_, reached) in zip(cases, verdicts, strict=True) if reached]
    all_of, through = Counter(case.kind for case in cases), Counter(case.kind for case in passed)
    print(f"\n{title}: {len(cases) - len(passed)} of {len(cases)} refused")
    for kind in sorted(all_of):
        print(f"  {kind}: {all_of[kind] - through[kind]} of {all_of[kind]}")
    return [case.name for case in passed]


def test_ninety_eight_of_a_hundred_attacks_are_refused(send_all: SendAll) -> None:
    cases = list(attacks.own())
    assert len(cases) >= 300
    verdicts = send_all([case.request for case in cases])
    passed = _tell("own attacks", cases, verdicts)
    assert len(passed) <= 0.02 * len(cases), passed
    assert {status for status, reached in verdicts if not reached} <= REFUSALS


def test_ninety_eight_of_a_hundred_of_the_rule_sets_own_attacks_are_refused(send_all: SendAll) -> None:
    rules = unpacked("front-door", PACKAGES) / "usr" / "share" / "modsecurity-crs" / "rules"
    cases = list(attacks.rule_set(source("crs-source", "modsecurity-crs"), rules))
    assert len(cases) >= 300
    passed = _tell("the Core Rule Set's attacks", cases, send_all([case.request for case in cases]))
    assert len(passed) <= 0.02 * len(cases), passed


def test_nine_hundred_ninety_nine_of_a_thousand_answers_in_prose_pass(send_all: SendAll) -> None:
    answers = prose.answers(1000)
    assert len(set(answers)) == 1000
    verdicts = send_all([attacks.answer(text) for text in answers])
    refused = [text for text, (_, reached) in zip(answers, verdicts, strict=True) if not reached]
    print(f"\nprose: {len(answers) - len(refused)} of {len(answers)} passed")
    assert len(refused) <= 1, refused


def test_answers_with_code_pass_where_the_operator_says_so(send_all: SendAll) -> None:
    answers = prose.answers_with_code(200)
    elsewhere = [attacks.answer(text) for text in answers]
    named = [request.replace(b"frm_0123456789", b"frm_C0DE456789") for request in elsewhere]
    refused = sum(not reached for _, reached in send_all(elsewhere))
    print(f"\nanswers with code: {len(answers) - refused} of {len(answers)} passed")
    assert refused > 0
    assert all(reached for _, reached in send_all(named))


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_the_apis_methods_pass(send: Send, method: str) -> None:
    body = b'{"name": "A form"}' if method in {"POST", "PUT", "PATCH"} else None
    assert send(attacks.request(method, "/api/v1/forms", body)) == (200, True)
