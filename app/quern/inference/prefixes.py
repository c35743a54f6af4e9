"""Prompt beginnings that stay in context memory, so that the next prompt that begins alike does not compute them again.

What to keep is found by itself: a finished prompt stays as a leaf; when another prompt of the same tenant begins alike,
the leaf is cut down to what they share and becomes a trunk. Room is made by letting go of what was never used again
first, then of what was used longest ago; nothing that a running sequence borrowed from is let go of. Tenants never
share: what another's prompt begins with could be told from the time an answer takes.

Pure bookkeeping: the caller moves the cells (`llama_memory_seq_cp`, `llama_memory_seq_rm`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]
#: Fewer common tokens than this are not worth a place.
SHORTEST = 24


def common_length(one: Tokens, other: Tokens) -> int:
    """How many tokens two prompts begin with in common."""
    length = min(len(one), len(other))
    different = np.flatnonzero(one[:length] != other[:length])
    return int(different[0]) if len(different) else length


@dataclass(eq=False)
class Prefix:
    """A beginning that `sequence` holds in context memory.

    `users` counts the running sequences that borrowed from it; `hits` how often anyone did; `doomed` ones go
    when the last user is done.
    """

    tenant: str
    tokens: Tokens
    sequence: int
    users: int = 0
    hits: int = 0
    last_used: int = 0
    doomed: bool = False


class PrefixCache:
    """The kept beginnings of all tenants."""

    def __init__(self, largest: int) -> None:
        self._largest = largest
        self._kept: list[Prefix] = []
        self._clock = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def cells(self) -> int:
        """Context memory that the kept beginnings may take up, in tokens; shared cells count for each."""
        return sum(len(prefix.tokens) for prefix in self._kept)

    def best(self, tenant: str, prompt: Tokens) -> tuple[Prefix | None, int]:
        """The kept beginning that saves the most of a prompt, and how much; one token is always left to compute."""
        found, longest = None, SHORTEST - 1
        for prefix in self._kept:
            if prefix.tenant == tenant and not prefix.doomed:
                length = min(common_length(prefix.tokens, prompt), len(prompt) - 1)
                if length > longest:
                    found, longest = prefix, length
        return (found, longest) if found is not None else (None, 0)

    def borrow(self, prefix: Prefix) -> None:
        """Note that a running sequence begins with it."""
        self._clock += 1
        prefix.users += 1
        prefix.hits += 1
        prefix.last_used = self._clock

    def give_back(self, prefix: Prefix) -> Prefix | None:
        """Note that such a sequence is done; returns the beginning if it must go now."""
        prefix.users -= 1
        if prefix.doomed and not prefix.users and prefix in self._kept:
            self._kept.remove(prefix)
            return prefix
        return None

    def keep(self, prefix: Prefix) -> Prefix | None:
        """Take a beginning in; returns one that must go for it, maybe itself."""
        self._clock += 1
        prefix.last_used = self._clock
        self._kept.append(prefix)
        return self.evict() if len(self._kept) > self._largest else None

    def evict(self) -> Prefix | None:
        """Let go of the beginning that is missed least; None when every one is borrowed from."""
        idle = [prefix for prefix in self._kept if not prefix.users]
        if not idle:
            return None
        least = min(idle, key=lambda prefix: (prefix.hits > 0, prefix.last_used))
        self._kept.remove(least)
        return least

    def purge(self, tenant: str) -> Iterable[Prefix]:
        """Forget a tenant; returns what can go now, the rest goes when its users are done."""
        own = [prefix for prefix in self._kept if prefix.tenant == tenant]
        for prefix in own:
            prefix.doomed = True
        gone = [prefix for prefix in own if not prefix.users]
        self._kept = [prefix for prefix in self._kept if prefix not in gone]
        return gone
