"""The connection to Redis `queue`: wake-ups and rate limits."""

from redis import ConnectionPool, Redis
from redis.backoff import NoBackoff
from redis.retry import Retry


def pool(url: str, timeout: float) -> ConnectionPool:
    """Connections that fail after `timeout` seconds, with one more try, which mends those of a restarted server."""
    return ConnectionPool.from_url(
        url,
        socket_timeout=timeout,
        socket_connect_timeout=min(timeout, 1.0),
        retry=Retry(NoBackoff(), 1),
        max_connections=256,
        health_check_interval=0,
    )


def connect(url: str, timeout: float = 1.0) -> "Redis":
    return Redis(connection_pool=pool(url, timeout))
