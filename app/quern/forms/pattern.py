"""Patterns of text fields: regular expressions in the linear-time dialect of Rust's `regex`, bounded in size.

Matching takes time in proportion to the text's length times the pattern's size, and a compiled Unicode class such as
`\\w` takes about 80 kB: a few characters (`\\w{1000}`) can ask for seconds and gigabytes. So a pattern's size is
estimated from its source before anything compiles it.
"""

import re
from typing import Final

from pydantic import Field as PydanticField
from pydantic import create_model

#: What one form's patterns may weigh together; a plain character weighs 1.
MAX_WEIGHT: Final = 5_000
_UNICODE_CLASS: Final = 25
_COUNT: Final = re.compile(r"\{\s*(\d{1,9})\s*(?:,\s*(\d{0,9})\s*)?\}")
_ESCAPE: Final = re.compile(r"\\(?:[pP](?:\{[^}]*\}|.)|[xuU]\{[^}]*\}|.)", re.DOTALL)


def anchored(pattern: str) -> str:
    """The pattern that the whole text must match."""
    return f"^(?:{pattern})$"


def weight(pattern: str) -> int:
    """An upper estimate of the compiled size, in characters: `ab` 2, `a{10}` 10, `(ab{3}){4}` 16, `\\w` 25."""
    groups, last, at = [0], 0, 0
    while at < len(pattern):
        character = pattern[at]
        if (count := _COUNT.match(pattern, at)) is not None:
            # An open end (`{3,}`) is a loop over the last one.
            times = max(int(count[1]), int(count[2] or 0)) + (1 if count[2] == "" else 0)
            groups[-1] += last * (times - 1)
            last, at = last * times, count.end()
            continue
        if character == ")" and len(groups) > 1:
            last = groups.pop()
            groups[-1] += last
            at += 1
            continue
        if character == "(":
            groups.append(0)
            last, at = 0, at + 1
            continue
        if character == "[":
            last, at = _class(pattern, at)
        elif (escape := _ESCAPE.match(pattern, at)) is not None:
            last, at = (_UNICODE_CLASS if escape[0][1] in "wWdDsSpPbB" else 1), escape.end()
        else:
            last, at = (3 if character == "." else 1), at + 1
        groups[-1] += last
    return sum(groups)


def _class(pattern: str, start: int) -> tuple[int, int]:
    """Weight and end of the bracketed class at `start`; classes nest in this dialect."""
    depth, at, found = 0, start, 1
    while at < len(pattern):
        if (escape := _ESCAPE.match(pattern, at)) is not None:
            if escape[0][1] in "wWdDsSpP":
                found += _UNICODE_CLASS
            at = escape.end()
            continue
        if pattern[at] == "[":
            depth += 1
            found += 5 if depth > 1 else 0
            # A closing bracket that comes first, or first after ^, is a member.
            at += 1 + pattern.startswith("^", at + 1)
            found += 3 if pattern[at - 1] == "^" else 0
            at += pattern.startswith("]", at)
            continue
        if pattern[at] == "]":
            depth -= 1
            if depth == 0:
                return found, at + 1
        elif not pattern[at].isascii():
            found += 3
        at += 1
    return found, at


def check(pattern: str) -> str:
    """The pattern itself when it can be used. Raises ValueError."""
    if weight(pattern) > MAX_WEIGHT:
        raise ValueError(f"the pattern is too large; its size may be {MAX_WEIGHT}, and repetition multiplies")
    try:
        # Alone as well: `a)|(?:b` is sound only inside the group, and would leave it.
        for source in (pattern, anchored(pattern)):
            create_model("Probe", probe=(str, PydanticField(pattern=source)))
    except Exception:
        # pydantic raises its SchemaError, which quotes the pattern over many lines.
        raise ValueError(
            "not a regular expression of the linear-time dialect (no look-around, no references)"
        ) from None
    return pattern
