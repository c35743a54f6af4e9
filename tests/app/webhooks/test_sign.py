"""Signatures: what the Standard Webhooks specification and its library ask for."""

import base64
import random
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks import Webhook

from quern.webhooks.sign import SecretError, SignatureError, new_secret, signature_headers, verify

NOW = datetime(2026, 3, 1, 12, 0, 0, 250_000, tzinfo=UTC)
PAYLOAD = '{"type":"response.completed","data":{"text":"Grüße, 東京"}}'.encode()


def test_a_known_message_has_a_known_signature() -> None:
    # printf 'job_1.1772366400.{}' | openssl dgst -sha256 -mac HMAC -macopt hexkey:3030…30 -binary | base64
    secret = "whsec_" + base64.b64encode(b"0" * 24).decode()
    headers = signature_headers("job_1", NOW, b"{}", [secret])
    assert headers["webhook-timestamp"] == "1772366400"
    assert headers["webhook-signature"] == "v1,1Tsr5kvEeA3YkN0HFjdgfZJ16hhE9avHVDcl23Wsw84="


def test_the_specifications_own_library_accepts_what_is_signed() -> None:
    secret = new_secret()
    headers = signature_headers("job_1", datetime.now(UTC), PAYLOAD, [secret])
    assert Webhook(secret).verify(PAYLOAD, headers)["type"] == "response.completed"


def test_during_a_rotation_both_the_old_and_the_new_secret_verify() -> None:
    old, new = new_secret(), new_secret()
    headers = signature_headers("job_1", NOW, PAYLOAD, [new, old])
    assert len(headers["webhook-signature"].split(" ")) == 2
    verify(PAYLOAD, headers, [old], now=NOW)
    verify(PAYLOAD, headers, [new], now=NOW)
    with pytest.raises(SignatureError):
        verify(PAYLOAD, headers, [new_secret()], now=NOW)


@pytest.mark.parametrize("size", [24, 32, 64])
def test_a_secret_is_whsec_and_that_many_random_bytes(size: int) -> None:
    secret = new_secret(size)
    assert secret.startswith("whsec_")
    assert len(base64.b64decode(secret.removeprefix("whsec_"), validate=True)) == size
    assert secret != new_secret(size)


@pytest.mark.parametrize("size", [0, 23, 65])
def test_secrets_that_are_too_short_or_too_long_are_refused(size: int) -> None:
    with pytest.raises(SecretError):
        new_secret(size)
    with pytest.raises(SecretError):
        signature_headers("job_1", NOW, b"{}", ["whsec_" + base64.b64encode(bytes(size)).decode()])


@pytest.mark.parametrize("secret", ["", "whsec_", "whsec_???", base64.b64encode(bytes(32)).decode()])
def test_what_is_not_a_secret_is_refused_without_repeating_it(secret: str) -> None:
    with pytest.raises(SecretError) as caught:
        signature_headers("job_1", NOW, b"{}", [secret])
    assert not secret.removeprefix("whsec_") or secret.removeprefix("whsec_") not in str(caught.value)


@pytest.mark.parametrize("message_id", ["", "a.b", "a b", "a\r\nb", "x" * 129, "é"])
def test_a_message_id_that_could_shift_the_signed_content_is_refused(message_id: str) -> None:
    with pytest.raises(ValueError, match="message id"):
        signature_headers(message_id, NOW, b"{}", [new_secret()])


def test_nothing_is_sent_unsigned() -> None:
    with pytest.raises(ValueError, match="at least one signing secret"):
        signature_headers("job_1", NOW, b"{}", [])


@pytest.mark.parametrize("shift", [timedelta(minutes=-5, seconds=-1), timedelta(minutes=5, seconds=1)])
def test_a_message_outside_the_tolerance_is_refused_as_a_replay(shift: timedelta) -> None:
    secret = new_secret()
    headers = signature_headers("job_1", NOW, PAYLOAD, [secret])
    with pytest.raises(SignatureError, match="within"):
        verify(PAYLOAD, headers, [secret], now=NOW.replace(microsecond=0) + shift)
    verify(PAYLOAD, headers, [secret], now=NOW + shift, tolerance=timedelta(minutes=6))


@given(st.data())
def test_no_changed_byte_and_no_changed_header_verifies(data: st.DataObject) -> None:
    secret = "whsec_" + base64.b64encode(random.Random(7).randbytes(32)).decode()
    headers = signature_headers("job_1", NOW, PAYLOAD, [secret])
    verify(PAYLOAD, headers, [secret], now=NOW)
    part = data.draw(st.sampled_from(["payload", "webhook-id", "webhook-timestamp", "webhook-signature"]))
    if part == "payload":
        position = data.draw(st.integers(0, len(PAYLOAD) - 1))
        changed = bytearray(PAYLOAD)
        changed[position] ^= data.draw(st.integers(1, 255))
        with pytest.raises(SignatureError):
            verify(bytes(changed), headers, [secret], now=NOW)
    else:
        value = data.draw(st.text(max_size=60).filter(lambda text: headers[part] not in text.split()))
        with pytest.raises(SignatureError):
            verify(PAYLOAD, headers | {part: value}, [secret], now=NOW)


@pytest.mark.parametrize("missing", ["webhook-id", "webhook-timestamp", "webhook-signature"])
def test_a_missing_header_is_named(missing: str) -> None:
    secret = new_secret()
    headers = signature_headers("job_1", NOW, PAYLOAD, [secret])
    del headers[missing]
    with pytest.raises(SignatureError, match=missing):
        verify(PAYLOAD, headers, [secret], now=NOW)


def test_header_names_match_in_any_case_and_other_versions_are_passed_over() -> None:
    secret = new_secret()
    headers = signature_headers("job_1", NOW, PAYLOAD, [secret])
    headers["webhook-signature"] = "v1a,AAAA v2 " + headers["webhook-signature"]
    verify(PAYLOAD, {name.title(): value for name, value in headers.items()}, [secret], now=NOW)
