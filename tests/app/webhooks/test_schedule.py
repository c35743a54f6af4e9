"""When a delivery is tried again, and when not."""

import random
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quern.webhooks.outcome import DeliveryOutcome, Failure
from quern.webhooks.schedule import Delivered, GiveUp, Retry, decide, parse_retry_after, throttle
from quern.webhooks.settings import STANDARD_SCHEDULE_SECONDS, WebhookSettings

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
EVEN = WebhookSettings(jitter=0)
FINAL = {Failure.DISABLED, Failure.FORBIDDEN_URL}


def answered(status: int, retry_after: str | None = None) -> DeliveryOutcome:
    return DeliveryOutcome(status, None, f"the receiver answered {status}", timedelta(seconds=1), retry_after)


def failed(failure: Failure) -> DeliveryOutcome:
    return DeliveryOutcome(None, failure, "no answer", timedelta(seconds=1))


def decision(
    outcome: DeliveryOutcome, attempt: int = 1, settings: WebhookSettings = EVEN, seed: int = 1
) -> Delivered | Retry | GiveUp:
    return decide(outcome, attempt=attempt, now=NOW, settings=settings, rng=random.Random(seed))


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
def test_every_2xx_is_delivered(status: int) -> None:
    assert decision(answered(status)) == Delivered()


@pytest.mark.parametrize("status", [301, 302, 307, 308, 400, 401, 404, 408, 429, 500, 502, 503, 504, 599])
def test_every_other_status_is_retried(status: int) -> None:
    assert decision(answered(status)) == Retry(timedelta(seconds=5))


@pytest.mark.parametrize("failure", sorted(set(Failure) - FINAL))
def test_no_answer_is_retried(failure: Failure) -> None:
    assert decision(failed(failure)) == Retry(timedelta(seconds=5))


def test_410_ends_the_message_and_disables_the_endpoint() -> None:
    outcome = decision(answered(410))
    assert isinstance(outcome, GiveUp)
    assert outcome.disable_endpoint


@pytest.mark.parametrize("failure", sorted(FINAL))
def test_what_only_a_person_can_mend_is_not_tried_again_and_disables_nothing(failure: Failure) -> None:
    outcome = decision(failed(failure))
    assert isinstance(outcome, GiveUp)
    assert not outcome.disable_endpoint


def test_the_delays_are_those_of_the_specification_and_then_it_gives_up() -> None:
    delays = []
    for attempt in range(1, 10):
        retry = decision(answered(500), attempt)
        assert isinstance(retry, Retry)
        delays.append(retry.delay.total_seconds())
    assert (0, *delays) == STANDARD_SCHEDULE_SECONDS
    assert sum(delays) == timedelta(hours=75, minutes=35, seconds=5).total_seconds()
    assert isinstance(decision(answered(500), 10), GiveUp)


@given(st.integers(1, 9), st.integers(0, 2**32), st.floats(0, 0.99))
def test_jitter_spreads_each_delay_by_no_more_than_its_share(attempt: int, seed: int, jitter: float) -> None:
    retry = decision(answered(500), attempt, WebhookSettings(jitter=jitter), seed)
    assert isinstance(retry, Retry)
    base = STANDARD_SCHEDULE_SECONDS[attempt]
    # timedelta rounds to microseconds.
    assert base * (1 - jitter) - 1e-5 <= retry.delay.total_seconds() <= base * (1 + jitter) + 1e-5


def test_jitter_really_spreads() -> None:
    delays = {decision(answered(500), 3, WebhookSettings(jitter=0.2), seed) for seed in range(50)}
    assert len(delays) > 40


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("120", 120),
        (" 7 ", 7),
        ("0", 5),
        ("1", 5),
        (format_datetime(NOW + timedelta(minutes=10), usegmt=True), 600),
        ("Sun, 01 Mar 2026 12:10:00 -0000", 600),
        (format_datetime(NOW - timedelta(minutes=10), usegmt=True), 5),
        ("99999999999999999999", 86_400),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 86_400),
        ("-5", 5),
        ("soon", 5),
        ("1.5", 5),
        ("", 5),
        ("١٢", 5),
    ],
)
def test_retry_after_lengthens_the_delay_up_to_its_cap_and_never_shortens_it(header: str, seconds: int) -> None:
    assert decision(answered(503, header)) == Retry(timedelta(seconds=seconds))


@given(st.text())
def test_no_retry_after_header_breaks_the_schedule(header: str) -> None:
    parsed = parse_retry_after(header, now=NOW)
    assert parsed is None or parsed >= timedelta(0)


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_receiver_under_load_is_left_alone_for_as_long_as_it_asks(status: int) -> None:
    assert throttle(answered(status, "90"), now=NOW, settings=EVEN) == timedelta(seconds=90)
    assert throttle(answered(status, "999999"), now=NOW, settings=EVEN) == timedelta(days=1)
    assert throttle(answered(status), now=NOW, settings=EVEN) is None


def test_other_refusals_do_not_hold_up_other_messages() -> None:
    assert throttle(answered(404, "90"), now=NOW, settings=EVEN) is None
    assert throttle(answered(200, "90"), now=NOW, settings=EVEN) is None


def test_tests_and_operators_can_shorten_the_schedule() -> None:
    short = WebhookSettings(schedule_seconds=(0, 0.1), jitter=0)
    assert decision(answered(500), 1, short) == Retry(timedelta(seconds=0.1))
    assert isinstance(decision(answered(500), 2, short), GiveUp)
