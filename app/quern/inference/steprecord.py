"""What the model's process is working on right now, in memory that outlives it.

When native code dies there is no time to say what it died of. So before each step the process writes down the requests
that take part; the process that started it reads this after the death. One page of 64-bit words in an anonymous file.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np

ROOM = 1000
_STRIDE = ROOM + 2


class Lane(IntEnum):
    """Threads of the model's process that enter native code."""

    DECODE = 0
    EMBED = 1
    PREPARE = 2


class Entry(NamedTuple):
    """A lane's work: since when (`time.monotonic`), and for which requests."""

    since: float
    requests: frozenset[int]


def create() -> int:
    """A file descriptor to a record, empty."""
    descriptor = os.memfd_create("quern-step")
    os.ftruncate(descriptor, len(Lane) * _STRIDE * 8)
    return descriptor


class StepRecord:
    """A record behind a file descriptor, in the writer's process or the reader's."""

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap.mmap(descriptor, len(Lane) * _STRIDE * 8)
        self._words = np.frombuffer(self._memory, np.int64).reshape(len(Lane), _STRIDE)

    def begin(self, lane: Lane, requests: Sequence[int]) -> None:
        """Note that a lane starts on these requests."""
        row = self._words[lane]
        count = min(len(requests), ROOM)
        row[2 : 2 + count] = requests[:count]
        row[1] = count
        row[0] = time.monotonic_ns()

    def end(self, lane: Lane) -> None:
        """Note that a lane is done."""
        self._words[lane][0] = 0

    def read(self) -> list[Entry]:
        """The lanes that were at work."""
        rows = (row for row in self._words if row[0])
        return [Entry(row[0] / 1e9, frozenset(int(word) for word in row[2 : 2 + row[1]])) for row in rows]

    def clear(self) -> None:
        """Empty it for the next process."""
        self._words[:] = 0
