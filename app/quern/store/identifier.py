"""Identifiers: a prefix that names the kind, then 26 characters of Crockford base32.

Random ones are ULIDs (they sort by time of creation); derived ones are 130 bits of a SHA-256, so that the same
cause always names the same thing.
"""

import hashlib
import re
from typing import Final

from ulid import ULID

_ALPHABET: Final = "0123456789abcdefghjkmnpqrstvwxyz"
PATTERN: Final = r"[a-z]{3}_[0-9a-hjkmnp-tv-z]{26}"
_SHAPE: Final = re.compile(PATTERN)


def new(prefix: str) -> str:
    """A fresh identifier, sortable by time within its prefix."""
    return f"{prefix}_{str(ULID()).lower()}"


def derived(prefix: str, *parts: str) -> str:
    """The identifier of the thing that `parts` cause; the parts' borders count (`a`,`bc` differs from `ab`,`c`)."""
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode()
        digest.update(len(raw).to_bytes(8, "big") + raw)
    number = int.from_bytes(digest.digest(), "big") >> (256 - 130)
    return prefix + "_" + "".join(_ALPHABET[number >> shift & 31] for shift in range(125, -1, -5))


def is_valid(value: str, prefix: str) -> bool:
    """Whether `value` has the shape of an identifier of this kind."""
    return _SHAPE.fullmatch(value) is not None and value.startswith(prefix + "_")
