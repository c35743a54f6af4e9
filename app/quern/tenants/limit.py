"""Rate limits: the generic cell rate algorithm in Redis (ITU-T I.371; as a Lua script so that a decision is atomic).

One value a key: the theoretical arrival time. A full minute's allowance may come as one burst, then one request each
60/limit seconds. When Redis is away the answer is 503: a limit that vanishes under load protects nobody. Keys without
a limit never ask Redis.
"""

from dataclasses import dataclass
from typing import Final

from redis import Redis
from redis.exceptions import RedisError

PERIOD: Final = 60.0

_GCRA: Final = """
local t = redis.call('TIME')
local now = t[1] * 1000 + t[2] / 1000
local interval, burst = tonumber(ARGV[1]), tonumber(ARGV[2])
local tat = math.max(tonumber(redis.call('GET', KEYS[1]) or now), now)
local fresh = tat + interval
local early = fresh - burst - now
if early > 0 then return {0, 0, math.ceil(early), math.ceil(tat - now)} end
redis.call('SET', KEYS[1], string.format('%.3f', fresh), 'PX', math.ceil(fresh - now))
return {1, math.floor((burst - (fresh - now)) / interval), 0, math.ceil(fresh - now)}
"""


@dataclass(frozen=True)
class Allowance:
    """A decision. Times in whole seconds, rounded up."""

    allowed: bool
    limit: int
    remaining: int
    retry_after: int
    reset: int

    def headers(self) -> dict[str, str]:
        """`RateLimit` and `RateLimit-Policy` (IETF draft ratelimit-headers), and `Retry-After` on refusal."""
        headers = {
            "RateLimit-Policy": f'"minute";q={self.limit};w={PERIOD:.0f}',
            "RateLimit": f'"minute";r={self.remaining};t={self.reset}',
        }
        if not self.allowed:
            headers["Retry-After"] = str(self.retry_after)
        return headers


class LimiterAwayError(Exception):
    """Redis did not answer, so nobody knows whether the limit is kept."""


class Limiter:
    """Decides by key. Thread-safe."""

    def __init__(self, redis: "Redis") -> None:
        self._script = redis.register_script(_GCRA)

    def take(self, key: str, limit: int) -> Allowance:
        """Count one request of `key` against `limit` a minute.

        Raises:
            LimiterAwayError: Redis is out of reach.
        """
        interval = PERIOD * 1000 / limit
        try:
            allowed, remaining, wait, reset = self._script(keys=[f"limit:{key}"], args=[interval, PERIOD * 1000])
        except RedisError as error:
            raise LimiterAwayError(type(error).__name__) from None
        return Allowance(bool(allowed), limit, int(remaining), max(1, -(-int(wait) // 1000)), -(-int(reset) // 1000))
