"""What the prefix cache promises: tenants apart, the used kept, the borrowed never taken away."""

from __future__ import annotations

import numpy as np

from quern.inference.prefixes import SHORTEST, Prefix, PrefixCache, common_length


def _prompt(*parts: tuple[int, int]) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.concatenate([np.full(count, token, np.int32) for token, count in parts])


def test_common_length_counts_equal_tokens_from_the_start() -> None:
    assert common_length(_prompt((1, 5), (2, 3)), _prompt((1, 5), (3, 9))) == 5
    assert common_length(_prompt((1, 5)), _prompt((1, 9))) == 5
    assert common_length(_prompt((1, 5)), _prompt((2, 5))) == 0


def test_the_longest_beginning_is_found_and_one_token_is_left() -> None:
    cache = PrefixCache(4)
    short, long = Prefix("a", _prompt((1, 30)), 0), Prefix("a", _prompt((1, 60)), 1)
    for prefix in (short, long):
        assert cache.keep(prefix) is None
    assert cache.best("a", _prompt((1, 40))) == (long, 39)
    assert cache.best("a", _prompt((2, 40))) == (None, 0)


def test_another_tenants_beginning_is_never_found() -> None:
    cache = PrefixCache(4)
    cache.keep(Prefix("a", _prompt((1, 60)), 0))
    assert cache.best("b", _prompt((1, 60))) == (None, 0)


def test_short_beginnings_are_not_worth_it() -> None:
    cache = PrefixCache(4)
    cache.keep(Prefix("a", _prompt((1, 60)), 0))
    assert cache.best("a", _prompt((1, SHORTEST - 1), (2, 30))) == (None, 0)


def test_what_was_never_used_again_goes_first_then_the_oldest() -> None:
    cache = PrefixCache(3)
    used, unused, newer = (Prefix("a", _prompt((token, 40)), token) for token in (1, 2, 3))
    cache.keep(used)
    cache.borrow(used)
    cache.give_back(used)
    cache.keep(unused)
    cache.keep(newer)
    assert cache.keep(Prefix("a", _prompt((4, 40)), 4)) is unused
    assert cache.evict() is newer


def test_what_is_borrowed_from_is_not_let_go() -> None:
    cache = PrefixCache(1)
    borrowed = Prefix("a", _prompt((1, 40)), 0)
    cache.keep(borrowed)
    cache.borrow(borrowed)
    other = Prefix("a", _prompt((2, 40)), 1)
    assert cache.keep(other) is other
    assert cache.evict() is None


def test_purge_forgets_one_tenant_at_once_and_the_borrowed_when_it_is_given_back() -> None:
    cache = PrefixCache(4)
    idle, busy, others = (Prefix(tenant, _prompt((n, 40)), n) for n, tenant in enumerate("aab"))
    for prefix in (idle, busy, others):
        cache.keep(prefix)
    cache.borrow(busy)
    assert list(cache.purge("a")) == [idle]
    assert cache.best("a", _prompt((1, 60))) == (None, 0)
    assert cache.best("b", _prompt((2, 60)))[0] is others
    assert cache.give_back(busy) is busy
    assert len(cache) == 1
