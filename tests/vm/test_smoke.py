"""The short proof: it boots to serving, AppArmor enforces, a forbidden act fails, and a power cut loses nothing.

`make test-vm-smoke` runs these alone; `make test-vm` runs them first.
"""

import json
from typing import Any

from tests.vm.client import Client
from tests.vm.confinement import denials, modes, outcomes
from tests.vm.guest import Guest
from tests.vm.power import cut_during_intake, lost


def test_boots_to_serving_without_a_failed_unit_or_a_denial(guest: Guest) -> None:
    assert guest.say("systemctl list-units --failed --no-legend --plain") == ""
    assert denials(guest) == []


def test_every_service_runs_under_its_profile_in_enforce_mode(guest: Guest, expected: dict[str, Any]) -> None:
    status = json.loads(guest.say("aa-status --json"))
    assert {status["profiles"].get(name) for name in expected["profiles"]} == {"enforce"}
    found = modes(guest, expected["profiles"])
    assert {process: mode for process, mode in found.items() if mode[0] != mode[1]} == {}


def test_the_engine_cannot_run_a_shell(guest: Guest) -> None:
    assert outcomes(guest, "quern-engine", "quern-engine")["run a shell"] == {
        "unconfined": "done",
        "confined": "refused",
    }


def test_a_power_cut_loses_nothing_acknowledged(guest: Guest, client: Client, services: list[str]) -> None:
    form = client.form("Power cut")
    intake = cut_during_intake(guest, client, services, form, times=1, between=20)
    assert len(intake.acknowledged) >= 40
    assert lost(client, form, intake) == []
