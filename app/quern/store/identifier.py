"""Identifiers: a prefix that names the kind, then 26 characters of Crockford base32.

Random ones are ULIDs (they sort by time of creation); derived ones are 130 bits of a SHA-256, so that the same
cause always names the same thing.
"""

import hashlib
import random
import re
import time
from typing import Final

_ALPHABET: Final = "0123456789abcdefghjkmnpqrstvwxyz"
#: Two characters at a time: intake makes several of these for each response.
_PAIRS: Final = [high + low for high in _ALPHABET for low in _ALPHABET]
PATTERN: Final = r"[a-z]{3}_[0-9a-hjkmnp-tv-z]{26}"
_SHAPE: Final = re.compile(PATTERN)


def new(prefix: str) -> str:
    """A fresh identifier, sortable by time within its prefix: a ULID, of 48 bits of milliseconds and 80 random ones."""
    # Names, not secrets. The kernel's randomness would give the interpreter's lock away, which costs a busy process
    # more than the rest of this; a forked process seeds its own.
    return f"{prefix}_{_base32(time.time_ns() // 1_000_000 << 80 | random.getrandbits(80))}"


def derived(prefix: str, *parts: str) -> str:
    """The identifier of the thing that `parts` cause; the parts' borders count (`a`,`bc` differs from `ab`,`c`)."""
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode()
        digest.update(len(raw).to_bytes(8, "big") + raw)
    return f"{prefix}_{_base32(int.from_bytes(digest.digest(), 'big') >> (256 - 130))}"


def _base32(number: int) -> str:
    return "".join([_PAIRS[number >> shift & 1023] for shift in range(120, -1, -10)])


def is_valid(value: str, prefix: str) -> bool:
    """Whether `value` has the shape of an identifier of this kind."""
    return _SHAPE.fullmatch(value) is not None and value.startswith(prefix + "_")
