"""How many threads the next step should use, learnt from how long the last ones took.

ggml's threads wait for one another several hundred times in each step. While they have the cores for themselves, all of
them together are fastest; on a machine that is busy with other work, one thread is faster than two by far, since one
that was taken off its core is waited for each time. Which it is changes from minute to minute, so it is measured all
the time: a bandit with few arms, kept apart by the step's size. Pure bookkeeping.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

#: Steps between two tries of what is not best now; doubled with each try that changes nothing.
SHORTEST_INTERVAL, LONGEST_INTERVAL = 16, 256
#: A step this much slower than its like makes the next one a try.
SURPRISE = 2.0
#: Weight of the newest measurement.
WEIGHT = 0.35


@dataclass
class _Size:
    """What is known of steps of about one size: seconds by thread count."""

    seconds: dict[int, float] = field(default_factory=dict)
    best: int | None = None
    interval: int = SHORTEST_INTERVAL
    since_try: int = 0
    turn: int = 0
    try_next: bool = False


def free_cores() -> int:
    """Cores that nobody wants at this moment, this thread's own among them."""
    with open("/proc/loadavg", encoding="ascii") as file:  # noqa: PTH123 - read before each step
        runnable = int(file.read().split()[3].split("/")[0])
    return (os.cpu_count() or 1) - runnable + 1


class ThreadPace:
    """Chooses among thread counts.

    Args:
        choices: thread counts, most first.
        free: how many cores are free now; more threads than that are not tried, as a failed try may take seconds.
    """

    def __init__(self, choices: tuple[int, ...], free: Callable[[], int] = free_cores) -> None:
        self._choices, self._free = choices, free
        self._sizes: dict[int, _Size] = {}
        self._latest_best: int | None = None

    def choose(self, tokens: int) -> int:
        """The thread count for a step of this many tokens."""
        if len(self._choices) == 1:
            return self._choices[0]
        size = self._sizes.setdefault(tokens.bit_length(), _Size())
        free = self._free()
        if free <= 0:
            return self._choices[-1]
        fitting = [choice for choice in self._choices if choice <= free] or [self._choices[-1]]
        if size.best is None:
            return self._latest_best if self._latest_best in fitting else fitting[0]
        unknown = [choice for choice in fitting if choice not in size.seconds]
        if unknown:
            return unknown[0]
        size.since_try += 1
        others = [choice for choice in fitting if choice != size.best]
        if others and (size.try_next or size.since_try >= size.interval):
            size.turn += 1
            return others[size.turn % len(others)]
        return size.best

    def observe(self, tokens: int, threads: int, seconds: float) -> None:
        """Learn from a step."""
        if len(self._choices) == 1:
            return
        size = self._sizes.setdefault(tokens.bit_length(), _Size())
        known = size.seconds.get(threads)
        surprising = known is not None and seconds > SURPRISE * known
        # Chance makes a step slow, never fast: a quick one is believed at once.
        slow = known is not None and seconds > known
        size.seconds[threads] = known + WEIGHT * (seconds - known) if known is not None and slow else seconds
        before = size.best
        size.best = min(size.seconds, key=lambda choice: size.seconds[choice])
        was_try = before is not None and threads != before
        if size.best != before:
            size.interval, size.since_try = SHORTEST_INTERVAL, 0
        elif was_try:
            size.interval, size.since_try = min(2 * size.interval, LONGEST_INTERVAL), 0
        size.try_next = surprising and not was_try
        self._latest_best = size.best


def thread_choices(threads: int) -> tuple[int, ...]:
    """All, half, and one."""
    return tuple(sorted({threads, (threads + 1) // 2, 1}, reverse=True))
