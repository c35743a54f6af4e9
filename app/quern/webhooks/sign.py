"""Signatures of the Standard Webhooks specification 1.0.0 (symmetric, `v1`).

The signed content is `{webhook-id}.{webhook-timestamp}.{body}`, the algorithm HMAC-SHA256. Several active secrets
give several signatures in one header, so that a receiver can change its secret at leisure.
https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

from __future__ import annotations

import base64
import binascii
import hmac
import re
import secrets as random
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta

from standardwebhooks import Webhook

SECRET_PREFIX = "whsec_"  # noqa: S105 - the prefix of secrets, not one itself
MIN_SECRET_BYTES, MAX_SECRET_BYTES = 24, 64
DEFAULT_TOLERANCE = timedelta(minutes=5)

SIGNATURE_HEADERS = ("webhook-id", "webhook-timestamp", "webhook-signature")

# A full stop in an id would let one signed content be read as another (the parts are joined by full stops).
_MESSAGE_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
_TIMESTAMP = re.compile(r"[0-9]{1,12}")


class SecretError(ValueError):
    """The text is not a `whsec_` secret of 24 to 64 bytes."""


class SignatureError(ValueError):
    """The message was not signed by any of the secrets, or not at a time that is acceptable."""


def new_secret(size: int = 32) -> str:
    """A fresh secret of `size` random bytes, serialized as `whsec_` and base64.

    Raises SecretError for a size outside 24 to 64 bytes.
    """
    if not MIN_SECRET_BYTES <= size <= MAX_SECRET_BYTES:
        raise SecretError(f"expected {MIN_SECRET_BYTES} to {MAX_SECRET_BYTES} bytes, found {size}")
    return SECRET_PREFIX + base64.b64encode(random.token_bytes(size)).decode()


def _signer(secret: str) -> Webhook:
    try:
        if not secret.startswith(SECRET_PREFIX):
            raise ValueError
        size = len(base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True))
    except ValueError:
        raise SecretError(f"expected {SECRET_PREFIX} followed by base64, found something else") from None
    if not MIN_SECRET_BYTES <= size <= MAX_SECRET_BYTES:
        raise SecretError(f"expected {MIN_SECRET_BYTES} to {MAX_SECRET_BYTES} bytes, found {size}")
    return Webhook(secret)


def signature_headers(message_id: str, at: datetime, payload: bytes, secrets: Sequence[str]) -> dict[str, str]:
    """The three headers for one attempt of one message.

    `message_id` stays the same over all attempts, `at` is the attempt's own time (aware), `payload` the exact body
    (UTF-8), `secrets` the active ones, newest first.

    Raises ValueError for an id outside `[A-Za-z0-9_-]{1,128}` or no secret at all, SecretError for a bad secret,
    UnicodeDecodeError for a body that is not UTF-8.
    """
    if not _MESSAGE_ID.fullmatch(message_id):
        raise ValueError("expected a message id of 1 to 128 letters, digits, _ or -, found something else")
    if not secrets:
        raise ValueError("expected at least one signing secret, found none; rotate the endpoint's secret")
    at = at.astimezone(UTC)
    text = payload.decode()
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": " ".join(_signer(secret).sign(message_id, at, text) for secret in secrets),
    }


def verify(
    payload: bytes,
    headers: Mapping[str, str],
    secrets: Iterable[str],
    *,
    now: datetime,
    tolerance: timedelta = DEFAULT_TOLERANCE,
) -> None:
    """Check a received message as a receiver does; header names match in any case.

    Unlike the library's own `verify` this takes the clock and the tolerance as arguments, tries several secrets, and
    answers a malformed header with the same error as a wrong signature.

    Raises SignatureError.
    """
    lower = {name.lower(): value for name, value in headers.items()}
    missing = [name for name in SIGNATURE_HEADERS if not lower.get(name)]
    if missing:
        raise SignatureError(f"expected the header {missing[0]}, found none")
    message_id, timestamp, signatures = (lower[name] for name in SIGNATURE_HEADERS)
    if not _TIMESTAMP.fullmatch(timestamp) or not _MESSAGE_ID.fullmatch(message_id):
        raise SignatureError("expected an id without full stops and a timestamp in whole seconds")
    at = datetime.fromtimestamp(int(timestamp), UTC) if int(timestamp) < 2**37 else datetime.max.replace(tzinfo=UTC)
    if abs(at - now) > tolerance:
        raise SignatureError(f"expected a timestamp within {tolerance} of now, found {timestamp}")
    try:
        text = payload.decode()
    except UnicodeDecodeError:
        raise SignatureError("expected a body in UTF-8, found other bytes") from None
    received = [value for version, _, value in (item.partition(",") for item in signatures.split()) if version == "v1"]
    for secret in secrets:
        expected = _signer(secret).sign(message_id, at, text).partition(",")[2]
        if any(_same(expected, candidate) for candidate in received):
            return
    raise SignatureError(f"none of the {len(received)} v1 signatures was made with an active secret")


def _same(expected: str, candidate: str) -> bool:
    try:
        return hmac.compare_digest(base64.b64decode(expected), base64.b64decode(candidate, validate=True))
    except (binascii.Error, ValueError):
        return False
