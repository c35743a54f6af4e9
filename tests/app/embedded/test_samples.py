"""The sample responses and the hostile corpora are what their users take them for."""

import base64
import json
import re
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import orjson
import pytest
from email_validator import EmailNotValidError, validate_email

APP_TESTS = Path(__file__).parent.parent
SAMPLES = files("quern.embedded") / "samples" / "feedback.jsonl"
INJECTED = APP_TESTS / "workflows" / "corpus" / "injected_answers.jsonl"
RUBBISH = APP_TESTS / "forms" / "corpus" / "rubbish_bodies.json"

TOPICS = {"billing", "delivery", "staff", "product quality", "website"}
SENTIMENTS = {"positive", "neutral", "negative"}
WITHOUT_SPACES = {"ja", "zh"}

FORM = {
    "type": "object",
    "required": ["answers"],
    "additionalProperties": False,
    "properties": {
        "answers": {
            "type": "object",
            "required": ["sector", "rating", "comment", "consent"],
            "additionalProperties": False,
            "properties": {
                "name": {"type": "string", "maxLength": 200},
                "email": {"type": "string", "format": "email"},
                "sector": {"enum": ["retail", "health", "energy", "education", "transport"]},
                "visit_date": {"type": "string", "format": "date"},
                "rating": {"type": "integer", "minimum": 1, "maximum": 5},
                "topics": {
                    "type": "array",
                    "uniqueItems": True,
                    "items": {"enum": ["staff", "price", "waiting", "quality", "website"]},
                },
                "comment": {"type": "string", "minLength": 1, "maxLength": 10_000},
                "consent": {"const": True},
            },
        }
    },
}

FORMATS = jsonschema.FormatChecker(["date"])


@FORMATS.checks("email", raises=EmailNotValidError)
def _is_email(value: object) -> bool:
    if isinstance(value, str):
        validate_email(value, check_deliverability=False)
    return True


FITS_FORM = jsonschema.Draft202012Validator(FORM, format_checker=FORMATS)


def _lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def _samples() -> list[dict[str, Any]]:
    return _lines(SAMPLES.read_text(encoding="utf-8"))


def _rubbish() -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = json.loads(RUBBISH.read_text(encoding="ascii"))
    return cases


def _body(case: dict[str, Any]) -> bytes:
    return b"".join(base64.b64decode(part["base64"], validate=True) * part["times"] for part in case["body"])


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("duplicate key")
    return dict(pairs)


def _read_strictly(body: bytes) -> Any:
    """orjson refuses what RFC 8259 does, but takes the last of two equal keys."""
    orjson.loads(body)
    return json.loads(body, object_pairs_hook=_refuse_duplicates)


def test_there_are_enough_samples_in_enough_languages() -> None:
    samples = _samples()
    languages = Counter(sample["language"] for sample in samples)
    assert len(samples) >= 60
    assert len(languages) >= 8
    assert 0.4 <= languages["en"] / len(samples) <= 0.6
    assert len({sample["answers"]["comment"] for sample in samples}) == len(samples)


def test_every_sample_fits_the_form() -> None:
    for sample in _samples():
        FITS_FORM.validate({"answers": sample["answers"]})


def test_sample_addresses_are_distinct_and_reserved_for_examples() -> None:
    addresses = [sample["answers"]["email"] for sample in _samples()]
    assert all(address.endswith("@example.org") for address in addresses)
    assert len(set(addresses)) == len(addresses)


def test_sample_comments_have_30_to_180_words() -> None:
    for sample in _samples():
        comment = sample["answers"]["comment"]
        if sample["language"] in WITHOUT_SPACES:
            assert 80 <= len(comment) <= 500, comment
        else:
            assert 30 <= len(comment.split()) <= 180, comment


def test_expected_labels_come_from_their_sets_and_each_is_used() -> None:
    expected = [sample["expected"] for sample in _samples()]
    assert {labels["topic"] for labels in expected} == TOPICS
    assert {labels["sentiment"] for labels in expected} == SENTIMENTS


def test_expected_order_number_is_the_one_in_the_comment() -> None:
    samples = _samples()
    for sample in samples:
        found = set(re.findall(r"\bQX-\d{5}\b", sample["answers"]["comment"], re.ASCII))
        wanted = sample["expected"]["order_number"]
        assert found == (set() if wanted is None else {wanted}), sample["answers"]["comment"]
    assert sum(sample["expected"]["order_number"] is not None for sample in samples) >= 20


def test_the_injected_answers_are_100_different_ones() -> None:
    answers = _lines(INJECTED.read_text(encoding="ascii"))
    assert [answer["id"] for answer in answers] == list(range(1, 101))
    assert len({answer["technique"] for answer in answers}) == 100
    assert len({answer["answer"] for answer in answers}) == 100


def test_every_injected_answer_passes_the_form_and_so_reaches_the_prompt() -> None:
    for injected in _lines(INJECTED.read_text(encoding="ascii")):
        answers = {"sector": "retail", "rating": 3, "comment": injected["answer"], "consent": True}
        FITS_FORM.validate({"answers": answers})
        assert "\0" not in injected["answer"], "intake refuses U+0000, so this would test nothing"


@pytest.mark.parametrize("token", ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<start_of_turn>", "<end_of_turn>"])
def test_the_injected_answers_use_the_turn_tokens_of_the_shipped_models(token: str) -> None:
    assert any(token in injected["answer"] for injected in _lines(INJECTED.read_text(encoding="ascii")))


def test_the_rubbish_bodies_are_many_named_and_refused_with_a_4xx() -> None:
    cases = _rubbish()
    assert len(cases) >= 60
    assert len({case["name"] for case in cases}) == len(cases)
    assert {status for case in cases for status in case["expected"]} == {400, 413, 415, 422}
    assert all(case["expected"] for case in cases)


@pytest.mark.parametrize(
    "case", [case for case in _rubbish() if case["expected"] == [400]], ids=lambda case: case["name"]
)
def test_a_rubbish_body_that_deserves_400_is_not_strict_json(case: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        _read_strictly(_body(case))


@pytest.mark.parametrize(
    "case", [case for case in _rubbish() if case["expected"] == [422]], ids=lambda case: case["name"]
)
def test_a_rubbish_body_that_deserves_422_is_strict_json_that_does_not_fit(case: dict[str, Any]) -> None:
    assert not FITS_FORM.is_valid(_read_strictly(_body(case)))


def test_a_rubbish_body_that_deserves_413_is_larger_than_a_stored_document_may_be() -> None:
    bson_limit = 16 * 1024 * 1024
    assert all(len(_body(case)) > bson_limit for case in _rubbish() if case["expected"] == [413])
