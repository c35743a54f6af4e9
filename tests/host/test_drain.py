"""Drained workers take no new work, what comes in is kept, and is done when they work again."""

import time
from collections.abc import Callable

import pytest
from testinfra.host import Host

from tests.host.client import Client
from tests.host.conftest import Played

pytestmark = pytest.mark.full


def test_what_comes_in_while_the_workers_are_drained_is_done_afterwards(
    host: Host, client: Client, play: Callable[..., Played]
) -> None:
    form = client.form(
        "While drained", workflow={"steps": [{"name": "mood", "type": "sentiment", "fields": ["comment"]}]}
    )
    drained = play("playbooks/drain.yml")
    assert drained.code == 0, drained.output
    try:
        accepted = [
            client.call("POST", f"/api/v1/forms/{form}/responses", {"answers": {"comment": f"All is well, {number}."}})
            for number in range(3)
        ]
        time.sleep(5)
        for made in accepted:
            assert client.call("GET", f"/api/v1/responses/{made['id']}")["status"] != "processed"
        assert not host.service("quern-worker@batched").is_running
    finally:
        working = play("playbooks/drain.yml", drain_state="working")
    assert working.code == 0, working.output
    for made in accepted:
        assert client.processed(made["id"], 600)["results"]["mood"]["label"]
