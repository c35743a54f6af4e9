"""Rate limits: exact under concurrency, told to the client, and decided for when Redis is away."""

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from redis import Redis

from quern.embedded.redis_server import RedisServer
from quern.tenants.keys import limits_of
from quern.tenants.limit import Limit, Limiter, LimiterAwayError
from tests.app.api.client import Client, House, until


@pytest.fixture(scope="module")
def redis(redis_queue: RedisServer) -> Iterator[Redis]:
    with Redis.from_url(redis_queue.url) as client:
        yield client


def _allowed(client: Client, count: int) -> tuple[int, int]:
    """How many of so many requests, sent eight at a time, were answered and how many refused."""
    with ThreadPoolExecutor(8) as pool:
        found = [answer.status for answer in pool.map(lambda _: client.send("GET", "/forms"), range(count))]
    assert set(found) <= {200, 429}
    return found.count(200), found.count(429)


def test_a_burst_of_a_minutes_allowance_is_taken_and_no_more(redis: Redis) -> None:
    limiter, limit = Limiter(redis), Limit("key", "burst", 30)
    began = time.monotonic()
    found = [limiter.take([limit]) for _ in range(60)]
    passed = sum(allowance.allowed for allowance in found)
    refilled = int((time.monotonic() - began) * 30 / 60) + 1
    assert 30 <= passed <= 30 + refilled
    assert [allowance.standings[0].remaining for allowance in found[:30]] == list(range(29, -1, -1))


def test_many_at_once_never_get_more_than_one_by_one_would(redis: Redis) -> None:
    limiter, limit = Limiter(redis), Limit("key", "crowd", 60)
    began = time.monotonic()
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda _: limiter.take([limit]).allowed, range(400)))
    refilled = int(time.monotonic() - began) + 1
    assert 60 <= sum(found) <= 60 + refilled


def test_the_allowance_comes_back_bit_by_bit(redis: Redis) -> None:
    limiter, limit = Limiter(redis), Limit("key", "refill", 1200)
    while (refused := limiter.take([limit])).allowed:
        pass
    assert refused.retry_after == 1
    time.sleep(refused.retry_after)
    assert limiter.take([limit]).allowed


def test_a_request_counts_in_both_of_its_buckets_or_in_none(redis: Redis) -> None:
    limiter = Limiter(redis)
    small, large = Limit("key", "both small", 2), Limit("tenant", "both large", 100)
    assert [limiter.take([small, large]).allowed for _ in range(5)] == [True, True, False, False, False]
    assert limiter.take([large]).standings[0].remaining == 97


def test_one_bucket_does_not_touch_another(redis: Redis) -> None:
    limiter = Limiter(redis)
    while limiter.take([Limit("key", "mine", 3)]).allowed:
        pass
    assert limiter.take([Limit("key", "yours", 3)]).allowed


def test_an_idle_bucket_is_forgotten(redis: Redis) -> None:
    Limiter(redis).take([Limit("key", "idle", 60)])
    assert 0 < redis.pttl("limit:idle") <= 1000


def test_a_limiter_without_redis_says_so(redis_queue: RedisServer) -> None:
    nowhere = Redis(unix_socket_path=f"{redis_queue.directory}/nowhere.sock")
    with pytest.raises(LimiterAwayError):
        Limiter(nowhere).take([Limit("key", "any", 1)])


@pytest.mark.parametrize(
    ("own", "shared", "expected"),
    [
        (None, 100, [("tenant", 100)]),
        (None, 0, []),
        (20, 100, [("key", 20), ("tenant", 100)]),
        (500, 100, [("key", 500)]),
        (0, 100, []),
        (20, 0, [("key", 20)]),
    ],
)
def test_which_limits_a_key_has(own: int | None, shared: int, expected: list[tuple[str, int]]) -> None:
    found = limits_of("ten_1", "key_1", own, shared)
    assert [(limit.name, limit.requests_per_minute) for limit in found] == expected


def test_a_tenant_may_make_a_hundred_requests_a_minute_by_default(house: House) -> None:
    client = house.client(house.tenant(requests_per_minute=None))
    began = time.monotonic()
    passed, refused = _allowed(client, 130)
    assert 100 <= passed <= 101 + (time.monotonic() - began) * 100 / 60
    assert refused > 0


def test_the_keys_of_a_tenant_share_its_limit(house: House) -> None:
    owner = house.tenant(requests_per_minute=20)
    one, two = house.client(owner), house.client(owner)
    assert _allowed(one, 15) == (15, 0)
    passed, refused = _allowed(two, 15)
    assert passed < 15
    assert refused > 0


def test_a_key_may_have_a_limit_of_its_own(house: House) -> None:
    owner = house.tenant(requests_per_minute=None)
    slow = house.client(owner, requests_per_minute=5)
    began = time.monotonic()
    passed, _ = _allowed(slow, 30)
    assert 5 <= passed <= 6 + (time.monotonic() - began) * 5 / 60
    assert _allowed(house.client(owner, requests_per_minute=0), 150) == (150, 0)


def test_every_answer_tells_where_the_client_stands(house: House) -> None:
    owner = house.tenant(requests_per_minute=50)
    client = house.client(owner, requests_per_minute=2)
    answer = client.send("GET", "/forms")
    assert answer.headers["ratelimit-policy"] == '"key";q=2;w=60, "tenant";q=50;w=60'
    assert re.fullmatch(r'"key";r=1;t=\d+, "tenant";r=49;t=\d+', answer.headers["ratelimit"])
    assert "retry-after" not in answer.headers
    assert "ratelimit" in client.send("GET", "/forms/nonsense").headers
    refused = client.send("GET", "/forms")
    assert refused.status == 429
    assert refused.headers["content-type"] == "application/problem+json"
    assert refused.json()["type"] == "urn:quern:problem:rate-limited"
    assert 1 <= int(refused.headers["retry-after"]) <= 30
    assert refused.headers["ratelimit"].startswith('"key";r=0;t=')


def test_waiting_as_long_as_told_is_enough(house: House) -> None:
    client = house.client(house.tenant(requests_per_minute=60))
    _allowed(client, 70)
    while (answer := client.send("GET", "/forms")).status == 200:
        pass
    time.sleep(int(answer.headers["retry-after"]))
    assert client.send("GET", "/forms").status == 200


def test_no_limit_asks_nothing_of_redis_and_tells_nothing(owner: Client) -> None:
    assert "ratelimit" not in owner.send("GET", "/forms").headers


def test_a_refused_request_does_nothing(house: House) -> None:
    client = house.client(house.tenant(requests_per_minute=1))
    draft = {"name": "f", "fields": [{"name": "a", "type": "text"}]}
    assert client.send("POST", "/forms", draft).status == 201
    assert client.send("POST", "/forms", draft).status == 429
    tenant = house.stack.runtime.store.db.keys.find_one({"_id": "key_" + str(client.key).split("_")[2]})
    assert tenant is not None
    assert house.stack.runtime.store.db.forms.count_documents({"tenant": tenant["tenant"]}) == 1


def test_without_redis_limited_keys_are_told_to_come_back_and_others_go_on(house: House) -> None:
    owner = house.tenant()
    free = house.client(owner)
    form = free.form([{"name": "a", "type": "text"}])
    limited = house.client(house.tenant(requests_per_minute=100))
    assert limited.send("GET", "/forms").status == 200
    redis = house.stack.redis
    redis.kill()
    try:
        answer = limited.send("GET", "/forms")
        assert (answer.status, answer.json()["type"]) == (503, "urn:quern:problem:away")
        assert int(answer.headers["retry-after"]) >= 1
        free.submit(form, {"a": "kept without Redis"})
        assert len(free.call("GET", f"/forms/{form}/responses")["items"]) == 1
    finally:
        redis.start()
    until(lambda: limited.send("GET", "/forms").status == 200)
