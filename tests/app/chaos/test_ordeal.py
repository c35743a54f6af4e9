"""The short ordeal: what is acknowledged is done, whatever is killed. The long one: python -m tests.chaos.run."""

from tests.chaos.run import endure


def test_nothing_acknowledged_is_lost_under_twenty_kills() -> None:
    ordeal = endure(kills=20, responses=100, seed=20)
    print(ordeal.report())
    assert ordeal.verdict.problems == []
    assert len(ordeal.killer.kills) == 20
    assert sum(kill.claims > 0 for kill in ordeal.killer.kills) >= 16
    assert len(ordeal.client.log) == 100
