from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import ResponseError

from quern.embedded.redis_server import RedisServer


def test_the_queue_keeps_every_acknowledged_write_over_sigkill(run_directory: Path) -> None:
    with RedisServer(run_directory, role="queue", fsync="always") as server:
        with Redis.from_url(server.url) as client:
            for number in range(500):
                client.rpush("wake", number)
        server.kill()
        server.start()
        with Redis.from_url(server.url) as client:
            assert client.lrange("wake", 0, -1) == [str(number).encode() for number in range(500)]


def test_the_queue_refuses_writes_when_full_and_evicts_nothing(run_directory: Path) -> None:
    with (
        RedisServer(run_directory, role="queue", memory_megabytes=4) as server,
        Redis.from_url(server.url) as client,
    ):
        written = 0
        with pytest.raises(ResponseError, match="maxmemory"):
            for number in range(100):
                client.set(f"key-{number}", b"x" * 100_000)
                written += 1
        assert written > 0
        assert client.dbsize() == written


def test_the_cache_evicts_when_full_and_forgets_over_a_restart(run_directory: Path) -> None:
    with RedisServer(run_directory, role="cache", memory_megabytes=4) as server:
        with Redis.from_url(server.url) as client:
            for number in range(100):
                client.set(f"key-{number}", b"x" * 100_000)
            assert 0 < client.dbsize() < 100
        server.restart()
        with Redis.from_url(server.url) as client:
            assert client.dbsize() == 0


def test_both_roles_listen_on_private_unix_sockets_only(redis_queue: RedisServer, redis_cache: RedisServer) -> None:
    for server in (redis_queue, redis_cache):
        assert server.socket.stat().st_mode & 0o777 == 0o600
        with Redis.from_url(server.url) as client:
            assert client.config_get("port") == {"port": "0"}
