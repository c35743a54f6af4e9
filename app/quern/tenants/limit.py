"""Rate limits: the generic cell rate algorithm in Redis (ITU-T I.371; as a Lua script so that a decision is atomic).

One value a bucket: the theoretical arrival time. A full minute's allowance may come as one burst, then one request each
60/limit seconds. A request may count in two buckets, its tenant's and its key's: it is taken from both or from neither.
When Redis is away the answer is 503: a limit that vanishes under load protects nobody. Keys without a limit never ask
Redis. `docs/limits.md` says the same to integrators.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from redis import Redis
from redis.exceptions import RedisError

PERIOD: Final = 60.0

_GCRA: Final = """
local t = redis.call('TIME')
local now = t[1] * 1000 + t[2] / 1000
local period = tonumber(ARGV[1])
local wait, tats, answer = 0, {}, {}
for i, key in ipairs(KEYS) do
  tats[i] = math.max(tonumber(redis.call('GET', key) or now), now)
  wait = math.max(wait, tats[i] + period / ARGV[i + 1] - period - now)
end
answer[1] = math.ceil(wait)
for i, key in ipairs(KEYS) do
  local interval, tat = period / ARGV[i + 1], tats[i]
  if wait <= 0 then
    tat = tat + interval
    redis.call('SET', key, string.format('%.3f', tat), 'PX', math.ceil(tat - now))
  end
  answer[2 * i] = math.max(0, math.floor((period - (tat - now)) / interval))
  answer[2 * i + 1] = math.ceil(tat - now)
end
return answer
"""


@dataclass(frozen=True)
class Limit:
    """So many requests a minute, counted in a bucket: `tenant` and an identifier, or `key` and an identifier."""

    name: str
    bucket: str
    requests_per_minute: int


@dataclass(frozen=True)
class Standing:
    """What is left of one limit; `reset` is in whole seconds, rounded up."""

    limit: Limit
    remaining: int
    reset: int


@dataclass(frozen=True)
class Allowance:
    """A decision. `retry_after` is in whole seconds, rounded up; 0 when the request is allowed."""

    standings: tuple[Standing, ...]
    retry_after: int

    @property
    def allowed(self) -> bool:
        return self.retry_after == 0

    def headers(self) -> dict[str, str]:
        """`RateLimit` and `RateLimit-Policy` (IETF draft ratelimit-headers), and `Retry-After` on refusal."""
        policies = [
            f'"{standing.limit.name}";q={standing.limit.requests_per_minute};w={PERIOD:.0f}'
            for standing in self.standings
        ]
        states = [f'"{standing.limit.name}";r={standing.remaining};t={standing.reset}' for standing in self.standings]
        headers = {"RateLimit-Policy": ", ".join(policies), "RateLimit": ", ".join(states)}
        if not self.allowed:
            headers["Retry-After"] = str(self.retry_after)
        return headers


class LimiterAwayError(Exception):
    """Redis did not answer, so nobody knows whether the limit is kept."""


class Limiter:
    """Decides. Thread-safe."""

    def __init__(self, redis: "Redis") -> None:
        self._script = redis.register_script(_GCRA)

    def take(self, limits: Sequence[Limit]) -> Allowance:
        """Count one request against all of `limits`, which must not be empty, or against none when one is used up.

        Raises:
            LimiterAwayError: Redis is out of reach.
        """
        keys = [f"limit:{limit.bucket}" for limit in limits]
        try:
            wait, *found = self._script(
                keys=keys, args=[PERIOD * 1000, *(limit.requests_per_minute for limit in limits)]
            )
        except (RedisError, OSError) as error:
            raise LimiterAwayError(type(error).__name__) from None
        standings = tuple(
            Standing(limit, int(found[2 * position]), _seconds(found[2 * position + 1]))
            for position, limit in enumerate(limits)
        )
        return Allowance(standings, _seconds(wait))


def _seconds(milliseconds: int) -> int:
    return -(-int(milliseconds) // 1000)
