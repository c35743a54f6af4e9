"""Power cuts during intake, judged by the client's log of what was acknowledged."""

from typing import Any

from tests.vm.client import Client, Intake
from tests.vm.guest import Guest, wait_until


def cut_during_intake(guest: Guest, client: Client, services: list[str], form: str, times: int, between: int) -> Intake:
    """Cut the power `times` times, each after `between` more acknowledgements; the client goes on all the while."""
    with Intake(client, form) as intake:
        for _ in range(times):
            _more(intake, between)
            guest.cut()
            guest.resume()
            guest.wait_serving(services)
        _more(intake, between)
    assert intake.faults == []
    return intake


def lost(client: Client, form: str, intake: Intake) -> list[Any]:
    """What was acknowledged and is not there as it was sent, and processed to its end."""
    there = {found["id"]: found for found in client.all_processed(form)}
    return [
        (number, there.get(identifier))
        for number, identifier in intake.acknowledged.items()
        if identifier not in there or there[identifier]["answers"]["number"] != number
    ]


def _more(intake: Intake, count: int) -> None:
    enough = len(intake.acknowledged) + count
    wait_until(lambda: len(intake.acknowledged) >= enough or intake.faults, f"{count} more acknowledgements")
