"""The connection to Redis `queue`: wake-ups and rate limits."""

from collections.abc import Callable
from urllib.parse import unquote, urlsplit

from redis import ConnectionPool, Redis
from redis.backoff import NoBackoff
from redis.credentials import CredentialProvider
from redis.retry import Retry

#: The URL as it is now: asked again for each new connection, so that a rotated password needs no restart.
Url = Callable[[], str]


class _FromUrl(CredentialProvider):
    """User and password of the URL that holds at the moment."""

    def __init__(self, url: Url) -> None:
        self._url = url

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        parts = urlsplit(self._url())
        password = unquote(parts.password or "")
        return (unquote(parts.username), password) if parts.username else (password,)


def pool(url: Url, timeout: float) -> ConnectionPool:
    """Connections that fail after `timeout` seconds, with one more try, which mends those of a restarted server."""
    now = url()
    made = ConnectionPool.from_url(
        now,
        socket_timeout=timeout,
        socket_connect_timeout=min(timeout, 1.0),
        retry=Retry(NoBackoff(), 1),
        max_connections=256,
        health_check_interval=0,
    )
    if made.connection_kwargs.pop("password", None) is not None:
        made.connection_kwargs.pop("username", None)
        made.connection_kwargs["credential_provider"] = _FromUrl(url)
    return made


def connect(url: Url, timeout: float = 1.0) -> "Redis":
    return Redis(connection_pool=pool(url, timeout))
